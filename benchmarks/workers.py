"""Compare one worker process with two, of one thread each, on the same job.

Run: python benchmarks/workers.py [--rounds N] [--json FILE]. For comparison, bare forward loops run
in one process and in two, each on its share of the same chunks. They show the machine's limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from chunkq_worker.child_env import child_env

from benchmarks import turns
from benchmarks.network import make_job
from chunkq.job.job_handle import open_job
from chunkq.job.job_reading import load_job

ROUNDS, SHAPE, EDGE, TIMEOUT = 3, (224, 160, 160), 64, 600.0


def chunkq(job: Path, workers: int) -> float:
    """Return the seconds from the first chunk's start to the last chunk's end, from the report.

    The seconds in which workers load libraries and network are subtracted, because the bare loops
    load them before the clock starts.
    """
    output = job.parent / f"out-{workers}.zarr"
    command = [sys.executable, "-m", "chunkq", "run", str(job), "-o", str(output), "--overwrite"]
    command += ["-w", str(workers), "--queue", f"sqlite://{job.parent}/queue.db"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr)
    report = open_job(f"{output}.chunkq").ledger.read_report()
    if report is None:
        raise SystemExit(f"{output}: no report")
    workers_report = report["workers"].values()
    loading = max(worker["shares"]["load"] * worker["seconds"] for worker in workers_report)
    return float(report["work_seconds"] - loading)


def loop(barrier: Any, answers: Any, job: str, number: int, count: int) -> None:
    """Run every `count`-th chunk from `number` on with one thread; answer with start and end."""
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
    barrier.wait(TIMEOUT)
    started = time.time()
    with torch.inference_mode():
        for patches in chunks:
            for _ in predictions(loaded, net, patches, volume):
                pass
    answers.put((started, time.time()))


def bare(job: Path, workers: int) -> float:
    """Return the seconds from the first start of the bare loops to the last end."""
    context = get_context("spawn")
    barrier, answers = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=loop, args=(barrier, answers, str(job), number, workers))
        for number in range(workers)
    ]
    os.environ.update(child_env(1))  # the environment of chunkq's workers
    for process in processes:
        process.start()
    spans = [answers.get(timeout=TIMEOUT) for _ in processes]
    for process in processes:
        process.join()
    return float(max(end for _, end in spans) - min(start for start, _ in spans))


def main() -> None:
    """Measure, print, and write JSON if requested."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    measures = {"chunkq": chunkq, "bare": bare}
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), SHAPE, threads=1, chunksize=[EDGE] * 3)

        def run(contestant: str) -> turns.Figures:
            name, workers = contestant.split()
            return {"seconds": measures[name](job, int(workers))}

        names = [f"{name} {workers}" for name in measures for workers in (1, 2)]
        results = turns.take_turns(names, arguments.rounds, run)
    seconds = [{name: figures["seconds"] for name, figures in turn.items()} for turn in results]
    speedups = {name: turns.ratios(results, f"{name} 1", f"{name} 2") for name in measures}
    turns.print_ratios("speedup by a second process", **speedups)
    figures: dict[str, Any] = {"seconds": seconds, "speedups": speedups}
    figures |= {name: statistics.median(each) for name, each in speedups.items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
