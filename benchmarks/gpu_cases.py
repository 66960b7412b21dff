"""The cases of gpu.py: a network, its patches and its volumes, and the job files for them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from chunkq.job.model_config import ModelConfig

ROOT = Path(__file__).parents[1]
CHUNK, STEP = 128, 8
"""Edge of the input's storage chunks and of its pieces of constant intensity, in voxels."""
NOISE = 16


@dataclass(frozen=True)
class Case:
    """A network with half-overlapping patches over cubes of noise and constant pieces.

    `edges` are the voxels of each volume's edge. Half the patch divides edge - patch, so that all
    contestants compute the same patches.
    """

    name: str
    factory: str
    patch: int
    batch: int
    precision: str
    edges: Mapping[str, int]
    is_trained: bool = False

    def patches(self, volume: str) -> int:
        """Return the number of patches of a volume."""
        return len(self.starts(volume)) ** 3

    def starts(self, volume: str) -> list[int]:
        """Return the first voxels of the patches along one axis."""
        return list(range(0, self.edges[volume] - self.patch + 1, self.patch // 2))


CASES = {
    case.name: case
    for case in (
        Case(
            "unet",
            "demo_unet",
            64,
            16,
            "tf32",
            {"check": 160, "small": 256, "middle": 448, "large": 800},
            is_trained=True,
        ),
        Case(
            "nnunet",
            "nnunet",
            128,
            4,
            "float16",
            {"check": 256, "middle": 448},
        ),
    )
}
"""`large` has 0.51 Gvoxel and 13 824 patches; `middle` 2197 of 64³ or 216 of 128³."""


def rehearsed(case: Case) -> Case:
    """Return a small variant of a case that a CPU computes in seconds."""
    edges = dict(zip(case.edges, (24, 32, 40, 48), strict=False))
    factory = "small_nnunet" if case.factory == "nnunet" else case.factory
    precision = {"tf32": "float32", "float16": "bfloat16"}[case.precision]
    return replace(case, factory=factory, patch=16, batch=4, precision=precision, edges=edges)


def write_networks(folder: Path) -> None:
    """Copy the networks' Python files into a folder."""
    shutil.copy(ROOT / "examples" / "brain" / "network.py", folder / "brain_network.py")
    shutil.copy(Path(__file__).with_name("gpu_networks.py"), folder)


def write_volume(case: Case, volume: str, folder: Path) -> Path:
    """Write a volume as a Zarr array (V, V, V) uint8; return its path."""
    edge, path = case.edges[volume], volume_path(case, volume, folder)
    rng = np.random.default_rng(edge)
    blocks = rng.integers(0, 255 - NOISE, (-(-edge // STEP),) * 3, dtype=np.uint8)
    array = zarr.create_array(
        path, shape=(edge,) * 3, chunks=(min(CHUNK, edge),) * 3, dtype="uint8", overwrite=True
    )
    for low in range(0, edge, CHUNK):
        high = min(low + CHUNK, edge)
        slab = blocks[low // STEP : -(-high // STEP)]
        for axis in range(3):
            slab = np.repeat(slab, STEP, axis)
        slab = slab[: high - low, :edge, :edge]
        array[low:high] = slab + rng.integers(0, NOISE, slab.shape, dtype=np.uint8)
    return path


def volume_path(case: Case, volume: str, folder: Path) -> Path:
    """Return the path of a volume; volumes of one edge are one array."""
    return folder / f"volume-{case.edges[volume]}.zarr"


def job(case: Case, folder: Path, device: str, **keys: Any) -> dict[str, Any]:
    """Return the values of a job file without input and output; model keys are among `keys`."""
    model_keys = {key: keys.pop(key) for key in list(keys) if key in model_fields()}
    model = {
        "runtime": "torch",
        "type": "class",
        "class_file": str(folder / "gpu_networks.py"),
        "class_name": case.factory,
        "model_input_shape": [1, *(case.patch,) * 3],
        "model_output_shape": [3, *(case.patch,) * 3],
        "max_batch_size": case.batch,
        "device": device,
        "precision": case.precision,
        **({"checkpoint": str(folder / "unet.pt")} if case.is_trained else {}),
        **model_keys,
    }
    return {
        "inference_type": "sliding_window",
        "strides": [case.patch // 2] * 3,
        "weight_function": ["weight_gaussian"],
        "combine": "soft",
        "model_config": _known_to_this_tree(model),
        **keys,
    }


def model_fields() -> set[str]:
    """Return the keys of `model_config`, with `precision` also in trees that lack it."""
    return {*ModelConfig.model_fields, "precision"}


def _known_to_this_tree(model: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of `model_config` for the tree that is imported.

    Before `precision` there was `autocast`, and torch's global flags chose between float32 and
    tf32.
    """
    if "precision" in ModelConfig.model_fields:
        return model
    precision = model.pop("precision")
    return model | ({"autocast": precision} if precision.endswith("16") else {})
