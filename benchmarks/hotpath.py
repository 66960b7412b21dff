"""Measure the seconds of a run by function, and the bandwidth of gathering and blending.

Run: python benchmarks/hotpath.py [--json FILE]. One process runs the job of network.py with two
threads. Functions are timed by the wall clock. Those of one thread do not overlap; those of the
device's thread overlap with those of other threads. The script restarts itself with the environment
of chunkq's workers (chunkq_worker.child_env).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chunkq_worker.child_env import child_env

from benchmarks.contestant import chunkq
from benchmarks.network import make_job
from benchmarks.turns import THREADS, quiet_rounds
from chunkq.blend.combine import add_weighted
from chunkq.job.job_reading import load_job

SHAPE = (224, 160, 160)
WATCHED = (
    ("device", "network: load", "chunkq_worker.inference_engine", "InferenceEngine.__init__"),
    ("device", "network: forward", "chunkq_worker.runtimes.torch", "TorchRuntime.__call__"),
    ("device", "gather a batch", "chunkq_worker.batching", "Batcher._fill"),
    ("device", "check for NaN", "chunkq_worker.output_predictions", "is_finite"),
    ("device", "activation, votes", "chunkq_worker.output_predictions", "_activate"),
    ("device", "weights", "chunkq.blend.patch_weights", "PatchWeights.weights_if_shared"),
    ("device", "blend", "chunkq.blend.rules", "add_weighted"),
    ("device", "clear sums", "chunkq_worker.runtimes.torch", "TorchRuntime.zeros"),
    ("device", "reduce", "chunkq.blend.sums", "chunk_results"),
    ("device", "cut into core, band, pieces", "chunkq.blend.sums", "contribution"),
    (
        "device",
        "all of a chunk on the device",
        "chunkq_worker.inference_engine",
        "InferenceEngine.start",
    ),
    ("others", "read the input", "chunkq.job.job_handle", "ItemHandle.read_halos"),
    ("others", "write the output", "chunkq.job.output_handle", "OutputHandle.write"),
    ("others", "write pieces", "chunkq.job.ledger", "ItemLedger.put_piece"),
    ("others", "commit", "chunkq.job.ledger", "ItemLedger.commit"),
    ("others", "finalize blocks, including writes", "chunkq.stages.finalize", "FinalizeStage.run"),
    ("end", "finalize", "chunkq_worker.predictor", "finalize_job"),
)
"""Thread, label, module and name of each timed function."""


def owner_of(module: str, name: str) -> tuple[Any, str]:
    """Return the module or class that has a watched function, and the function's name there."""
    *classes, last = name.split(".")
    owner: Any = importlib.import_module(module)
    for part in classes:
        owner = getattr(owner, part)
    return owner, last


def watch(seconds: dict[str, float]) -> None:
    """Wrap every watched function so that it adds its time to `seconds`."""

    def timed(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[label] += time.perf_counter() - before

        return run

    for _, label, module, name in WATCHED:
        owner, last = owner_of(module, name)
        setattr(owner, last, timed(getattr(owner, last), label))


def profile() -> dict[str, float]:
    """Return the seconds by label of one run after a warm-up; `all` is the time of the run."""
    seconds: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as name:
        job = load_job(str(make_job(Path(name), SHAPE)))
        chunkq(job, f"{name}/warm.zarr")()
        run = chunkq(job, f"{name}/out.zarr")
        watch(seconds)

        def run_once() -> dict[str, float]:
            seconds.clear()
            before = time.perf_counter()
            run()
            return seconds | {"all": time.perf_counter() - before}

        [figures] = quiet_rounds(1, run_once)
    return figures


def rate(work: Callable[[], object], amount: float, rounds: int = 15) -> float:
    """Return the median rate in GB/s of `amount` bytes."""
    times = []
    for _ in range(rounds):
        before = time.perf_counter()
        work()
        times.append(time.perf_counter() - before)
    return amount / statistics.median(times) / 1e9


def bandwidth(channels: int) -> dict[str, float]:
    """Return GB/s, bytes read and written, of copying, of gathering a batch and of blending.

    Patches of 64³ are in a region of 128³, which is larger than the caches. A copy reads and writes
    each byte. Gathering reads and writes integers. Blending reads prediction, weights and sums and
    writes the sums.
    """
    edge, region = 64, 128
    values = np.random.default_rng(0).integers(0, 255, (region,) * 3, dtype=np.uint8)
    batch = np.zeros((8, 1, edge, edge, edge), np.uint8)
    corners = [(a, b, c) for a in (0, 60) for b in (0, 60) for c in (0, 60)]
    slots = [tuple(slice(low, low + edge) for low in corner) for corner in corners]

    def gather() -> None:
        for row, slot in zip(batch, slots, strict=True):
            row[...] = values[slot].reshape(1, edge, edge, edge)

    sums = torch.zeros((channels, region, region, region))
    predictions = torch.rand((8, channels, edge, edge, edge))
    weights = torch.rand((edge,) * 3)

    def blend() -> None:
        for prediction, slot in zip(predictions, slots, strict=True):
            add_weighted(sums[(slice(None), *slot)], weights, prediction)

    source, target = torch.rand(1 << 25), torch.empty(1 << 25)
    voxels = 8 * edge**3
    return {
        "copy": rate(lambda: target.copy_(source), 2 * source.nbytes),
        "gather": rate(gather, 2 * voxels),
        "blend": rate(blend, voxels * (12 * channels + 4)),
    }


def main() -> None:
    """Measure, print, and write JSON if requested."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    environment = child_env(THREADS)
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)
    torch.set_num_threads(THREADS)
    figures: dict[str, Any] = {
        "bandwidth": {str(channels): bandwidth(channels) for channels in (1, 3, 21)}
    }
    seconds = profile()
    figures["profile"] = {"all": seconds.pop("all"), "rows": []}
    for thread, label, *_ in WATCHED:
        row = {"thread": thread, "label": label, "seconds": seconds.get(label, 0.0)}
        figures["profile"]["rows"].append(row)
        print(f"{thread:8}{label:32}{row['seconds']:8.3f} s")
    print(f"all {figures['profile']['all']:.3f} s")
    print(json.dumps(figures["bandwidth"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
