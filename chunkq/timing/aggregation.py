"""Aggregate the commit records of a job to its timing, without I/O."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chunkq.job.task_records import Commit
from chunkq.job.tasks import chunk_name
from chunkq.plan.costs import Costs, total_costs
from chunkq.plan.footprint import largest_footprint
from chunkq.plan.plan import Plan
from chunkq.plan.pyramid import LevelCosts
from chunkq.queue.contract.executor import WorkerName
from chunkq.timing.intervals import (
    Intervals,
    Numbers,
    attribute_time,
    covered_seconds,
    max_overlap,
    spread,
)
from chunkq.timing.timing import (
    BINS,
    STAGES,
    STRAGGLER_FACTOR,
    STRAGGLER_SECONDS,
    TIME_PARTS,
    Durations,
    Fetching,
    FinalizeTiming,
    LevelTiming,
    Straggler,
    Stragglers,
    Timeline,
    Timing,
    Worker,
)

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
MAX_STRAGGLERS = 20
"""Number of stragglers that are listed."""


def aggregate_timing(
    plans: Sequence[Plan],
    infer: Iterable[Commit],
    finalize: Iterable[Commit] = (),
    costs: Costs | None = None,
    downsample: Iterable[Commit] = (),
    levels: Iterable[LevelCosts] = (),
) -> Timing:
    """Return the timing of a job from its commit records of inference, finalizing and pyramids.

    `plans` are the plans of its items, `costs` those of its tasks, by default of all chunks, and
    `levels` those of the levels of its pyramids. Reads each record once and holds about 50 bytes
    of it.
    """
    chunks, blocks, units = _Columns(plans), _Columns(plans), _Columns(None)
    for commit in infer:
        chunks.add(commit)
    for commit in finalize:
        blocks.add(commit)
    for commit in downsample:
        units.add(commit)
    timing = _JobTiming(plans, chunks, blocks, units)
    return timing.timing(costs or total_costs(plans), list(levels))


@dataclass
class _Totals:
    """Sums over commit records."""

    count: int = 0
    patches: int = 0
    skipped: int = 0
    requests: int = 0
    retried: int = 0
    peak_rss: int = 0
    busy: float = 0.0
    seconds: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)

    def add(self, commit: Commit) -> None:
        self.count += 1
        self.patches += commit.patches
        self.skipped += commit.skipped
        self.requests += commit.requests
        self.retried += commit.attempt > 1
        self.peak_rss = max(self.peak_rss, commit.peak_rss)
        self.busy += max(0.0, commit.finished - commit.started)
        self.seconds.update(commit.seconds)
        self.moved.update(commit.moved)


class _Columns:
    """Commit records as columns.

    `item` is the number of the item, `flat_index` the C-order index of the chunk. `worker` is a
    number into `names`, whose totals are in `by_worker`. Without `plans`, chunks are no blocks.
    """

    def __init__(self, plans: Sequence[Plan] | None) -> None:
        self._blocks = [] if plans is None else [plan.index_bounds.stop for plan in plans]
        self.started, self.finished = array("d"), array("d")
        self.stages = {stage: array("f") for stage in STAGES}
        self.flat_index, self.attempt, self.worker = array("q"), array("H"), array("l")
        self.item, self.patches = array("l"), array("q")
        self.names: dict[str, int] = {}
        self.total = _Totals()
        self.by_worker: list[_Totals] = []

    def add(self, commit: Commit) -> None:
        self.total.add(commit)
        number = self.names.setdefault(commit.worker, len(self.names))
        if number == len(self.by_worker):
            self.by_worker.append(_Totals())
        self.by_worker[number].add(commit)
        flat_index = 0
        if self._blocks:
            for index, count in zip(commit.chunk, self._blocks[commit.item], strict=True):
                flat_index = flat_index * count + index
        self.started.append(commit.started)
        # The clock can be set back during a task; its interval must not be negative.
        self.finished.append(max(commit.started, commit.finished))
        for stage, column in self.stages.items():
            column.append(max(0.0, commit.seconds.get(stage, 0.0)))
        self.flat_index.append(flat_index)
        self.item.append(commit.item)
        self.patches.append(commit.patches)
        self.attempt.append(min(commit.attempt, 0xFFFF))
        self.worker.append(number)


class _JobTiming:
    """Columns of one job as arrays; times are in seconds since the start of its first task.

    `duration` and `own_duration` are the times `whole` and `own` of `Durations`.
    """

    def __init__(
        self, plans: Sequence[Plan], chunks: _Columns, blocks: _Columns, units: _Columns
    ) -> None:
        self.plans, self.columns, self.blocks, self.units = plans, chunks, blocks, units
        begins = [min(c.started) for c in (chunks, blocks, units) if c.started]
        self.origin = min(begins, default=0.0)
        self.start, self.stop = self._intervals(chunks)
        self.block_start, self.block_stop = self._intervals(blocks)
        self.unit_start, self.unit_stop = self._intervals(units)
        self.stages = {
            stage: np.frombuffer(column, np.float32) if column else np.empty(0, np.float32)
            for stage, column in chunks.stages.items()
        }
        self.worker = np.array(chunks.worker, np.int64)
        self.finalized_by = np.array(blocks.worker, np.int64)
        self.downsampled_by = np.array(units.worker, np.int64)
        splits = np.searchsorted(np.sort(self.worker), np.arange(1, len(chunks.names)))
        self.rows_by_worker = np.split(np.argsort(self.worker, kind="stable"), splits)
        self.first = float(self.start.min(initial=np.inf)) if len(self.start) else 0.0
        self.last = float(self.stop.max(initial=0.0))
        self.last_start = float(self.start.max(initial=0.0))
        self.duration = self.stop - self.start
        computing = self.duration - self.stages["wait"] - self.stages["load"]
        self.own_duration = np.maximum(computing, 0.0)
        self.item = np.array(chunks.item, np.int64)
        self.flat_index = np.array(chunks.flat_index, np.int64)
        self.patches = np.array(chunks.patches, np.float64)

    def _name(self, row: int) -> str:
        """Return the name of the chunk in a row."""
        item = int(self.item[row])
        index = np.unravel_index(self.flat_index[row], self.plans[item].index_bounds.stop)
        name = chunk_name(tuple(int(along) for along in index))
        return name if len(self.plans) == 1 else f"{item}/{name}"

    def timing(self, costs: Costs, levels: Sequence[LevelCosts]) -> Timing:
        """Return the timing of the job, whose tasks have these costs."""
        total = self.columns.total
        workers = {name: self._worker(name) for name in sorted(self.columns.names)}
        ends = np.concatenate([self.stop, self.block_stop, self.unit_stop])
        begins = np.concatenate([self.start, self.block_start, self.unit_start])
        wall = float(ends.max(initial=0.0))
        work = max(0.0, self.last - self.first)
        all_voxels = sum(plan.region.size for plan in self.plans)
        voxels = round(all_voxels * total.patches / total_costs(self.plans).patches)
        moved, finalize_moved = total.moved, self.blocks.total.moved
        units = self.units.total
        in_flight = max((w.chunks_in_flight for w in workers.values()), default=0)
        arrays = largest_footprint(self.plans)
        return Timing(
            chunks=total.count,
            planned_chunks=costs.chunks,
            finalized_blocks=self.blocks.total.count,
            planned_blocks=costs.finalized_blocks,
            patches=total.patches,
            planned_patches=costs.patches,
            skipped_patches=total.skipped,
            voxels=voxels,
            started=self.origin,
            wall_seconds=wall,
            paused_seconds=max(0.0, wall - covered_seconds(begins, ends)),
            work_seconds=work,
            patches_per_second=total.patches / work if work else 0.0,
            voxels_per_second=voxels / work if work else 0.0,
            seconds={stage: total.seconds[stage] for stage in STAGES}
            | {"finalize": self.blocks.total.busy},
            chunk_seconds_mean=total.busy / total.count if total.count else 0.0,
            bytes={
                "input": moved["input"],
                "output": moved["output"] + finalize_moved["output"],
                "pieces_written": moved["pieces"],
                "pieces_read": finalize_moved["pieces_read"],
                "levels": units.moved["level"],
                "level_below": units.moved["level_below"],
            },
            planned_bytes={
                "input": costs.input_bytes,
                "output": costs.output_bytes,
                "pieces_written": costs.piece_bytes,
                "pieces_read": costs.piece_bytes,
                "levels": sum(level.bytes_written for level in levels),
                "level_below": sum(level.bytes_read for level in levels),
            },
            peak_rss_bytes=max((w.peak_rss_bytes for w in workers.values()), default=0),
            planned_array_bytes=arrays.peak_bytes(max(1, in_flight)),
            one_more_in_flight_bytes=arrays.peak_bytes(2) - arrays.peak_bytes(1),
            chunks_in_flight=in_flight,
            retried=total.retried,
            worker_time_shares=_worker_time_shares(workers.values()),
            tail_seconds=max((w.tail_seconds for w in workers.values()), default=0.0),
            finalizing=FinalizeTiming(
                self.blocks.total.count,
                self.blocks.total.busy,
                max(0.0, wall - self.last) if self.blocks.total.count else 0.0,
            ),
            timeline=self._timeline(workers.values()),
            durations=self._durations(),
            stragglers=self._stragglers(),
            workers=workers,
            fetching=Fetching(total.requests, moved["fetched"]),
            levels=LevelTiming(units.count, sum(level.tasks for level in levels), units.busy),
        )

    def _intervals(self, columns: _Columns) -> Intervals:
        """Return the intervals of the records, in seconds since the origin."""
        return (
            np.array(columns.started, np.float64) - self.origin,
            np.array(columns.finished, np.float64) - self.origin,
        )

    def _stage(self, stage: str, rows: Any = ...) -> Intervals:
        """Return the intervals in which the chunks of these rows were in a stage."""
        before = STAGES[: STAGES.index(stage)]
        begin = self.start[rows] + sum(self.stages[s][rows].astype(np.float64) for s in before)
        return begin, begin + self.stages[stage][rows]

    def _worker(self, name: str) -> Worker:
        """Return the timing of the worker process `name`, which has computed a chunk."""
        number = self.columns.names[name]
        total, rows = self.columns.by_worker[number], self.rows_by_worker[number]
        start, stop = self.start[rows], self.stop[rows]
        first, last = float(start.min()), float(stop.max())
        finalizer = self.blocks.names.get(name, -1)
        block_rows = self.finalized_by == finalizer
        unit_rows = self.downsampled_by == self.units.names.get(name, -1)
        peaks = [total.peak_rss]
        if finalizer >= 0:
            peaks.append(self.blocks.by_worker[finalizer].peak_rss)
        layers = [
            *(self._stage(stage, rows) for stage in TIME_PARTS[:4]),
            (self.block_start[block_rows], self.block_stop[block_rows]),
            (self.unit_start[unit_rows], self.unit_stop[unit_rows]),
            (start, stop),
        ]
        seconds = attribute_time(layers, first, last)
        total_seconds = sum(seconds)
        shares = dict.fromkeys(TIME_PARTS, 0.0) | {"other": 1.0}
        if total_seconds:
            shares = {
                stage: time / total_seconds for stage, time in zip(TIME_PARTS, seconds, strict=True)
            }
        worker = WorkerName.parse(name)
        return Worker(
            host=worker.host,
            device=worker.device,
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
            # A worker that stopped while other chunks were started did not wait for the last one.
            tail_seconds=self.last - last if last >= self.last_start else 0.0,
        )

    def _timeline(self, workers: Iterable[Worker]) -> Timeline:
        """Return the timeline, empty if all chunks together took no time."""
        if not self.last > self.first:
            return Timeline()
        edges = np.linspace(self.first, self.last, BINS + 1)
        width = float(edges[1] - edges[0])
        begin, end = self._stage("compute")
        active = np.array([(w.first, w.seconds) for w in workers], np.float64)

        def per_second(starts: Numbers, stops: Numbers, amounts: Numbers) -> tuple[float, ...]:
            return tuple(float(v) for v in spread(starts, stops, amounts, edges) / width)

        return Timeline(
            width,
            per_second(self.start, self.stop, self.patches),
            per_second(active[:, 0], active.sum(1), active[:, 1]),
            per_second(begin, end, end - begin),
        )

    def _durations(self) -> Durations:
        """Return the distribution of durations, empty if there is no chunk."""
        durations = self.own_duration
        if not len(durations):
            return Durations()
        kinds = {"whole": self.duration, "own": durations} | self.stages
        low, high = max(float(durations.min()), 1e-3), max(float(durations.max()), 1e-3)
        bins = int(np.clip(2 * np.sqrt(len(durations)), 4, BINS // 2))
        edges = np.geomspace(low * 0.999, max(high, low * 1.01) * 1.001, bins + 1)
        counts, _ = np.histogram(durations.clip(edges[0], edges[-1]), edges)
        return Durations(
            float(self.duration.mean()),
            {kind: _quantiles(values) for kind, values in kinds.items()},
            tuple(float(edge) for edge in edges),
            tuple(int(count) for count in counts),
        )

    def _stragglers(self) -> Stragglers:
        """Return the chunks that `STRAGGLER_RULE` selects, those with the largest excess first."""
        durations, patches = self.own_duration, np.maximum(self.patches, 1.0)
        if not len(durations):
            return Stragglers()
        timed = ("read", "compute", "write")
        stages: dict[str, Numbers] = {s: self.stages[s].astype(np.float64) for s in timed}
        stages["other"] = np.maximum(durations - sum(stages.values()), 0.0)
        usual = {stage: np.full(len(patches), _median(time)) for stage, time in stages.items()}
        usual["compute"] = patches * _median(stages["compute"] / patches)
        expected = sum(usual.values(), np.zeros(len(patches)))
        limit = np.maximum(expected * STRAGGLER_FACTOR, expected + STRAGGLER_SECONDS)
        slow = np.flatnonzero(durations > limit)
        excess = durations - expected
        worst = slow[np.argsort(-excess[slow], kind="stable")][:MAX_STRAGGLERS]
        names = list(self.columns.names)

        def straggler(number: int) -> Straggler:
            stage = max(stages, key=lambda s: float(stages[s][number] - usual[s][number]))
            return Straggler(
                self._name(number),
                names[self.worker[number]],
                self.columns.attempt[number],
                self.columns.patches[number],
                float(durations[number]),
                float(expected[number]),
                stage,
                float(stages[stage][number]),
                float(usual[stage][number]),
            )

        return Stragglers(
            median=_median(durations),
            count=len(slow),
            excess_seconds=float(excess[slow].sum()),
            worst=tuple(straggler(int(number)) for number in worst),
        )


def _worker_time_shares(workers: Iterable[Worker]) -> dict[str, float]:
    """Return the shares of the time and tails of all workers; they add up to 1."""
    seconds = dict.fromkeys((*TIME_PARTS, "tail"), 0.0)
    for worker in workers:
        seconds["tail"] += worker.tail_seconds
        for stage, share in worker.shares.items():
            seconds[stage] += share * worker.seconds
    total = sum(seconds.values())
    if not total:
        return seconds | {"other": 1.0}
    return {stage: time / total for stage, time in seconds.items()}


def _quantiles(values: Any) -> dict[str, float]:
    quantiles = _interpolated(values, QUANTILES)
    return {f"{q:g}": value for q, value in zip(QUANTILES, quantiles, strict=True)}


def _median(values: Any) -> float:
    (median,) = _interpolated(values, (0.5,))
    return median


def _interpolated(values: Any, quantiles: Sequence[float]) -> list[float]:
    """Return quantiles of at least one value, interpolated linearly between the sorted values.

    NumPy's own functions would import numpy.ma, which takes 30 ms.
    """
    ordered = np.sort(values.astype(np.float64))
    positions = np.multiply(quantiles, len(ordered) - 1)
    interpolated = np.interp(positions, np.arange(len(ordered)), ordered)
    return [float(value) for value in interpolated]
