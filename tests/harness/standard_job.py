"""The job of most queue and crash tests; its network records its patches and can stop."""

import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from chunkq.job.tasks import chunk_name
from tests.harness.networks import NETWORK, RUNTIME
from tests.harness.processes import CommandResult
from tests.harness.volumes import write_zarr
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace

SHAPE = (24, 36, 52)
"""24 of the 30 blocks own patches; the last ones along the last axis own none."""
POISONOUS = (20, 30, 35)
"""Index of the only input voxel with value 255."""

HOOKS = """
import os
import sys

if "TEST_PRELOAD" in os.environ and "chunkq_worker.worker_process" in sys.orig_argv:
    import torch
"""

JOB: dict[str, Any] = {
    "inference_type": "sliding_window",
    "strides": [4, 4, 4],
    "combine": "weighted_avg",
    "weight_function": ["weight_gaussian"],
    "activation": "softmax",
    "chunksize": [12, 12, 12],
    "storage_chunks": [6, 6, 6],
    "threads": 1,
    "model_config": {
        "runtime": RUNTIME,
        "type": "class",
        "class_name": "Net",
        "model_input_shape": [1, 8, 8, 8],
        "model_output_shape": [2, 8, 8, 8],
        "max_batch_size": 8,
    },
}


@dataclass(frozen=True)
class StandardJob:
    """Files that all workspaces of a session share: input volume and network."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> Self:
        """Write the input, the network and the hooks into a folder."""
        job = cls(folder)
        write_zarr(folder / "in.zarr", job.volume, (8, 8, 8))
        (folder / "net.py").write_text(NETWORK)
        (folder / "hooks").mkdir()
        (folder / "hooks" / "sitecustomize.py").write_text(HOOKS)
        return job

    @cached_property
    def volume(self) -> npt.NDArray[np.uint8]:
        """The input volume: random values in 1 to 199, and 255 at `POISONOUS`."""
        volume = np.random.default_rng(0).integers(1, 200, SHAPE, dtype=np.uint8)
        volume[POISONOUS] = 255
        return volume

    def values(self, **changes: Any) -> dict[str, Any]:
        """Return the keys of the job file with changes; `model` is merged into `model_config`."""
        model = JOB["model_config"] | {"class_file": str(self.folder / "net.py")}
        model |= changes.pop("model", {})
        files = {"input": str(self.folder / "in.zarr"), "output": "out.zarr"}
        return JOB | files | {"model_config": model} | changes

    def workspace(
        self, folder: Path, changes: Mapping[str, Any] | None = None, url: str | None = None
    ) -> "StandardWorkspace":
        """Return a workspace in a folder for this job with some keys changed."""
        values = self.values(**(changes or {}))
        return StandardWorkspace(folder, values, url=url, standard_job=self)

    def run_undisturbed(self, folder: Path) -> "StandardWorkspace":
        """Run the job without disturbance, with one worker on the embedded queue."""
        workspace = self.workspace(folder)
        workspace.produce()
        workspace.work().ok()
        workspace.finalize().ok()
        return workspace


@dataclass(frozen=True)
class StandardWorkspace(Workspace):
    """Workspace for the standard job, with the records of its network and the gate it stops at."""

    standard_job: StandardJob = field(kw_only=True)

    @property
    def process_env(self) -> dict[str, str]:
        """The environment of a command in a separate process, with the network's variables."""
        paths = [str(self.standard_job.folder / "hooks"), os.environ.get("PYTHONPATH", "")]
        return super().process_env | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "NET_TRACE": str(self.folder / "trace"),
            "NET_JOB": str(self.job_folder),
            "NET_GATE": str(self.folder / "gate"),
        }

    def wait_until_stopped(self) -> int:
        """Wait until a process stops at the gate; return its process id."""
        gate = self.folder / "gate" / "stopped"
        wait_until(gate.exists, "a process stops at the gate")
        return int(gate.read_text())

    def open_gate(self) -> None:
        """Let the process at the gate continue."""
        (self.folder / "gate" / "open").touch()

    def wait_for_chunks_in_flight(self, depth: int) -> None:
        """Wait until every worker that has tasks has `depth` uncommitted ones."""

        def is_full() -> bool:
            running, done = self.running(), self.done()
            tasks = Counter(r.worker for r in running if chunk_name(r.task.chunk) not in done)
            return bool(tasks) and set(tasks.values()) == {depth}

        wait_until(is_full, f"{depth} chunks are in flight")

    def computed(self) -> Counter[int]:
        """Return how often the network received each patch, by the CRC-32 of its voxels."""
        trace = self.folder / "trace"
        lines = trace.read_text().splitlines() if trace.exists() else []
        return Counter(int(line.split()[1]) for line in lines)

    def patches(self) -> dict[str, set[int]]:
        """Return the CRC-32 of every patch that each chunk owns, computed with NumPy."""
        plan, volume = self.job.items[0].plan, self.standard_job.volume
        return {
            ".".join(map(str, index)): {
                zlib.crc32(volume[patch.source.slices((0, 0, 0))].tobytes())
                for patch in plan.patches(plan.chunk(index))
            }
            for index in plan.active_indices()
        }


def run_all(
    workspace: StandardWorkspace, *commands: Sequence[str], **environment: str
) -> list[CommandResult]:
    """Run commands in parallel processes; return their results."""
    with ExitStack() as stack:
        clis = [stack.enter_context(workspace.start(*each, **environment)) for each in commands]
        return [cli.wait() for cli in clis]
