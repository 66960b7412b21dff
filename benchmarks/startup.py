"""Compare a small job from the first import to the last byte with a plain script.

Run: python benchmarks/startup.py [--rounds N] [--tree PATH] [--json FILE]. The job is one chunk of
96³ voxels: 27 patches of 64³ and the brain demo's U-Net, on the embedded queue. The script imports
torch and tensorstore, reads the volume, loads the network, blends the same patches in the same
batches and writes the labels. Both run in turns, as whole commands, with the malloc settings of
chunkq's workers. With `--tree`, chunkq of another checkout runs in turns with them.

The CPU seconds are those of all processes of a command, which a busy machine changes least.

The marks are seconds since the start of a command, by the start and end of its processes and the
dates of what it writes. They are medians of runs of their own, because watching processes costs
time. `status`, `plan` and `jobs` run on this small job, as whole commands.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from chunkq_worker.child_env import child_env

from benchmarks import turns
from benchmarks.network import UNET, make_job
from benchmarks.turns import THREADS, Figures

ROOT = Path(__file__).parents[1]
ROUNDS, WATCHED_ROUNDS, COMMAND_ROUNDS = 7, 3, 5
EDGE, PATCH, STRIDE, BATCH = 96, 64, 16, 4
TARGET_RATIO, TARGET_SECONDS = 1.15, 0.35
COMMANDS = {
    "status": ("status", "out.zarr"),
    "plan": ("plan", "job.yaml"),
    "jobs": ("jobs",),
}
PROCESSES = {
    "check": {"check-model"},
    "supervisor": {"work", "chunkq_worker.early_work"},
    "worker process": {"chunkq_worker.worker_process"},
}
"""Process of a run -> arguments of which only it has one."""
SCRIPT = f'''
"""A plain script: import, read, load, compute, write. Prints seconds since its start."""
import json, sys, time
start = float(sys.argv[4])
marks = {{"interpreter started": time.time() - start}}

import numpy as np
import tensorstore as ts
import torch

marks["imported"] = time.time() - start
torch.set_num_threads({THREADS})
source, network, output = sys.argv[1:4]
store = {{"driver": "zarr3", "kvstore": {{"driver": "file", "path": source}}}}
volume = ts.open(store).result().read().result()
marks["read"] = time.time() - start
net = torch.jit.load(network).eval()
marks["loaded"] = time.time() - start

axis = (np.arange({PATCH}) - ({PATCH} - 1) / 2) / ({PATCH} / 8)
profile = np.exp(-0.5 * axis**2).astype(np.float32)
weights = torch.from_numpy(profile[:, None, None] * profile[:, None] * profile)
starts = range(0, {EDGE} - {PATCH} + 1, {STRIDE})
corners = [(z, y, x) for z in starts for y in starts for x in starts]
sums = torch.zeros((3, *volume.shape))
norm = torch.zeros(volume.shape)
boxes = [tuple(slice(a, a + {PATCH}) for a in corner) for corner in corners]
with torch.inference_mode():
    for first in range(0, len(boxes), {BATCH}):
        group = boxes[first : first + {BATCH}]
        batch = np.stack([volume[box] for box in group])[:, None].astype(np.float32)
        for box, prediction in zip(group, net(torch.from_numpy(batch))):
            sums[(slice(None), *box)] += prediction * weights
            norm[box] += weights
labels = (sums / norm).argmax(0).to(torch.uint8).numpy()
marks["computed"] = time.time() - start
store = {{
    "driver": "zarr3",
    "kvstore": {{"driver": "file", "path": output}},
    "metadata": {{
        "shape": list(labels.shape),
        "data_type": "uint8",
        "chunk_grid": {{"name": "regular", "configuration": {{"chunk_shape": [32, 32, 32]}}}},
        "codecs": [{{"name": "bytes"}}, {{"name": "zstd", "configuration": {{"level": 1}}}}],
    }},
}}
ts.open(store, create=True, delete_existing=True).result().write(labels).result()
marks["written"] = time.time() - start
print(json.dumps(marks))
'''


class Stage:
    """A folder with the job, its queue and the script."""

    def __init__(self, folder: Path, other: Path | None) -> None:
        self.folder = folder
        self.trees = {"chunkq": ROOT} | ({} if other is None else {"before": other})
        self.job = make_job(
            folder,
            (EDGE,) * 3,
            strides=[STRIDE] * 3,
            chunksize=[EDGE] * 3,
        )
        (folder / "script.py").write_text(SCRIPT)

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of a contestant."""
        tree = self.trees.get(name, ROOT)
        path = os.pathsep.join(map(str, (tree, tree / "producer", tree / "worker")))
        settings = {
            "OMP_NUM_THREADS": str(THREADS),
            "CHUNKQ_QUEUE": f"sqlite://{self.folder}/{name}.db",
        }
        own = {} if name in self.trees else child_env(THREADS)
        return os.environ | settings | own | {"PYTHONPATH": path}

    def command(self, name: str, *arguments: str) -> list[str]:
        """Return the command of a contestant; `arguments` are those of chunkq."""
        if name == "script":
            paths = [str(self.folder / "in.zarr"), str(UNET), str(self.folder / "script.zarr")]
            return [sys.executable, str(self.folder / "script.py"), *paths, str(time.time())]
        return [sys.executable, "-m", "chunkq", *arguments]

    def start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a command of a contestant."""
        return subprocess.Popen(
            self.command(name, *arguments),
            cwd=self.folder,
            env=self.environment(name),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, name: str) -> Figures:
        """Run the job as a whole command, with a new output; return its seconds."""
        self.clear()
        before, used = time.perf_counter(), turns.own_seconds()
        out = finished(self.start(name, "run", "job.yaml", "--gpus", "none"), name)
        seconds = time.perf_counter() - before
        steps = json.loads(out.splitlines()[-1]) if name == "script" else {}
        return {
            "seconds": seconds,
            "cpu": turns.own_seconds() - used,
            "marks": steps | {"command ended": seconds},
        }

    def clear(self) -> None:
        """Delete the outputs."""
        for output in ("out.zarr", "out.zarr.chunkq", "script.zarr"):
            shutil.rmtree(self.folder / output, ignore_errors=True)

    def watch(self, name: str) -> dict[str, float]:
        """Run the job and return the marks, in seconds since the start of the command."""
        self.clear()
        start = time.time()
        process = self.start(name, "run", "job.yaml", "--gpus", "none")
        seen = watch_processes(process.pid)
        finished(process, name)
        seen["command ended"] = time.time()
        folder = self.folder / "out.zarr.chunkq"
        seen["job created"] = (folder / "job.json").stat().st_mtime
        [report] = folder.glob("*/report.json")
        seen["output sealed"] = report.stat().st_mtime
        [commit] = folder.glob("*/done/infer/0/*")
        values = json.loads(commit.read_bytes())
        seen["chunk started"], seen["chunk computed"] = values["started"], values["finished"]
        return {mark: moment - start for mark, moment in sorted(seen.items(), key=lambda s: s[1])}


def finished(process: subprocess.Popen[str], name: str) -> str:
    """Wait for a command and return its output. Raise SystemExit if it fails."""
    out = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{name}: exit code {process.returncode}: {out}")
    return out


def watch_processes(pid: int) -> dict[str, float]:
    """Return when each process of a run was first and last seen (s, Unix), until the run ends."""
    seen: dict[str, float] = {}
    run = psutil.Process(pid)
    while run.is_running() and run.status() != psutil.STATUS_ZOMBIE:
        for child in run.children(recursive=True):
            with suppress(psutil.Error):
                arguments = child.cmdline()
                kinds = [kind for kind, names in PROCESSES.items() if names.intersection(arguments)]
                for kind in kinds if child.status() != psutil.STATUS_ZOMBIE else ():
                    seen.setdefault(f"{kind} started", time.time())
                    seen[f"{kind} ended"] = time.time()
        time.sleep(0.005)
    return seen


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def command_seconds(stage: Stage, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median seconds of the short commands of each checkout."""
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in COMMANDS}
    for _ in range(rounds + 1):  # the first round fills the file cache
        for name in stage.trees:
            stage.run(name)  # a checkout may not read the job of another one
            for command, (kind, *arguments) in COMMANDS.items():
                before = time.perf_counter()
                subprocess.run(
                    stage.command(name, kind, *arguments),
                    cwd=stage.folder,
                    env=stage.environment(name),
                    stdout=subprocess.DEVNULL,
                    check=True,
                )
                seconds = time.perf_counter() - before
                figures[command].setdefault(name, []).append(seconds)
    return {
        command: {name: statistics.median(seconds[1:]) for name, seconds in by_tree.items()}
        for command, by_tree in figures.items()
    }


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tree", type=Path, help="Another checkout of chunkq.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        stage = Stage(Path(name), arguments.tree)
        names = ("script", *stage.trees)
        for contestant in names:
            stage.run(contestant)  # fills the file cache
        results = turns.take_turns(names, arguments.rounds, stage.run)
        watched = {
            tree: medians([stage.watch(tree) for _ in range(WATCHED_ROUNDS)])
            for tree in stage.trees
        }
        figures: dict[str, Any] = {
            "rounds": arguments.rounds,
            "seconds": {other: turns.median_seconds(results, other) for other in names},
            "ratios": {tree: turns.ratios(results, tree, "script") for tree in stage.trees},
            "cpu_ratios": {
                tree: turns.ratios(results, tree, "script", key="cpu") for tree in stage.trees
            },
            "cpu_seconds": {
                other: statistics.median(turn[other]["cpu"] for turn in results) for other in names
            },
            "target_ratio": TARGET_RATIO,
            "marks": {"script": medians([turn["script"]["marks"] for turn in results]), **watched},
            "commands": command_seconds(stage, COMMAND_ROUNDS),
            "target_seconds": TARGET_SECONDS,
        }
    print(json.dumps(figures, indent=1))
    for tree in stage.trees:
        ratios, cpu_ratios = figures["ratios"][tree], figures["cpu_ratios"][tree]
        turns.print_ratios(f"{tree} / script", time=ratios, CPU=cpu_ratios)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
