"""One to thousands of workers on a volume of 1 PB: what becomes the limit, and what to set then.

Run: python benchmarks/scale.py [--json FILE] [--plot FILE.png] [--workers 1,64,4096]. No queue, no
store and no GPU is used: a simulation (scale_model.py, which says what it leaves out) is fed with
what the other benchmarks have written to queues.json, planning.json and network.json beside this
file, with README.md's figures where they have not, and with assumptions where nothing can be
measured here. All of them are listed in the output, and each is an option.

Only the rate of chunks is simulated. Queueing the whole job, listing its records, completing blocks
afterwards and sealing are computed from rates.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from scale_inputs import Fed, feed
from scale_model import (
    HEARTBEATS_PER_S,
    RENEW,
    Inputs,
    Setup,
    Simulation,
    Work,
    distributed,
    finalizing,
    plan_of,
    setup_for,
)
from scale_plot import Point, picture

from chunkq.executors.base import DEPTH_ON_GPU
from chunkq.executors.rq.executor import MOST_QUEUED
from chunkq.finalize import blocks_at_once
from chunkq.plan import Plan

HERE = Path(__file__).parent
EDGE = 100_000
"""Voxels, of a byte each, along each axis of 1 PB."""
WORKERS = (1, 4, 16, 64, 256, 1024, 4096)
CHUNKS = (256, 512, 1024)
EXECUTORS = ("sqlite", "rq", "dask", "ray")
ONE_MACHINE = 8
"""Workers that share a machine, and so may use SQLite."""
REDIS_CLIENTS = 10_000
"""Connections that a Redis server takes unless `maxclients` says otherwise."""
MANY_RECORDS = 10_000_000
"""Commit records in one folder, from which on the output warns."""
BUSY = 0.95
"""Share of the time that a device should be busy."""
FINALIZING_SHARE = 0.1
"""Finalizers are added until they take less than this share of the computing."""
MOST_SIMULATED = 1024
"""Workers simulated one by one; of a larger crew, a slice of so many."""
SEED = 1
STORE = ("store bandwidth", "store reads", "store writes", "commits")


@dataclass(frozen=True)
class Case:
    """A job of one chunk size (voxels along each axis)."""

    chunk: int
    plan: Plan
    work: Work


@dataclass(frozen=True)
class Row:
    """What so many workers come to; memory in bytes, shares of 1.

    `uses` are the shares that are used of what each resource allows; `limit` has the largest.
    """

    executor: str
    chunk: int
    workers: int
    depth: int
    chunks: int
    chunks_per_s: float
    uses: dict[str, float]
    queue_use: float
    heartbeats: float
    hours: float
    enqueue_hours: float
    list_seconds: float
    finalizers: int
    complete_hours: float
    seal_hours: float
    worker_memory: float
    queue_memory: float
    advice: str = ""

    @property
    def limit(self) -> str:
        """Name of the resource that is used most."""
        return max(self.uses, key=self.uses.__getitem__)

    @property
    def busy(self) -> float:
        """Share of the time in which a device computes."""
        return self.uses["device"]

    @property
    def store_use(self) -> float:
        """Share used of what the store can do at most, of bytes or of requests."""
        return max(self.uses[name] for name in STORE)

    @property
    def finalizer_hours(self) -> float:
        """From the last chunk to the sealed output."""
        return self.complete_hours + self.list_seconds / 3600 + self.seal_hours

    @property
    def total(self) -> float:
        """Hours from the first chunk to the sealed output."""
        return self.hours + self.finalizer_hours

    @property
    def completed_by(self) -> str:
        """Who completes blocks."""
        if self.executor == "rq":
            return "at once"
        if not self.finalizers:
            return "`finalize`"
        return f"{self.finalizers} worker" + "s" * (self.finalizers > 1)


def row_for(inputs: Inputs, case: Case, executor: str, workers: int, depth: int) -> Row:
    """Simulate one crew, and compute what comes before and after."""
    work = case.work
    setup = setup_for(inputs, work, executor, workers, depth)
    enqueued, whole = (inputs.queue(executor, of) for of in ("enqueue_per_s", "tasks_per_s"))
    bounds = setup.bounds() | {"enqueueing": enqueued}
    rate = 0.0
    if setup.queue_per_s:  # else heartbeats alone are more than the queue can take
        part, share = setup.slice(MOST_SIMULATED)
        rate = min(Simulation(part, SEED).steady() / share, enqueued)
    hours = work.chunks / rate / 3600 if rate else math.inf
    finalizers, completing = (0, 0.0)
    if setup.then is None:
        finalizers, completing = _finalizers(inputs, case, executor, workers, depth, hours)
    records = work.chunks + work.blocks
    queued = min(work.chunks, MOST_QUEUED) if executor == "rq" else work.chunks
    enqueue_seconds = work.chunks / enqueued + work.chunks / inputs.plan_chunks_per_s
    return Row(
        executor=executor,
        chunk=case.chunk,
        workers=workers,
        depth=depth,
        chunks=work.chunks,
        chunks_per_s=rate,
        uses={name: rate / bound if bound else 1.0 for name, bound in bounds.items()},
        queue_use=1 - (setup.queue_per_s - rate * setup.queue_requests) / whole,
        heartbeats=1 - setup.queue_per_s / whole,
        hours=hours,
        enqueue_hours=enqueue_seconds / 3600,
        list_seconds=records / inputs.list_records_per_s,
        finalizers=finalizers,
        complete_hours=completing,
        seal_hours=records / inputs.seal_records_per_s / 3600,
        worker_memory=float(depth * case.plan.costs.worker_bytes),
        queue_memory=queued * inputs.queue(executor, "task_bytes"),
    )


def _finalizers(
    inputs: Inputs, case: Case, executor: str, workers: int, depth: int, hours: float
) -> tuple[int, float]:
    """Return how many workers should complete blocks afterwards, and the hours they take.

    The fewest that take a small share of the computing, or hardly longer than all together;
    0 is `chunkq finalize` in its own process.
    """

    def took(setup: Setup) -> float:
        bound = setup.bound
        return case.work.blocks / bound / 3600 if bound else math.inf

    alone = took(finalizing(inputs, case.work, blocks_at_once(case.plan)))
    by = {
        count: took(distributed(inputs, case.work, executor, count, depth))
        for count in (2**n for n in range(workers.bit_length()))
    }
    enough = max(FINALIZING_SHARE * hours, 1.05 * min(by.values()))
    if alone <= enough:
        return 0, alone
    return next((count, took) for count, took in by.items() if took <= enough)


def advise(row: Row, rows: Sequence[Row], inputs: Inputs) -> str:
    """Say what to set: the better chunk size if one was simulated, else what lifts the limit."""
    beside = [r for r in rows if (r.executor, r.workers) == (row.executor, row.workers)]
    best = min(beside, key=lambda r: r.total)
    if best.total < 0.9 * row.total:
        return f"chunksize {best.chunk}: {hours(best.total)} h in all"
    if row.busy >= BUSY:
        return "nothing; more devices make it faster"
    if not row.busy:
        return "fewer workers: heartbeats alone are more than the queue takes"
    wanted = BUSY * row.uses[row.limit] / row.busy
    if row.limit == "queue":
        elsewhere = "" if row.executor == "rq" else "rq, or "
        if row.heartbeats > 0.5:
            return f"{elsewhere}fewer workers: {row.heartbeats:.0%} of the queue is heartbeats"
        return f"{elsewhere}{wanted:.1f} times as many voxels in a chunk"
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
    }[row.limit]


def hours(number: float) -> str:
    """Write hours with three digits."""
    return "never" if math.isinf(number) else f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def input_table(fed: Fed) -> Table:
    """List all figures, and where they come from; what is assumed is marked."""
    shown = Table("figure", "what", "from", title="What it is fed with")
    shown.add_column("value", justify="right")
    shown.add_column("unit")
    for f in fields(Inputs):
        source = fed.sources[f.name]
        mark = f"[yellow]{source}[/]" if source == "ASSUMED" else source
        value = f"{getattr(fed.inputs, f.name):,.6g}"
        shown.add_row(f.name, f.metadata["what"], mark, value, f.metadata["unit"])
    return shown


def case_table(cases: Sequence[Case], depth: int) -> Table:
    """List what a chunk of each size means."""
    shown = Table(
        "chunksize",
        title="The jobs, of a volume of {0[0]} × {0[1]} × {0[2]}".format(
            cases[0].plan.volume.shape
        ),
    )
    for name in (
        "million chunks", "patches a chunk", "million patches in all", "moved (volumes)",
        "of it pieces", "MB moved by a chunk", "objects written by a chunk", "blocks finalized",
        f"GB a worker, depth {depth}",
    ):  # fmt: skip
        shown.add_column(name, justify="right")
    for case in cases:
        costs, infer, block = case.plan.costs, case.work.infer, case.work.block
        voxels = math.prod(case.plan.volume.shape) * case.plan.volume.voxel_bytes
        shown.add_row(
            str(case.chunk),
            f"{costs.chunks / 1e6:.2f}",
            f"{infer.patches:,.0f}",
            f"{costs.patches / 1e6:,.0f}",
            f"{costs.store_bytes / voxels:.1f}",
            f"{2 * costs.piece_bytes / voxels:.1f}",
            f"{(infer.bytes + block.bytes) / 1e6:,.0f}",
            f"{infer.write.objects + block.write.objects:,.0f}",
            f"{costs.finalized_blocks / costs.chunks:.1%}",
            f"{depth * costs.worker_bytes / 1e9:.0f}",
        )
    return shown


def row_table(executor: str, rows: Sequence[Row]) -> Table:
    """Lay one executor's rows out."""
    shown = Table("chunk", title=f"{executor}: simulated; hours for the whole volume")
    for name in ("workers", "chunks/s", "device", "queue", "store", "hours", "finalize h"):
        shown.add_column(name, justify="right")
    for name in ("blocks completed by", "limit", "what to set"):
        shown.add_column(name)
    for n, row in enumerate(rows):
        shown.add_row(
            str(row.chunk),
            str(row.workers),
            f"{row.chunks_per_s:,.3g}",
            *(f"{share:.0%}" for share in (row.busy, row.queue_use, row.store_use)),
            hours(row.hours),
            hours(row.finalizer_hours),
            row.completed_by,
            f"{row.limit} {row.uses[row.limit]:.0%}",
            row.advice,
            end_section=n + 1 < len(rows) and rows[n + 1].chunk != row.chunk,
        )
    return shown


