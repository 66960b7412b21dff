"""The figures of a report add up to the commit records they are taken from."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq.diagnosis import LOSSES, REMEDIES, advice, conclusion
from chunkq.executors.base import WorkerName
from chunkq.intervals import attribute_time, covered_seconds, max_overlap, spread
from chunkq.ledger import Commit
from chunkq.timing import BINS, STAGES, WAITING_STAGES, Timing
from chunkq.timing_aggregation import aggregate_timing
from tests.strategies import plan_for

START = 1.7e9
PLAN = plan_for((100,), (10,), chunksize=[10])
FEW_SECONDS = st.floats(0, 50).map(lambda s: round(s, 3))
SPANS = st.lists(st.tuples(FEW_SECONDS, FEW_SECONDS), max_size=12)


def commit(
    chunk: int, begin: float, worker: str = "a:0:x", attempt: int = 1, **stages: float
) -> Commit:
    """A chunk whose stages follow one another from `begin` on."""
    seconds = {stage: stages.get(stage, 0.0) for stage in STAGES}
    started = START + begin
    finished = started + sum(seconds.values()) + stages.get("other", 0.0)
    moved = {"input": 100 + chunk, "output": 40, "pieces": chunk}
    return Commit(
        "infer", (chunk,), attempt, worker, started, finished, seconds, moved, {}, 3, 1000 + chunk
    )


@st.composite
def records(draw: st.DrawFn) -> list[Commit]:
    """Up to ten chunks by up to three workers, in any order and overlapping at will."""
    count = draw(st.integers(0, 10))
    return [
        commit(
            chunk,
            draw(FEW_SECONDS),
            draw(st.sampled_from(("a:0:x", "a:1:y", "b:cpu:z"))),
            draw(st.integers(1, 3)),
            **{stage: draw(FEW_SECONDS) for stage in (*STAGES, "other")},
        )
        for chunk in range(count)
    ]


def test_a_workers_peak_counts_the_blocks_it_completed() -> None:
    chunk = commit(0, 0.0)
    mine = replace(commit(1, 1.0), kind="finalize", peak_rss=7000)
    elsewhere = replace(commit(2, 1.0, "host"), kind="finalize", peak_rss=9000)
    times = aggregate_timing(PLAN, [chunk], [mine, elsewhere])
    assert times.peak_rss_bytes == times.workers[chunk.worker].peak_rss_bytes == 7000


def arrays(spans: list[tuple[float, float]]) -> tuple[Any, Any]:
    """Starts and stops of spans given by start and length."""
    starts = np.array([start for start, _ in spans], np.float64)
    return starts, starts + np.array([length for _, length in spans], np.float64)


@given(st.lists(SPANS, min_size=1, max_size=4), st.floats(0, 40), st.floats(0, 60))
def test_layers_share_out_the_whole_time(
    layers: list[list[tuple[float, float]]], low: float, length: float
) -> None:
    held = attribute_time([arrays(spans) for spans in layers], low, low + length)
    assert len(held) == len(layers) + 1
    assert min(held) >= 0
    assert sum(held) == pytest.approx(length, abs=1e-9)
    starts, stops = arrays(layers[0])
    first = covered_seconds(starts.clip(low, low + length), stops.clip(low, low + length))
    assert held[0] == pytest.approx(first, abs=1e-9)


@given(SPANS)
def test_a_moment_is_covered_once_however_many_spans_last(spans: list[tuple[float, float]]) -> None:
    starts, stops = arrays(spans)
    moments = np.unique(np.concatenate([starts, stops]))
    lengths = np.diff(moments)
    middles = moments[:-1] + lengths / 2
    at_once = ((starts[:, None] <= middles) & (middles < stops[:, None])).sum(0)
    assert covered_seconds(starts, stops) == pytest.approx(
        float(lengths[at_once > 0].sum()), abs=1e-9
    )
    assert max_overlap(starts, stops) >= int(at_once.max(initial=0))


@given(SPANS, st.integers(1, 9))
def test_what_is_spread_over_time_is_not_lost(spans: list[tuple[float, float]], bins: int) -> None:
    starts, stops = arrays(spans)
    amounts = np.arange(1.0, len(spans) + 1)
    parts = spread(starts, stops, amounts, np.linspace(-1, 101, bins + 1))
    assert parts.sum() == pytest.approx(amounts.sum())
    assert (parts >= -1e-9).all()


def test_cutting_the_time_into_slabs_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    layers = [arrays(list(zip(*rng.uniform(0, 9, (2, 50)), strict=True))) for _ in range(3)]
    whole = attribute_time(layers, 1.0, 12.0)
    monkeypatch.setattr("chunkq.intervals.SLAB", 7)
    assert attribute_time(layers, 1.0, 12.0) == pytest.approx(whole)


@given(records())
def test_figures_add_up_to_the_records(commits: list[Commit]) -> None:
    times = aggregate_timing(PLAN, commits)
    workers = times.workers.values()
    assert times.chunks == sum(w.chunks for w in workers) == len(commits)
    assert times.patches == sum(w.patches for w in workers) == 3 * len(commits)
    assert times.voxels == 10 * len(commits)
    assert times.retried == sum(c.attempt > 1 for c in commits)
    assert times.peak_rss_bytes == max((c.peak_rss for c in commits), default=0)
    for stage in STAGES:
        total = sum(c.seconds[stage] for c in commits)
        assert times.seconds[stage] == pytest.approx(total)
        assert sum(w.stage_seconds[stage] for w in workers) == pytest.approx(total)
    for key, moved in (("input", "input"), ("output", "output"), ("pieces_written", "pieces")):
        assert times.bytes[key] == sum(c.moved[moved] for c in commits)
    assert sum(times.durations.counts) == len(commits)
    course = times.timeline
    if course.bin_seconds:
        assert len(course.voxels_per_second) == len(course.workers) == BINS
        assert sum(course.voxels_per_second) * course.bin_seconds == pytest.approx(times.voxels)
        spans = sum(w.seconds for w in workers)
        assert sum(course.workers) * course.bin_seconds == pytest.approx(spans, abs=1e-3)


@given(records())
def test_shares_are_shares_of_the_whole(commits: list[Commit]) -> None:
    times = aggregate_timing(PLAN, commits)
    for worker in times.workers.values():
        assert set(worker.shares) == set(WAITING_STAGES)
        assert sum(worker.shares.values()) == pytest.approx(1)
        assert min(worker.shares.values()) >= 0
        assert worker.device_busy_share + worker.device_wait_share == pytest.approx(1)
        assert 0 <= worker.tail_seconds <= times.tail_seconds
    if times.worker_time_shares:
        assert sum(times.worker_time_shares.values()) == pytest.approx(1)


@given(records(), st.randoms())
def test_the_order_of_the_records_does_not_matter(commits: list[Commit], random: Any) -> None:
    mixed = random.sample(commits, len(commits))
    one, other = aggregate_timing(PLAN, commits), aggregate_timing(PLAN, mixed)
    assert other.worker_time_shares == pytest.approx(one.worker_time_shares)
    assert list(other.workers) == list(one.workers)
    assert other.durations.quantiles == one.durations.quantiles


@given(records())
def test_figures_survive_the_report(commits: list[Commit]) -> None:
    import json

    times = aggregate_timing(PLAN, commits)
    assert Timing.from_dict(json.loads(json.dumps(times.as_dict())) | {"digest": "x"}) == times


@given(records())
def test_there_is_always_a_conclusion(commits: list[Commit]) -> None:
    times = aggregate_timing(PLAN, commits)
    assert conclusion(times).endswith(".")
    assert len(advice(times) or "") < 300


def test_every_loss_has_words_and_a_remedy() -> None:
    assert set(LOSSES) == set(REMEDIES) == {*WAITING_STAGES, "tail"} - {"compute"}


def test_a_device_that_computes_while_others_read_loses_nothing() -> None:
    # Chunk 1 is read and chunk 0 written while the other is computed.
    first = commit(0, 0, read=1, compute=4, write=2)
    second = commit(1, 1, read=2, wait=2, compute=4, write=1)
    worker = aggregate_timing(PLAN, [first, second]).workers["a:0:x"]
    assert worker.seconds == 10
    assert worker.shares == pytest.approx(
        {"compute": 0.8, "load": 0, "read": 0.1, "write": 0.1}
        | {"finalize": 0, "other": 0, "idle": 0}
    )
    assert worker.chunks_in_flight == 2


def test_time_without_any_chunk_is_idle_unless_blocks_are_finalized() -> None:
    chunks = [commit(0, 0, compute=1), commit(1, 9, compute=1)]
    block = replace(commit(0, 2, other=4), kind="finalize")
    shares = aggregate_timing(PLAN, chunks, [block]).workers["a:0:x"].shares
    assert shares["finalize"] == pytest.approx(0.4)
    assert shares["idle"] == pytest.approx(0.4)


def test_only_workers_that_found_nothing_more_wait_for_the_last_one() -> None:
    commits = [
        commit(0, 0, "left:0:x", compute=2),  # chunks were begun after it: it was stopped
        commit(1, 0, "early:0:y", compute=6),
        commit(2, 4, "late:0:z", compute=16),
    ]
    times = aggregate_timing(PLAN, commits)
    tails = {WorkerName.parse(name).host: w.tail_seconds for name, w in times.workers.items()}
    assert tails == pytest.approx({"left": 0, "early": 14, "late": 0})
    assert times.tail_seconds == pytest.approx(14)
    assert times.worker_time_shares["tail"] == pytest.approx(14 / (2 + 6 + 16 + 14))
    assert "waiting for the last worker" in conclusion(times)


def test_a_straggler_is_named_with_its_stage_and_loading_makes_none() -> None:
    commits = [commit(n, 3 * n, read=1, compute=1, write=1) for n in range(8)]
    commits.append(commit(8, 24, attempt=2, read=9, compute=1, write=1))
    commits.append(commit(9, 30, read=1, wait=50, load=60, compute=1, write=1))
    found = aggregate_timing(PLAN, commits).stragglers
    assert found.count == len(found.worst) == 1
    (worst,) = found.worst
    assert (worst.chunk, worst.worker, worst.attempt, worst.stage) == ("8", "a:0:x", 2, "read")
    assert (worst.seconds, worst.stage_seconds, worst.stage_median) == pytest.approx((11, 9, 1))
    assert found.excess_seconds == pytest.approx(8)


@pytest.mark.parametrize(
    ("stages", "depth", "words"),
    [
        ({"compute": 5}, 1, "devices are the limit"),
        ({"read": 5, "compute": 5}, 1, "--depth 2"),  # reading fits beside the network
        ({"read": 90, "compute": 1}, 1, "Reading is the limit"),  # no depth makes up for that
        ({"compute": 1, "write": 90}, 1, "Writing is the limit"),
        ({"compute": 1, "other": 9}, 1, "job folder"),
    ],
)
def test_advice_is_about_the_largest_loss(stages: dict[str, float], depth: int, words: str) -> None:
    length = sum(stages.values())
    commits = [commit(n, n * length, **stages) for n in range(10)]
    assert words in (advice(aggregate_timing(PLAN, commits)) or "")


def test_a_short_job_gets_no_advice() -> None:
    commits = [commit(n, n, read=0.5, compute=0.5) for n in range(10)]
    assert advice(aggregate_timing(PLAN, commits)) is None


def test_a_clock_set_back_makes_no_negative_time() -> None:
    commits = [replace(commit(0, 10, compute=1), finished=START), commit(1, 20, compute=1)]
    times = aggregate_timing(PLAN, commits)
    assert times.chunk_seconds_mean >= 0
    assert sum(times.workers["a:0:x"].shares.values()) == pytest.approx(1)
