from dataclasses import replace
from itertools import pairwise
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scale_inputs import Inputs
from benchmarks.scale_model import (
    HEARTBEATS_PER_S,
    RECORD_CONTRIBUTIONS,
    RENEW,
    Setup,
    Simulation,
    setup_for,
)
from benchmarks.scale_work import Load, Task, Work, plan_of

NARROW = replace(
    Inputs.unlimited(),
    codec_bytes_per_s=70.0,
    worker_bytes_per_s=50.0,
    store_bytes_per_s=200.0,
    store_latency_s=0.01,
    store_reads_per_s=40.0,
    store_writes_per_s=30.0,
    folder_writes_per_s=12.0,
    requests_in_flight=4.0,
    patches_per_s=3.0,
)
"""Inputs of which every resource can be the limit, depending on the task and the workers."""

rates = st.floats(1.0, 1e4)
amounts = st.floats(0.1, 50.0)
loads = st.builds(Load, amounts, st.floats(0.1, 9.0), amounts)
tasks = st.builds(Task, loads, st.floats(0.5, 5.0), loads, st.floats(0, 4), st.floats(0, 4))
setups = st.builds(
    Setup,
    st.builds(
        replace,
        st.just(NARROW),
        store_bytes_per_s=rates,
        store_reads_per_s=rates,
        store_writes_per_s=rates,
    ),
    tasks.map(lambda task: replace(task, commits=1.0)),
    workers=st.integers(1, 12),
    depth=st.integers(1, 4),
    block=st.none() | tasks.map(lambda task: replace(task, commits=1.0, patches=0.0)),
    tasks_per_s=st.floats(5.0, 500.0),
)


def test_work_has_all_patches_and_bytes_of_the_plan() -> None:
    plan = plan_of(4096, 256, patch=128, stride=64, storage=64)
    work = Work.of(plan, 128)
    voxels = prod(plan.volume.shape)
    assert work.chunks == plan.costs.chunks == 16**3
    assert work.blocks == plan.costs.finalized_blocks == 16**3 - 1
    assert work.infer.patches * work.chunks == pytest.approx(plan.costs.patches)
    assert work.block.read.bytes * work.chunks == pytest.approx(plan.costs.piece_bytes)
    written = work.infer.write.bytes + work.block.write.bytes
    assert written * work.chunks == pytest.approx(voxels + plan.costs.piece_bytes)
    # The objects are those of a chunk in the middle, with all 4³ storage chunks of its block.
    assert work.infer.write.objects + work.block.write.objects == 4**3 + 8
    assert work.block.read.objects == 8
    # Complete storage chunks of the input are read, which contain at least the halo.
    assert work.infer.read.bytes * work.chunks >= plan.costs.input_bytes
    assert work.infer.read.objects == 3**3


def test_without_overlap_there_is_no_block_to_complete() -> None:
    work = Work.of(plan_of(1024, 256, patch=64, stride=64, storage=64), 64)
    assert (work.blocks, work.block.read, work.block.bytes) == (0, Load(), 0)
    assert setup_for(Inputs(), work, "rq", 4).block is None


@pytest.mark.parametrize("executor", ["sqlite", "rq", "dask", "ray"])
def test_workers_complete_all_blocks_on_every_queue(executor: str) -> None:
    work = Work.of(plan_of(4096, 256, patch=128, stride=64, storage=64), 64)
    setup = setup_for(Inputs(), work, executor, 4)
    assert setup.block is not None
    assert setup.block.bytes * work.chunks == pytest.approx(work.block.bytes * work.blocks)
    assert setup.tasks_per_s == Inputs().queue(executor, "tasks_per_s")


@settings(max_examples=40)
@given(setups, st.integers(1, 60))
def test_every_chunk_is_done_exactly_once(setup: Setup, count: int) -> None:
    run = Simulation(setup).complete(count)
    assert sorted(run.tasks) == list(range(count))
    assert run.times == sorted(run.times)


@settings(max_examples=40)
@given(setups, st.integers(1, 60), st.integers(0, 9))
def test_no_resource_exceeds_its_rate(setup: Setup, count: int, seed: int) -> None:
    run = Simulation(setup, None).complete(count)
    limits = {name: bound for name, bound in setup.bounds().items() if name != "depth"}
    for name, bound in limits.items():
        assert count / run.times[-1] <= bound * (1 + 1e-9), name
    # Random latencies exceed none of them either.
    run = Simulation(setup, seed).complete(count)
    assert count / run.times[-1] <= min(limits.values()) * (1 + 1e-9)


@given(st.integers(1, 50), st.floats(0.01, 100.0), st.integers(1, 4))
def test_without_other_limits_a_worker_takes_the_time_of_its_device(
    count: int, patches: float, depth: int
) -> None:
    task = Task(Load(5, 2, 5), patches, Load(7, 3, 7), 4, 2, 1)
    run = Simulation(Setup(Inputs.unlimited(), task, 1, depth)).complete(count)
    assert run.times[-1] == pytest.approx(count * patches, rel=1e-12)


