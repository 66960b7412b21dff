"""chunkq beside a bare forward loop, MONAI's sliding window and a plain copy, store to store.

Run: python benchmarks/network.py [PART ...] [--rounds N] [--json FILE]. Contestants take turns in
processes of their own, with two threads each and the malloc settings that chunkq gives its workers;
a figure is the median of the ratios taken round by round. `small` has 96 patches in 12 chunks of
96³, `large` 605 patches in 4 chunks of 192³, nearer to what a real job has; `basic` has 27 patches
and MONAI's BasicUNet, which takes several times as long for a patch as the demo's U-Net. MONAI
comes from the package index into a folder of its own. In FILE, parts that are not asked for stay as
they were.
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
from benchmarks.turns import THREADS, Figures

ROUNDS = {"small": 7, "large": 3, "basic": 7, "copy": 7}
UNET = Path(__file__).parents[1] / "examples" / "brain" / "unet.ts"
MONAI = "monai==1.6.1"
SIZES = {
    "small": ((224, 160, 160), 96),
    "large": ((384, 384, 192), 192),
    "basic": ((128, 128, 128), 96),
}
"""Volume, and edge of chunks."""
PARTS = (*SIZES, "memory", "copy")
BASIC = """
import sys, torch
from monai.networks.nets import BasicUNet
torch.manual_seed(0)
network = BasicUNet(spatial_dims=3, in_channels=1, out_channels=3).eval()
torch.jit.save(torch.jit.trace(network, torch.zeros(1, 1, 64, 64, 64)), sys.argv[1])
"""
"""Writes MONAI's BasicUNet, as it is by default, with random weights."""


def make_job(
    folder: Path,
    shape: tuple[int, ...],
    dtype: str = "uint8",
    edge: int = 32,
    network: Path = UNET,
    **keys: Any,
) -> Path:
    """A job over a volume of noise: the brain demo's U-Net, windows of 64³ that overlap by half."""
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
    """A network that costs nothing: it returns what it is given."""
    import torch

    path = folder / "identity.ts"
    torch.jit.save(torch.jit.script(torch.nn.Identity()), path)
    return path


def basic_unet(folder: Path) -> Path:
    path = folder / "basic.ts"
    settings = os.environ | {"PYTHONPATH": str(turns.PEERS)}
    command = [sys.executable, "-W", "ignore", "-c", BASIC, str(path)]
    subprocess.run(command, env=settings, check=True)
    return path


def ask(name: str, job: Path) -> Figures:
    """Run one contestant."""
    script = Path(__file__).with_name("contestant.py")
    output = job.parent / f"{name}.zarr"
    return turns.ask(script, name, job, output, child_env(THREADS))


def contest(job: Path, others: Sequence[str], rounds: int) -> Figures:
    """Have chunkq and others take turns; ratios are of chunkq's seconds by the others'."""
    ask("chunkq", job)  # whatever the system keeps of the files is kept for all
    names = ("chunkq", *others)
    taken = turns.take_turns(names, rounds, lambda name: ask(name, job))
    return {
        "patches": taken[0]["chunkq"]["patches"],
        "seconds": {name: turns.median_seconds(taken, name) for name in names},
        "ratios": {other: turns.ratios(taken, "chunkq", other) for other in others},
        "cpu_ratios": {other: turns.ratios(taken, "chunkq", other, of="cpu") for other in others},
    }


def beside_networks(size: str, rounds: int) -> Figures:
    """The same patches by the bare network and by MONAI."""
    shape, chunk = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        network = basic_unet(Path(folder)) if size == "basic" else UNET
        job = make_job(Path(folder), shape, network=network, chunksize=[chunk] * 3)
        return {"volume": shape, "chunk": chunk} | contest(job, ("bare", "monai"), rounds)


def peaks() -> Figures:
    """The most memory taken (MB) over a volume and one four times as large."""
    found: Figures = {}
    for name, shape in (("small", (160, 160, 160)), ("large", (640, 160, 160))):
        with tempfile.TemporaryDirectory() as folder:
            job = make_job(Path(folder), shape)
            found[name] = {who: ask(who, job)["peak"] / 1024 for who in ("chunkq", "monai")}
    growth = {who: found["large"][who] - found["small"][who] for who in ("chunkq", "monai")}
    return found | {"growth": growth}


def copying(rounds: int) -> Figures:
    """A network that costs nothing, without overlap, beside a plain copy of the arrays."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        job = make_job(
            place,
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
                "ts_file": str(identity(place)),
                "model_input_shape": [1, 64, 64, 64],
                "max_batch_size": 8,
            },
        )
        return contest(job, ("copy",), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    parts = asked.parts or list(PARTS)
    if set(parts) != {"copy"}:
        turns.fetch("monai", MONAI)
    figures: Figures = {}
    for part in parts:
        if part == "memory":
            figures[part] = peaks()
        elif part == "copy":
            figures[part] = copying(asked.rounds or ROUNDS[part])
        else:
            figures[part] = beside_networks(part, asked.rounds or ROUNDS[part])
        print(part, json.dumps(figures[part]), flush=True)
    if asked.json:
        kept = json.loads(asked.json.read_text()) if asked.json.exists() else {}
        asked.json.write_text(json.dumps(kept | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
