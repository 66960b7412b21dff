"""Commit records and the plan -> where the time went; no input or output."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chunkq.executors.base import WorkerName
from chunkq.footprint import footprint
from chunkq.intervals import (
    Intervals,
    Numbers,
    attribute_time,
    covered_seconds,
    max_overlap,
    spread,
)
from chunkq.ledger import Commit
from chunkq.plan import Plan
from chunkq.tasks import chunk_name
from chunkq.timing import (
    BINS,
    STAGES,
    STRAGGLER_FACTOR,
    STRAGGLER_SECONDS,
    WAITING_STAGES,
    Durations,
    FinalizeTiming,
    Straggler,
    Stragglers,
    Timeline,
    Timing,
    Worker,
)

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
STRAGGLERS_LISTED = 20


def aggregate_timing(
    plan: Plan, infer: Iterable[Commit], finalize: Iterable[Commit] = ()
) -> Timing:
    """Sum up a job's commit records. Each is looked at once and kept as some 50 bytes."""
    chunks, blocks = _Columns(plan), _Columns(plan)
    for commit in infer:
        chunks.add(commit)
    for commit in finalize:
        blocks.add(commit)
    return _JobTiming(plan, chunks, blocks).times()


@dataclass
class _Totals:
    """Running sums over commit records."""

    count: int = 0
    patches: int = 0
    retried: int = 0
    peak_rss: int = 0
    busy: float = 0.0
    seconds: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)

    def add(self, commit: Commit) -> None:
        self.count += 1
        self.patches += commit.patches
        self.retried += commit.attempt > 1
        self.peak_rss = max(self.peak_rss, commit.peak_rss)
        self.busy += max(0.0, commit.finished - commit.started)
        self.seconds.update(commit.seconds)
        self.moved.update(commit.moved)


class _Columns:
    """Commit records as columns."""

    def __init__(self, plan: Plan) -> None:
        self._blocks = plan.blocks
        self.started, self.finished = array("d"), array("d")
        self.stages = {stage: array("f") for stage in STAGES}
        self.place, self.attempt, self.worker = array("q"), array("H"), array("l")
        self.names: dict[str, int] = {}
        self.total = _Totals()
        self.by_worker: list[_Totals] = []

    def add(self, commit: Commit) -> None:
        self.total.add(commit)
        number = self.names.setdefault(commit.worker, len(self.names))
        if number == len(self.by_worker):
            self.by_worker.append(_Totals())
        self.by_worker[number].add(commit)
        place = 0
        for index, count in zip(commit.chunk, self._blocks, strict=True):
            place = place * count + index
        self.started.append(commit.started)
        # A clock that was set back must not make a span end before it starts.
        self.finished.append(max(commit.started, commit.finished))
        for stage, column in self.stages.items():
            column.append(max(0.0, commit.seconds.get(stage, 0.0)))
        self.place.append(place)
        self.attempt.append(min(commit.attempt, 0xFFFF))
        self.worker.append(number)


