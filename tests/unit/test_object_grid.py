"""Names and positions of the objects of a Zarr array."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq.geometry.box import Box
from chunkq.job.object_checksums import decode_checksums, encode_checksums
from chunkq.storage.formats.zarr_chunks import ChunkKeys
from chunkq.storage.object_grid import ObjectGrid

V3, V2 = ChunkKeys("default", "/"), ChunkKeys("v2", ".")


@st.composite
def grids(draw: st.DrawFn) -> tuple[ObjectGrid, Box]:
    """A grid, and a box of whole objects of it."""
    rank = draw(st.integers(1, 4))
    axis = st.tuples(st.integers(1, 12), st.integers(1, 5))
    shape, chunk = zip(*draw(st.lists(axis, min_size=rank, max_size=rank)), strict=True)
    grid = ObjectGrid(shape, chunk, draw(st.sampled_from([V3, V2])))
    start, stop = [], []
    for size, step, count in zip(shape, chunk, grid.counts, strict=True):
        low, high = sorted(draw(st.tuples(st.integers(0, count), st.integers(0, count))))
        start.append(min(low * step, size))
        stop.append(min(high * step, size))
    return grid, Box(tuple(start), tuple(stop))


@given(grids())
def test_names_are_those_of_the_objects_of_a_box_in_c_order(case: tuple[ObjectGrid, Box]) -> None:
    grid, box = case
    numbers = np.arange(np.prod(grid.counts)).reshape(grid.counts)
    voxels = np.kron(numbers, np.ones(grid.chunk, int))[box.slices((0,) * len(grid.shape))]
    indices = [np.unravel_index(n, grid.counts) for n in np.unique(voxels)]
    assert list(grid.names(box)) == [grid.keys.name([int(i) for i in n]) for n in indices]


@given(grids(), st.integers(1, 300))
def test_slabs_cover_a_box_once_and_their_names_follow_each_other(
    case: tuple[ObjectGrid, Box], voxels: int
) -> None:
    grid, box = case
    covered = np.zeros(grid.shape, int)
    names: list[str] = []
    for slab in grid.slabs(box, voxels):
        assert slab.size
        covered[slab.slices((0,) * len(grid.shape))] += 1
        names += grid.names(slab)
    expected = np.zeros(grid.shape, int)
    expected[box.slices((0,) * len(grid.shape))] = 1
    np.testing.assert_array_equal(covered, expected)
    assert names == list(grid.names(box))


@given(grids())
def test_the_index_of_a_name_is_the_one_that_it_was_made_of(case: tuple[ObjectGrid, Box]) -> None:
    grid, _ = case
    for index in product(*map(range, grid.counts)):
        assert grid.index_of(grid.keys.name(index)) == index
    outside = (grid.counts[0], *([0] * (len(grid.shape) - 1)))
    assert grid.index_of(grid.keys.name(outside)) is None


@pytest.mark.parametrize(
    "name",
    ["", "zarr.json", "c", "c/0", "c/0/0/0", "c/00/0", "c/0/0.__lock", "0/0", "c/0/-1", "d/0/0"],
)
def test_other_names_have_no_index(name: str) -> None:
    assert ObjectGrid((8, 8), (4, 4), V3).index_of(name) is None


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_checksums_are_the_same_after_they_were_text(checksums: list[int]) -> None:
    assert decode_checksums(encode_checksums(checksums), len(checksums)) == checksums


@pytest.mark.parametrize(("text", "count"), [("AAAA", 1), ("AQAAAA==", 2), ("*", 1), ("é", 1)])
def test_a_text_that_has_not_one_checksum_per_object_is_refused(text: str, count: int) -> None:
    with pytest.raises(ValueError, match=r"expected|base64|ASCII"):
        decode_checksums(text, count)


def test_nothing_stored_is_an_empty_text() -> None:
    assert encode_checksums([0, 0, 0]) == ""
    assert decode_checksums("", 3) == [0, 0, 0]
