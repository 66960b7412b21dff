"""A toy network of any rank that tests/reference.py knows, and any job over it."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from unittest import mock

import numpy as np
import numpy.typing as npt
import psutil
from chunkq_producer import submit
from chunkq_worker.run import run_task

from chunkq.cli import main
from chunkq.executors.base import Attempt, Executor
from chunkq.finalize import finalize_job
from chunkq.job import load_job
from chunkq.ledger import Commit, JobFolder
from chunkq.opened import OpenJob, open_job
from chunkq.tasks import Task
from tests.waiting import PATIENCE

TOY = '''\
"""Toy networks, the same as those of tests/reference.py, for any rank."""
import itertools, math, os, time
import torch


def crop(y, output):
    for axis, q in enumerate(output, start=2):
        y = y.narrow(axis, (y.shape[axis] - q) // 2, q)
    return y


class Toy(torch.nn.Module):
    """`kind` is pointwise, position_dependent or box_blur; inputs are divided by `scale`.

    TOY_DELAY in the environment makes every batch take that many seconds.
    A voxel above `poison` turns the patch's first voxel into NaN.
    """

    def __init__(self, kind, channels, patch, output, scale=1.0, poison=None):
        super().__init__()
        self.kind, self.patch, self.output = kind, tuple(patch), tuple(output)
        self.scale, self.poison = scale, poison
        one = (1,) * len(self.patch)
        self.t = ((torch.arange(channels, dtype=torch.float64) + 0.5) / channels).reshape(-1, *one)
        self.gain = torch.ones(one, dtype=torch.float64)
        if kind == "position_dependent":
            axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in self.patch]
            u = sum(torch.meshgrid(*axes, indexing="ij")) / len(axes)
            phases = torch.arange(channels, dtype=torch.float64).reshape(-1, *one)
            self.gain = 1 + torch.cos(2 * math.pi * u + phases) / 2

    def forward(self, batch):
        time.sleep(float(os.environ.get("TOY_DELAY", "0")))
        given = batch.reshape(len(batch), 1, *self.patch)
        x = given / self.scale
        if self.kind == "box_blur":
            wide = torch.nn.functional.pad(x, (1, 1) * len(self.patch))
            x = torch.zeros_like(x)
            for shift in itertools.product(range(3), repeat=len(self.patch)):
                part = wide
                for axis, (s, n) in enumerate(zip(shift, self.patch), start=2):
                    part = part.narrow(axis, s, n)
                x = x + part
            x = x / 3 ** len(self.patch)
        y = x * (2 * self.t * self.gain).to(x.dtype) - (self.t * self.t).to(x.dtype)
        y = crop(y, self.output).contiguous()
        if self.poison is not None:
            bad = given.flatten(1).amax(1) > self.poison
            y.flatten(1)[bad, 0] = math.nan
        return y
'''


def random_volume(shape: tuple[int, ...], dtype: npt.DTypeLike = "uint8") -> npt.NDArray[Any]:
    """A fixed random volume: integers fill 0 to 100, floats 0 to 1."""
    values = np.random.default_rng(7).random(shape)
    return (values * (1 if np.dtype(dtype).kind == "f" else 100)).astype(dtype)


def write_zarr(
    path: Path, values: npt.NDArray[Any], chunks: tuple[int, ...] | None = None, **more: Any
) -> Path:
    """Store an array as Zarr, v3 unless `zarr_format` says otherwise."""
    import zarr

    chunks = chunks or values.shape
    array = zarr.create_array(path, shape=values.shape, chunks=chunks, dtype=values.dtype, **more)
    array[...] = values
    return path


def toy_model(
    folder: Path,
    patch: tuple[int, ...],
    *,
    channels: int = 3,
    kind: str = "box_blur",
    output: tuple[int, ...] | None = None,
    scale: float = 1.0,
    poison: float | None = None,
) -> dict[str, Any]:
    """Write the toy network's files; returns the `model_config` that names them."""
    output = output or patch
    (folder / "network.py").write_text(TOY)
    kwargs = {
        "kind": kind,
        "channels": channels,
        "patch": patch,
        "output": output,
        "scale": scale,
        "poison": poison,
    }
    (folder / "kwargs.py").write_text(f"kwargs = {kwargs!r}\n")
    return {
        "runtime": "torch",
        "type": "class",
        "class_file": str(folder / "network.py"),
        "class_name": "Toy",
        "kwargs_file": str(folder / "kwargs.py"),
        "model_input_shape": [1, *patch],
        "model_output_shape": [channels, *output],
        "max_batch_size": 4,
    }


