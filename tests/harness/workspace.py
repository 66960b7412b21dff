"""A folder with a job in it, and the commands that are run there."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from chunkq_producer import submit
from chunkq_worker.run_task import run_task

from chunkq import documents
from chunkq.cli import main
from chunkq.executors import open_executor
from chunkq.executors.base import Attempt, Counts, Executor, Running
from chunkq.finalize import finalize_job
from chunkq.job import load_job
from chunkq.job_handle import JobHandle, open_job
from chunkq.ledger import ITEM, Commit, JobFolder, Ledger
from chunkq.tasks import Task
from tests.harness.files import files_below
from tests.harness.processes import CommandResult, RunningCommand, running
from tests.harness.waiting import TIMEOUT

GROUP_DOCUMENTS = {"zarr.json", ".zgroup", ".zattrs"}
EPOCH = re.compile(rb'(?<="epoch": ")[0-9a-f]{8}(?=")')
FOREIGN = ("AWS", "CHUNKQ", "NET_")
"""Variables of whoever runs the tests that no command must see."""


@dataclass(frozen=True)
class Workspace:
    """A folder with a job, its output and a queue; `values` are the keys of the job file.

    The queue is an embedded one in the folder unless `url` is another.
    """

    folder: Path
    values: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    url: str | None = None

    @property
    def output(self) -> Path:
        return self.folder / "out.zarr"

    @property
    def job_folder(self) -> Path:
        return self.folder / "out.zarr.chunkq"

    @property
    def queue_file(self) -> Path:
        return self.folder / "queue.db"

    @property
    def queue_url(self) -> str:
        return self.url or f"sqlite://{self.queue_file}"

    # ------------------------------------------------------------------------- the job file

    @property
    def job_file(self) -> Path:
        """The job as YAML, written at the first use."""
        path = self.folder / "job.yaml"
        return path if path.exists() else self.write_job(path.name)

    def write_job(self, name: str = "job.json", **changes: Any) -> Path:
        """Write the job file with some keys changed; None removes a key.

        `model` among the changes is merged into `model_config`.
        """
        model = {**self.values.get("model_config", {}), **changes.pop("model", {})}
        values = _without_none({**self.values, "model_config": _without_none(model), **changes})
        path = self.folder / name
        path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
        return path

    # ------------------------------------------------------------------------- commands

    @property
    def env(self) -> dict[str, str]:
        """The environment of a command in this process."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS", "CHUNKQ"))}
        return {**kept, "CHUNKQ_QUEUE": self.queue_url, **self.environment}

    @property
    def process_env(self) -> dict[str, str]:
        """The environment of a command in a process of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        return {**kept, "CHUNKQ_QUEUE": self.queue_url, **self.environment}

    def call(self, *arguments: str | Path) -> CommandResult:
        """Run a light command in this process; a traceback fails the test."""
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "argv", ["chunkq", *map(str, arguments)]),
            mock.patch.dict(os.environ, self.env, clear=True),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = main()
        return CommandResult(code, out.getvalue(), err.getvalue())

    def run(
        self, *arguments: str | Path, timeout: float = TIMEOUT, **environment: str
    ) -> CommandResult:
        """Run a command as a process of its own, with stdout and stderr apart."""
        ended = subprocess.run(
            _command(arguments),
            cwd=self.folder,
            env=self.process_env | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return CommandResult(ended.returncode, ended.stdout, ended.stderr)

    @contextmanager
    def start(self, *arguments: str | Path, **environment: str) -> Iterator[RunningCommand]:
        """Start a command as a process of its own; at the end, kill what is left of it."""
        with running(_command(arguments), self.folder, self.process_env | environment) as command:
            yield command

    def produce(self, *arguments: str) -> CommandResult:
        """Produce the job of `job_file`; assert success."""
        return self.call("produce", self.job_file, *arguments).ok()

    def finalize(self) -> CommandResult:
        return self.call("finalize", self.output)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.call("status", self.output, "--json").ok().out)
        return status

    def work(self, *arguments: str, **environment: str) -> CommandResult:
        """Run workers until no task is left."""
        with self.start("work", "--burst", "--gpus", "none", *arguments, **environment) as command:
            return command.wait()

    def compute_inline(
        self,
        only: Callable[[tuple[int, ...]], bool] = lambda index: True,
        output: str | None = None,
    ) -> None:
        """Compute uncommitted chunks in this process without a queue; failures stay recorded."""
        with mock.patch.dict(os.environ, self.env, clear=True):
            job = open_job(f"{output or self.output}.chunkq")
            for index in filter(only, job.plan.indices()):
                with contextlib.suppress(Exception):
                    run_task(Task("infer", job.folder.path, index), Attempt(1, "here"))

    # ------------------------------------------------------------------------- the queue

    @contextmanager
    def queue(self) -> Iterator[Executor]:
        executor = open_executor(self.queue_url)
        yield executor
        executor.close()

    def counts(self) -> Counts:
        with self.queue() as queue:
            return queue.counts(str(self.job_folder))

    def running(self) -> list[Running]:
        with self.queue() as queue:
            return queue.running(str(self.job_folder))

    def attempts(self) -> list[int]:
        """Return how often each task of the embedded queue was started."""
        import sqlite3

        with contextlib.closing(sqlite3.connect(self.queue_file)) as database:
            return [n for (n,) in database.execute("SELECT attempts FROM tasks")]

    # ------------------------------------------------------------------------- job folder, output

    @property
    def job(self) -> JobHandle:
        return open_job(str(self.job_folder))

    @property
    def epoch_folder(self) -> Path:
        """The part of the job folder that belongs to the job's epoch."""
        return self.job_folder / JobFolder(str(self.job_folder)).require_record().epoch

    @property
    def ledger(self) -> Ledger:
        return self.job.ledger

    @property
    def array(self) -> Path:
        """The output array, under the name that it has now."""
        sealed = self.output / "0"
        return sealed if sealed.exists() else self.output / self.job.record.array

    def commits(self, kind: str = "infer") -> list[Commit]:
        """Return the commit records of all finished chunks."""
        return self.ledger.commits(kind, self.ledger.committed(kind))

    def done(self, kind: str = "infer") -> dict[str, tuple[bytes, int]]:
        """Return content and time of every commit record, by chunk name; none without a job."""
        if not (self.job_folder / "job.json").exists():
            return {}
        folder = self.done_folder(kind)
        records = folder.glob("[!.]*") if folder.is_dir() else iter(())
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in records}

    def done_folder(self, kind: str = "infer") -> Path:
        return self.epoch_folder / "done" / kind / ITEM

    def pieces_folder(self) -> Path:
        return self.epoch_folder / "pieces" / ITEM

    def record(self, name: str) -> dict[str, Any]:
        """Return the commit record of a chunk."""
        record: dict[str, Any] = json.loads(self.done()[name][0])
        return record

    def pieces(self) -> list[Path]:
        return [path for path in (self.epoch_folder / "pieces").rglob("*") if path.is_file()]

    def report(self) -> dict[str, Any]:
        """Return what `report.json` holds; its checksum must fit."""
        report = documents.decode((self.epoch_folder / "report.json").read_bytes())
        assert report is not None
        return report

    def stored(self) -> dict[str, bytes]:
        return output_files(self.output)


def output_files(output: Path) -> dict[str, bytes]:
    """Return every file of an output; in the group's metadata the job's epoch is left out."""
    files = files_below(output)
    group = {name: EPOCH.sub(b"", files[name]) for name in GROUP_DOCUMENTS & files.keys()}
    return files | group


def run_inline(values: dict[str, Any]) -> tuple[JobHandle, dict[str, Any]]:
    """Produce, compute every chunk and finalize in this process; return the job and its report."""
    queue = mock.create_autospec(Executor, instance=True, url="sqlite:///nowhere/queue.db")
    produced = submit.produce(submit.prepare(load_job(values)), queue)
    job = open_job(produced.folder.path)
    for index in job.plan.indices():
        run_task(Task("infer", job.folder.path, index), Attempt(1, "here"))
    return job, finalize_job(job, worker="here")


def _command(arguments: tuple[str | Path, ...]) -> list[str]:
    return [sys.executable, "-m", "chunkq", *map(str, arguments)]


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
