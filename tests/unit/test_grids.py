from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkq.geometry.grids import AxisGeometry, AxisGrid
from chunkq.geometry.padding import source_indices
from tests import reference as ref
from tests.strategies import PAD_MODES, divisors


@st.composite
def grids(draw: st.DrawFn) -> tuple[AxisGrid, dict[str, int], Literal["pad", "shift"]]:
    """Any grid, also invalid ones: strides larger than the patch, offsets far outside."""
    kept, lead = draw(st.integers(1, 7)), draw(st.integers(0, 3))
    numbers = {
        "volume": draw(st.integers(1, 20)),
        "patch": kept + 2 * lead,
        "stride": draw(st.integers(1, kept + 3)),
        "pad": draw(st.integers(0, 12)),
        "offset": draw(st.integers(-12, 12)),
    }
    edge: Literal["pad", "shift"] = draw(st.sampled_from(("pad", "shift")))
    return AxisGrid.create(kept=kept, lead=lead, edge=edge, **numbers), numbers, edge


Drawn = tuple[AxisGrid, dict[str, int], Literal["pad", "shift"]]


@st.composite
def axes(draw: st.DrawFn) -> AxisGeometry:
    """An axis that `resolve` accepts: 1 to 3 grids, of which the first covers the volume."""
    volume, kept, lead = draw(st.integers(1, 30)), draw(st.integers(1, 7)), draw(st.integers(0, 2))
    chunk = draw(st.integers(min(kept, volume), 12))
    stride, pad = draw(st.integers(1, kept)), draw(st.integers(lead, lead + 9))
    edge: Literal["pad", "shift"] = draw(st.sampled_from(("pad", "shift")))
    grids = tuple(
        AxisGrid.create(
            volume=volume,
            patch=kept + 2 * lead,
            kept=kept,
            lead=lead,
            stride=stride,
            pad=pad,
            offset=offset,
            edge=edge,
        )
        for offset in (0, *draw(st.lists(st.integers(-9, 9), max_size=2)))
    )
    storage = draw(st.sampled_from(divisors(chunk)))
    mode = draw(st.sampled_from(PAD_MODES))
    return AxisGeometry(volume, chunk, storage, grids, mode, 0, volume)


def grid_of(volume: int, patch: int, stride: int, *, pad: int = 0, offset: int = 0) -> AxisGrid:
    return AxisGrid.create(
        volume=volume,
        patch=patch,
        kept=patch,
        lead=0,
        stride=stride,
        pad=pad,
        offset=offset,
        edge="pad",
    )


def all_starts(grid: AxisGrid) -> list[int]:
    return [grid.start(k) for k in range(grid.count)]


def kept_ranges(grid: AxisGrid) -> list[tuple[int, int]]:
    """Start and stop of the kept voxels of each patch, not clipped to the volume."""
    return [(s + grid.lead, s + grid.lead + grid.kept) for s in all_starts(grid)]


def kept_in_volume(grid: AxisGrid) -> list[int]:
    return [k for k, (a, b) in enumerate(kept_ranges(grid)) if b > 0 and a < grid.volume]


@settings(max_examples=400)
@given(grids())
def test_starts_equal_those_of_the_reference(drawn: Drawn) -> None:
    grid, numbers, edge = drawn
    assert all_starts(grid) == ref.axis_starts(**numbers, edge=edge)


@settings(max_examples=200)
@given(grids())
def test_the_last_patch_is_the_first_that_reaches_the_padded_end(drawn: Drawn) -> None:
    grid, numbers, edge = drawn
    padded_end = numbers["volume"] + numbers["pad"]
    starts = all_starts(grid)
    assert starts[0] == numbers["offset"] - numbers["pad"]
    assert starts[-1] + grid.patch >= padded_end
    assert all(start + grid.patch < padded_end for start in starts[:-1])
    assert all(a < b for a, b in pairwise(starts))
    if edge == "shift" and len(starts) > 1:
        assert starts[-1] + grid.patch == padded_end


@pytest.mark.parametrize(
    ("offset", "starts"),
    [  # volume 10, patch 4, stride 4
        (0, [0, 4, 8]),
        (-1, [-1, 3, 7]),
        (-4, [-4, 0, 4, 8]),
        (-9, [-9, -5, -1, 3, 7]),  # the first two do not intersect the volume
        (3, [3, 7]),
        (25, [25]),
    ],
)
def test_an_offset_moves_the_whole_grid(offset: int, starts: list[int]) -> None:
    assert all_starts(grid_of(10, 4, 4, offset=offset)) == starts


