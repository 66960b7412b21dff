"""Measure planning, enqueueing and status at scale, each against a bare lower bound.

Run: python benchmarks/planning.py [--json FILE]. Every figure is the median of interleaved rounds;
a ratio is the median of the ratios of each round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from chunkq_producer.job_status import job_status

from chunkq.geometry.axes import plain_axes
from chunkq.job.items import Image
from chunkq.job.job_file import Job
from chunkq.job.job_folder import JobFolder
from chunkq.job.job_handle import JobHandle, open_job
from chunkq.job.job_parsing import parse_job
from chunkq.job.job_path import job_folder_of
from chunkq.job.record import JobRecord
from chunkq.job.resolve import resolve
from chunkq.job.task_records import Commit
from chunkq.job.tasks import Task, chunk_name
from chunkq.plan.plan import Plan
from chunkq.plan.volume import Volume
from chunkq.queue.backends.rq.names import rq_id
from chunkq.queue.backends.sqlite import SqliteExecutor
from chunkq.storage.images import ImageSource

ROUNDS, EPOCH = 5, "0a1b2c3d"


def plan_over(edge: int) -> Plan:
    """Return the plan of `job_over` over edge³ chunks."""
    return resolve(job_over(), Volume((edge * 128,) * 3, "uint8"))


def job_over(path: str = "/missing/in.zarr") -> Job:
    """Return a half-overlapping job with chunks of 128³ voxels."""
    return parse_job(
        {
            "input": path,
            "output": "/missing/out.zarr",
            "inference_type": "sliding_window",
            "strides": [32, 32, 32],
            "weight_function": ["weight_gaussian"],
            "combine": "soft",
            "chunksize": [128, 128, 128],
            "model_config": {
                "runtime": "torch",
                "type": "torchscript",
                "ts_file": "/missing/model.ts",
                "model_input_shape": [1, 64, 64, 64],
                "model_output_shape": [3, 64, 64, 64],
            },
        }
    )


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def paired(measured: Callable[[], Any], bare: Callable[[], Any]) -> dict[str, float]:
    """Return the median seconds of both, and the median ratio of interleaved rounds."""
    rounds = [(seconds(measured), seconds(bare)) for _ in range(ROUNDS)]
    return {
        "seconds": statistics.median(a for a, _ in rounds),
        "bare_seconds": statistics.median(b for _, b in rounds),
        "ratio": statistics.median(a / b for a, b in rounds),
    }


def walk(plan: Plan) -> int:
    """Compute the costs of a job and visit every chunk's index, as `produce` does; count them."""
    assert plan.costs.patches > 0
    return sum(1 for _ in plan.active_indices())


def planning() -> dict[str, float]:
    """Plan 10.08 million chunks, against a bare triple loop over as many indices."""
    edge = 216
    figures = paired(
        lambda: walk(plan_over(edge)),
        lambda: sum(1 for _ in product(range(edge), repeat=3)),
    )
    return {"chunks": float(edge**3), **figures}


def planning_memory() -> dict[str, float]:
    """Return the peak memory (bytes) of planning 10⁴ and 10⁷ chunks, in new processes."""
    peaks = {}
    for name, edge in (("peak_at_10648_chunks", 22), ("peak_at_10077696_chunks", 216)):
        result = subprocess.run(
            [sys.executable, __file__, "--peak", str(edge)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[name] = float(result.stdout)
    return {**peaks, "ratio": peaks["peak_at_10077696_chunks"] / peaks["peak_at_10648_chunks"]}


def enqueueing(folder: Path) -> dict[str, float]:
    """Submit 100 000 tasks to the embedded queue, against one transaction of the same rows."""
    tasks = [Task("infer", "/missing/out.zarr.chunkq", EPOCH, 0, (i,)) for i in range(100_000)]
    number = iter(range(1000))

    def submit() -> None:
        queue = SqliteExecutor(f"sqlite://{folder}/queue-{next(number)}.db")
        assert queue.submit(tasks) == len(tasks)
        queue.close()

    def bare() -> None:
        database = sqlite3.connect(folder / f"bare-{next(number)}.db")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE tasks (id TEXT UNIQUE, job TEXT, message TEXT)")
        rows = ((rq_id(task), task.job, task.to_json()) for task in tasks)
        database.executemany("INSERT INTO tasks VALUES (?, ?, ?)", rows)
        database.commit()
        database.close()

    return {"tasks": 100_000.0, **paired(submit, bare)}


def status(folder: Path) -> dict[str, float]:
    """Compute the status of 100 000 chunks, 1000 unfinished, against a listing of the same files.

    The figures `command_…` are for `chunkq status`, against the same command on a one-chunk job.
    """
    edge = 47
    plan = plan_over(edge)
    job = create(folder / "out.zarr", plan)
    done = Path(job.ledger.path) / "done" / "infer" / "0"
    done.mkdir(parents=True)
    indices = list(plan.active_indices())
    for number, index in enumerate(indices[1000:]):
        commit = Commit(
            "infer", 0, index, 1, f"host-{number % 8}", number, number + 1.0,
            {"read": 0.1, "wait": 0.1, "compute": 0.7, "write": 0.1},
        )  # fmt: skip
        # Without flushing each file to the disk, which is not measured.
        (done / chunk_name(index)).write_bytes(commit.to_json(EPOCH))
    queue = SqliteExecutor(f"sqlite://{folder}/status.db")
    queue.submit(Task("infer", *job.id, 0, index) for index in indices[:1000])
    figures = paired(
        lambda: job_status(job, queue),
        lambda: sum(entry.stat().st_mtime for entry in os.scandir(done)),
    )
    queue.close()
    small = folder / "small.zarr"
    create(small, plan_over(1))
    command = paired(lambda: show(folder / "out.zarr", queue.url), lambda: show(small, queue.url))
    return {
        "chunks": float(len(indices)),
        **figures,
        **{f"command_{key}": value for key, value in command.items()},
    }


def create(output: Path, plan: Plan) -> JobHandle:
    """Create a job folder without an output."""
    source = ImageSource(
        "zarr", "/missing/in.zarr", plain_axes(plan.volume.shape), plan.volume.dtype
    )
    folder = JobFolder(job_folder_of(str(output)))
    folder.create_record(JobRecord(job_over(), (Image(0, "", (source,)),), {}, (("",),), EPOCH))
    return open_job(folder.path)


def show(output: Path, queue: str) -> None:
    """Run `chunkq status`."""
    chunkq = Path(sys.executable).with_name("chunkq")
    command = [chunkq, "status", output, "--queue", queue]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Measure, print a table, and write JSON if requested."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", type=Path)
    options.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.peak:
        walk(plan_over(arguments.peak))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = {
            "plan 10 million chunks": planning(),
            "memory of planning": planning_memory(),
            "enqueue 100 000 tasks": enqueueing(folder),
            "status of 100 000 chunks": status(folder),
        }
    for label, figures in results.items():
        row = ", ".join(f"{key} {value:,.4g}" for key, value in figures.items())
        print(f"{label}: {row}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
