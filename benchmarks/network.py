"""Compare chunkq with a bare forward loop, MONAI's sliding window and a plain copy of the arrays.

Run: python benchmarks/network.py [PART ...] [--rounds N] [--json FILE]. Contestants run from store
to store, in separate processes that run in slices (see slices.py), with two threads each and the
malloc settings of chunkq's workers. A figure is the median of the ratios of each round. `small` has
96 patches in 12 chunks of 96³. `large` has 605 patches in 4 chunks of 192³, which is closer to a
real job. `basic` has 27 patches and MONAI's BasicUNet, which takes several times as long per patch
as the demo's U-Net. MONAI is installed from the package index into a separate folder. Parts that
are not run keep their figures in FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
import zarr
from chunkq_worker.child_env import child_env

from benchmarks import turns
from benchmarks.slices import run_in_slices
from benchmarks.turns import KEPT_OUTPUT, THREADS, Figures

ROUNDS = {"small": 5, "large": 2, "basic": 2, "copy": 5}
"""Together with `memory` they take 11 minutes on two cores."""
UNET = Path(__file__).parents[1] / "examples" / "brain" / "unet.ts"
MONAI = "monai==1.6.1"
SIZES = {
    "small": ((224, 160, 160), 96),
    "large": ((384, 384, 192), 192),
    "basic": ((128, 128, 128), 96),
}
"""Shape of the volume, and edge of the chunks."""
PARTS = (*SIZES, "memory", "copy")
BASIC = """
import sys, torch
from monai.networks.nets import BasicUNet
torch.manual_seed(0)
network = BasicUNet(spatial_dims=3, in_channels=1, out_channels=3).eval()
torch.jit.save(torch.jit.trace(network, torch.zeros(1, 1, 64, 64, 64)), sys.argv[1])
"""
"""Script that writes MONAI's BasicUNet with default settings and random weights."""


def make_job(
    folder: Path,
    shape: tuple[int, ...],
    dtype: str = "uint8",
    edge: int = 32,
    network: Path = UNET,
    **keys: Any,
) -> Path:
    """Write a job over a volume of noise: the brain demo's U-Net, half-overlapping 64³ windows."""
    values = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8).astype(dtype)
    zarr.create_array(folder / "in.zarr", shape=shape, chunks=(edge,) * 3, dtype=dtype)[:] = values
    job: dict[str, Any] = {
        "input": "in.zarr",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [32, 32, 32],
        "weight_function": ["weight_gaussian"],
        "combine": "soft",
        "chunksize": [96, 96, 96],
        "storage_chunks": [32, 32, 32],
        "threads": 2,
        "model_config": {
            "runtime": "torch",
            "type": "torchscript",
            "ts_file": str(network),
            "model_input_shape": [1, 64, 64, 64],
            "model_output_shape": [3, 64, 64, 64],
            "max_batch_size": 4,
        },
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job | keys))
    return path


def identity(folder: Path) -> Path:
    """Write a network without cost, which returns its input; return its path."""
    import torch

    path = folder / "identity.ts"
    torch.jit.save(torch.jit.script(torch.nn.Identity()), path)
    return path


def basic_unet(folder: Path) -> Path:
    """Write MONAI's BasicUNet as TorchScript; return its path."""
    path = folder / "basic.ts"
    settings = os.environ | {"PYTHONPATH": str(turns.PEERS)}
    command = [sys.executable, "-W", "ignore", "-c", BASIC, str(path)]
    subprocess.run(command, env=settings, check=True)
    return path


def start(name: str, job: Path) -> subprocess.Popen[str]:
    """Start one contestant in a separate process."""
    script = Path(__file__).with_name("contestant.py")
    output = job.parent / f"{name}.zarr"
    return turns.start_contestant(script, name, job, output, child_env(THREADS))


def run(name: str, job: Path) -> Figures:
    """Run one contestant in a separate process; return its figures."""
    return turns.finish(name, start(name, job))


def run_and_keep(job: Path) -> Figures:
    """Run chunkq; keep its output, whose metadata the others use."""
    figures = run("chunkq", job)
    (job.parent / "chunkq.zarr").rename(job.parent / KEPT_OUTPUT)
    return figures


def contest(job: Path, others: Sequence[str], rounds: int) -> Figures:
    """Run chunkq and others in slices; ratios are chunkq's seconds divided by the others'."""
    run_and_keep(job)  # fills the file cache for all contestants
    names = ("chunkq", *others)
    results = run_in_slices(names, rounds, lambda name: start(name, job))
    ratios = {other: turns.ratios(results, "chunkq", other) for other in others}
    cpu_ratios = {other: turns.ratios(results, "chunkq", other, key="cpu") for other in others}
    for other in others:
        turns.print_ratios(f"chunkq / {other}", time=ratios[other], CPU=cpu_ratios[other])
    return {
        "patches": results[0]["chunkq"]["patches"],
        "seconds": {name: turns.median_seconds(results, name) for name in names},
        "ratios": ratios,
        "cpu_ratios": cpu_ratios,
    }


def compare_networks(size: str, rounds: int) -> Figures:
    """Compare chunkq with the bare network and with MONAI on the same patches."""
    shape, chunk = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        network = basic_unet(Path(folder)) if size == "basic" else UNET
        job = make_job(Path(folder), shape, network=network, chunksize=[chunk] * 3)
        return {"volume": shape, "chunk": chunk} | contest(job, ("bare", "monai"), rounds)


def memory_peaks() -> Figures:
    """Return the peak memory (MB) for a volume and for one four times as large."""
    peaks: Figures = {}
    for name, shape in (("small", (160, 160, 160)), ("large", (640, 160, 160))):
        with tempfile.TemporaryDirectory() as folder:
            job = make_job(Path(folder), shape)
            figures = {"chunkq": run_and_keep(job), "monai": run("monai", job)}
            peaks[name] = {other: each["peak"] / 1024 for other, each in figures.items()}
    growth = {name: peaks["large"][name] - peaks["small"][name] for name in ("chunkq", "monai")}
    return peaks | {"growth": growth}


def compare_copies(rounds: int) -> Figures:
    """Compare chunkq without overlap and with a network without cost with a plain array copy."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = make_job(
            folder,
            (384, 384, 384),
            "float32",
            64,
            inference_type="patch",
            strides=None,
            chunksize=[128, 128, 128],
            storage_chunks=[64, 64, 64],
            weight_function=["weight_uniform"],
            combine="weighted_avg",
            model_config={
                "runtime": "torch",
                "type": "torchscript",
                "ts_file": str(identity(folder)),
                "model_input_shape": [1, 64, 64, 64],
                "max_batch_size": 8,
            },
        )
        return contest(job, ("copy",), rounds)


def main() -> None:
    """Run the parts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    if set(parts) != {"copy"}:
        turns.fetch("monai", MONAI)
    figures: Figures = {}
    for part in parts:
        print(part, flush=True)
        if part == "memory":
            figures[part] = memory_peaks()
        elif part == "copy":
            figures[part] = compare_copies(arguments.rounds or ROUNDS[part])
        else:
            figures[part] = compare_networks(part, arguments.rounds or ROUNDS[part])
        print(part, json.dumps(figures[part]), flush=True)
    if arguments.json:
        earlier = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        arguments.json.write_text(json.dumps(earlier | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
