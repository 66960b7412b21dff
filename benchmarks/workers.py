"""One worker process and two, of one thread each: the same job, from first chunk to last.

Run: python benchmarks/workers.py [--rounds N] [--json FILE]. Beside it bare forward loops in one
process and in two, each with its half of the same chunks: what the machine itself gives.
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

from benchmarks.network import make_job
from chunkq.job import load_job
from chunkq.job_handle import open_job

ROUNDS, SHAPE, EDGE, PATIENCE = 5, (224, 160, 160), 64, 600.0


def chunkq(job: Path, workers: int) -> float:
    """Seconds from the first chunk's start to the last one's end, as the job's report has them.

    Less those in which a worker loaded libraries and network, which bare loops have done before.
    """
    output = job.parent / f"out-{workers}.zarr"
    command = [sys.executable, "-m", "chunkq", "run", str(job), "-o", str(output), "--overwrite"]
    command += ["-w", str(workers), "--queue", f"sqlite://{job.parent}/queue.db"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    report = open_job(f"{output}.chunkq").ledger.read_report()
    if report is None:
        raise SystemExit(f"{output}: no report")
    crew = report["workers"].values()
    loading = max(one["shares"]["load"] * one["seconds"] for one in crew)
    return float(report["work_seconds"] - loading)


def loop(barrier: Any, answers: Any, job: str, number: int, of: int) -> None:
    """Every `of`-th chunk from `number` on, with one thread; answer with begin and end."""
    import torch

    from benchmarks.contestant import network, predictions, read
    from chunkq.resolve import resolve
    from chunkq.stores import find_source

    torch.set_num_threads(1)
    loaded = load_job(job)
    volume = read(loaded.input[0])
    plan, net = resolve(loaded, find_source(loaded.input[0]).volume), network(loaded)
    mine = [list(plan.patches(plan.chunk(index))) for index in plan.indices()][number::of]
    barrier.wait(PATIENCE)
    began = time.time()
    with torch.inference_mode():
        for patches in mine:
            for _ in predictions(loaded, net, patches, volume):
                pass
    answers.put((began, time.time()))


def bare(job: Path, workers: int) -> float:
    """Seconds of the bare loops, from the first one's begin to the last one's end."""
    context = get_context("spawn")
    barrier, answers = context.Barrier(workers), context.Queue()
    crew = [
        context.Process(target=loop, args=(barrier, answers, str(job), number, workers))
        for number in range(workers)
    ]
    os.environ.update(child_env(1))  # as chunkq's workers have it
    for process in crew:
        process.start()
    spans = [answers.get(timeout=PATIENCE) for _ in crew]
    for process in crew:
        process.join()
    return float(max(end for _, end in spans) - min(begin for begin, _ in spans))


def main() -> None:
    """Measure, print, and write JSON where asked."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    turns: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        job = make_job(Path(name), SHAPE, threads=1, chunksize=[EDGE] * 3)
        for _ in range(given.rounds):
            turn = {f"chunkq {n}": chunkq(job, n) for n in (1, 2)}
            turns.append(turn | {f"bare {n}": bare(job, n) for n in (1, 2)})
            print(json.dumps(turns[-1]), flush=True)
    figures: dict[str, Any] = {"seconds": turns}
    for who in ("chunkq", "bare"):
        figures[who] = statistics.median(turn[f"{who} 1"] / turn[f"{who} 2"] for turn in turns)
    print(json.dumps({who: figures[who] for who in ("chunkq", "bare")}))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