@dataclass(frozen=True)
class Answer:
    """What a command came to."""

    code: int
    out: str
    err: str

    def refused(self, code: int, *fragments: str) -> None:
        """Assert one clear complaint: its exit code, its form, and words that must be in it."""
        assert self.code == code, (self.code, self.out, self.err)
        lines = self.err.splitlines()
        assert lines, "nothing on stderr"
        assert all(line.startswith("chunkq: ") for line in lines), self.err
        assert "Traceback" not in self.err
        for fragment in fragments:
            assert fragment in self.err, (fragment, self.err)

    def ok(self) -> Self:
        """Assert success."""
        assert self.code == 0, (self.code, self.out, self.err)
        assert "Traceback" not in self.err, self.err
        return self


@dataclass(frozen=True)
class Bench:
    """A folder with a job in it and a queue of its own; `values` are the job file's."""

    folder: Path
    values: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def queue(self) -> Path:
        return self.folder / "queue.db"

    @property
    def output(self) -> Path:
        return self.folder / "out.zarr"

    @property
    def job_folder(self) -> Path:
        return self.folder / "out.zarr.chunkq"

    @property
    def ledger(self) -> JobFolder:
        return JobFolder(str(self.job_folder))

    @property
    def env(self) -> dict[str, str]:
        """The environment that commands get: this queue, and nothing of the developer's own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CHUNKQ", "AWS"))}
        return {**kept, "CHUNKQ_QUEUE": f"sqlite://{self.queue}", **self.environment}

    def write_job(self, name: str = "job.json", **changes: Any) -> Path:
        """Write the job file, some keys changed; None takes a key out.

        `model` among the changes is merged into `model_config`.
        """
        model = {**self.values.get("model_config", {}), **changes.pop("model", {})}
        values = {**self.values, "model_config": _given(model), **changes}
        path = self.folder / name
        path.write_text(json.dumps(_given(values)))
        return path

    def run(self, *args: str | Path, timeout: float = PATIENCE, **environment: str) -> Answer:
        """Run a command as its own process in the folder."""
        done = subprocess.run(
            [sys.executable, "-m", "chunkq", *map(str, args)],
            cwd=self.folder,
            env=self.env | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    def here(self, *args: str | Path) -> Answer:
        """Run a light command in this process; a traceback is an error of the test."""
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "argv", ["chunkq", *map(str, args)]),
            mock.patch.dict(os.environ, self.env, clear=True),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = main()
        return Answer(code, out.getvalue(), err.getvalue())

    def start(self, *args: str | Path, **environment: str) -> subprocess.Popen[str]:
        """Start a command as a process of its own; end it with `kill`."""
        return subprocess.Popen(
            [sys.executable, "-m", "chunkq", *map(str, args)],
            cwd=self.folder,
            env=self.env | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def work_here(
        self,
        only: Callable[[tuple[int, ...]], bool] = lambda index: True,
        output: str | None = None,
    ) -> None:
        """Compute uncommitted chunks in this process, past the queue; failures stay recorded."""
        with mock.patch.dict(os.environ, self.env, clear=True):
            job = open_job(f"{output or self.output}.chunkq")
            for index in filter(only, job.plan.indices()):
                with contextlib.suppress(Exception):
                    run_task(Task("infer", job.folder.path, index), Attempt(1, "here"))

    def commits(self, kind: str = "infer") -> list[Commit]:
        """The commit records of all finished chunks."""
        return self.ledger.commits(kind, self.ledger.committed(kind))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def kill(process: subprocess.Popen[str]) -> str:
    """Kill a process and all it started, by pid; returns what it had said."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(family, timeout=PATIENCE)
    said, _ = process.communicate(timeout=PATIENCE)
    return said


def run_whole(values: dict[str, Any]) -> tuple[OpenJob, dict[str, Any]]:
    """Produce, compute every chunk and finalize in this process; returns the job and report."""
    queue = mock.create_autospec(Executor, instance=True, url="sqlite:///nowhere/queue.db")
    made = submit.produce(submit.prepare(load_job(values)), queue)
    job = open_job(made.folder.path)
    for index in job.plan.indices():
        run_task(Task("infer", job.folder.path, index), Attempt(1, "here"))
    return job, finalize_job(job, worker="here")


def read_output(path: str | Path) -> npt.NDArray[Any]:
    """The whole output volume, through plain zarr-python."""
    import zarr

    return np.asarray(zarr.open_array(f"{path}/0", mode="r")[...])


def everything_below(folder: Path) -> list[str]:
    """Every file and folder below a folder, by relative path."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