def fed_devices(inputs: Inputs, case: Case, executor: str, depth: int) -> dict[str, float]:
    """Return how many devices each resource that all share would keep busy, were it alone."""
    setup = setup_for(inputs, case.work, executor, 1, depth)
    bounds = setup.bounds()
    each = bounds["device"]
    beating = HEARTBEATS_PER_S * RENEW
    whole = inputs.queue(executor, "tasks_per_s")
    fed = {name: bounds[name] / each for name in STORE}
    fed["queue"] = whole / (each * setup.queue_requests + beating)
    fed["enqueueing"] = inputs.queue(executor, "enqueue_per_s") / each
    return fed


def fed_table(inputs: Inputs, cases: Sequence[Case], depth: int) -> Table:
    """Lay out from how many devices on each shared resource is the limit."""
    names = ("queue", "enqueueing", *STORE)
    shown = Table("executor", title="Devices that each shared resource can keep busy")
    for name in ("chunksize", *names):
        shown.add_column(name, justify="right")
    for executor in EXECUTORS:
        for case in cases:
            fed = fed_devices(inputs, case, executor, depth)
            least = min(fed.values())
            counts = (
                f"[bold]{fed[name]:,.0f}[/]" if fed[name] == least else f"{fed[name]:,.0f}"
                for name in names
            )
            shown.add_row(executor, str(case.chunk), *counts, end_section=case is cases[-1])
    return shown


