"""Border protocols side by side: chunkq's bands, recomputing, temporary layers, stored patches.

Run: python benchmarks/borders.py [--chunks 96 192] [--rounds N] [--size small] [--json FILE]. One
network, one volume, one size of patch, chunks of several sizes; each protocol of protocols.py runs
store to store in a process of its own, with the settings that chunkq gives its workers. Seconds are
medians, ratios medians of those taken round by round beside chunkq with the same chunks. Every
output is compared with the weighted average of all patches over the whole volume, in float64.
chunkflow comes from the package index into a folder of its own.
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
from chunkq.job import Job, load_job
from chunkq.resolve import resolve
from chunkq.stores import find_source
from chunkq.weights import built_in

ROUNDS = 2
CHUNKFLOW = Path(__file__).with_name("chunkflow.txt")
BYTES = (
    "those of uncompressed voxels: of every box asked of a store and every box given to one, "
    "temporary stores included"
)
F64 = npt.NDArray[np.float64]


def full(folder: Path) -> Path:
    """The U-Net of the brain demo over 288 × 288 × 96 voxels: 128 patches of 64³.

    Chunks of 96³ and of 192 × 192 × 96 both have borders along two axes; along each there are half
    as many for the larger ones, as in a volume without end.
    """
    return make_job(folder, (288, 288, 96), combine="weighted_avg")


def small(folder: Path) -> Path:
    """One convolution over patches of 16³."""
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(1, 3, 3, padding=1)
    with torch.no_grad():
        layer.weight /= 100  # voxels are up to 254
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
"""How a job is made, and the edges of its chunks unless others are asked for."""


def cut(job_file: Path, edge: int) -> Path:
    """The same job with chunks of another size, no larger than the volume."""
    job = yaml.safe_load(job_file.read_text())
    volume = stored(load_job(job_file).input[0]).shape
    job["chunksize"] = [min(edge, n) for n in volume]
    path = job_file.with_name(f"job-{edge}.yaml")
    path.write_text(yaml.safe_dump(job))
    return path


def whole_volume(job: Job) -> F64:
    """Return the weighted average of all patches over the whole volume, float64 (C, *V).

    The plan supplies the patches and chunkq the profiles of the weights. Everything between them
    and the average is computed here: without chunks, pieces or normalised weights.
    """
    plan, volume = resolve(job, find_source(job.input[0]).volume), read(job.input[0])
    profiles = built_in(job.weight_function[0], plan.output_patch, plan.margin).profiles
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
    """Let all protocols take turns on chunks of each size; returns what each took and did."""
    job = load_job(job_file)
    meant = whole_volume(job)
    jobs = {edge: cut(job_file, edge) for edge in edges}

    def run(contestant: str) -> Figures:
        name, edge = contestant.split()
        script, output = Path(__file__).with_name("protocols.py"), job_file.parent / f"{name}.zarr"
        figures = turns.ask(script, name, jobs[int(edge)], output, child_env(THREADS))
        return figures | {"difference": float(np.abs(read(str(output)) - meant).max())}

    run(f"chunkq {edges[0]}")  # whatever the system keeps of the files is kept for all
    crew = [f"{name} {edge}" for edge in edges for name in PROTOCOLS]
    taken = turns.take_turns(crew, rounds, run)
    return {
        "volume_voxels": list(meant.shape[1:]),
        "channels": len(meant),
        "patch_voxels": list(job.model.model_input_shape[1:]),
        "strides_voxels": list(job.strides or ()),
        "threads": THREADS,
        "rounds": rounds,
        "bytes_are": BYTES,
        "chunks": [
            {
                "chunk_voxels": list(load_job(jobs[edge]).chunksize or ()),
                "protocols": {name: summary(taken, name, edge) for name in PROTOCOLS},
            }
            for edge in edges
        ],
    }


def summary(taken: list[Turn], name: str, edge: int) -> Figures:
    """One protocol's figures over all rounds, with chunks of one size."""
    contestant = f"{name} {edge}"
    own = [turn[contestant] for turn in taken]
    ratios = turns.ratios(taken, contestant, f"chunkq {edge}")
    return {
        "patches_computed": own[0]["patches"],
        "bytes_read": own[0]["read"],
        "bytes_written": own[0]["written"],
        "seconds_median": turns.median_seconds(taken, contestant),
        "seconds_by_chunkqs_median": statistics.median(ratios),
        "seconds_by_chunkqs_of_each_round": ratios,
        "peak_memory_mb": max(figures["peak"] for figures in own) / 1024,
        "memory_before_mb": max(figures["before"] for figures in own) / 1024,
        "largest_difference": max(figures["difference"] for figures in own),
    }


def show(found: Figures) -> None:
    """Print a table for chunks of each size."""
    row = "{:<13}{:>8}{:>12}{:>12}{:>10}{:>9}{:>10}{:>12}"
    heads = ("patches", "read MB", "written MB", "seconds", "ratio", "peak MB", "difference")
    for of in found["chunks"]:
        print(row.format("×".join(map(str, of["chunk_voxels"])), *heads))
        for name, own in of["protocols"].items():
            print(
                row.format(
                    name,
                    own["patches_computed"],
                    f"{own['bytes_read'] / 1e6:.1f}",
                    f"{own['bytes_written'] / 1e6:.1f}",
                    f"{own['seconds_median']:.2f}",
                    f"{own['seconds_by_chunkqs_median']:.2f}",
                    f"{own['peak_memory_mb']:.0f}",
                    f"{own['largest_difference']:.1e}",
                )
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--chunks", type=int, nargs="+", metavar="EDGE", help="edges of chunks")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    turns.fetch("chunkflow", "--requirement", str(CHUNKFLOW))
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        make, edges = SIZES[asked.size]
        found = compare(make(Path(folder)), asked.chunks or edges, asked.rounds)
    show(found)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
