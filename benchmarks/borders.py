"""Compare border protocols: chunkq's pieces, recomputing, temporary layers, stored patches.

Run: python benchmarks/borders.py [--chunks 96 192] [--rounds N] [--size small] [--json FILE]. All
protocols of protocols.py use one network, one volume and one patch size, with chunks of several
sizes. Each runs from store to store in a separate process with the environment of chunkq's workers.
Seconds are medians; ratios are medians of the ratios to chunkq of each round, with equal chunks.
Every output is compared with the weighted average of all patches over the volume in float64.
chunkflow is installed from the package index into a separate folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import yaml
from chunkq_worker.child_env import child_env

from benchmarks import turns
from benchmarks.contestant import network, predictions, read, stored
from benchmarks.network import make_job
from benchmarks.protocols import PROTOCOLS
from benchmarks.turns import THREADS, Figures, Turn
from chunkq.blend.weights import built_in_weights
from chunkq.job.job_file import Job
from chunkq.job.job_reading import load_job
from chunkq.job.resolve import resolve
from chunkq.storage.images import find_source

ROUNDS = 2
CHUNKFLOW = Path(__file__).with_name("chunkflow.txt")
BYTES = (
    "those of uncompressed voxels: all boxes read from a store and all boxes written to one, "
    "temporary stores included"
)
F64 = npt.NDArray[np.float64]


def full(folder: Path) -> Path:
    """Write the job of the brain demo's U-Net over 288 × 288 × 96 voxels: 128 patches of 64³.

    Chunks of 96³ and of 192 × 192 × 96 both have borders along two axes. Along each axis the larger
    chunks have half as many borders, as in an unbounded volume.
    """
    return make_job(folder, (288, 288, 96), combine="weighted_avg")


def small(folder: Path) -> Path:
    """Write the job of one convolution over patches of 16³."""
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(1, 3, 3, padding=1)
    with torch.no_grad():
        layer.weight /= 100  # voxel values go up to 254
    path = folder / "tiny.ts"
    torch.jit.save(torch.jit.script(torch.nn.Sequential(layer, torch.nn.Softmax(1))), path)
    return make_job(
        folder,
        (72, 72, 24),
        combine="weighted_avg",
        strides=[8, 8, 8],
        storage_chunks=[8, 8, 8],
        model_config={
            "runtime": "torch",
            "type": "torchscript",
            "ts_file": str(path),
            "model_input_shape": [1, 16, 16, 16],
            "model_output_shape": [3, 16, 16, 16],
            "max_batch_size": 4,
        },
    )


SIZES = {"full": (full, (96, 192)), "small": (small, (24, 48))}
"""Function that writes the job, and default edges of its chunks."""


def with_chunks(job_file: Path, edge: int) -> Path:
    """Write the job with another chunk size, limited to the volume; return its path."""
    job = yaml.safe_load(job_file.read_text())
    volume = stored(load_job(job_file).input[0]).shape
    job["chunksize"] = [min(edge, n) for n in volume]
    path = job_file.with_name(f"job-{edge}.yaml")
    path.write_text(yaml.safe_dump(job))
    return path


def whole_volume(job: Job) -> F64:
    """Return the weighted average of all patches over the volume, float64 (C, *V).

    The plan supplies the patches and chunkq the weight profiles. The rest is computed here,
    without chunks, pieces or normalized weights.
    """
    plan, volume = resolve(job, find_source(job.input[0]).volume), read(job.input[0])
    profiles = built_in_weights(job.weight_function[0], plan.output_patch, plan.margin).profiles
    weights: F64 = np.exp(reduce(np.add.outer, profiles))
    sums, total = np.zeros((plan.channels, *volume.shape)), np.zeros(volume.shape)
    patches = [patch for index in plan.indices() for patch in plan.patches(plan.chunk(index))]
    with torch.inference_mode():
        for patch, values in predictions(job, network(job), patches, volume):
            window = patch.source.slices((0,) * plan.rank)
            sums[(slice(None), *window)] += weights * values.numpy().astype(np.float64)
            total[window] += weights
    return sums / total


def compare(job_file: Path, edges: Sequence[int], rounds: int) -> Figures:
    """Run all protocols in turns with each chunk size; return their figures."""
    job = load_job(job_file)
    expected = whole_volume(job)
    jobs = {edge: with_chunks(job_file, edge) for edge in edges}

    def run(contestant: str) -> Figures:
        name, edge = contestant.split()
        script, output = Path(__file__).with_name("protocols.py"), job_file.parent / f"{name}.zarr"
        figures = turns.run_contestant(script, name, jobs[int(edge)], output, child_env(THREADS))
        return figures | {"difference": float(np.abs(read(str(output)) - expected).max())}

    run(f"chunkq {edges[0]}")  # fills the file cache for all contestants
    contestants = [f"{name} {edge}" for edge in edges for name in PROTOCOLS]
    results = turns.take_turns(contestants, rounds, run)
    return {
        "volume_voxels": list(expected.shape[1:]),
        "channels": len(expected),
        "patch_voxels": list(job.model.model_input_shape[1:]),
        "strides_voxels": list(job.strides or ()),
        "threads": THREADS,
        "rounds": rounds,
        "bytes_are": BYTES,
        "chunks": [
            {
                "chunk_voxels": list(load_job(jobs[edge]).chunksize or ()),
                "protocols": {name: summary(results, name, edge) for name in PROTOCOLS},
            }
            for edge in edges
        ],
    }


def summary(results: list[Turn], name: str, edge: int) -> Figures:
    """Return the figures of one protocol over all rounds, with one chunk size."""
    contestant = f"{name} {edge}"
    figures = [turn[contestant] for turn in results]
    ratios = turns.ratios(results, contestant, f"chunkq {edge}")
    return {
        "patches_computed": figures[0]["patches"],
        "bytes_read": figures[0]["read"],
        "bytes_written": figures[0]["written"],
        "seconds_median": turns.median_seconds(results, contestant),
        "seconds_by_chunkqs_median": statistics.median(ratios),
        "seconds_by_chunkqs_of_each_round": ratios,
        "peak_memory_mb": max(one["peak"] for one in figures) / 1024,
        "memory_before_mb": max(one["before"] for one in figures) / 1024,
        "largest_difference": max(one["difference"] for one in figures),
    }


def show(results: Figures) -> None:
    """Print a table for each chunk size."""
    row = "{:<13}{:>8}{:>12}{:>12}{:>10}{:>9}{:>10}{:>12}"
    heads = ("patches", "read MB", "written MB", "seconds", "ratio", "peak MB", "difference")
    for size in results["chunks"]:
        print(row.format("×".join(map(str, size["chunk_voxels"])), *heads))
        for name, figures in size["protocols"].items():
            print(
                row.format(
                    name,
                    figures["patches_computed"],
                    f"{figures['bytes_read'] / 1e6:.1f}",
                    f"{figures['bytes_written'] / 1e6:.1f}",
                    f"{figures['seconds_median']:.2f}",
                    f"{figures['seconds_by_chunkqs_median']:.2f}",
                    f"{figures['peak_memory_mb']:.0f}",
                    f"{figures['largest_difference']:.1e}",
                )
            )


def main() -> None:
    """Run the comparison that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--chunks", type=int, nargs="+", metavar="EDGE", help="edges of chunks")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    turns.fetch("chunkflow", "--requirement", str(CHUNKFLOW))
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        write_job, edges = SIZES[arguments.size]
        results = compare(write_job(Path(folder)), arguments.chunks or edges, arguments.rounds)
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
