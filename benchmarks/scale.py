"""One to thousands of workers on a volume of 1 PB: what becomes the limit, and what to set then.

Run: python benchmarks/scale.py [--json FILE] [--plot FILE.png] [--workers 1,64,4096]. No queue, no
store and no GPU is used: a simulation (scale_model.py, which says what it leaves out) is fed with
what the other benchmarks have written to queues.json, queue_scale.json, planning.json and
network.json in the folder `--measured`, with README.md's figures where they have not, and with
assumptions where nothing can be measured here. All of them are listed in the output, and each is an
option.

Only the rate of chunks is simulated; workers complete blocks meanwhile, on every queue. Queueing
the whole job, listing its records and sealing are computed from rates.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.scale_inputs import ASSUMED, Fed, Inputs, feed
from benchmarks.scale_limits import SHARED, Regime, Row, advise, enough_for, hours, regimes, row_for
from benchmarks.scale_plot import Point, picture
from benchmarks.scale_work import Case, Work, plan_of
from chunkq.executors.base import DEPTH_ON_GPU
from chunkq.footprint import footprint

MEASURED = Path(__file__).with_name("results")
EDGE = 100_000
"""Voxels, of a byte each, along each axis of 1 PB."""
WORKERS = (1, 4, 16, 64, 256, 1024, 4096)
CHUNKS = (256, 512, 1024)
EXECUTORS = ("sqlite", *SHARED)
ONE_MACHINE = 8
"""Workers that share a machine, and so may use SQLite."""
REDIS_CLIENTS = 10_000
"""Connections that a Redis server takes unless `maxclients` says otherwise."""
MANY_RECORDS = 10_000_000
"""Commit records in one folder, from which on the output warns."""


def input_table(fed: Fed) -> Table:
    """List all figures, and where they come from; what is assumed is marked."""
    shown = Table("figure", "what", "from", title="What it is fed with")
    shown.add_column("value", justify="right")
    shown.add_column("unit")
    for f in fields(Inputs):
        source = fed.sources[f.name]
        mark = f"[yellow]{source}[/]" if source == ASSUMED else source
        value = f"{getattr(fed.inputs, f.name):,.6g}"
        shown.add_row(f.name, f.metadata["what"], mark, value, f.metadata["unit"])
    return shown


def case_table(cases: Sequence[Case], depth: int) -> Table:
    """List what a chunk of each size means."""
    size = " × ".join(map(str, cases[0].plan.volume.shape))
    shown = Table("chunksize", title=f"The jobs, of a volume of {size}")
    for name in (
        "million chunks", "patches a chunk", "million patches in all", "moved (volumes)",
        "of it pieces", "MB moved by a chunk", "objects written by a chunk", "blocks completed",
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
            f"{footprint(case.plan).peak_bytes(depth) / 1e9:.0f}",
        )
    return shown


def regime_table(found: Sequence[Regime]) -> Table:
    """Lay out which limit a crew meets, from the smallest crew that does to the largest."""
    shown = Table("chunk", "workers", "limit", title="Where the limit changes, simulated")
    for name in ("queues", "device busy", "queue used", "store used", "hours", "sealing h"):
        shown.add_column(name, justify="left" if name == "queues" else "right")
    shown.add_column("what to set, with the most workers")
    for n, regime in enumerate(found):
        first, last = regime.fewest, regime.most
        pairs = [
            (f"{first.workers}", f"{last.workers}"),
            *((f"{a:.0%}", f"{b:.0%}") for a, b in (
                (first.busy, last.busy), (first.queue_use, last.queue_use),
                (first.store_use, last.store_use),
            )),
            (hours(first.hours), hours(last.hours)),
        ]  # fmt: skip
        workers, *others = (a if a == b else f"{a} to {b}" for a, b in pairs)
        shown.add_row(
            str(last.chunk), workers, last.limit, ", ".join(regime.executors), *others,
            hours(last.seal_hours), last.advice,
            end_section=n + 1 < len(found) and found[n + 1].most.chunk != last.chunk,
        )  # fmt: skip
    return shown


def around(inputs: Inputs, case: Case, depth: int) -> dict[str, Any]:
    """Return what a chunk size means for queue, workers and sealing, however many workers."""
    return {
        "chunk": case.chunk,
        "chunks": case.work.chunks,
        "worker_bytes": footprint(case.plan).peak_bytes(depth),
        "enqueue_hours": {name: case.enqueue_hours(inputs, name) for name in SHARED},
        "queue_bytes": {name: case.queue_bytes(inputs, name) for name in SHARED},
        "records": case.records,
        "list_hours": case.list_hours(inputs),
        "seal_hours": case.seal_hours(inputs),
        "workers_until_limit": enough_for(inputs, case, depth),
    }


def around_table(found: Sequence[dict[str, Any]]) -> Table:
    """Lay that out, a column for each chunk size."""

    def column(of: dict[str, Any]) -> dict[str, str]:
        queueing = {f"queueing on {q} (h)": hours(h) for q, h in of["enqueue_hours"].items()}
        queues = {f"queue on {q} (GB)": f"{b / 1e9:.1f}" for q, b in of["queue_bytes"].items()}
        until = {
            f"workers from which {name} would be the limit": f"{count:,.0f}"
            for name, count in of["workers_until_limit"].items()
        }
        listing = {"listing of all records (s)": f"{of['list_hours'] * 3600:,.0f}"}
        return queueing | queues | listing | {"sealing (h)": hours(of["seal_hours"])} | until

    shown = Table("chunksize", title="Whatever the number of workers, and how many are too many")
    for of in found:
        shown.add_column(str(of["chunk"]), justify="right")
    columns = [column(of) for of in found]
    for name in columns[0]:
        shown.add_row(name, *(values[name] for values in columns))
    return shown


def warnings(cases: Sequence[Case], workers: int, depth: int) -> list[str]:
    """Say what no rate tells: connections, crowded folders."""
    found = []
    if (clients := workers * (depth + 1)) > REDIS_CLIENTS:
        found.append(
            f"Redis: {workers} workers of depth {depth} open up to {clients:,} connections; a "
            f"server takes {REDIS_CLIENTS:,} unless `maxclients` and its limit of open files are "
            "raised"
        )
    found += [
        f"chunksize {case.chunk}: {case.work.chunks / 1e6:.0f} million commit records lie in one "
        "folder, and whoever lists them holds all names in memory"
        for case in cases
        if case.work.chunks > MANY_RECORDS
    ]
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
    options.add_argument("--measured", type=Path, default=MEASURED, help="folder of JSON files")
    for f in fields(Inputs):
        kind, what = f.metadata["unit"], f.metadata["what"]
        options.add_argument(f"--{f.name.replace('_', '-')}", type=float, metavar=kind, help=what)
    return options


def main() -> None:
    """Simulate, print tables, and write JSON and a picture where asked."""
    given = parser().parse_args()
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
    facts = [around(fed.inputs, case, given.depth) for case in cases]
    notes = warnings(cases, max(given.workers), given.depth)
    console = Console(width=170)
    console.print(input_table(fed), case_table(cases, given.depth), regime_table(regimes(rows)))
    console.print(around_table(facts))
    for note in notes:
        console.print(f"- {note}", highlight=False)
    console.print(f"{time.perf_counter() - begun:.0f} s in all")
    if given.json:
        given.json.write_text(json.dumps(as_dict(given, fed, rows, facts, notes), indent=1) + "\n")
    if given.plot:
        points = [
            Point(r.executor, r.chunk, r.workers, r.busy, r.limit)
            for r in rows
            if r.executor in SHARED
        ]
        picture(points, given.plot)


def as_dict(
    given: argparse.Namespace,
    fed: Fed,
    rows: Sequence[Row],
    facts: Sequence[dict[str, Any]],
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
                "what": f.metadata["what"],
                "from": fed.sources[f.name],
            }
            for f in fields(Inputs)
        },
        "limits": [regime.as_dict() for regime in regimes(rows)],
        "chunk_sizes": list(facts),
        "rows": [
            asdict(row) | {"limit": row.limit, "device_busy": row.busy, "store_use": row.store_use}
            for row in rows
        ],
        "notes": list(notes),
    }


if __name__ == "__main__":
    main()