def best_table(rows: Sequence[Row]) -> Table:
    """Lay the best of the simulated settings out for each number of workers."""
    shown = Table(title="What to set")
    for name in ("workers", "executor", "chunksize", "hours in all", "device", "limit"):
        shown.add_column(name, justify="right")
    shown.add_column("blocks completed by")
    shown.add_column("what to set besides")
    for workers in sorted({row.workers for row in rows}):
        best = min((row for row in rows if row.workers == workers), key=lambda row: row.total)
        alike = [
            row.executor
            for row in rows
            if (row.workers, row.chunk) == (workers, best.chunk) and row.total < 1.05 * best.total
        ]
        shown.add_row(
            str(workers), ", ".join(alike), str(best.chunk), hours(best.total), f"{best.busy:.0%}",
            best.limit, best.completed_by, best.advice,
        )  # fmt: skip
    return shown


def warnings(cases: Sequence[Case], rows: Sequence[Row], depth: int) -> list[str]:
    """Say what no rate tells: connections, memory, crowded folders."""
    found = []
    most = max(row.workers for row in rows)
    if (clients := most * (depth + 1)) > REDIS_CLIENTS:
        found.append(
            f"Redis: {most} workers of depth {depth} open up to {clients:,} connections; a server "
            f"takes {REDIS_CLIENTS:,} unless `maxclients` and its limit of open files are raised"
        )
    for case in cases:
        of_case = [row for row in rows if row.chunk == case.chunk]
        memory = {row.executor: f"{row.queue_memory / 1e9:.1f} GB" for row in of_case}
        first = of_case[0]
        queued = ", ".join(f"{name} {size}" for name, size in memory.items())
        found.append(
            f"chunksize {case.chunk}: queueing takes "
            + ", ".join(sorted({f"{hours(r.enqueue_hours)} h ({r.executor})" for r in of_case}))
            + f"; the queue holds {queued}; `produce --resume` lists {first.chunks / 1e6:.1f} "
            f"million records in {first.list_seconds / 2:.0f} s; sealing reads them in "
            f"{hours(first.seal_hours)} h"
        )
        if case.plan.costs.chunks > MANY_RECORDS:
            found.append(
                f"chunksize {case.chunk}: {case.plan.costs.chunks / 1e6:.0f} million commit "
                "records lie in one folder, and whoever lists them holds all names in memory"
            )
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Parse whole positive numbers with commas between them."""
    found = tuple(int(word) for word in text.split(","))
    if min(found) < 1:
        raise ValueError(text)
    return found


def parser() -> argparse.ArgumentParser:
    """Return the options: those of the job, and one for each input."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, help="keep the figures there")
    options.add_argument("--plot", type=Path, help="keep a picture there (PNG)")
    options.add_argument("--workers", type=numbers, default=WORKERS)
    options.add_argument("--chunks", type=numbers, default=CHUNKS, help="edges of cubes")
    options.add_argument("--depth", type=int, default=DEPTH_ON_GPU)
    options.add_argument("--edge", type=int, default=EDGE, help="the volume's, in voxels")
    options.add_argument("--patch", type=int, default=128, help="edge of a patch")
    options.add_argument("--stride", type=int, help="half of the patch if left out")
    options.add_argument("--storage", type=int, default=128, help="edge of storage chunks")
    options.add_argument("--store", choices=("files", "bucket"), default="files")
    options.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    options.add_argument("--measured", type=Path, default=HERE, help="where the JSON files are")
    for f in fields(Inputs):
        kind, what = f.metadata["unit"], f.metadata["what"]
        options.add_argument(f"--{f.name.replace('_', '-')}", type=float, metavar=kind, help=what)
    return options