def test_one_chunk_at_a_time_takes_the_sum_of_its_stages() -> None:
    task = Task(Load(100, 10, 70), 6, Load(25, 5, 35), 4, 2, 1)
    inputs = replace(NARROW, queue_latency_s=0.25)
    setup = Setup(inputs, task, 1, 1, tasks_per_s=2.0 + RENEW * HEARTBEATS_PER_S)
    queue = 2 * 0.25 + 1 / 2.0
    read = 14 / 40 + 3 * 0.01 + 100 / 50 + 70 / 70
    compute = 6 / 3
    write = 35 / 70 + 7 / 30 + 2 * 0.01 + 25 / 50 + 1 / 12 + 6 * 0.01
    total = queue + read + compute + write
    assert setup.seconds_alone == pytest.approx(total, rel=1e-12)
    assert Simulation(setup).complete(9).times[-1] == pytest.approx(9 * total, rel=1e-12)


def test_transfers_are_limited_by_the_store_and_by_their_links() -> None:
    # 3 workers, 100 B each: 40 B/s for all are 40/3 for each; a link of 5 B/s is slower.
    task = Task(read=Load(bytes=100.0))
    for link, seconds in ((50.0, 7.5), (5.0, 20.0)):
        inputs = replace(Inputs.unlimited(), store_bytes_per_s=40.0, worker_bytes_per_s=link)
        run = Simulation(Setup(inputs, task, 3, 1)).complete(3)
        assert run.times == pytest.approx([seconds] * 3)


def test_reading_and_writing_overlap_with_the_device() -> None:
    task = Task(Load(50, 1), 6, Load(50, 1), commits=1)
    depths = [Simulation(Setup(NARROW, task, 1, depth)).steady() for depth in (1, 2, 4)]
    assert depths[0] < 0.6 * depths[1]
    assert depths[2] == pytest.approx(3 / 6, rel=1e-9)  # only the device counts


@pytest.mark.parametrize("limit", ["device", "queue", "store bandwidth", "store writes", "commits"])
def test_the_steady_rate_is_that_of_the_narrowest_resource(limit: str) -> None:
    task = Task(Load(10, 2, 10), 1, Load(10, 2, 10), commits=1)
    narrow = {
        "device": {"patches_per_s": 0.5},
        "store bandwidth": {"store_bytes_per_s": 10.0},
        "store writes": {"store_writes_per_s": 1.0},
        "commits": {"folder_writes_per_s": 0.5},
    }.get(limit, {})
    queue = 0.5 + 8 * RENEW * HEARTBEATS_PER_S if limit == "queue" else 1e4
    wide = replace(Inputs.unlimited(), store_latency_s=0.001, patches_per_s=100.0)
    setup = Setup(replace(wide, **narrow), task, 8, 4, tasks_per_s=queue)
    bounds = setup.bounds()
    assert min(bounds, key=bounds.__getitem__) == limit
    assert Simulation(setup, 1).steady() == pytest.approx(bounds[limit], rel=0.02)


@settings(max_examples=15)
@given(setups)
def test_more_workers_are_slower_only_by_their_heartbeats(setup: Setup) -> None:
    def with_workers(workers: int) -> Setup:
        heartbeats = workers * RENEW * HEARTBEATS_PER_S
        return replace(setup, workers=workers, tasks_per_s=setup.tasks_per_s + heartbeats)

    setups = [with_workers(n) for n in (1, 2, 4, 8, 16)]
    rates = [Simulation(one).steady() for one in setups]
    for one, rate in zip(setups, rates, strict=True):
        assert rate <= 1.03 * one.bound
    for fewer, more in pairwise(rates):
        assert more >= 0.97 * fewer


@given(setups, st.sampled_from([2, 4, 8]))
def test_a_slice_of_the_workers_has_its_share_of_every_bound(setup: Setup, times: int) -> None:
    larger = replace(setup, workers=setup.workers * times)
    part, share = larger.slice(setup.workers)
    assert (part.workers, share) == (setup.workers, 1 / times)
    bounds, sliced = larger.bounds(), part.bounds()
    for name in bounds.keys() - {"depth"}:
        assert sliced[name] == pytest.approx(share * bounds[name], rel=1e-9)
    assert larger.slice(larger.workers) == (larger, 1.0)


def test_heartbeats_and_contributions_use_their_share_of_the_queue() -> None:
    task = Task(patches=1.0)
    setup = Setup(Inputs.unlimited(), task, 100, tasks_per_s=20.0)
    rate = 20.0 - 100 * HEARTBEATS_PER_S * RENEW
    assert setup.bounds()["queue"] == rate
    with_block = replace(setup, block=Task()).bounds()
    assert with_block["queue"] == pytest.approx(rate / (1 + RECORD_CONTRIBUTIONS))
    assert replace(setup, workers=1000).bounds()["queue"] == 0
