"""Measure a sparse volume: 10⁶ chunks of which about 500 are real, with a network of zeros.

Run: python -m benchmarks.sparse [--edge N] [--real N] [--json FILE]. The volume has one storage
chunk per chunk, of which N exist; patches overlap by half, so a storage chunk makes up to 8 chunks
real. Each step runs once, in this process: `plan` finds the storage chunks by one listing,
`produce` stores what is empty and queues the rest, `run` computes the queue's tasks, `finalize`
seals. A mask of an eighth of the resolution that says the same is measured by `plan` beside it. The
memory of a Redis server of its own is compared with that before the job; `plan` and `finalize` do
not use it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from chunkq_worker.run_task import check_gate, run_task

from benchmarks.queues import queue_servers
from chunkq.create import check_job, create_job
from chunkq.enqueue import enqueue
from chunkq.finalize import finalize_job
from chunkq.job.job_file import Job
from chunkq.job.job_reading import load_job
from chunkq.queue.contract.executor import WorkerOptions
from chunkq.queue.registry import open_executor

CHUNK, PATCH = 32, 16
NETWORK = """import numpy as np


def net(batch):
    return np.zeros_like(batch)
"""


def sparse_job(folder: Path, edge: int, real: int) -> tuple[Job, Job]:
    """Write a volume of edge³ chunks, and return a job for missing chunks and one with a mask."""
    (folder / "net.py").write_text(NETWORK)
    store = zarr.create_array(
        folder / "in.zarr", shape=(edge * CHUNK,) * 3, chunks=(CHUNK,) * 3, dtype="uint8"
    )
    mask = np.zeros((edge * CHUNK // 8,) * 3, np.uint8)
    numbers = np.random.default_rng(0).choice(edge**3, real, replace=False)
    for index in zip(*np.unravel_index(numbers, (edge,) * 3), strict=True):
        store[tuple(slice(int(i) * CHUNK, (int(i) + 1) * CHUNK) for i in index)] = 1
        mask[tuple(slice(int(i) * CHUNK // 8, (int(i) + 1) * CHUNK // 8) for i in index)] = 1
    zarr.create_array(folder / "mask.zarr", data=mask, chunks=(100,) * 3)
    model = {
        "runtime": "numpy", "type": "class", "class_file": str(folder / "net.py"),
        "class_name": "net", "model_input_shape": [PATCH] * 3, "max_batch_size": 8,
    }  # fmt: skip
    values: dict[str, Any] = {
        "input": str(folder / "in.zarr"),
        "inference_type": "sliding_window",
        "strides": [PATCH // 2] * 3,
        "chunksize": [CHUNK] * 3,
        "storage_chunks": [PATCH] * 3,
        "weight_function": ["weight_gaussian"],
        "fill_value": -1,
        "model_config": model,
    }
    missing = load_job(values | {"skip_empty": "missing"}, output=str(folder / "out.zarr"))
    masked = load_job(
        values | {"mask": str(folder / "mask.zarr")}, output=str(folder / "masked.zarr")
    )
    return missing, masked


Figures = dict[str, float]


def timed(figures: Figures, name: str, work: Callable[[], Any]) -> Any:
    """Return the result of a call; store its seconds, and those of this process's CPU."""
    before, cpu_before = time.perf_counter(), time.process_time()
    result = work()
    figures[f"{name}_seconds"] = time.perf_counter() - before
    figures[f"{name}_cpu_seconds"] = time.process_time() - cpu_before
    return result


def measure(edge: int, real: int) -> Figures:
    """Return the figures of all steps."""
    figures: Figures = {}
    with queue_servers() as servers:
        missing, masked = sparse_job(servers.folder, edge, real)

        def planned(job: Job) -> Any:
            checked = check_job(job)
            return checked, checked.costs

        timed(figures, "mask_plan", lambda: planned(masked))
        checked, costs = timed(figures, "plan", lambda: planned(missing))
        figures |= {"chunks": costs.chunks, "patches": costs.patches}
        figures["all_chunks"] = checked.plans[0].costs.chunks
        with closing(open_executor(servers.empty_queue("rq"))) as executor:
            empty = servers.redis.info("memory")["used_memory"]

            def store_redis_bytes(step: str) -> None:
                used = servers.redis.info("memory")["used_memory"]
                figures[f"{step}_redis_bytes"] = used - empty

            def produce() -> Any:
                job = create_job(check_job(missing))
                enqueue(job, executor)
                return job

            job = timed(figures, "produce", produce)
            store_redis_bytes("produce")
            options = WorkerOptions("bench:cpu:0", 2, burst=True, check_gate=check_gate)
            timed(figures, "run", lambda: executor.run_tasks(run_task, options))
            store_redis_bytes("run")
        report = timed(figures, "finalize", lambda: finalize_job(job, worker="bench"))
        figures["finalized_blocks"] = report["finalized_blocks"]
        skipped = Path(job.ledger.path) / "skipped" / "0.bin"
        figures["skipped_file_bytes"] = skipped.stat().st_size
    return figures


def main() -> None:
    """Print the figures, and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edge", type=int, default=100, help="chunks along each axis")
    parser.add_argument("--real", type=int, default=64, help="storage chunks that exist")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = measure(options.edge, options.real)
    for name, value in figures.items():
        print(f"{name:22} {value:.6g}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
