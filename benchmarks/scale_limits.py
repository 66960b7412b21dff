"""Throughput of a number of workers, its limit, where the limit changes, and what to set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from benchmarks.scale_inputs import Inputs
from benchmarks.scale_model import HEARTBEATS_PER_S, RENEW, Simulation, setup_for
from benchmarks.scale_work import Case

SHARED = ("rq", "dask", "ray")
BUSY = 0.95
"""Target for the share of time in which a device is busy."""
MAX_SIMULATED = 1024
"""Largest number of workers to simulate; for more, a slice of this size is simulated."""
SEED = 1
STORE = ("store bandwidth", "store reads", "store writes", "commits")


@dataclass(frozen=True)
class Row:
    """Result for a number of workers; shares are fractions of 1.

    `uses` has the used share of each resource.
    """

    executor: str
    chunk: int
    workers: int
    depth: int
    chunks_per_s: float
    uses: dict[str, float]
    queue_use: float
    heartbeats: float
    hours: float
    seal_hours: float
    advice: str = ""

    @property
    def limit(self) -> str:
        """The most used resource; `sealing` if that takes longer than all chunks."""
        if self.seal_hours > self.hours:
            return "sealing"
        return max(self.uses, key=self.uses.__getitem__)

    @property
    def busy(self) -> float:
        """Share of time in which a device computes, until the last chunk is done."""
        return self.uses["device"]

    @property
    def store_use(self) -> float:
        """Largest used share of the store's resources: bandwidth, reads, writes, commits."""
        return max(self.uses[name] for name in STORE)

    @property
    def total(self) -> float:
        """Hours from the first chunk until the output is sealed."""
        return self.hours + self.seal_hours


@dataclass(frozen=True)
class Regime:
    """A range of worker numbers with one chunk size and one limit, from `fewest` to `most`.

    Of several queues with the same range and limit, the rows are those of the most used queue.
    """

    executors: tuple[str, ...]
    fewest: Row
    most: Row

    def as_dict(self) -> dict[str, object]:
        """Return JSON values; pairs are for the fewest and the most workers."""
        ends = (self.fewest, self.most)
        return {
            "chunk": self.most.chunk,
            "executors": self.executors,
            "workers": [row.workers for row in ends],
            "limit": self.most.limit,
            "device_busy": [row.busy for row in ends],
            "queue_use": [row.queue_use for row in ends],
            "store_use": [row.store_use for row in ends],
            "hours": [row.hours for row in ends],
            "seal_hours": self.most.seal_hours,
            "what_to_set": self.most.advice,
        }


def row_for(inputs: Inputs, case: Case, executor: str, workers: int, depth: int) -> Row:
    """Simulate one number of workers."""
    work = case.work
    setup = setup_for(inputs, work, executor, workers, depth)
    enqueued, drained = (inputs.queue(executor, name) for name in ("enqueue_per_s", "tasks_per_s"))
    bounds = setup.bounds() | {"enqueueing": enqueued}
    rate = 0.0
    if setup.queue_per_s:  # otherwise heartbeats alone exceed the queue's rate
        part, share = setup.slice(MAX_SIMULATED)
        rate = min(Simulation(part, SEED).steady() / share, enqueued)
    return Row(
        executor=executor,
        chunk=case.chunk,
        workers=workers,
        depth=depth,
        chunks_per_s=rate,
        uses={name: rate / bound if bound else 1.0 for name, bound in bounds.items()},
        queue_use=1 - (setup.queue_per_s - rate * setup.queue_requests) / drained,
        heartbeats=1 - setup.queue_per_s / drained,
        hours=work.chunks / rate / 3600 if rate else math.inf,
        seal_hours=case.seal_hours(inputs),
    )


