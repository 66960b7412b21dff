"""Simulate 1 to 4096 workers on a volume of 1 PB: which resource is the limit, and what to set.

Run: python benchmarks/scale.py [--json FILE] [--plot FILE.png] [--workers 1,64,4096]. The script
uses no queue, store or GPU. Inputs of the simulation (scale_model.py lists what it omits) are the
figures in queues.json, queue_scale.json, planning.json and network.json of the folder `--measured`.
Where these have none, the defaults of README.md are used, and assumptions where nothing can be
measured. The output lists all inputs, and each is an option.

Only the rate of chunks is simulated. On every queue, workers complete blocks meanwhile. Queueing
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

from benchmarks.scale_inputs import ASSUMED, Collected, Inputs, collect
from benchmarks.scale_limits import SHARED, Regime, Row, advise, enough_for, hours, regimes, row_for
from benchmarks.scale_plot import Point, picture
from benchmarks.scale_work import Case, Work, plan_of
from chunkq.plan.footprint import footprint
from chunkq.queue.contract.executor import DEFAULT_DEPTH_GPU

MEASURED = Path(__file__).with_name("results")
EDGE = 100_000
"""Voxels along each axis of 1 PB, of one byte each."""
WORKERS = (1, 4, 16, 64, 256, 1024, 4096)
CHUNKS = (256, 512, 1024)
EXECUTORS = ("sqlite", *SHARED)
ONE_MACHINE = 8
"""Workers that fit on one machine and can share a SQLite queue."""
REDIS_CLIENTS = 10_000
"""Default limit of the connections of a Redis server (`maxclients`)."""
MANY_RECORDS = 10_000_000
"""Number of commit records in one folder above which the output has a warning."""


def input_table(collected: Collected) -> Table:
    """Return a table of all inputs and their sources; assumptions are highlighted."""
    table = Table("figure", "label", "from", title="Inputs of the simulation")
    table.add_column("value", justify="right")
    table.add_column("unit")
    for f in fields(Inputs):
        source = collected.sources[f.name]
        mark = f"[yellow]{source}[/]" if source == ASSUMED else source
        value = f"{getattr(collected.inputs, f.name):,.6g}"
        table.add_row(f.name, f.metadata["label"], mark, value, f.metadata["unit"])
    return table


def case_table(cases: Sequence[Case], depth: int) -> Table:
    """Return a table of the costs of a chunk for each chunk size."""
    size = " × ".join(map(str, cases[0].plan.volume.shape))
    table = Table("chunksize", title=f"The jobs, of a volume of {size}")
    for name in (
        "million chunks", "patches per chunk", "million patches in total", "moved (volumes)",
        "of it pieces", "MB moved per chunk", "objects written per chunk", "blocks completed",
        f"GB per worker, depth {depth}",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for case in cases:
        costs, infer, block = case.plan.costs, case.work.infer, case.work.block
        voxels = math.prod(case.plan.volume.shape) * case.plan.volume.voxel_bytes
        table.add_row(
            str(case.chunk),
            f"{costs.chunks / 1e6:.2f}",
            f"{infer.patches:,.0f}",
            f"{costs.patches / 1e6:,.0f}",
            f"{costs.store_bytes / voxels:.1f}",
            f"{2 * costs.piece_bytes / voxels:.1f}",
            f"{(infer.bytes + block.bytes) / 1e6:,.0f}",
            f"{infer.write.objects + block.write.objects:,.0f}",
            f"{costs.finalized_blocks / costs.blocks:.1%}",
            f"{footprint(case.plan).peak_bytes(depth) / 1e9:.0f}",
        )
    return table


def regime_table(regime_rows: Sequence[Regime]) -> Table:
    """Return a table of the limits, each with the fewest and the most workers that meet it."""
    table = Table("chunk", "workers", "limit", title="Where the limit changes, simulated")
    for name in ("queues", "device busy", "queue used", "store used", "hours", "sealing h"):
        table.add_column(name, justify="left" if name == "queues" else "right")
    table.add_column("what to set, with the most workers")
    for n, regime in enumerate(regime_rows):
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
        table.add_row(
            str(last.chunk), workers, last.limit, ", ".join(regime.executors), *others,
            hours(last.seal_hours), last.advice,
            end_section=n + 1 < len(regime_rows) and regime_rows[n + 1].most.chunk != last.chunk,
        )  # fmt: skip
    return table


def costs_of(inputs: Inputs, case: Case, depth: int) -> dict[str, Any]:
    """Return the costs of a chunk size for queue and sealing, and the workers until each limit."""
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


def costs_table(costs: Sequence[dict[str, Any]]) -> Table:
    """Return a table with a column of costs for each chunk size."""

    def column(item: dict[str, Any]) -> dict[str, str]:
        queueing = {f"queueing on {q} (h)": hours(h) for q, h in item["enqueue_hours"].items()}
        queues = {f"queue on {q} (GB)": f"{b / 1e9:.1f}" for q, b in item["queue_bytes"].items()}
        until = {
            f"workers until {name} is the limit": f"{count:,.0f}"
            for name, count in item["workers_until_limit"].items()
        }
        listing = {"listing of all records (s)": f"{item['list_hours'] * 3600:,.0f}"}
        return queueing | queues | listing | {"sealing (h)": hours(item["seal_hours"])} | until

    table = Table("chunksize", title="Costs for any number of workers, and workers until the limit")
    for item in costs:
        table.add_column(str(item["chunk"]), justify="right")
    columns = [column(item) for item in costs]
    for name in columns[0]:
        table.add_row(name, *(values[name] for values in columns))
    return table


def warnings(cases: Sequence[Case], workers: int, depth: int) -> list[str]:
    """Return warnings about limits that are not rates: connections and large folders."""
    lines = []
    if (clients := workers * (depth + 1)) > REDIS_CLIENTS:
        lines.append(
            f"Redis: {workers} workers of depth {depth} open up to {clients:,} connections; the "
            f"default limit is {REDIS_CLIENTS:,}, so raise `maxclients` and the limit of open files"
        )
    lines += [
        f"chunksize {case.chunk}: one folder has {case.work.chunks / 1e6:.0f} million commit "
        "records; a process that lists them needs memory for all names"
        for case in cases
        if case.work.chunks > MANY_RECORDS
    ]
    return lines


def numbers(text: str) -> tuple[int, ...]:
    """Parse positive integers separated by commas."""
    values = tuple(int(word) for word in text.split(","))
    if min(values) < 1:
        raise ValueError(text)
    return values


def parser() -> argparse.ArgumentParser:
    """Return the parser: options of the job and one option for each input."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, help="write the figures to this file")
    options.add_argument("--plot", type=Path, help="write a plot to this file (PNG)")
    options.add_argument("--workers", type=numbers, default=WORKERS)
    options.add_argument("--chunks", type=numbers, default=CHUNKS, help="edges of the chunks")
    options.add_argument("--depth", type=int, default=DEFAULT_DEPTH_GPU)
    options.add_argument("--edge", type=int, default=EDGE, help="edge of the volume in voxels")
    options.add_argument("--patch", type=int, default=128, help="edge of a patch")
    options.add_argument("--stride", type=int, help="default: half of the patch")
    options.add_argument("--storage", type=int, default=128, help="edge of storage chunks")
    options.add_argument("--store", choices=("files", "bucket"), default="files")
    options.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    options.add_argument("--measured", type=Path, default=MEASURED, help="folder of JSON files")
    for f in fields(Inputs):
        kind, label = f.metadata["unit"], f.metadata["label"]
        options.add_argument(f"--{f.name.replace('_', '-')}", type=float, metavar=kind, help=label)
    return options