def main() -> None:
    """Simulate, print tables, and write JSON and a picture where asked."""
    options = parser()
    given = options.parse_args()
    begun = time.perf_counter()
    own = {f.name: getattr(given, f.name) for f in fields(Inputs)}
    fed = feed(
        given.measured,
        bucket=given.store == "bucket",
        patch=given.patch,
        cpu=given.device == "cpu",
        given={name: value for name, value in own.items() if value is not None},
    )
    cases = []
    for chunk in given.chunks:
        plan = plan_of(
            given.edge,
            chunk,
            patch=given.patch,
            stride=given.stride or given.patch // 2,
            storage=min(given.storage, chunk),
        )
        cases.append(Case(chunk, plan, Work.of(plan, given.storage)))
    found = [
        row_for(fed.inputs, case, executor, workers, given.depth)
        for executor in EXECUTORS
        for case in cases
        for workers in given.workers
        if executor != "sqlite" or workers <= ONE_MACHINE
    ]
    rows = [replace(row, advice=advise(row, found, fed.inputs)) for row in found]
    console = Console(width=170)
    console.print(input_table(fed), case_table(cases, given.depth))
    for executor in EXECUTORS:
        if chosen := [row for row in rows if row.executor == executor]:
            console.print(row_table(executor, chosen))
    console.print(fed_table(fed.inputs, cases, given.depth), best_table(rows))
    notes = warnings(cases, rows, given.depth)
    for note in notes:
        console.print(f"- {note}", highlight=False)
    console.print(f"{time.perf_counter() - begun:.0f} s in all")
    if given.json:
        given.json.write_text(json.dumps(as_dict(given, fed, cases, rows, notes), indent=1) + "\n")
    if given.plot:
        points = [
            Point(r.executor, r.chunk, r.workers, r.busy, r.limit)
            for r in rows
            if r.executor != "sqlite"
        ]
        picture(points, given.plot)


def as_dict(
    given: argparse.Namespace,
    fed: Fed,
    cases: Sequence[Case],
    rows: Sequence[Row],
    notes: Sequence[str],
) -> dict[str, object]:
    """Return all of a run, as plain values."""
    job = ("edge", "patch", "stride", "storage", "store", "device", "depth")
    return {
        "job": {name: getattr(given, name) for name in job},
        "inputs": {
            f.name: {
                "value": getattr(fed.inputs, f.name),
                "unit": f.metadata["unit"],
                "from": fed.sources[f.name],
            }
            for f in fields(Inputs)
        },
        "rows": [
            asdict(row)
            | {
                "limit": row.limit,
                "device_busy": row.busy,
                "store_use": row.store_use,
                "finalizer_hours": row.finalizer_hours,
            }
            for row in rows
        ],
        "devices_fed": [
            {"executor": executor, "chunk": case.chunk}
            | fed_devices(fed.inputs, case, executor, given.depth)
            for executor in EXECUTORS
            for case in cases
        ],
        "notes": list(notes),
    }


if __name__ == "__main__":
    main()
