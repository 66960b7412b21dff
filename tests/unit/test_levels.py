from itertools import product
from math import ceil, prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq.geometry.box import Box
from chunkq.geometry.levels import Level, level_factors, pyramid_levels
from tests.unit.test_box import assert_partition, voxels

Shape = tuple[int, ...]


def naive_levels(shape: Shape, sizes: list[float], count: int) -> list[tuple[Shape, Shape]]:
    """Return shape and voxels of level 0 per voxel of each level, level 0 included."""
    total = (1,) * len(shape)
    levels = [(shape, total)]
    while len(levels) < count:
        now = [s * t for s, t in zip(sizes, total, strict=True)]
        lengths = [v for v, n in zip(now, shape, strict=True) if n > 1]
        halved = [n > 1 and v <= 1.5 * min(lengths) for v, n in zip(now, shape, strict=True)]
        shape = tuple(ceil(n / 2) if h else n for n, h in zip(shape, halved, strict=True))
        total = tuple(2 * t if h else t for t, h in zip(total, halved, strict=True))
        levels.append((shape, total))
    return levels


@st.composite
def pyramids(draw: st.DrawFn) -> tuple[Level, ...]:
    rank = draw(st.integers(1, 3))

    def numbers(low: int, high: int) -> Shape:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    shape, chunk = numbers(1, 23), numbers(1, 4)
    storage = tuple(c * n for c, n in zip(chunk, numbers(1, 2), strict=True))
    block = tuple(s * n for s, n in zip(storage, numbers(1, 5), strict=True))
    sizes = [draw(st.sampled_from([1.0, 1.5, 1.6, 4.0, 8.5])) for _ in range(rank)]
    return pyramid_levels(shape, sizes, chunk, storage, block, draw(st.sampled_from([None, 2, 4])))


@given(st.lists(st.integers(2, 50), min_size=1, max_size=4), st.data())
def test_each_level_halves_the_axes_with_small_voxels_of_the_level_before(
    shape: list[int], data: st.DataObject
) -> None:
    sizes = [data.draw(st.sampled_from([1.0, 1.5, 2.0, 3.1, 30.0])) for _ in shape]
    ones = (1,) * len(shape)
    levels = pyramid_levels(tuple(shape), sizes, ones, ones, ones, 5)
    expected = naive_levels(tuple(shape), sizes, len(levels) + 1)
    assert [(level.shape, level.total) for level in levels] == expected[1:]
    assert len(levels) == 4 or levels[-1].shape == ones


def test_an_axis_is_halved_up_to_one_and_a_half_times_the_smallest_voxel_size() -> None:
    assert level_factors((9, 9, 9), (1.5, 1.0, 1.51)) == (2, 2, 1)
    assert level_factors((9, 9, 9), (40.0, 8.0, 8.0)) == (1, 2, 2)


def test_axes_of_one_voxel_are_left_out() -> None:
    assert level_factors((1, 9, 9), (1.0, 8.0, 8.0)) == (1, 2, 2)


def test_levels_end_when_every_axis_fits_one_storage_chunk() -> None:
    levels = pyramid_levels((300, 512, 70), (1.0,) * 3, (64,) * 3, (64,) * 3, (128,) * 3, None)
    assert [level.shape for level in levels] == [(150, 256, 35), (75, 128, 18), (38, 64, 9)]
    assert pyramid_levels((64, 64), (1.0, 1.0), (64, 64), (64, 64), (64, 64), None) == ()


def test_a_task_writes_what_a_block_becomes_and_at_least_one_storage_unit() -> None:
    levels = pyramid_levels((999,) * 2, (1.0,) * 2, (16,) * 2, (32,) * 2, (192, 64), 5)
    assert [level.unit for level in levels] == [(96, 32), (32, 32), (32, 32), (32, 32)]


@given(pyramids(), st.integers(1, 60))
def test_units_and_what_they_write_partition_a_level(
    levels: tuple[Level, ...], max_voxels: int
) -> None:
    for level in levels:
        whole = Box.of_shape(level.shape)
        units = [level.box(index) for index in product(*map(range, level.units))]
        assert_partition(units, voxels(whole))
        index = tuple(n - 1 for n in level.units)
        writes = list(level.writes(index, max_voxels))
        assert all(w.size <= max(max_voxels, prod(level.storage)) for w in writes)
        assert [w.start for w in writes] == sorted(w.start for w in writes)
        assert_partition(writes, voxels(level.box(index)))
        # Each write is a whole number of storage units of the level.
        for box in writes:
            assert all(low % s == 0 for low, s in zip(box.start, level.storage, strict=True))
            assert all(
                high % s == 0 or high == n
                for high, s, n in zip(box.stop, level.storage, level.shape, strict=True)
            )


@given(pyramids(), st.integers(1, 60))
def test_parts_of_a_storage_unit_read_every_storage_chunk_below_once(
    levels: tuple[Level, ...], max_voxels: int
) -> None:
    chunk = (2,) * len(levels[0].shape) if levels else ()
    for level in levels:
        box = next(level.writes((0,) * len(level.units), 1))
        parts = list(level.parts(box, chunk, max_voxels))
        assert_partition(parts, voxels(box))
        for part in parts:
            source = level.source(part)
            assert all(n % c == 0 for n, c in zip(source.start, chunk, strict=True))
            # At most the limit, or one storage chunk, or two along an axis that is not reduced.
            assert source.size <= max(max_voxels, prod(chunk))


@given(pyramids())
def test_a_unit_is_made_from_exactly_the_boxes_that_name_it(levels: tuple[Level, ...]) -> None:
    for level in levels:
        below = Box.of_shape(level.below)
        cells = np.zeros(level.below, np.int64)
        for index in product(*map(range, level.units)):
            source = level.source(level.box(index))
            cells[source.slices((0,) * len(level.below))] += 1
            assert index in set(level.units_of(source))
            corner = Box(source.start, tuple(n + 1 for n in source.start))
            assert list(level.units_of(corner)) == [index]
        assert (cells == 1).all()
        assert set(level.units_of(below)) == set(product(*map(range, level.units)))


@pytest.mark.parametrize("count", [None, 9])
def test_an_image_of_one_voxel_has_no_level_above(count: int | None) -> None:
    assert pyramid_levels((1, 1), (1.0, 1.0), (1, 1), (1, 1), (1, 1), count) == ()
