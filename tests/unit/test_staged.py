"""Copies of inputs in Zarr: their slabs, and chunks that are missing."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq.errors import ChunkReadError
from chunkq.geometry.axes import lettered_axes, plain_axes
from chunkq.geometry.box import Box
from chunkq.storage.objects import ObjectFolder
from chunkq.storage.staged import SLAB_BYTES, Slabs, StagedCopy


@st.composite
def slabs(draw: st.DrawFn) -> tuple[Slabs, int]:
    letters = draw(st.sampled_from(["x", "yx", "zyx", "tzyx", "czyx", "ctzyx", "zyxc"]))
    sizes = st.integers(1, 20_000) if letters in ("x", "yx", "zyx") else st.integers(1, 700)
    shape = [draw(sizes) for _ in letters]
    itemsize = draw(st.sampled_from([1, 2, 8]))
    return Slabs.of(lettered_axes(letters, plain_axes(shape)), itemsize), itemsize


@given(slabs())
def test_a_slab_is_whole_storage_chunks_within_its_limit(case: tuple[Slabs, int]) -> None:
    layout, itemsize = case
    row = [1] * layout.axis + [layout.thickness, *layout.shape[layout.axis + 1 :]]
    size = int(np.prod(row, dtype=np.int64)) * itemsize
    assert size <= SLAB_BYTES or layout.thickness == 1
    if layout.count < 1000:
        boxes = list(layout.boxes())
        assert len(boxes) == layout.count
        assert boxes[1:] == list(layout.boxes(1))
        assert sum(box.size for box in boxes) == layout.size
        assert all(before.start < after.start for before, after in pairwise(boxes))
        for box in boxes:
            for low, high, edge, length in zip(
                box.start, box.stop, layout.chunks, layout.shape, strict=True
            ):
                assert low % edge == 0
                assert high % edge == 0 or high == length


def test_time_points_and_leading_channels_share_no_storage_chunk() -> None:
    axes = lettered_axes("ctzyx", plain_axes((2, 300, 40, 64, 64)))
    assert Slabs.of(axes, 4).chunks == (1, 1, 40, 64, 64)


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_storage_chunk_that_is_missing_is_an_error_and_never_zeros(
    tmp_path: Path, scheme: str
) -> None:
    folder = ObjectFolder(f"{scheme}{tmp_path}/ingest")
    copy = StagedCopy(folder, "0", Slabs((6, 5), 0, 2, (2, 3)), "uint16")
    copy.create()
    copy.open(write=True).write(Box((0, 0), (4, 5)), np.zeros((4, 5), np.uint16))
    assert not copy.is_complete()
    with pytest.raises(ChunkReadError):
        copy.open().read(Box((2, 0), (6, 5)))
    copy.open(write=True).write(Box((4, 0), (6, 5)), np.zeros((2, 5), np.uint16))
    assert copy.is_complete()
    np.testing.assert_array_equal(copy.open().read(Box((0, 0), (6, 5))), np.zeros((6, 5)))


def test_a_damaged_record_of_slabs_is_none(tmp_path: Path) -> None:
    copy = StagedCopy(ObjectFolder(str(tmp_path)), "0", Slabs((6,), 0, 2, (2,)), "uint8")
    assert copy.slabs_written() == 0
    copy.record_slabs(2)
    assert copy.slabs_written() == 2
    (tmp_path / "0.json").write_text('{"slabs": 3}')
    assert copy.slabs_written() == 0
