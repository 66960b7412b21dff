"""Compare one worker process with two, of one thread each, on the same job.

Run: python benchmarks/workers.py [--rounds N] [--json FILE]. For comparison, bare forward loops run
in one process and in two, each on its share of the same chunks. They show the machine's limit. The
contestants run in slices (see slices.py), in the environment of chunkq's workers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from chunkq_worker.child_env import child_env

from benchmarks import turns
from benchmarks.network import make_job
from benchmarks.slices import run_in_slices

ROUNDS, SHAPE, EDGE = 3, (224, 160, 160), 64
SCRIPT = Path(__file__).with_name("workers_contestant.py")
NAMES = ("chunkq", "bare")


def main() -> None:
    """Measure, print, and write JSON if requested."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), SHAPE, threads=1, chunksize=[EDGE] * 3)

        def start(contestant: str) -> subprocess.Popen[str]:
            output = job.with_name(f"{contestant.replace(' ', '-')}.zarr")
            return turns.start_contestant(SCRIPT, contestant, job, output, child_env(1))

        contestants = [f"{name} {workers}" for name in NAMES for workers in (1, 2)]
        results = run_in_slices(contestants, arguments.rounds, start)
    seconds = [{name: figures["seconds"] for name, figures in turn.items()} for turn in results]
    speedups = {name: turns.ratios(results, f"{name} 1", f"{name} 2") for name in NAMES}
    shares = [own / bare for own, bare in zip(*speedups.values(), strict=True)]
    turns.print_ratios("speedup by a second process", **speedups)
    turns.print_ratios("speedup of chunkq, relative to bare loops", time=shares)
    figures: dict[str, Any] = {"seconds": seconds, "speedups": speedups, "shares": shares}
    figures |= {name: statistics.median(each) for name, each in speedups.items()}
    figures["share"] = statistics.median(shares)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
