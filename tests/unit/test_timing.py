"""The timing of a job adds up to the commit records from which it is aggregated."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq import json_values
from chunkq.job.task_records import Commit
from chunkq.queue.contract.executor import WorkerName
from chunkq.timing.aggregation import aggregate_timing
from chunkq.timing.diagnosis import LOSSES, REMEDIES, advice, conclusion
from chunkq.timing.intervals import attribute_time, covered_seconds, max_overlap, spread
from chunkq.timing.timing import BINS, STAGES, TIME_PARTS, Timing
from tests.strategies import plan_for

START = 1.7e9
PLAN = plan_for((300,), (10,), chunksize=[30])
SECONDS = st.floats(0, 50).map(lambda s: round(s, 3))
INTERVALS = st.lists(st.tuples(SECONDS, SECONDS), max_size=12)
"""Intervals as pairs of start and length."""


def commit(
    chunk: int,
    begin: float,
    worker: str = "a:0:x",
    attempt: int = 1,
    patches: int = 3,
    **stages: float,
) -> Commit:
    """Return the record of a chunk whose stages follow each other from `begin`."""
    seconds = {stage: stages.get(stage, 0.0) for stage in STAGES}
    started = START + begin
    finished = started + sum(seconds.values()) + stages.get("other", 0.0)
    moved = {"input": 100 + chunk, "output": 40, "pieces": chunk}
    return Commit(
        "infer",
        0,
        (chunk,),
        attempt,
        worker,
        started,
        finished,
        seconds,
        moved,
        {},
        patches,
        1000 + chunk,
    )


@st.composite
def records(draw: st.DrawFn) -> list[Commit]:
    """Draw the records of up to ten chunks by up to three workers, with any overlap in time."""
    count = draw(st.integers(0, 10))
    return [
        commit(
            chunk,
            draw(SECONDS),
            draw(st.sampled_from(("a:0:x", "a:1:y", "b:cpu:z"))),
            draw(st.integers(1, 3)),
            **{stage: draw(SECONDS) for stage in (*STAGES, "other")},
        )
        for chunk in range(count)
    ]


def test_the_peak_memory_of_a_worker_includes_the_blocks_that_it_finalized() -> None:
    chunk = commit(0, 0.0)
    same_worker = replace(commit(1, 1.0), kind="finalize", peak_rss=7000)
    other_worker = replace(commit(2, 1.0, "host"), kind="finalize", peak_rss=9000)
    timing = aggregate_timing([PLAN], [chunk], [same_worker, other_worker])
    assert timing.peak_rss_bytes == timing.workers[chunk.worker].peak_rss_bytes == 7000


def arrays(intervals: list[tuple[float, float]]) -> tuple[Any, Any]:
    """Return the starts and stops of pairs of start and length."""
    starts = np.array([start for start, _ in intervals], np.float64)
    return starts, starts + np.array([length for _, length in intervals], np.float64)


@given(st.lists(INTERVALS, min_size=1, max_size=4), st.floats(0, 40), st.floats(0, 60))
def test_attributed_time_adds_up_to_the_total_time(
    layers: list[list[tuple[float, float]]], low: float, length: float
) -> None:
    seconds = attribute_time([arrays(intervals) for intervals in layers], low, low + length)
    assert len(seconds) == len(layers) + 1
    assert min(seconds) >= 0
    assert sum(seconds) == pytest.approx(length, abs=1e-9)
    starts, stops = arrays(layers[0])
    first = covered_seconds(starts.clip(low, low + length), stops.clip(low, low + length))
    assert seconds[0] == pytest.approx(first, abs=1e-9)


@given(INTERVALS)
def test_covered_seconds_counts_overlapping_intervals_once(
    intervals: list[tuple[float, float]],
) -> None:
    starts, stops = arrays(intervals)
    moments = np.unique(np.concatenate([starts, stops]))
    lengths = np.diff(moments)
    middles = moments[:-1] + lengths / 2
    at_once = ((starts[:, None] <= middles) & (middles < stops[:, None])).sum(0)
    assert covered_seconds(starts, stops) == pytest.approx(
        float(lengths[at_once > 0].sum()), abs=1e-9
    )
    assert max_overlap(starts, stops) >= int(at_once.max(initial=0))


@given(INTERVALS, st.integers(1, 9))
def test_spread_amounts_add_up_to_the_total(
    intervals: list[tuple[float, float]], bins: int
) -> None:
    starts, stops = arrays(intervals)
    amounts = np.arange(1.0, len(intervals) + 1)
    parts = spread(starts, stops, amounts, np.linspace(-1, 101, bins + 1))
    assert parts.sum() == pytest.approx(amounts.sum())
    assert (parts >= -1e-9).all()


def test_attributed_time_does_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    layers = [arrays(list(zip(*rng.uniform(0, 9, (2, 50)), strict=True))) for _ in range(3)]
    in_one_batch = attribute_time(layers, 1.0, 12.0)
    monkeypatch.setattr("chunkq.timing.intervals.BATCH_SIZE", 7)
    assert attribute_time(layers, 1.0, 12.0) == pytest.approx(in_one_batch)


@given(records())
def test_timing_adds_up_to_the_records(commits: list[Commit]) -> None:
    timing = aggregate_timing([PLAN], commits)
    workers = timing.workers.values()
    assert timing.chunks == sum(w.chunks for w in workers) == len(commits)
    assert timing.patches == sum(w.patches for w in workers) == 3 * len(commits)
    assert timing.voxels == 30 * len(commits)
    assert timing.retried == sum(c.attempt > 1 for c in commits)
    assert timing.peak_rss_bytes == max((c.peak_rss for c in commits), default=0)
    for stage in STAGES:
        total = sum(c.seconds[stage] for c in commits)
        assert timing.seconds[stage] == pytest.approx(total)
        assert sum(w.stage_seconds[stage] for w in workers) == pytest.approx(total)
    for key, moved in (("input", "input"), ("output", "output"), ("pieces_written", "pieces")):
        assert timing.bytes[key] == sum(c.moved[moved] for c in commits)
    assert sum(timing.durations.counts) == len(commits)
    timeline = timing.timeline
    if timeline.bin_seconds:
        assert len(timeline.patches_per_second) == len(timeline.workers) == BINS
        patches = sum(timeline.patches_per_second) * timeline.bin_seconds
        assert patches == pytest.approx(timing.patches)
        assert timing.patches_per_second * timing.work_seconds == pytest.approx(timing.patches)
        assert timing.voxels_per_second == pytest.approx(10 * timing.patches_per_second)
        worker_seconds = sum(timeline.workers) * timeline.bin_seconds
        assert worker_seconds == pytest.approx(sum(w.seconds for w in workers), abs=1e-3)


@given(records())
def test_shares_add_up_to_one(commits: list[Commit]) -> None:
    timing = aggregate_timing([PLAN], commits)
    for worker in timing.workers.values():
        assert set(worker.shares) == set(TIME_PARTS)
        assert sum(worker.shares.values()) == pytest.approx(1)
        assert min(worker.shares.values()) >= 0
        assert worker.device_busy_share + worker.device_wait_share == pytest.approx(1)
        assert 0 <= worker.tail_seconds <= timing.tail_seconds
    if timing.worker_time_shares:
        assert sum(timing.worker_time_shares.values()) == pytest.approx(1)


@given(records(), st.randoms())
def test_timing_does_not_depend_on_the_order_of_the_records(
    commits: list[Commit], random: Any
) -> None:
    shuffled = random.sample(commits, len(commits))
    first, second = aggregate_timing([PLAN], commits), aggregate_timing([PLAN], shuffled)
    assert second.worker_time_shares == pytest.approx(first.worker_time_shares)
    assert list(second.workers) == list(first.workers)
    assert second.durations.quantiles == first.durations.quantiles


@given(records())
def test_timing_survives_a_round_trip_through_json(commits: list[Commit]) -> None:
    timing = aggregate_timing([PLAN], commits)
    assert json_values.decode(Timing, json_values.encode(timing)) == timing


@given(records())
def test_every_job_has_a_conclusion(commits: list[Commit]) -> None:
    timing = aggregate_timing([PLAN], commits)
    assert conclusion(timing).endswith(".")
    assert len(advice(timing) or "") < 300


def test_every_loss_has_a_description_and_a_remedy() -> None:
    assert set(LOSSES) == set(REMEDIES) == {*TIME_PARTS, "tail"} - {"compute"}


def test_reading_and_writing_during_computation_is_no_loss() -> None:
    # Chunk 1 is read while chunk 0 is computed; chunk 0 is written while chunk 1 is computed.
    first = commit(0, 0, read=1, compute=4, write=2)
    second = commit(1, 1, read=2, wait=2, compute=4, write=1)
    worker = aggregate_timing([PLAN], [first, second]).workers["a:0:x"]
    assert worker.seconds == 10
    assert worker.shares == pytest.approx(
        {"compute": 0.8, "load": 0, "read": 0.1, "write": 0.1}
        | {"finalize": 0, "downsample": 0, "other": 0, "idle": 0}
    )
    assert worker.chunks_in_flight == 2


def test_time_without_any_chunk_is_idle_unless_blocks_are_finalized() -> None:
    chunks = [commit(0, 0, compute=1), commit(1, 9, compute=1)]
    block = replace(commit(0, 2, other=4), kind="finalize")
    shares = aggregate_timing([PLAN], chunks, [block]).workers["a:0:x"].shares
    assert shares["finalize"] == pytest.approx(0.4)
    assert shares["idle"] == pytest.approx(0.4)


def test_only_workers_that_ran_out_of_chunks_have_a_tail() -> None:
    commits = [
        commit(0, 0, "stopped:0:x", compute=2),  # other chunks were started after its last one
        commit(1, 0, "early:0:y", compute=6),
        commit(2, 4, "late:0:z", compute=16),
    ]
    timing = aggregate_timing([PLAN], commits)
    tails = {WorkerName.parse(name).host: w.tail_seconds for name, w in timing.workers.items()}
    assert tails == pytest.approx({"stopped": 0, "early": 14, "late": 0})
    assert timing.tail_seconds == pytest.approx(14)
    assert timing.worker_time_shares["tail"] == pytest.approx(14 / (2 + 6 + 16 + 14))
    assert LOSSES["tail"] in conclusion(timing)


def test_a_straggler_has_the_slow_stage_and_load_and_wait_do_not_count() -> None:
    commits = [commit(n, 3 * n, read=1, compute=1, write=1) for n in range(8)]
    commits.append(commit(8, 24, attempt=2, read=9, compute=1, write=1))
    commits.append(commit(9, 30, read=1, wait=50, load=60, compute=1, write=1))
    stragglers = aggregate_timing([PLAN], commits).stragglers
    assert stragglers.count == len(stragglers.worst) == 1
    (worst,) = stragglers.worst
    assert (worst.chunk, worst.worker, worst.attempt, worst.stage) == ("8", "a:0:x", 2, "read")
    assert (worst.seconds, worst.stage_seconds, worst.stage_expected) == pytest.approx((11, 9, 1))
    assert stragglers.excess_seconds == pytest.approx(8)


def test_chunks_with_more_patches_are_no_stragglers() -> None:
    patches = [1] * 6 + [64] * 3
    commits = [
        commit(n, 100 * n, patches=count, read=0.5, compute=count, write=0.5)
        for n, count in enumerate(patches)
    ]
    assert aggregate_timing([PLAN], commits).stragglers.count == 0


def test_a_straggler_is_slow_for_its_number_of_patches() -> None:
    commits = [commit(n, 100 * n, patches=64, read=1, compute=64) for n in range(6)]
    commits.append(commit(6, 600, patches=2, read=1, compute=20))
    (worst,) = aggregate_timing([PLAN], commits).stragglers.worst
    assert (worst.chunk, worst.patches, worst.stage) == ("6", 2, "compute")
    # One second for reading and one per patch.
    assert (worst.seconds, worst.expected_seconds) == pytest.approx((21, 3))
    assert (worst.stage_seconds, worst.stage_expected) == pytest.approx((20, 2))


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({"compute": 5}, "devices are the limit"),
        ({"read": 5, "compute": 5}, "--depth 2"),  # reading takes as long as the network
        ({"read": 90, "compute": 1}, "Reading is the limit"),  # no depth is large enough
        ({"compute": 1, "write": 90}, "Writing is the limit"),
        ({"compute": 1, "other": 9}, "job folder"),
    ],
)
def test_advice_is_about_the_largest_loss(stages: dict[str, float], expected: str) -> None:
    length = sum(stages.values())
    commits = [commit(n, n * length, **stages) for n in range(10)]
    assert expected in (advice(aggregate_timing([PLAN], commits)) or "")


def test_a_short_job_has_no_advice() -> None:
    commits = [commit(n, n, read=0.5, compute=0.5) for n in range(10)]
    assert advice(aggregate_timing([PLAN], commits)) is None


def test_a_clock_that_is_set_back_gives_no_negative_time() -> None:
    commits = [replace(commit(0, 10, compute=1), finished=START), commit(1, 20, compute=1)]
    timing = aggregate_timing([PLAN], commits)
    assert timing.chunk_seconds_mean >= 0
    assert sum(timing.workers["a:0:x"].shares.values()) == pytest.approx(1)
