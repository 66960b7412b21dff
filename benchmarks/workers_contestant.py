"""Run a job with some workers of one thread each, as chunkq or as bare loops; print the figures.

workers.py starts it as: python workers_contestant.py "NAME WORKERS" JOB OUTPUT. The clock is the
monotonic one, which all processes of a machine share. It starts when every process has loaded the
network and run a batch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any

from chunkq.job.job_handle import open_job
from chunkq.job.job_reading import load_job
from chunkq.plan.chunk import Patch

TIMEOUT = 600.0
"""How long (s) the loops wait for each other."""
Clock = tuple[float, float]
"""Start and end (s, monotonic)."""


def chunkq(job: str, output: str, workers: int) -> Clock:
    """Return the start of the first chunk and the end of the last one, from the report."""
    command = [sys.executable, "-m", "chunkq", "run", job, "-o", output, "--overwrite"]
    command += ["-w", str(workers), "--queue", f"sqlite://{output}.db"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr)
    report = open_job(f"{output}.chunkq").ledger.read_report()
    if report is None:
        raise SystemExit(f"{output}: no report")
    started = float(report["started"]) + time.monotonic() - time.time()
    return started, started + float(report["work_seconds"])


def loop(barrier: Any, answers: Any, job: str, number: int, count: int) -> None:
    """Run every `count`-th chunk from `number` on with one thread; answer with the clock."""
    import torch

    from benchmarks.contestant import network, predictions, read
    from chunkq.job.resolve import resolve
    from chunkq.storage.images import find_source

    torch.set_num_threads(1)
    loaded = load_job(job)
    volume = read(loaded.input[0])
    plan, net = resolve(loaded, find_source(loaded.input[0]).volume), network(loaded)
    indices = list(plan.active_indices())[number::count]
    chunks = [list(plan.patches(plan.chunk(index))) for index in indices]

    def compute(patches: Sequence[Patch]) -> None:
        for _ in predictions(loaded, net, patches, volume):
            pass

    with torch.inference_mode():
        compute(chunks[0][: loaded.model.max_batch_size])  # chunkq's workers have run a batch, too
        barrier.wait(TIMEOUT)
        started = time.monotonic()
        for patches in chunks:
            compute(patches)
    answers.put((started, time.monotonic()))


def bare(job: str, output: str, workers: int) -> Clock:
    """Return the first start and the last end of bare loops, each on its share of the chunks."""
    context = get_context("spawn")
    barrier, answers = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=loop, args=(barrier, answers, job, number, workers))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    clocks = [answers.get(timeout=TIMEOUT) for _ in processes]
    for process in processes:
        process.join()
    return min(started for started, _ in clocks), max(ended for _, ended in clocks)


CONTESTANTS: dict[str, Callable[[str, str, int], Clock]] = {"chunkq": chunkq, "bare": bare}


def main() -> None:
    """Run the contestant that the command line names and print its figures."""
    contestant, job, output = sys.argv[1:]
    name, workers = contestant.split()
    print(json.dumps({"clock": CONTESTANTS[name](job, output, int(workers))}))


if __name__ == "__main__":
    main()