def advise(row: Row, rows: Sequence[Row], inputs: Inputs) -> str:
    """Return what to set: a better chunk size if one was simulated, else what raises the limit."""
    same_workers = [r for r in rows if (r.executor, r.workers) == (row.executor, row.workers)]
    best = min(same_workers, key=lambda r: r.total)
    if best.total < 0.9 * row.total:
        return f"chunksize {best.chunk}: {hours(best.total)} h in total"
    if row.busy >= BUSY and row.limit != "sealing":
        return "nothing; more devices make it faster"
    if row.limit == "queue":
        return advise_on_queue(row, inputs)
    factor = BUSY * row.uses.get(row.limit, 1.0) / row.busy
    return {
        "device": f"--depth {row.depth + 1}, or larger chunks",
        "depth": f"--depth {math.ceil(row.depth * factor)}",
        "enqueueing": "larger chunks, or a job for each part of the volume",
        "store bandwidth": f"a store of {factor * inputs.store_bytes_per_s / 1e9:,.0f} GB/s, "
        "or wider strides",
        "store reads": f"{factor:.1f} times the reads/s, or larger storage chunks of the input",
        "store writes": f"{factor:.1f} times the writes/s, or larger storage_chunks",
        "commits": f"{factor:.1f} times the writes/s in a folder, or larger chunks",
        "worker's link": f"{factor * inputs.worker_bytes_per_s / 1e9:.1f} GB/s for each worker",
        "worker's codec": f"{factor:.1f} times the cores of a worker",
        "sealing": "larger chunks, or a job for each part of the volume",
    }[row.limit]


def advise_on_queue(row: Row, inputs: Inputs) -> str:
    """Return what to set if the queue is the limit."""
    if not row.busy:
        return "fewer workers: heartbeats alone exceed the queue's rate"
    fastest = max(SHARED, key=lambda name: inputs.queue(name, "tasks_per_s"))
    alternative = "" if row.executor == fastest else f"{fastest}, or "
    if row.heartbeats > 0.5:
        return f"{alternative}fewer workers: {row.heartbeats:.0%} of the queue is heartbeats"
    factor = BUSY * row.uses["queue"] / row.busy
    return f"{alternative}{factor:.1f} times as many voxels in a chunk"


def regimes(rows: Sequence[Row]) -> list[Regime]:
    """Return the regimes, by chunk size and workers; queues with equal regimes are merged."""
    ranges: dict[tuple[int, int, int, str], list[tuple[Row, Row]]] = {}
    order = {name: n for n, name in enumerate(SHARED)}
    shared = [row for row in rows if row.executor in order]
    shared.sort(key=lambda row: (row.chunk, order[row.executor], row.workers))
    for _, group in groupby(shared, key=lambda row: (row.chunk, row.executor, row.limit)):
        run = list(group)
        first, last = run[0], run[-1]
        key = (first.chunk, first.workers, last.workers, first.limit)
        ranges.setdefault(key, []).append((first, last))
    return [
        Regime(
            tuple(first.executor for first, _ in ends),
            *max(ends, key=lambda pair: pair[1].queue_use),
        )
        for _, ends in sorted(ranges.items())
    ]


def enough_for(inputs: Inputs, case: Case, depth: int) -> dict[str, float]:
    """Return for each shared resource the number of workers from which it alone is the limit.

    For sealing it is the number from which the chunks take less time than sealing.
    """

    setups = {name: setup_for(inputs, case.work, name, 1, depth) for name in SHARED}
    bounds = setups[SHARED[0]].bounds()
    rate = bounds["device"]
    workers = {name: bounds[name] / rate for name in STORE}
    for name, setup in setups.items():
        requests = rate * setup.queue_requests + HEARTBEATS_PER_S * RENEW
        workers[f"queue {name}"] = inputs.queue(name, "tasks_per_s") / requests
        workers[f"enqueueing {name}"] = inputs.queue(name, "enqueue_per_s") / rate
    workers["sealing"] = case.work.chunks / rate / 3600 / case.seal_hours(inputs)
    return workers


def hours(number: float) -> str:
    """Format hours with three digits."""
    return "never" if math.isinf(number) else f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
