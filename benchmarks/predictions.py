"""Compare what `chunkq plan --check-model` predicts with what worker processes use.

Run: python benchmarks/predictions.py [JOB ...] [--json FILE]. Each job is planned, produced,
computed by one new process of `chunkq work` and sealed by `chunkq finalize`. Then its chunks are
computed again without a queue, which leaves all blocks to `chunkq finalize`. Counts and bytes must
be equal, memory must agree within 10 %. A ratio is predicted divided by measured.
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

from chunkq.job.job_handle import JobHandle, open_job
from chunkq.job.ledger import ALIGNMENT, CRC_BYTES
from chunkq.job.tasks import chunk_name
from chunkq.stages.finalize import OWN_PIECE

NETWORKS = '''
import torch


class Tiny(torch.nn.Module):
    """A network whose only cost is its arrays."""

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
"""Starts a command from a small process: the peak memory of a process includes its parent's."""
WITHOUT_QUEUE = """
import sys
from chunkq_worker.run_task import run_task
from chunkq.queue.contract.executor import Attempt
from chunkq.job.job_handle import open_job
from chunkq.job.tasks import Task
job = open_job(sys.argv[1])
for index in job.items[0].plan.active_indices():
    run_task(Task("infer", *job.id, 0, index), Attempt(1, "inline"))
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
    """Write a job over a cube of noise; return its depth."""
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
    """Return the bytes that `Ledger.put_piece` writes in addition to the voxels of the pieces."""
    plan, epoch = job.items[0].plan, job.record.epoch
    total = 0
    for chunk in map(plan.chunk, plan.active_indices()):
        pieces = [
            (p.target, p.name, [("<f4", (plan.channels, *p.box.shape))])
            for p in plan.outgoing_pieces(chunk)
        ]
        if chunk.has_band:
            bands = [("<f4", (plan.channels, *box.shape)) for box in chunk.band_boxes]
            rest = [(plan.output_dtype.str, plan.output_box(b).shape) for b in chunk.rest_boxes]
            pieces.append((chunk.index, OWN_PIECE, [*bands, *rest]))
        for block, name, arrays in pieces:
            path = f"pieces/0/{chunk_name(block)}/{name}"
            line = len(json.dumps([epoch, path, arrays])) + 1
            total += line + -line % ALIGNMENT + CRC_BYTES
    return total


def command(folder: Path, *arguments: str) -> str:
    """Run a chunkq command; return its stdout."""
    return _run(folder, [sys.executable, "-m", "chunkq", *arguments])


def _run(folder: Path, arguments: list[str]) -> str:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("CHUNKQ")}
    environment = {**inherited, "CHUNKQ_QUEUE": f"sqlite://{folder}/queue.db"}
    result = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {result.stderr}")
    return result.stdout


def finalize(folder: Path) -> int:
    """Run `chunkq finalize`; return its peak memory in bytes."""
    arguments = [sys.executable, "-m", "chunkq", "finalize", "out.zarr"]
    out = _run(folder, [sys.executable, "-I", "-S", "-c", LAUNCHER, *arguments])
    code, peak = json.loads(out.splitlines()[-1])
    if code:
        raise SystemExit(f"finalize exited with {code}")
    return int(peak)


def figures(folder: Path, depth: int) -> Figures:
    """Predict the costs of a job, run it, and compare."""
    options = ("--check-model", "--depth", str(depth), "--json")
    predicted = json.loads(command(folder, "plan", "job.json", *options))
    check = predicted["model_check"]
    command(folder, "produce", "job.json")
    command(folder, "work", "--burst", "--gpus", "none", "--depth", str(depth), "--quiet")
    command(folder, "finalize", "out.zarr")
    report = json.loads(command(folder, "report", "out.zarr", "--json"))
    command(folder, "produce", "job.json", "--overwrite")
    _run(folder, [sys.executable, "-c", WITHOUT_QUEUE, str(folder / "out.zarr.chunkq")])
    peak = finalize(folder)
    header_bytes = headers(open_job(str(folder / "out.zarr.chunkq")))
    measured = report["bytes"]
    pairs = {
        "patches": (predicted["patches"], report["patches"]),
        "input_bytes": (predicted["input_bytes"], measured["input"]),
        "output_bytes": (predicted["output_bytes"], measured["output"]),
        "piece_bytes": (predicted["piece_bytes"], measured["pieces_written"] - header_bytes),
        "piece_bytes_read": (predicted["piece_bytes"], measured["pieces_read"] - header_bytes),
        "worker_peak": (check["worker_bytes"], report["peak_rss_bytes"]),
        "finalizer_peak": (check["finalizer_bytes"], peak),
    }
    results: Figures = {
        key: {"predicted": p, "measured": m, "ratio": p / m if m else 1.0 if p == m else None}
        for key, (p, m) in pairs.items()
        if p is not None  # None: the job has nothing to finalize
    }
    results["array_bytes"] = predicted["array_bytes"]
    results["loaded_bytes"] = check["loaded_bytes"]
    return results


def main() -> None:
    """Run the jobs that the command line names, print the comparison, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", type=int, help="numbers of jobs from 0; default: all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = [list(JOBS)[number] for number in arguments.jobs] or list(JOBS)
    all_figures: Figures = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            depth = make_job(Path(folder), **JOBS[name])
            all_figures[name] = results = figures(Path(folder), depth)
        print(name)
        for key, value in results.items():
            if isinstance(value, dict):
                ratio = "-" if value["ratio"] is None else f"{value['ratio']:.4f}"
                print(f"  {key:18}{value['predicted']:>14}{value['measured']:>14}  {ratio}")
        print(f"  arrays only, at most {results['array_bytes']}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(all_figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
