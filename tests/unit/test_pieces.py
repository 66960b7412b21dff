"""What chunks leave for each other comes back as it was stored, or not at all."""

from __future__ import annotations

import ast
from pathlib import Path

import hypothesis.extra.numpy as arrays_of
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq.errors import PieceError
from chunkq.ledger import Ledger

DTYPES = st.sampled_from(["<f4", "|u1", "<u2", "<f2"]).map(np.dtype)
ARRAYS = arrays_of.arrays(DTYPES, arrays_of.array_shapes(min_dims=1, max_dims=4, min_side=0))


@given(pieces=st.lists(ARRAYS, max_size=4))
def test_arrays_come_back_as_they_were_stored(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[np.ndarray]
) -> None:
    folder = Ledger(str(tmp_path_factory.mktemp("job")), "0a1b2c3d")
    written = folder.put_piece((1, 2), "own", pieces)
    found, size = folder.get_piece((1, 2), "own")
    assert size == written.size
    assert [(a.dtype, a.shape, a.tobytes()) for a in found] == [
        (a.dtype, a.shape, a.tobytes()) for a in pieces
    ]


def test_what_is_stored_in_another_memory_order_comes_back_in_its_shape(tmp_path: Path) -> None:
    folder, stored = (
        Ledger(str(tmp_path), "0a1b2c3d"),
        np.arange(24, dtype="<f4").reshape(2, 3, 4).T,
    )
    folder.put_piece((0,), "own", [stored])
    np.testing.assert_array_equal(folder.get_piece((0,), "own")[0][0], stored)


@pytest.mark.parametrize("byte", [0, 3, 4, 10, 30, -1])
def test_one_changed_byte_is_found(tmp_path: Path, byte: int) -> None:
    folder = Ledger(str(tmp_path), "0a1b2c3d")
    folder.put_piece((0,), "own", [np.arange(8, dtype="<f4")])
    path = tmp_path / "0a1b2c3d" / "pieces" / "0" / "0" / "own"
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)
    with pytest.raises(PieceError, match="pieces/0/0/own is damaged"):
        folder.get_piece((0,), "own")


@pytest.mark.parametrize("length", [0, 3, 4, 40])
def test_a_piece_cut_short_is_found(tmp_path: Path, length: int) -> None:
    folder = Ledger(str(tmp_path), "0a1b2c3d")
    folder.put_piece((0,), "own", [np.zeros(8, "<f4")])
    path = tmp_path / "0a1b2c3d" / "pieces" / "0" / "0" / "own"
    path.write_bytes(path.read_bytes()[:length] if length != 4 else bytes(4))
    with pytest.raises(PieceError, match="pieces/0/0/own is damaged"):
        folder.get_piece((0,), "own")


def test_pieces_are_read_without_python_s_parser_which_threads_disturb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Ledger(str(tmp_path), "0a1b2c3d")
    folder.put_piece((0,), "own", [np.ones(3, "<f4")])

    def parsed(*_: object, **__: object) -> None:
        raise AssertionError("a header was parsed as Python code")

    monkeypatch.setattr(ast, "parse", parsed)
    assert folder.get_piece((0,), "own")[0][0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["own", "01"])
def test_a_piece_in_the_place_of_another_is_found(tmp_path: Path, name: str) -> None:
    ledger = Ledger(str(tmp_path), "0a1b2c3d")
    for block, piece in [((0,), "own"), ((1,), name)]:
        ledger.put_piece(block, piece, [np.zeros(8, "<f4")])
    pieces = tmp_path / "0a1b2c3d" / "pieces" / "0"
    (pieces / "1" / name).replace(pieces / "0" / "own")
    with pytest.raises(PieceError, match="pieces/0/0/own is damaged"):
        ledger.get_piece((0,), "own")


def test_a_piece_of_an_earlier_job_is_found(tmp_path: Path) -> None:
    earlier, ledger = (Ledger(str(tmp_path), epoch) for epoch in ("0a1b2c3d", "4e5f6071"))
    earlier.put_piece((0,), "own", [np.zeros(8, "<f4")])
    (tmp_path / earlier.epoch).rename(tmp_path / ledger.epoch)
    with pytest.raises(PieceError, match="is damaged"):
        ledger.get_piece((0,), "own")
