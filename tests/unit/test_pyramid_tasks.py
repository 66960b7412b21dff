"""`Pyramid` agrees with what is found voxel by voxel."""

from itertools import product

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from chunkq.geometry.levels import pyramid_levels
from chunkq.plan.chunk import Index
from chunkq.plan.item_tasks import ItemTasks
from chunkq.plan.pyramid import Pyramid
from tests.unit.test_item_tasks import PLANS

Numbers = npt.NDArray[np.int64]


@st.composite
def pyramids(draw: st.DrawFn) -> Pyramid:
    plan = draw(st.sampled_from([plan for plan in PLANS if plan.rank == 2]))
    chunk = tuple(draw(st.integers(1, 3)) for _ in range(2))
    count = draw(st.sampled_from([None, 2, 4]))
    sizes = draw(st.sampled_from([(1.0, 1.0), (3.0, 1.0)]))
    levels = pyramid_levels(plan.region.shape, sizes, chunk, chunk, plan.chunksize, count)
    counts = None
    if draw(st.booleans()):
        numbers = draw(st.lists(st.integers(0, 1), min_size=99, max_size=99))
        shape = plan.index_bounds.shape
        counts = np.array(numbers[: int(np.prod(shape))], np.uint32).reshape(shape)
    return Pyramid(plan, ItemTasks(plan, counts), levels, "mean")


def blocks_of_voxels(pyramid: Pyramid) -> dict[tuple[int, ...], Index]:
    """Return the block of each voxel of level 0, in voxels of the output."""
    plan, origin = pyramid.plan, pyramid.plan.region.start
    return {
        tuple(v - o for v, o in zip(voxel, origin, strict=True)): index
        for index in plan.indices()
        for box in [plan.chunk(index).block]
        for voxel in product(*map(range, box.start, box.stop))
    }


def is_written(pyramid: Pyramid, index: Index) -> bool:
    """Return whether a task writes a block: its own chunk, or one that reaches into it."""
    tasks = pyramid.tasks
    return tasks.is_task(index) or index in set(tasks.blocks())


@given(pyramids())
def test_a_unit_is_a_task_if_a_voxel_that_it_is_made_of_is_written(pyramid: Pyramid) -> None:
    if not pyramid.levels:
        return
    blocks = blocks_of_voxels(pyramid)
    written = np.zeros(pyramid.plan.region.shape, np.bool_)
    below: dict[tuple[int, ...], Index] = {}
    for voxel, index in blocks.items():
        written[voxel] = is_written(pyramid, index)
        below[voxel] = index
    for number, level in enumerate(pyramid.levels, start=1):
        units: dict[Index, set[Index]] = {index: set() for index in np.ndindex(*level.units)}
        has_task = dict.fromkeys(units, False)
        above: dict[tuple[int, ...], Index] = {}
        for voxel in np.ndindex(*level.below):
            parent = tuple(v // f for v, f in zip(voxel, level.factors, strict=True))
            unit = tuple(p // u for p, u in zip(parent, level.unit, strict=True))
            above[parent] = unit
            units[unit].add(below[voxel])
            has_task[unit] |= bool(written[voxel])
        assert list(pyramid.units(number)) == [unit for unit in units if has_task[unit]]
        assert [pyramid.has_unit(number, unit) for unit in units] == list(has_task.values())
        for unit, sources in units.items():
            if number == 1:
                assert set(pyramid.blocks_below(unit)) == sources
            else:
                expected = {s for s in sources if pyramid.has_unit(number - 1, s)}
                assert set(pyramid.units_below(number, unit)) == expected
        for source in set(below.values()):
            expected = {unit for unit, sources in units.items() if source in sources}
            found = (
                pyramid.units_above_block(source)
                if number == 1
                else pyramid.units_above(number - 1, source)
            )
            assert set(found) == expected
        tasks = [unit for unit in units if has_task[unit]]
        size = pyramid.plan.output.voxel_bytes
        costs = pyramid.costs[number - 1]
        assert costs.tasks == len(tasks)
        assert costs.bytes_written == size * sum(level.box(unit).size for unit in tasks)
        assert costs.bytes_read == size * sum(level.source(level.box(u)).size for u in tasks)
        # What the next level finds: a voxel is written if its unit is a task.
        below = above
        written = np.zeros(level.shape, np.bool_)
        for voxel, unit in above.items():
            written[voxel] = has_task[unit]
    assert pyramid.units_above(len(pyramid.levels), (0, 0)) == []
