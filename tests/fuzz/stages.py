"""A tiny job at each stage of its run, stored as folders that can be restored repeatedly."""

import contextlib
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy.typing as npt
import yaml
from chunkq_worker.run_task import run_task

from chunkq.cli import main
from chunkq.job.job_handle import open_job
from chunkq.job.tasks import Task
from chunkq.queue.contract.executor import WorkerOptions
from chunkq.queue.leases.task_loop import LeaseQueue
from chunkq.queue.registry import open_executor
from tests.harness.volumes import random_volume, read_output, write_zarr

STAGES = ("produced", "half inferred", "inferred", "half finalized", "sealed")
OUTPUT, QUEUE = "out.zarr", "queue.db"
SHAPE = (24, 22)
NETWORK = """
import os
import numpy as np

def net(batch):
    if os.environ.get("NET_BROKEN"):
        raise ArithmeticError("broken")
    x = np.asarray(batch, np.float32) / 100
    return np.concatenate([x, 1 - x], axis=1)
"""
JOB: dict[str, Any] = {
    "input": "in.zarr",
    "output": OUTPUT,
    "inference_type": "sliding_window",
    "strides": [4, 4],
    "chunksize": [12, 12],
    "storage_chunks": [6, 6],
    "combine": "weighted_avg",
    "weight_function": ["weight_gaussian"],
    "threads": 1,
    "model_config": {
        "runtime": "numpy",
        "type": "class",
        "class_file": "net.py",
        "class_name": "net",
        "model_input_shape": [1, 8, 8],
        "model_output_shape": [2, 8, 8],
        "max_batch_size": 8,
    },
}
"""A job of 4 chunks with 3 blocks that several chunks contribute to."""


class Stages:
    """The stages of one job below a folder, and `work`, the folder for restored copies.

    The stages are created in `work` because stored paths are absolute.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        if not (folder / "created").exists():
            shutil.rmtree(folder, ignore_errors=True)
            self._create()
            (folder / "created").touch()

    @property
    def output(self) -> Path:
        return self.work / OUTPUT

    @property
    def queue_url(self) -> str:
        return f"sqlite://{self.work / QUEUE}"

    @cached_property
    def reference(self) -> npt.NDArray[Any]:
        """The voxels of the intact output."""
        return read_output(self.folder / "sealed" / OUTPUT)

    def restore(self, stage: str) -> None:
        """Replace `work` by a copy of a stage."""
        remove(self.work)
        shutil.copytree(self.folder / stage, self.work, symlinks=True)

    def _create(self) -> None:
        self.work.mkdir(parents=True)
        write_zarr(self.work / "in.zarr", random_volume(SHAPE), (8, 8))
        (self.work / "net.py").write_text(NETWORK)
        (self.work / "job.yaml").write_text(yaml.safe_dump(JOB))
        self._command("produce", str(self.work / "job.yaml"))
        executor = open_executor(self.queue_url)
        assert isinstance(executor, LeaseQueue)
        options = WorkerOptions("fuzz-host:1")
        path = f"{self.output}.chunkq"
        self._save("produced")
        for _ in range(2):
            self._run_next(executor, options)
        self._fail_next(executor, options)
        executor.reserve(WorkerOptions("killed-host:2"))  # the lease of a killed worker
        self._save("half inferred")
        job = open_job(path)
        executor.cancel(job.id)
        chunks = job.items[0].plan.active_indices()
        executor.submit(Task("infer", *job.id, 0, index) for index in chunks)
        while self._run_next(executor, options):
            pass
        self._save("inferred")
        first = next(iter(job.items[0].plan.to_finalize()))
        executor.submit([Task("finalize", *job.id, 0, first)])
        lease = executor.reserve(options)
        assert lease is not None
        run_task(lease.task, lease.attempt)
        executor.ack(lease)
        self._save("half finalized")
        executor.close()
        self._command("finalize", str(self.output))
        self._save("sealed")

    def _run_next(self, executor: LeaseQueue, options: WorkerOptions) -> bool:
        """Run the next task and ack it; return whether the queue had one."""
        lease = executor.reserve(options)
        if lease is not None:
            run_task(lease.task, lease.attempt)
            executor.ack(lease)
        return lease is not None

    def _fail_next(self, executor: LeaseQueue, options: WorkerOptions) -> None:
        """Run the next task with a network that raises, and nack it."""
        lease = executor.reserve(options)
        assert lease is not None
        with mock.patch.dict(os.environ, {"NET_BROKEN": "1"}):
            try:
                run_task(lease.task, lease.attempt)
            except ArithmeticError as error:
                executor.nack(lease, error)

    def _command(self, *arguments: str) -> None:
        with (
            mock.patch("sys.argv", ["chunkq", *arguments]),
            mock.patch.dict(os.environ, {"CHUNKQ_QUEUE": self.queue_url}),
        ):
            assert main() == 0

    def _save(self, stage: str) -> None:
        shutil.copytree(self.work, self.folder / stage)


def remove(folder: Path) -> None:
    """Remove a folder whose permissions may have changed."""
    for top, names, _ in os.walk(folder):
        os.chmod(top, 0o700)
        for name in names:
            with contextlib.suppress(OSError):
                if not os.path.islink(os.path.join(top, name)):
                    os.chmod(os.path.join(top, name), 0o700)
    shutil.rmtree(folder, ignore_errors=True)
    assert not os.path.lexists(folder)
