"""The planned number of fetches agrees with a simulation of a cache."""

from collections import OrderedDict
from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chunkq.errors import JobError
from chunkq.plan.fetches import AxisFetches, Fetches, axis_fetches, picked_fetches
from chunkq.plan.plan import Plan
from chunkq.storage import chunk_cache
from tests.strategies import Case, cases, plan_for


def chunks_of_tasks(plan: Plan, storage: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
    """Return the storage chunks that each task reads, in the order of tasks."""
    tasks = []
    for index in plan.active_indices():
        bounds = [axis.read(i) for axis, i in zip(plan.axes, map(plan_number, index), strict=True)]
        along = [
            range(int(low) // s, -(-int(high) // s))
            for (low, high), s in zip(bounds, storage, strict=True)
        ]
        tasks.append(list(product(*along)))
    return tasks


def plan_number(number: int) -> np.ndarray:
    return np.asarray(number, np.int64)


def simulate(tasks: list[list[tuple[int, ...]]], kept: int) -> float:
    """Return how often a cache of the `kept` last used chunks fetches each chunk, on average."""
    cache: OrderedDict[tuple[int, ...], None] = OrderedDict()
    fetched, seen = 0, set()
    for chunk in (chunk for task in tasks for chunk in task):
        seen.add(chunk)
        fetched += chunk not in cache
        cache[chunk] = None
        cache.move_to_end(chunk)
        if len(cache) > kept:
            cache.popitem(last=False)
    return fetched / len(seen)


@given(case=cases(max_rank=3), data=st.data())
def test_a_simulated_cache_fetches_at_most_what_is_planned(case: Case, data: st.DataObject) -> None:
    plan = case.plan
    assume(len(plan.axes[0].grids) == 1)
    storage = tuple(data.draw(st.integers(1, 9)) for _ in plan.axes)
    fetches = Fetches(tuple(map(axis_fetches, plan.axes, storage)), 1)
    tasks = chunks_of_tasks(plan, storage)
    assert fetches.storage_chunks == len({chunk for task in tasks for chunk in task})
    assert fetches.average(0) == pytest.approx(simulate(tasks, 0))
    assert fetches.average(fetches.storage_chunks) == simulate(tasks, fetches.storage_chunks) == 1
    kept = data.draw(st.integers(0, fetches.storage_chunks))
    assert simulate(tasks, kept) <= fetches.average(kept) + 1e-9


def test_a_cache_of_1_gib_leaves_the_overlap_along_the_slowest_axis() -> None:
    edge = 8 * 256
    plan = plan_for(
        (edge,) * 3,
        (64,) * 3,
        inference_type="sliding_window",
        strides=[32] * 3,
        chunksize=[256] * 3,
        model={"model_output_shape": [2, 64, 64, 64]},
    )
    fetches = Fetches(tuple(axis_fetches(axis, 64) for axis in plan.axes), 4 * 64**3)
    along = AxisFetches(used=32, most=5, fetched=39)
    assert fetches.axes == (along,) * 3
    assert fetches.average(0) == pytest.approx((39 / 32) ** 3)
    assert fetches.average(chunk_cache.MAX_BYTES) == pytest.approx(39 / 32)
    assert fetches.useful_bytes == 4 * edge**3


def test_positions_that_share_a_storage_chunk_fetch_it_once_each() -> None:
    assert picked_fetches((0, 1, 5), 4, at_once=False) == AxisFetches(2, 1, 3)
    assert picked_fetches((0, 1, 5), 4, at_once=True) == AxisFetches(2, 2, 2)


def test_blocks_that_share_no_storage_chunk_need_no_cache() -> None:
    plan = plan_for((32, 32), (8, 8), chunksize=[16, 16])
    fetches = Fetches(tuple(axis_fetches(axis, 8) for axis in plan.axes), 64)
    assert (fetches.are_repeated, fetches.useful_bytes) == (False, 0)
    assert prod(axis.used for axis in fetches.axes) == 16


def test_the_variable_sets_the_size_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in (("0", 0), ("5000", 5000)):
        monkeypatch.setenv(chunk_cache.VARIABLE, text)
        chunk_cache.size.cache_clear()
        assert chunk_cache.size() == expected
    monkeypatch.setenv(chunk_cache.VARIABLE, "1GB")
    chunk_cache.size.cache_clear()
    with pytest.raises(JobError):
        chunk_cache.size()
    chunk_cache.size.cache_clear()
