"""`count_patches` and `ItemTasks` agree with what is counted patch by patch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkq.geometry.box import Box
from chunkq.geometry.cells import CellAxis
from chunkq.job.known_empty import KnownEmpty
from chunkq.plan import patch_counts
from chunkq.plan.costs import Costs
from chunkq.plan.item_tasks import ItemTasks
from chunkq.plan.patch_counts import Condition, count_patches
from chunkq.plan.plan import Plan
from chunkq.storage.stored_chunks import StoredCells, StoredChunks
from tests.strategies import plan_for

Bools = npt.NDArray[np.bool_]


def geometries() -> Iterator[Plan]:
    sliding, shifted = "sliding_window", [[-3, -2], [2, 1]]
    yield plan_for((19, 14), (6, 4), inference_type=sliding, strides=[3, 4], chunksize=[6, 4])
    yield plan_for((19, 14), (6, 4), inference_type="patch", offsets=shifted, chunksize=[8, 6])
    yield plan_for((23, 9), (8, 6), inference_type="crop_margin", margin=[1, 2], chunksize=[6, 4])
    yield plan_for((30,), (5,), inference_type=sliding, strides=[2], chunksize=[10])
    more: dict[str, Any] = {"inference_type": sliding, "strides": [3, 4], "chunksize": [6, 4]}
    more |= {"storage_chunks": [3, 2], "skip_empty": 0}
    yield plan_for((19, 14), (6, 4), roi=[[9, 17], [4, None]], **more)
    yield plan_for((19, 14), (6, 4), roi=[[8, 17], [5, 9]], **more)


PLANS = list(geometries())


def read_of(cells: Bools) -> Any:
    return lambda box: cells[box.slices((0,) * cells.ndim)]


def has_occupied(plan: Plan, box: Box, axes: tuple[CellAxis, ...], cells: Bools) -> bool:
    """Return whether any voxel of a box lies in an occupied cell, voxel by voxel."""
    for voxel in np.ndindex(box.shape):
        index = []
        for axis, low, i in zip(axes, box.start, voxel, strict=True):
            index.append(int(np.floor((low + i + 0.5 + axis.shift) / axis.scale + 1e-9)))
        inside = all(0 <= n < axis.count for n, axis in zip(index, axes, strict=True))
        if inside and cells[tuple(index)]:
            return True
    return False


@st.composite
def conditions(draw: st.DrawFn) -> tuple[Plan, Condition, Bools]:
    plan = draw(st.sampled_from(PLANS))
    axes, shape = [], []
    for size in plan.volume.shape:
        scale = draw(st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0, 7.3]))
        count = draw(st.integers(1, max(1, round(size / scale) + 2)))
        axes.append(CellAxis(count, scale, draw(st.sampled_from([0.0, 0.0, -2.0, 3.5]))))
        shape.append(count)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    cells = rng.random(shape) < draw(st.sampled_from([0.02, 0.1, 0.5]))
    return plan, Condition(tuple(axes), read_of(cells), draw(st.booleans())), cells


def position(plan: Plan, index: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i - low for i, low in zip(index, plan.index_bounds.start, strict=True))


@settings(max_examples=60, deadline=None)
@given(conditions(), st.sampled_from([40, 1 << 20]))
def test_patches_are_counted_as_one_by_one(
    drawn: tuple[Plan, Condition, Bools], max_cells: int
) -> None:
    plan, condition, cells = drawn
    expected = np.zeros(plan.index_bounds.shape, np.uint32)
    volume = Box.of_shape(plan.volume.shape)
    for index in plan.active_indices():
        for patch in plan.patches(plan.chunk(index)):
            window = patch.source & volume if condition.of_input else patch.target
            is_met = has_occupied(plan, window, condition.axes, cells)
            expected[position(plan, index)] += is_met
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patch_counts, "MAX_CELLS", max_cells)
        assert count_patches(plan, [[condition]]).tolist() == expected.tolist()


def test_a_patch_needs_one_condition_of_each_group() -> None:
    plan = plan_for((8,), (2,), inference_type="patch", chunksize=[4])
    axes = (CellAxis(8),)
    first, second = np.arange(8) < 4, np.arange(8) >= 6
    one, other = (Condition(axes, read_of(cells)) for cells in (first, second))
    assert count_patches(plan, [[one, other]]).tolist() == [2, 1]
    assert count_patches(plan, [[one], [other]]).tolist() == [0, 0]


@pytest.mark.parametrize("number", range(len(PLANS)))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_tasks_are_what_the_plan_has_without_the_skipped_chunks(number: int, share: float) -> None:
    plan, rng = PLANS[number], np.random.default_rng(number)
    counts = np.zeros(plan.index_bounds.shape, np.uint32)
    for index in plan.active_indices():
        counts[position(plan, index)] = plan.chunk(index).patches * (rng.random() < share)
    tasks = ItemTasks(plan, counts)
    chunks = [index for index in plan.active_indices() if counts[position(plan, index)]]
    assert list(tasks.chunks()) == chunks
    assert [index for index in plan.indices() if tasks.is_task(index)] == chunks
    contributors = {
        index: [source for source in plan.contributors(index) if source in chunks]
        for index in plan.to_finalize()
    }
    assert list(tasks.blocks()) == [index for index, sources in contributors.items() if sources]
    assert {index: tasks.contributors(index) for index in contributors} == contributors
    assert tasks.count_patches(list(plan.indices())) == counts.sum() == tasks.costs.patches
    assert (tasks.costs.chunks, tasks.costs.finalized_blocks) == (
        len(chunks),
        sum(map(bool, contributors.values())),
    )
    moved = sum(
        sum(piece.box.size for piece in plan.outgoing_pieces(chunk)) * 4
        + sum(box.size for box in chunk.band_boxes) * 4
        + sum(box.size for box in chunk.rest_boxes) * plan.output.voxel_bytes
        for chunk in map(plan.chunk, chunks)
    )
    assert tasks.costs.piece_bytes == moved


def test_without_skipped_chunks_the_costs_are_those_of_the_plan() -> None:
    for plan in PLANS:
        counts = np.zeros(plan.index_bounds.shape, np.uint32)
        for index in plan.active_indices():
            counts[position(plan, index)] = plan.chunk(index).patches
        assert ItemTasks(plan, counts).costs == plan.costs == ItemTasks(plan).costs


def test_an_item_without_tasks_costs_nothing() -> None:
    plan = PLANS[0]
    costs = ItemTasks(plan, np.zeros(plan.index_bounds.shape, np.uint32)).costs
    assert replace(costs, blocks=0) == Costs(0, 0, 0, 0, 0, 0, 0, 0)


def test_what_is_known_is_stored_as_bits_and_read_back() -> None:
    plan = PLANS[0]
    counts = np.zeros(plan.index_bounds.shape, np.uint32)
    counts[1, 2], counts[3, 0] = 3, 70_000
    occupied = np.array([[True, False, False], [False, False, True]])
    known = KnownEmpty(counts, (StoredCells((10, 5), occupied),))
    arrays = known.to_arrays()
    assert arrays[0].nbytes == -(-counts.size // 8)
    again = KnownEmpty.from_arrays(arrays, plan)
    assert again.counts.tolist() == counts.tolist()
    assert again.stored[0].chunk == (10, 5)
    assert again.stored[0].occupied.tolist() == occupied.tolist()


def test_storage_chunks_are_those_of_the_positions_that_are_read() -> None:
    indices = np.array([[0, 0, 0, 1], [0, 1, 2, 0], [1, 0, 1, 1]])
    stored = StoredChunks((2, 4, 9, 6), (1, 2, 3, 4), indices)
    cells = stored.spatial((3, 2), {0: [0], 1: [0, 1]})
    assert cells.chunk == (4, 3)
    assert np.argwhere(cells.occupied).tolist() == [[1, 0]]
    assert cells.any(Box((3, 0), (5, 1)))
    assert not cells.any(Box((0, 0), (4, 9)))
    both = stored.spatial((3, 2), {0: [0, 1], 1: [0, 3]})
    assert np.argwhere(both.occupied).tolist() == [[0, 2], [1, 0], [1, 1]]
