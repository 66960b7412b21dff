"""Borders between blocks, and the planes inside of blocks that they are compared with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq.plan.borders import count_borders, select_borders
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
    for axis in range(plan.rank):
        borders = list(select_borders(plan, axis, limit, 100))
        assert len(borders) == min(limit, count_borders(plan, axis))
        assert len(set(borders)) == len(borders)
        for border in borders:
            for box in (border.at_border, border.inside):
                assert box.size
                assert box in plan.region
                assert box.shape[axis] == 2
            assert border.at_border.shape == border.inside.shape
            assert border.at_border.start[axis] + 1 in edges(plan, axis)
            assert border.inside.start[axis] + 1 not in edges(plan, axis)
            distance = border.at_border.start[axis] - border.inside.start[axis]
            assert abs(distance) == plan.chunksize[axis] // 4


def test_the_borders_of_a_small_output_are_compared_as_a_whole() -> None:
    plan = plan_for((40, 30), (8, 8), inference_type="patch", chunksize=[16, 8])
    for axis, starts in enumerate(([16, 32], [8, 16, 24])):
        seen = np.zeros(plan.region.shape, int)
        for border in select_borders(plan, axis, 100, 1):
            seen[border.at_border.slices((0, 0))] += 1
        expected = np.zeros_like(seen)
        along = np.moveaxis(expected, axis, 0)
        along[starts] = 1
        along[[start - 1 for start in starts]] = 1
        np.testing.assert_array_equal(seen, expected)


def test_a_few_borders_of_many_are_spread_evenly_and_read_from_a_storage_chunk_on() -> None:
    plan = plan_for((2000, 4000), (8, 8), inference_type="patch", chunksize=[200, 400])
    borders = list(select_borders(plan, 0, 9, 9 * 100))
    assert count_borders(plan, 0) == 90
    assert [border.at_border.start[0] + 1 for border in borders] == [*range(200, 2000, 200)]
    assert {border.at_border.shape for border in borders} == {(2, 100)}
    storage = plan.storage_chunks[1]
    assert 1 < storage < 150
    assert {border.at_border.start[1] % 400 for border in borders} == {150 - 150 % storage}