class _JobTiming:
    """One job's columns as arrays, in seconds since its first task's start."""

    def __init__(self, plan: Plan, chunks: _Columns, blocks: _Columns) -> None:
        self.plan, self.columns, self.blocks = plan, chunks, blocks
        begins = [min(c.started) for c in (chunks, blocks) if c.started]
        self.origin = min(begins, default=0.0)
        self.start, self.stop = self._since_origin(chunks)
        self.block_start, self.block_stop = self._since_origin(blocks)
        self.stages = {
            stage: np.frombuffer(column, np.float32) if column else np.empty(0, np.float32)
            for stage, column in chunks.stages.items()
        }
        self.worker = np.array(chunks.worker, np.int64)
        self.completed_by = np.array(blocks.worker, np.int64)
        turns = np.searchsorted(np.sort(self.worker), np.arange(1, len(chunks.names)))
        self.of_worker = np.split(np.argsort(self.worker, kind="stable"), turns)
        self.first = float(self.start.min(initial=np.inf)) if len(self.start) else 0.0
        self.last = float(self.stop.max(initial=0.0))
        self.last_begun = float(self.start.max(initial=0.0))
        self.whole = self.stop - self.start
        self.own = np.maximum(self.whole - self.stages["wait"] - self.stages["load"], 0.0)
        self.places = np.unravel_index(np.array(chunks.place, np.int64), plan.blocks)
        self.voxels = np.ones(len(self.start))
        for axis, place in zip(plan.axes, self.places, strict=True):
            self.voxels *= axis.stop(place) - axis.start(place)

    def times(self) -> Timing:
        plan, total, costs = self.plan, self.columns.total, self.plan.costs
        workers = {name: self._worker(name) for name in sorted(self.columns.names)}
        ends = np.concatenate([self.stop, self.block_stop])
        begins = np.concatenate([self.start, self.block_start])
        wall = float(ends.max(initial=0.0))
        work = max(0.0, self.last - self.first)
        voxels = round(float(self.voxels.sum()))
        moved, gathered = total.moved, self.blocks.total.moved
        flight = max((w.chunks_in_flight for w in workers.values()), default=0)
        arrays = footprint(plan)
        return Timing(
            chunks=total.count,
            planned_chunks=costs.chunks,
            finalized_blocks=self.blocks.total.count,
            planned_blocks=costs.finalized_blocks,
            patches=total.patches,
            planned_patches=costs.patches,
            voxels=voxels,
            started=self.origin,
            wall_seconds=wall,
            paused_seconds=max(0.0, wall - covered_seconds(begins, ends)),
            work_seconds=work,
            voxels_per_second=voxels / work if work else 0.0,
            seconds={stage: total.seconds[stage] for stage in STAGES}
            | {"finalize": self.blocks.total.busy},
            chunk_seconds_mean=total.busy / total.count if total.count else 0.0,
            bytes={
                "input": moved["input"],
                "output": moved["output"] + gathered["output"],
                "pieces_written": moved["pieces"],
                "pieces_read": gathered["pieces_read"],
            },
            planned_bytes={
                "input": costs.input_bytes,
                "output": costs.output_bytes,
                "pieces_written": costs.piece_bytes,
                "pieces_read": costs.piece_bytes,
            },
            peak_rss_bytes=max((w.peak_rss_bytes for w in workers.values()), default=0),
            planned_array_bytes=arrays.peak_bytes(max(1, flight)),
            one_more_in_flight_bytes=arrays.peak_bytes(2) - arrays.peak_bytes(1),
            chunks_in_flight=flight,
            retried=total.retried,
            worker_time_shares=_worker_time_shares(workers.values()),
            tail_seconds=max((w.tail_seconds for w in workers.values()), default=0.0),
            finalizing=FinalizeTiming(
                self.blocks.total.count,
                self.blocks.total.busy,
                max(0.0, wall - self.last) if self.blocks.total.count else 0.0,
            ),
            timeline=self._course(workers.values()),
            durations=self._durations(),
            stragglers=self._stragglers(),
            workers=workers,
        )

    def _since_origin(self, columns: _Columns) -> Intervals:
        return (
            np.array(columns.started, np.float64) - self.origin,
            np.array(columns.finished, np.float64) - self.origin,
        )

    def _stage(self, stage: str, mine: Any = ...) -> Intervals:
        """Return when a stage of the chunks went on."""
        before = STAGES[: STAGES.index(stage)]
        begin = self.start[mine] + sum(self.stages[s][mine].astype(np.float64) for s in before)
        return begin, begin + self.stages[stage][mine]

    def _worker(self, name: str) -> Worker:
        number = self.columns.names[name]
        total, mine = self.columns.by_worker[number], self.of_worker[number]
        start, stop = self.start[mine], self.stop[mine]
        first, last = float(start.min()), float(stop.max())
        as_finalizer = self.blocks.names.get(name, -1)
        completing = self.completed_by == as_finalizer
        peaks = [total.peak_rss]
        if as_finalizer >= 0:
            peaks.append(self.blocks.by_worker[as_finalizer].peak_rss)
        layers = [
            *(self._stage(stage, mine) for stage in WAITING_STAGES[:4]),
            (self.block_start[completing], self.block_stop[completing]),
            (start, stop),
        ]
        held = attribute_time(layers, first, last)
        span = sum(held)
        shares = dict.fromkeys(WAITING_STAGES, 0.0) | {"other": 1.0}
        if span:
            shares = {
                holder: time / span for holder, time in zip(WAITING_STAGES, held, strict=True)
            }
        where = WorkerName.parse(name)
        return Worker(
            host=where.host,
            device=where.device,
            chunks=total.count,
            patches=total.patches,
            first=first,
            seconds=last - first,
            device_busy_share=shares["compute"],
            device_wait_share=1 - shares["compute"],
            shares=shares,
            stage_seconds={stage: total.seconds[stage] for stage in STAGES},
            bytes=dict(total.moved),
            chunks_in_flight=max_overlap(start, stop),
            peak_rss_bytes=max(peaks),
            retried=total.retried,
            # Whoever left while chunks were still begun did not wait for the last ones.
            tail_seconds=self.last - last if last >= self.last_begun else 0.0,
        )

    def _course(self, workers: Iterable[Worker]) -> Timeline:
        if not self.last > self.first:
            return Timeline()
        edges = np.linspace(self.first, self.last, BINS + 1)
        width = float(edges[1] - edges[0])
        begin, end = self._stage("compute")
        spans = np.array([(w.first, w.seconds) for w in workers], np.float64)

        def per_second(starts: Numbers, stops: Numbers, amounts: Numbers) -> tuple[float, ...]:
            return tuple(float(v) for v in spread(starts, stops, amounts, edges) / width)

        return Timeline(
            width,
            per_second(self.start, self.stop, self.voxels),
            per_second(spans[:, 0], spans.sum(1), spans[:, 1]),
            per_second(begin, end, end - begin),
        )

    def _durations(self) -> Durations:
        if not len(self.own):
            return Durations()
        kinds = {"whole": self.whole, "own": self.own} | self.stages
        low, high = max(float(self.own.min()), 1e-3), max(float(self.own.max()), 1e-3)
        bins = int(np.clip(2 * np.sqrt(len(self.own)), 4, BINS // 2))
        edges = np.geomspace(low * 0.999, max(high, low * 1.01) * 1.001, bins + 1)
        counts, _ = np.histogram(self.own.clip(edges[0], edges[-1]), edges)
        return Durations(
            float(self.whole.mean()),
            {kind: _quantiles(values) for kind, values in kinds.items()},
            tuple(float(edge) for edge in edges),
            tuple(int(count) for count in counts),
        )

    def _stragglers(self) -> Stragglers:
        if not len(self.own):
            return Stragglers()
        median = float(np.median(self.own))
        limit = max(median * STRAGGLER_FACTOR, median + STRAGGLER_SECONDS)
        late = np.flatnonzero(self.own > limit)
        worst = late[np.argsort(-self.own[late], kind="stable")][:STRAGGLERS_LISTED]
        known = {stage: self.stages[stage] for stage in ("read", "compute", "write")}
        known["other"] = np.maximum(self.own - sum(known.values()), 0.0)
        usual = {stage: float(np.median(values)) for stage, values in known.items()}
        names = list(self.columns.names)

        def told(number: int) -> Straggler:
            over = {stage: float(values[number]) - usual[stage] for stage, values in known.items()}
            stage = max(over, key=lambda s: over[s])
            return Straggler(
                chunk_name(tuple(int(axis[number]) for axis in self.places)),
                names[self.worker[number]],
                self.columns.attempt[number],
                float(self.own[number]),
                stage,
                float(known[stage][number]),
                usual[stage],
            )

        return Stragglers(
            median=median,
            count=len(late),
            excess_seconds=float((self.own[late] - median).sum()),
            worst=tuple(told(int(number)) for number in worst),
        )


def _worker_time_shares(workers: Iterable[Worker]) -> dict[str, float]:
    seconds = dict.fromkeys((*WAITING_STAGES, "tail"), 0.0)
    for worker in workers:
        seconds["tail"] += worker.tail_seconds
        for holder, share in worker.shares.items():
            seconds[holder] += share * worker.seconds
    whole = sum(seconds.values())
    if not whole:
        return seconds | {"other": 1.0}
    return {holder: time / whole for holder, time in seconds.items()}


def _quantiles(values: Any) -> dict[str, float]:
    found = np.quantile(values.astype(np.float64), QUANTILES)
    return {f"{q:g}": float(value) for q, value in zip(QUANTILES, found, strict=True)}