def main() -> None:
    """Simulate, print tables, and write JSON and a plot if requested."""
    arguments = parser().parse_args()
    started = time.perf_counter()
    values = {f.name: getattr(arguments, f.name) for f in fields(Inputs)}
    collected = collect(
        arguments.measured,
        bucket=arguments.store == "bucket",
        patch=arguments.patch,
        cpu=arguments.device == "cpu",
        options={name: value for name, value in values.items() if value is not None},
    )
    cases = []
    for chunk in arguments.chunks:
        plan = plan_of(
            arguments.edge,
            chunk,
            patch=arguments.patch,
            stride=arguments.stride or arguments.patch // 2,
            storage=min(arguments.storage, chunk),
        )
        cases.append(Case(chunk, plan, Work.of(plan, arguments.storage)))
    simulated = [
        row_for(collected.inputs, case, executor, workers, arguments.depth)
        for executor in EXECUTORS
        for case in cases
        for workers in arguments.workers
        if executor != "sqlite" or workers <= ONE_MACHINE
    ]
    rows = [replace(row, advice=advise(row, simulated, collected.inputs)) for row in simulated]
    costs = [costs_of(collected.inputs, case, arguments.depth) for case in cases]
    notes = warnings(cases, max(arguments.workers), arguments.depth)
    console = Console(width=170)
    console.print(
        input_table(collected), case_table(cases, arguments.depth), regime_table(regimes(rows))
    )
    console.print(costs_table(costs))
    for note in notes:
        console.print(f"- {note}", highlight=False)
    console.print(f"{time.perf_counter() - started:.0f} s in total")
    if arguments.json:
        report = as_dict(arguments, collected, rows, costs, notes)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        points = [
            Point(r.executor, r.chunk, r.workers, r.busy, r.limit)
            for r in rows
            if r.executor in SHARED
        ]
        picture(points, arguments.plot)


def as_dict(
    arguments: argparse.Namespace,
    collected: Collected,
    rows: Sequence[Row],
    costs: Sequence[dict[str, Any]],
    notes: Sequence[str],
) -> dict[str, object]:
    """Return all figures of a run as JSON values."""
    job = ("edge", "patch", "stride", "storage", "store", "device", "depth")
    return {
        "job": {name: getattr(arguments, name) for name in job},
        "inputs": {
            f.name: {
                "value": getattr(collected.inputs, f.name),
                "unit": f.metadata["unit"],
                "label": f.metadata["label"],
                "from": collected.sources[f.name],
            }
            for f in fields(Inputs)
        },
        "limits": [regime.as_dict() for regime in regimes(rows)],
        "chunk_sizes": list(costs),
        "rows": [
            asdict(row) | {"limit": row.limit, "device_busy": row.busy, "store_use": row.store_use}
            for row in rows
        ],
        "notes": list(notes),
    }


if __name__ == "__main__":
    main()
