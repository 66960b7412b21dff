"""Borders between blocks, and the planes inside of blocks that they are compared with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq.geometry.box import Box
from chunkq.plan.borders import count_corners, select_corners
from chunkq.plan.plan import Plan
from tests.strategies import Case, cases, plan_for


def edges(plan: Plan, axis: int) -> set[int]:
    """Return the first voxels of blocks along an axis, without the first one."""
    along = plan.axes[axis]
    return {along.block(number).start for number in along.numbers[1:]}


@given(cases(), st.integers(1, 40))
def test_borders_lie_between_blocks_and_their_planes_inside_of_one(case: Case, limit: int) -> None:
    check_borders(case.plan, limit)


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_the_borders_of_a_region_lie_in_it(limit: int) -> None:
    keys = {"inference_type": "sliding_window", "strides": [4, 4], "chunksize": [12, 12]}
    check_borders(plan_for((50, 40), (8, 8), roi=[[5, 44], [11, 40]], **keys), limit)


def check_borders(plan: Plan, limit: int) -> None:
    corners = list(select_corners(plan, limit, 1 << 40))
    assert len(corners) == min(limit, count_corners(plan))
    for axis in range(plan.rank):
        seen = np.zeros(plan.region.shape, int)
        for border in (b for borders in corners for b in borders if b.axis == axis):
            for box in (border.at_border, border.inside):
                assert box.size
                assert box in plan.region
                assert box.shape[axis] == 2
            assert border.at_border.shape == border.inside.shape
            assert border.at_border.start[axis] + 1 in edges(plan, axis)
            assert border.inside.start[axis] + 1 not in edges(plan, axis)
            distance = border.at_border.start[axis] - border.inside.start[axis]
            assert abs(distance) == plan.chunksize[axis] // 4
            first = list(border.at_border.start)
            first[axis] += 1
            voxels = Box(tuple(first), border.at_border.stop)
            seen[voxels.slices(plan.region.start)] += 1
        assert seen.max(initial=0) <= 1, "a pair of voxels is in two corners"


def test_a_corner_is_read_in_whole_storage_chunks_on_both_sides_of_each_border() -> None:
    keys = {"chunksize": [64, 64, 128], "storage_chunks": [64, 64, 64]}
    plan = plan_for((128, 128, 256), (8, 8, 8), inference_type="patch", **keys)
    (borders,) = select_corners(plan, 100, 1)
    assert [(b.axis, b.at_border.start, b.at_border.stop) for b in borders] == [
        (0, (63, 32, 64), (65, 96, 192)),
        (1, (32, 63, 64), (96, 65, 192)),
        (2, (32, 32, 127), (96, 96, 129)),
    ]


def test_an_axis_without_a_border_is_compared_in_its_middle() -> None:
    keys = {"chunksize": [64, 208], "storage_chunks": [64, 26]}
    plan = plan_for((128, 200), (8, 8), inference_type="patch", **keys)
    (borders,) = select_corners(plan, 100, 1)
    assert [b.at_border for b in borders] == [Box((63, 52), (65, 104))]


def test_as_many_corners_are_read_as_give_the_pairs_evenly_spaced() -> None:
    plan = plan_for((640, 6400), (8, 8), inference_type="patch", chunksize=[64, 64])
    assert count_corners(plan) == 9 * 99
    corners = list(select_corners(plan, 100, 640))
    assert len(corners) == 10
    assert [c[1].at_border.start[1] + 1 for c in corners] == [
        64 * (1 + number * 891 // 10 % 99) for number in range(10)
    ]
    assert sum(c[0].at_border.size for c in corners) // 2 == 640


def test_of_a_large_output_one_corner_is_read_for_a_hundred_blocks() -> None:
    plan = plan_for((640, 6400), (8, 8), inference_type="patch", chunksize=[8, 64])
    assert len(list(select_corners(plan, 1000, 1))) == 80
    assert len(list(select_corners(plan, 7, 1))) == 7
