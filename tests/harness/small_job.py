"""Jobs of six or four small chunks that overlap along both axes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.networks import RUNTIME, toy_model
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace

SHAPE = (32, 22)
CHUNKS = {(i, j) for i in range(3) for j in range(2)}


def small_workspace(folder: Path, **changes: Any) -> Workspace:
    """Write the input and the job file `job.json`, with some keys changed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_zarr(folder / "in.zarr", random_volume(SHAPE), (8, 8))
    values = {
        "input": "in.zarr",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [4, 4],
        "weight_function": ["weight_gaussian"],
        "chunksize": [12, 12],
        "storage_chunks": [4, 4],
        "threads": 1,
        "model_config": toy_model(folder, (8, 8), scale=100.0),
    } | changes
    workspace = Workspace(folder, values)
    workspace.write_job()
    return workspace


def four_chunks(folder: Path, runtime: str = RUNTIME, **changes: Any) -> Workspace:
    """Write the input and the job file `job.json` of a job with two chunks along each axis."""
    folder.mkdir(parents=True, exist_ok=True)
    write_zarr(folder / "in.zarr", random_volume((32, 24)), (8, 8))
    values = {
        "input": "in.zarr",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [4, 4],
        "chunksize": [16, 12],
        "storage_chunks": [4, 4],
        "threads": 1,
        "model_config": toy_model(folder, (8, 8), scale=100.0, runtime=runtime),
    }
    workspace = Workspace(folder, values | changes)
    workspace.write_job()
    return workspace


@dataclass(frozen=True)
class VolumeWorkspace(Workspace):
    """A workspace whose output is the precomputed volume `out`."""

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def job_folder(self) -> Path:
        return self.folder / "out.chunkq"


def small_volume(folder: Path, **changes: Any) -> VolumeWorkspace:
    """Write the files of `small_workspace` for a job that writes a precomputed volume."""
    small = small_workspace(folder, output="precomputed://out", **changes)
    return VolumeWorkspace(folder, small.values)
