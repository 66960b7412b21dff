"""Border protocols side by side: chunkq's bands, recomputing, temporary layers, stored patches.

Run: python benchmarks/borders.py [--rounds N] [--size small] [--json FILE]. One network, one
volume, one size of patch and chunk; each protocol of protocols.py runs store to store in a process
of its own, with the settings that chunkq gives its workers. Seconds are medians, ratios medians of
those taken round by round. Every output is compared with the float64 combination of all patches
over the whole volume, tests/reference.py. chunkflow comes from the package index into a folder
of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from chunkq_worker.birth import child_settings

from benchmarks import turns
from benchmarks.contestant import network, read
from benchmarks.network import make_job
from benchmarks.protocols import PROTOCOLS
from benchmarks.turns import THREADS, Figures, Turn
from chunkq.job import Job, load_job
from tests.reference import reference, sliding_window

ROUNDS = 5
CHUNKFLOW = Path(__file__).with_name("chunkflow.txt")
BYTES = (
    "bytes are those of uncompressed voxels: of every box asked of a store and every box given to "
    "one, temporary stores included"
)
SIZES = ("full", "small")
F64 = npt.NDArray[np.float64]


def full(folder: Path) -> Path:
    """The U-Net of the brain demo over 192³ voxels: 125 patches of 64³, 8 chunks of 96³."""
    return make_job(folder, (192, 192, 192), combine="weighted_avg")


def small(folder: Path) -> Path:
    """One convolution over patches of 16³, chunks of 24³."""
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(1, 3, 3, padding=1)
    with torch.no_grad():
        layer.weight /= 100  # voxels are up to 254
    path = folder / "tiny.ts"
    torch.jit.save(torch.jit.script(torch.nn.Sequential(layer, torch.nn.Softmax(1))), path)
    return make_job(
        folder,
        (64, 48, 48),
        combine="weighted_avg",
        strides=[8, 8, 8],
        chunksize=[24, 24, 24],
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


def whole_volume(job: Job) -> F64:
    """What the job means: all patches of the whole volume combined in float64, (C, *V)."""
    net, slot = network(job), job.model.model_input_shape

    def predict(patch: F64, start: tuple[int, ...]) -> F64:
        with torch.inference_mode():
            batch = torch.from_numpy(patch.astype(np.float32)).reshape(1, *slot)
            values: npt.NDArray[np.float32] = net(batch)[0].numpy()
        return values.astype(np.float64)

    volume = read(job.input[0])
    setup = sliding_window(volume.shape, slot[-volume.ndim :], job.strides or ())
    return reference(setup, volume, predict, job.combine, job.weight_function[0]).average


def compare(job_file: Path, rounds: int) -> Figures:
    """Let all protocols take turns; returns a flat table of what each took and did."""
    job = load_job(job_file)
    meant = whole_volume(job)

    def run(name: str) -> Figures:
        script, output = Path(__file__).with_name("protocols.py"), job_file.parent / f"{name}.zarr"
        figures = turns.ask(script, name, job_file, output, child_settings(THREADS))
        return figures | {"difference": float(np.abs(read(str(output)) - meant).max())}

    run("chunkq")  # whatever the system keeps of the files is kept for all
    taken = turns.take_turns(PROTOCOLS, rounds, run)
    found: Figures = {
        "volume_voxels": list(meant.shape[1:]),
        "channels": len(meant),
        "patch_voxels": list(job.model.model_input_shape[1:]),
        "strides_voxels": list(job.strides or ()),
        "chunk_voxels": list(job.chunksize or ()),
        "threads": THREADS,
        "rounds": rounds,
        "bytes_are": BYTES,
    }
    for name in PROTOCOLS:
        found |= {f"{name}_{key}": value for key, value in summary(taken, name).items()}
    return found


def summary(taken: list[Turn], name: str) -> Figures:
    """One protocol's figures over all rounds."""
    own = [turn[name] for turn in taken]
    ratios = turns.ratios(taken, name, "chunkq")
    return {
        "patches_computed": own[0]["patches"],
        "bytes_read": own[0]["read"],
        "bytes_written": own[0]["written"],
        "seconds_median": turns.median_seconds(taken, name),
        "seconds_by_chunkqs_median": statistics.median(ratios),
        "seconds_by_chunkqs_of_each_round": ratios,
        "peak_memory_mb": max(figures["peak"] for figures in own) / 1024,
        "memory_before_mb": max(figures["before"] for figures in own) / 1024,
        "largest_difference": max(figures["difference"] for figures in own),
    }


def show(found: Figures) -> None:
    """Print the table."""
    row = "{:<13}{:>8}{:>12}{:>12}{:>10}{:>9}{:>10}{:>12}"
    heads = ("", "patches", "read MB", "written MB", "seconds", "ratio", "peak MB", "difference")
    print(row.format(*heads))
    for name in PROTOCOLS:
        own: dict[str, Any] = {
            key.removeprefix(f"{name}_"): value
            for key, value in found.items()
            if key.startswith(f"{name}_")
        }
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
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    turns.fetch("chunkflow", "--requirement", str(CHUNKFLOW))
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        job_file = (full if asked.size == "full" else small)(Path(folder))
        found = compare(job_file, asked.rounds)
    show(found)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
