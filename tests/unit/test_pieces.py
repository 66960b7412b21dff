"""A piece is read as it was stored, or raises PieceError."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import hypothesis.extra.numpy as numpy_strategies
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from zlib_ng import zlib_ng

import chunkq.job.ledger
import chunkq.storage.objects
from chunkq.errors import ErrorCode, PieceError
from chunkq.job.ledger import ItemLedger, Ledger, PieceInfo

EPOCH = "0a1b2c3d"
DTYPES = st.sampled_from(["<f4", "|u1", "<u2", "<f2"]).map(np.dtype)
ARRAYS = numpy_strategies.arrays(
    DTYPES, numpy_strategies.array_shapes(min_dims=1, max_dims=4, min_side=0)
)


@given(arrays=st.lists(ARRAYS, max_size=4))
def test_arrays_are_read_as_they_were_stored(
    tmp_path_factory: pytest.TempPathFactory, arrays: list[np.ndarray]
) -> None:
    ledger = Ledger(str(tmp_path_factory.mktemp("job")), EPOCH).item(0)
    info = ledger.put_piece((1, 2), "own", arrays)
    read_arrays, size = ledger.get_piece((1, 2), "own")
    assert size == info.size
    assert [(a.dtype, a.shape, a.tobytes()) for a in read_arrays] == [
        (a.dtype, a.shape, a.tobytes()) for a in arrays
    ]


def test_an_array_in_fortran_order_keeps_its_shape_and_values(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path), EPOCH).item(0)
    array = np.arange(24, dtype="<f4").reshape(2, 3, 4).T
    ledger.put_piece((0,), "own", [array])
    np.testing.assert_array_equal(ledger.get_piece((0,), "own")[0][0], array)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (chunkq.job.ledger, chunkq.storage.objects):
        monkeypatch.setattr(module, "PART_BYTES", 7)


@pytest.mark.usefixtures("small_parts")
def test_a_piece_of_several_parts_is_read_as_it_was_stored(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path), EPOCH).item(0)
    arrays = [np.arange(24, dtype="<f4").reshape(2, 3, 4)[:, :, ::2], np.arange(9, dtype="|u1")]
    info = ledger.put_piece((0,), "own", arrays)
    content = (tmp_path / EPOCH / "pieces" / "0" / "0" / "own").read_bytes()
    assert info == PieceInfo(len(content), zlib_ng.crc32(content[:-4]))
    assert content[-4:] == info.crc32.to_bytes(4, "little")
    read_arrays, size = ledger.get_piece((0,), "own")
    assert size == len(content)
    for array, stored in zip(read_arrays, arrays, strict=True):
        np.testing.assert_array_equal(array, stored)


@pytest.mark.usefixtures("small_parts")
def test_a_checksum_covers_one_part_while_it_is_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    crc32 = zlib_ng.crc32

    def recorded(part: npt.NDArray[np.uint8], checksum: int) -> int:
        sizes.append(len(part))
        return crc32(part, checksum)

    monkeypatch.setattr(zlib_ng, "crc32", recorded)
    ledger = Ledger(str(tmp_path), EPOCH).item(0)
    info = ledger.put_piece((0,), "own", [np.ones(30, "<f4")])
    assert (max(sizes), sum(sizes)) == (7, info.size - 4)
    sizes.clear()
    ledger.get_piece((0,), "own")
    assert (max(sizes), sum(sizes)) == (7, info.size)


def test_a_piece_is_written_again_if_another_process_deletes_the_unfinished_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, deleted = os.replace, list[str]()

    def delete_first(source: str, target: str) -> None:
        if not deleted:
            deleted.append(source)
            os.unlink(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", delete_first)
    ledger = Ledger(str(tmp_path), EPOCH).item(0)
    ledger.put_piece((0,), "own", [np.arange(8, dtype="<f4")])
    assert len(deleted) == 1
    assert ledger.get_piece((0,), "own")[0][0].tolist() == list(range(8))


def assert_damaged(ledger: ItemLedger) -> None:
    with pytest.raises(PieceError) as error:
        ledger.get_piece((0,), "own")
    assert error.value.code is ErrorCode.PIECE_DAMAGED
    assert f"{ledger.objects.path}/pieces/0/0/own is damaged" in str(error.value)


def test_a_missing_piece_is_detected(tmp_path: Path) -> None:
    with pytest.raises(PieceError, match="pieces/0/0/own is missing"):
        Ledger(str(tmp_path), EPOCH).item(0).get_piece((0,), "own")


@pytest.mark.parametrize("byte", [0, 3, 4, 10, 30, -1])
def test_a_changed_byte_is_detected(tmp_path: Path, byte: int) -> None:
    ledger = Ledger(str(tmp_path), EPOCH).item(0)
    ledger.put_piece((0,), "own", [np.arange(8, dtype="<f4")])
    path = tmp_path / EPOCH / "pieces" / "0" / "0" / "own"
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)
    assert_damaged(ledger)


@pytest.mark.parametrize("length", [0, 3, 4, 40])
def test_a_truncated_piece_is_detected(tmp_path: Path, length: int) -> None:
    ledger = Ledger(str(tmp_path), EPOCH).item(0)
    ledger.put_piece((0,), "own", [np.zeros(8, "<f4")])
    path = tmp_path / EPOCH / "pieces" / "0" / "0" / "own"
    path.write_bytes(path.read_bytes()[:length] if length != 4 else bytes(4))
    assert_damaged(ledger)


def test_pieces_are_read_without_the_parser_of_python_which_is_not_thread_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(str(tmp_path), EPOCH).item(0)
    ledger.put_piece((0,), "own", [np.ones(3, "<f4")])

    def parse(*_: object, **__: object) -> None:
        raise AssertionError("a header was parsed as Python code")

    monkeypatch.setattr(ast, "parse", parse)
    assert ledger.get_piece((0,), "own")[0][0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["own", "01"])
def test_a_piece_under_the_name_of_another_is_detected(tmp_path: Path, name: str) -> None:
    ledger = Ledger(str(tmp_path), EPOCH).item(0)
    for block, piece in [((0,), "own"), ((1,), name)]:
        ledger.put_piece(block, piece, [np.zeros(8, "<f4")])
    pieces = tmp_path / EPOCH / "pieces" / "0"
    (pieces / "1" / name).replace(pieces / "0" / "own")
    assert_damaged(ledger)


def test_a_piece_of_an_earlier_job_is_detected(tmp_path: Path) -> None:
    earlier, ledger = (Ledger(str(tmp_path), epoch).item(0) for epoch in (EPOCH, "4e5f6071"))
    earlier.put_piece((0,), "own", [np.zeros(8, "<f4")])
    (tmp_path / earlier.epoch).rename(tmp_path / ledger.epoch)
    assert_damaged(ledger)