def test_patches_outside_the_volume_are_numbered_but_not_kept() -> None:
    grid = grid_of(10, 4, 4, offset=-9)
    assert (grid.count, grid.first_kept, grid.end_kept) == (5, 2, 5)
    outside = grid_of(10, 4, 4, offset=25)
    assert (outside.count, outside.first_kept == outside.end_kept) == (1, True)
    assert outside.span() == (0, 0)


@given(grids())
def test_start_of_an_array_equals_start_of_each_number(drawn: Drawn) -> None:
    grid = drawn[0]
    assert grid.start(np.arange(grid.count)).tolist() == all_starts(grid)


@given(grids())
def test_count_below_counts_the_kept_ranges_that_start_before_a_position(drawn: Drawn) -> None:
    grid = drawn[0]
    positions = np.arange(-20, 45)
    expected = [sum(a < p for a, _ in kept_ranges(grid)) for p in positions]
    assert grid.count_below(positions).tolist() == expected


@given(grids())
def test_kept_patches_are_those_that_intersect_the_volume(drawn: Drawn) -> None:
    grid = drawn[0]
    assert list(range(grid.first_kept, grid.end_kept)) == kept_in_volume(grid)


@settings(max_examples=200)
@given(grids(), st.integers(1, 9))
def test_a_block_owns_the_patches_whose_clipped_kept_voxels_start_in_it(
    drawn: Drawn, size: int
) -> None:
    grid = drawn[0]
    blocks = np.arange(-(-grid.volume // size))
    low, high = grid.owned(blocks, size)
    owner = {k: int(b) for b in blocks for k in range(low[b], high[b])}
    starts = kept_ranges(grid)
    assert owner == {k: max(0, starts[k][0]) // size for k in kept_in_volume(grid)}
    assert sum(high - low) == len(owner)


@settings(max_examples=200)
@given(grids(), st.integers(1, 9))
def test_the_owners_run_from_the_first_to_the_last_block_that_owns_a_patch(
    drawn: Drawn, size: int
) -> None:
    grid = drawn[0]
    blocks = np.arange(-(-grid.volume // size))
    low, high = grid.owned(blocks, size)
    owning, owners = np.flatnonzero(high > low), grid.owners(size)
    assert list(owners[:1]) == list(owning[:1])
    assert list(owners[-1:]) == list(owning[-1:])
    if grid.gap() is None and size >= grid.kept:
        assert list(owners) == list(owning)


@given(grids(), st.integers(-5, 25), st.integers(1, 10))
def test_touching_returns_the_patches_that_intersect_a_window(
    drawn: Drawn, start: int, length: int
) -> None:
    grid, stop = drawn[0], start + length
    expected = [k for k, (a, b) in enumerate(kept_ranges(grid)) if b > start and a < stop]
    assert list(grid.touching(start, stop)) == expected


@settings(max_examples=300)
@given(grids())
def test_a_gap_is_an_uncovered_voxel_between_kept_patches_if_there_is_one(drawn: Drawn) -> None:
    grid = drawn[0]
    ranges = [kept_ranges(grid)[k] for k in kept_in_volume(grid)]
    covered = {x for a, b in ranges for x in range(a, b)}
    uncovered = set(range(ranges[0][0], ranges[-1][1])) - covered if ranges else set()
    gap = grid.gap()
    assert gap in uncovered if uncovered else gap is None


@given(grids())
def test_the_span_runs_from_the_first_to_the_last_predicted_voxel(drawn: Drawn) -> None:
    grid = drawn[0]
    voxels = [x for k in kept_in_volume(grid) for x in range(*kept_ranges(grid)[k])]
    inside = [x for x in voxels if 0 <= x < grid.volume]
    assert grid.span() == ((min(inside), max(inside) + 1) if inside else (0, 0))


def test_a_grid_of_10_to_the_13_patches_is_computed_in_closed_form() -> None:
    grid = grid_of(10**15, 128, 64)
    low, high = grid.owned(np.array([0, 10**9, 10**9 + 1]), 640)
    assert (high - low).tolist() == [10, 10, 10]
    assert low.tolist() == [0, 10**10, 10**10 + 10]
    assert list(grid.touching(64 * 10**12, 64 * 10**12 + 1)) == [10**12 - 1, 10**12]


def owned_ranges(axis: AxisGeometry, block: int) -> list[tuple[int, int]]:
    """Clipped start and stop of every patch that a block owns, by exhaustive search."""
    ranges = []
    for grid in axis.grids:
        for k in kept_in_volume(grid):
            a, b = kept_ranges(grid)[k]
            if max(a, 0) // axis.chunk == block:
                ranges.append((max(a, 0), min(b, axis.volume)))
    return ranges


@given(axes())
def test_blocks_tile_the_axis(axis: AxisGeometry) -> None:
    blocks = np.arange(axis.blocks)
    edges = [0, *axis.stop(blocks).tolist()]
    assert axis.start(blocks).tolist() == edges[:-1]
    assert edges[-1] == axis.volume
    assert all(0 < b - a <= axis.chunk for a, b in pairwise(edges))


@settings(max_examples=200)
@given(axes())
def test_the_upper_overlap_ends_with_the_patches_and_within_the_next_block(
    axis: AxisGeometry,
) -> None:
    blocks = np.arange(axis.blocks)
    stops = axis.stop(blocks)
    overlap = axis.upper_overlap(blocks).tolist()
    for b in blocks:
        patches_end = max((stop for _, stop in owned_ranges(axis, int(b))), default=0)
        assert overlap[b] == max(0, patches_end - stops[b])
    assert axis.band(blocks).tolist() == [0, *overlap[:-1]]
    assert all(axis.band(blocks) <= stops - axis.start(blocks))


@given(axes())
def test_an_aligned_band_is_the_fewest_storage_chunks_or_the_whole_block(
    axis: AxisGeometry,
) -> None:
    blocks = np.arange(axis.blocks)
    lengths = axis.stop(blocks) - axis.start(blocks)
    numbers = zip(axis.band(blocks), axis.aligned_band(blocks), lengths, strict=True)
    for band, aligned, length in numbers:
        assert band <= aligned < band + axis.storage
        assert aligned == length or aligned % axis.storage == 0


@settings(max_examples=200)
@given(axes())
def test_the_halo_is_the_smallest_window_that_the_owned_patches_read(axis: AxisGeometry) -> None:
    blocks = np.arange(axis.blocks)
    low, high = axis.halo(blocks)
    real_low, real_high = axis.read(blocks)
    for b in blocks:
        windows = [
            (grid.start(k), grid.start(k) + grid.patch)
            for grid in axis.grids
            for k in kept_in_volume(grid)
            if max(kept_ranges(grid)[k][0], 0) // axis.chunk == b
        ]
        if not windows:
            assert low[b] == high[b]
            assert real_low[b] == real_high[b]
            continue
        assert (low[b], high[b]) == (min(windows)[0], max(end for _, end in windows))
        indices = source_indices(int(low[b]), int(high[b]), axis.volume, axis.pad_mode)
        indices = indices[indices >= 0]
        assert (real_low[b], real_high[b]) == (indices.min(), indices.max() + 1)


@given(axes())
def test_values_of_one_block_equal_those_of_an_array_of_blocks(axis: AxisGeometry) -> None:
    blocks = np.arange(axis.blocks)
    functions = (axis.start, axis.stop, axis.band, axis.aligned_band, axis.upper_overlap)
    for function in functions:
        assert [int(function(np.asarray(b))) for b in blocks] == function(blocks).tolist()
    for window in (axis.halo, axis.read):
        one_by_one = [[int(end) for end in window(np.asarray(b))] for b in blocks]
        assert one_by_one == np.stack(window(blocks), axis=1).tolist()
    for b in blocks:
        block, number = axis.block(int(b)), np.asarray(b)
        assert (
            block.start,
            block.stop,
            block.band,
            block.aligned_band,
            block.upper_overlap,
        ) == tuple(int(function(number)) for function in functions)
        assert block.halo == tuple(map(int, axis.halo(number)))
        owned = [grid.owned(number, axis.chunk) for grid in axis.grids]
        assert list(block.owned) == [range(int(low), int(high)) for low, high in owned]
