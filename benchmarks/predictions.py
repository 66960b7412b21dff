"""What `chunkq plan --check-model` foretells beside what real worker processes then take.

Run: python benchmarks/predictions.py [JOB ...] [--json FILE]. Each job is planned, produced, worked
off by one fresh process of `chunkq work` and sealed by `chunkq finalize`. Then its chunks are
computed once more past the queue, which leaves all blocks to `chunkq finalize`. Counts and bytes
are to be equal, memory within a tenth; a ratio is predicted by measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from chunkq.finalize import OWN_PIECE
from chunkq.job_handle import JobHandle, open_job
from chunkq.ledger import ALIGNMENT, CRC_BYTES, ITEM
from chunkq.tasks import chunk_name

NETWORKS = '''
import torch


class Tiny(torch.nn.Module):
    """Costs nothing but its arrays."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return (x / 255).repeat(1, self.channels, 1, 1, 1)


class Small(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = torch.nn.Conv3d(1, 8, 3, padding=1)
        self.last = torch.nn.Conv3d(8, channels, 3, padding=1)

    def forward(self, x):
        return self.last(torch.relu(self.first(x / 255)))
'''
LAUNCHER = """
import json, os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024]))
"""
"""Small itself: a process's largest memory counts what its parent had when it was started."""
PAST_THE_QUEUE = """
import sys
from chunkq_worker.run_task import run_task
from chunkq.executors.base import Attempt
from chunkq.job_handle import open_job
from chunkq.tasks import Task
for index in open_job(sys.argv[1]).plan.indices():
    run_task(Task("infer", sys.argv[1], index), Attempt(1, "alone"))
"""
JOBS: dict[str, dict[str, Any]] = {
    "32³, 1 channel, average, depth 1": {"volume": 96, "chunk": 32, "depth": 1},
    "64³, 3 channels, soft, depth 2": {
        "volume": 128, "chunk": 64, "channels": 3, "combine": "soft", "network": "Small",
    },
    "96³, 1 channel, average, float32, depth 2": {"chunk": 96, "dtype": "float32"},
    "96³, 8 channels, average, depth 1": {"chunk": 96, "channels": 8, "depth": 1},
    "96³, 3 channels, hard, depth 4": {
        "chunk": 96, "channels": 3, "combine": "hard", "depth": 4, "network": "Small",
    },
    "192³, 1 channel, average, depth 2": {"volume": 384, "chunk": 192, "patch": 64, "stride": 48},
}  # fmt: skip
Figures = dict[str, Any]


def make_job(
    folder: Path,
    *,
    volume: int = 192,
    chunk: int,
    patch: int = 32,
    stride: int = 24,
    channels: int = 1,
    combine: str = "weighted_avg",
    dtype: str = "uint8",
    network: str = "Tiny",
    depth: int = 2,
) -> int:
    """Write a job over a cube of noise; returns its depth."""
    shape = (volume,) * 3
    noise = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    zarr.create_array(folder / "in.zarr", shape=shape, chunks=(32,) * 3, dtype=dtype)[:] = noise
    (folder / "net.py").write_text(NETWORKS)
    (folder / "kwargs.py").write_text(f"kwargs = {{'channels': {channels}}}\n")
    values = {
        "input": "in.zarr",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [stride] * 3,
        "chunksize": [chunk] * 3,
        "combine": combine,
        "weight_function": ["weight_gaussian"],
        "threads": 2,
        "model_config": {
            "runtime": "torch",
            "type": "class",
            "class_file": "net.py",
            "class_name": network,
            "kwargs_file": "kwargs.py",
            "model_input_shape": [1, *(patch,) * 3],
            "model_output_shape": [channels, *(patch,) * 3],
            "max_batch_size": 4,
        },
    }
    (folder / "job.json").write_text(json.dumps(values))
    return depth


def headers(job: JobHandle) -> int:
    """Bytes of the pieces that are not voxels: what `Ledger.put_piece` writes around them."""
    plan, epoch = job.plan, job.record.epoch
    stored = (plan.channels,) if plan.channel_axis else ()
    total = 0
    for chunk in map(plan.chunk, plan.indices()):
        if not chunk.is_active:
            continue
        pieces = [
            (p.target, p.name, [("<f4", (plan.channels, *p.box.shape))])
            for p in plan.outgoing_pieces(chunk)
        ]
        if chunk.has_band:
            own = [("<f4", (plan.channels, *box.shape)) for box in chunk.band_boxes]
            rest = [(plan.output_dtype.str, (*stored, *b.shape)) for b in chunk.rest_boxes]
            pieces.append((chunk.index, OWN_PIECE, [*own, *rest]))
        for block, name, arrays in pieces:
            path = f"pieces/{ITEM}/{chunk_name(block)}/{name}"
            line = len(json.dumps([epoch, path, arrays])) + 1
            total += line + -line % ALIGNMENT + CRC_BYTES
    return total


def command(folder: Path, *words: str) -> str:
    """Run a chunkq command; returns what it printed."""
    return _run(folder, [sys.executable, "-m", "chunkq", *words])


def _run(folder: Path, words: list[str]) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CHUNKQ")}
    environment = {**kept, "CHUNKQ_QUEUE": f"sqlite://{folder}/queue.db"}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr}")
    return done.stdout


def finalize(folder: Path) -> int:
    """Finalize; returns the largest resident memory of the command."""
    words = [sys.executable, "-m", "chunkq", "finalize", "out.zarr"]
    out = _run(folder, [sys.executable, "-I", "-S", "-c", LAUNCHER, *words])
    code, peak = json.loads(out.splitlines()[-1])
    if code:
        raise SystemExit(f"finalize ended with {code}")
    return int(peak)


def figures(folder: Path, depth: int) -> Figures:
    """Foretell a job and run it."""
    words = ("plan", "job.json", "--check-model", "--depth", str(depth), "--json")
    foretold = json.loads(command(folder, *words))
    probe = foretold["model_check"]
    command(folder, "produce", "job.json")
    command(folder, "work", "--burst", "--gpus", "none", "--depth", str(depth), "--quiet")
    command(folder, "finalize", "out.zarr")
    report = json.loads(command(folder, "report", "out.zarr", "--json"))
    command(folder, "produce", "job.json", "--overwrite")
    _run(folder, [sys.executable, "-c", PAST_THE_QUEUE, str(folder / "out.zarr.chunkq")])
    peak = finalize(folder)
    around = headers(open_job(str(folder / "out.zarr.chunkq")))
    moved = report["bytes"]
    pairs = {
        "patches": (foretold["patches"], report["patches"]),
        "input_bytes": (foretold["input_bytes"], moved["input"]),
        "output_bytes": (foretold["output_bytes"], moved["output"]),
        "piece_bytes": (foretold["piece_bytes"], moved["pieces_written"] - around),
        "piece_bytes_read": (foretold["piece_bytes"], moved["pieces_read"] - around),
        "worker_peak": (probe["worker_bytes"], report["peak_rss_bytes"]),
        "finalizer_peak": (probe["finalizer_bytes"], peak),
    }
    found: Figures = {
        key: {"predicted": p, "measured": m, "ratio": p / m if m else 1.0 if p == m else None}
        for key, (p, m) in pairs.items()
        if p is not None  # there is nothing to finalize
    }
    found["array_bytes"] = foretold["array_bytes"]
    found["loaded_bytes"] = probe["loaded_bytes"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", type=int, help="numbers, from 0 on; else all")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    names = [list(JOBS)[number] for number in asked.jobs] or list(JOBS)
    all_figures: Figures = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            depth = make_job(Path(folder), **JOBS[name])
            all_figures[name] = found = figures(Path(folder), depth)
        print(name)
        for key, value in found.items():
            if isinstance(value, dict):
                shown = "-" if value["ratio"] is None else f"{value['ratio']:.4f}"
                print(f"  {key:18}{value['predicted']:>14}{value['measured']:>14}  {shown}")
        print(f"  arrays alone, at most {found['array_bytes']}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(all_figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
