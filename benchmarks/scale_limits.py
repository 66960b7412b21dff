"""What a crew of workers comes to, what its limit is, where that changes, and what to set then."""

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
"""Share of the time that a device should be busy."""
MOST_SIMULATED = 1024
"""Workers simulated one by one; of a larger crew, a slice of so many."""
SEED = 1
STORE = ("store bandwidth", "store reads", "store writes", "commits")


@dataclass(frozen=True)
class Row:
    """What so many workers come to; shares of 1.

    `uses` are the shares that are used of what each resource allows.
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
        """Name of the resource that is used most; sealing, if it takes longer than all chunks."""
        if self.seal_hours > self.hours:
            return "sealing"
        return max(self.uses, key=self.uses.__getitem__)

    @property
    def busy(self) -> float:
        """Share of the time in which a device computes, until the last chunk is done."""
        return self.uses["device"]

    @property
    def store_use(self) -> float:
        """Share used of what the store can do at most, of bytes or of requests."""
        return max(self.uses[name] for name in STORE)

    @property
    def total(self) -> float:
        """Hours from the first chunk to the sealed output."""
        return self.hours + self.seal_hours


@dataclass(frozen=True)
class Regime:
    """Crews on chunks of one size that meet one limit: from the smallest to the largest of them.

    Of several queues on which it is the same, the rows of the one that is used most.
    """

    executors: tuple[str, ...]
    fewest: Row
    most: Row

    def as_dict(self) -> dict[str, object]:
        """Return plain values; pairs are those of the smallest and of the largest crew."""
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
    """Simulate one crew."""
    work = case.work
    setup = setup_for(inputs, work, executor, workers, depth)
    enqueued, whole = (inputs.queue(executor, of) for of in ("enqueue_per_s", "tasks_per_s"))
    bounds = setup.bounds() | {"enqueueing": enqueued}
    rate = 0.0
    if setup.queue_per_s:  # else heartbeats alone are more than the queue can take
        part, share = setup.slice(MOST_SIMULATED)
        rate = min(Simulation(part, SEED).steady() / share, enqueued)
    return Row(
        executor=executor,
        chunk=case.chunk,
        workers=workers,
        depth=depth,
        chunks_per_s=rate,
        uses={name: rate / bound if bound else 1.0 for name, bound in bounds.items()},
        queue_use=1 - (setup.queue_per_s - rate * setup.queue_requests) / whole,
        heartbeats=1 - setup.queue_per_s / whole,
        hours=work.chunks / rate / 3600 if rate else math.inf,
        seal_hours=case.seal_hours(inputs),
    )


def advise(row: Row, rows: Sequence[Row], inputs: Inputs) -> str:
    """Say what to set: the better chunk size if one was simulated, else what lifts the limit."""
    beside = [r for r in rows if (r.executor, r.workers) == (row.executor, row.workers)]
    best = min(beside, key=lambda r: r.total)
    if best.total < 0.9 * row.total:
        return f"chunksize {best.chunk}: {hours(best.total)} h in all"
    if row.busy >= BUSY and row.limit != "sealing":
        return "nothing; more devices make it faster"
    if row.limit == "queue":
        return advise_on_queue(row, inputs)
    wanted = BUSY * row.uses.get(row.limit, 1.0) / row.busy
    return {
        "device": f"--depth {row.depth + 1}, or larger chunks",
        "depth": f"--depth {math.ceil(row.depth * wanted)}",
        "enqueueing": "larger chunks, or a job for each part of the volume",
        "store bandwidth": f"a store of {wanted * inputs.store_bytes_per_s / 1e9:,.0f} GB/s, "
        "or wider strides",
        "store reads": f"{wanted:.1f} times the reads/s, or larger storage chunks of the input",
        "store writes": f"{wanted:.1f} times the writes/s, or larger storage_chunks",
        "commits": f"{wanted:.1f} times the writes/s in a folder, or larger chunks",
        "worker's link": f"{wanted * inputs.worker_bytes_per_s / 1e9:.1f} GB/s for each worker",
        "worker's codec": f"{wanted:.1f} times the cores of a worker",
        "sealing": "larger chunks, or a job for each part of the volume",
    }[row.limit]


def advise_on_queue(row: Row, inputs: Inputs) -> str:
    """Say what to set where the queue is the limit."""
    if not row.busy:
        return "fewer workers: heartbeats alone are more than the queue takes"
    fastest = max(SHARED, key=lambda name: inputs.queue(name, "tasks_per_s"))
    elsewhere = "" if row.executor == fastest else f"{fastest}, or "
    if row.heartbeats > 0.5:
        return f"{elsewhere}fewer workers: {row.heartbeats:.0%} of the queue is heartbeats"
    wanted = BUSY * row.uses["queue"] / row.busy
    return f"{elsewhere}{wanted:.1f} times as many voxels in a chunk"


def regimes(rows: Sequence[Row]) -> list[Regime]:
    """Return where the limit changes, by chunk size and workers; queues that agree together."""
    found: dict[tuple[int, int, int, str], list[tuple[Row, Row]]] = {}
    order = {name: n for n, name in enumerate(SHARED)}
    chosen = [row for row in rows if row.executor in order]
    chosen.sort(key=lambda row: (row.chunk, order[row.executor], row.workers))
    for _, alike in groupby(chosen, key=lambda row: (row.chunk, row.executor, row.limit)):
        run = list(alike)
        first, last = run[0], run[-1]
        place = (first.chunk, first.workers, last.workers, first.limit)
        found.setdefault(place, []).append((first, last))
    return [
        Regime(
            tuple(first.executor for first, _ in ends),
            *max(ends, key=lambda pair: pair[1].queue_use),
        )
        for _, ends in sorted(found.items())
    ]


def enough_for(inputs: Inputs, case: Case, depth: int) -> dict[str, float]:
    """Return from how many workers on each thing that all share is the limit, were it alone.

    Sealing is from where the chunks are done in less time than it takes.
    """

    setups = {name: setup_for(inputs, case.work, name, 1, depth) for name in SHARED}
    bounds = setups[SHARED[0]].bounds()
    each = bounds["device"]
    found = {name: bounds[name] / each for name in STORE}
    for name, setup in setups.items():
        taken = each * setup.queue_requests + HEARTBEATS_PER_S * RENEW
        found[f"queue {name}"] = inputs.queue(name, "tasks_per_s") / taken
        found[f"enqueueing {name}"] = inputs.queue(name, "enqueue_per_s") / each
    found["sealing"] = case.work.chunks / each / 3600 / case.seal_hours(inputs)
    return found


def hours(number: float) -> str:
    """Write hours with three digits."""
    return "never" if math.isinf(number) else f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
