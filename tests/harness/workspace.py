"""A folder with a job, and the commands that tests run on it."""

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
from chunkq_worker.run_task import run_task

from chunkq.cli import main
from chunkq.create import check_job, create_job
from chunkq.finalize import finalize_job
from chunkq.job.job_folder import JobFolder
from chunkq.job.job_handle import ItemHandle, JobHandle, open_job
from chunkq.job.job_reading import load_job
from chunkq.job.ledger import ItemLedger
from chunkq.job.task_records import Commit, Failure
from chunkq.queue.contract.executor import Attempt, Executor, RunningTask, TaskCounts
from chunkq.queue.registry import open_executor
from chunkq.stages.completion import failures, queued_tasks
from chunkq.stages.registry import stage_of
from chunkq.storage import documents
from tests.harness.files import files_below
from tests.harness.processes import CommandResult, RunningCommand, running
from tests.harness.waiting import TIMEOUT

GROUP_DOCUMENTS = {"zarr.json", ".zgroup", ".zattrs"}
EPOCH = re.compile(rb'(?<="epoch": ")[0-9a-f]{8}(?=")')
FOREIGN = ("AWS", "CHUNKQ", "NET_")
"""Prefixes of environment variables that no command of a test may inherit."""


@dataclass(frozen=True)
class Workspace:
    """A folder with a job, its output and a queue; `values` are the keys of the job file.

    The queue is an embedded one in the folder unless `url` names another.
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
        """The job as YAML, written at first use."""
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
        """The environment of a command that runs in this process."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS", "CHUNKQ"))}
        return {**inherited, "CHUNKQ_QUEUE": self.queue_url, **self.environment}

    @property
    def process_env(self) -> dict[str, str]:
        """The environment of a command that runs in a separate process."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        return {**inherited, "CHUNKQ_QUEUE": self.queue_url, **self.environment}

    def call(self, *arguments: str | Path) -> CommandResult:
        """Run a light command in this process; let a traceback fail the test."""
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
        """Run a command in a separate process; capture stdout and stderr separately."""
        result = subprocess.run(
            _command(arguments),
            cwd=self.folder,
            env=self.process_env | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return CommandResult(result.returncode, result.stdout, result.stderr)

    @contextmanager
    def start(self, *arguments: str | Path, **environment: str) -> Iterator[RunningCommand]:
        """Start a command in a separate process; at the end, kill it and its descendants."""
        with running(_command(arguments), self.folder, self.process_env | environment) as command:
            yield command

    def produce(self, *arguments: str) -> CommandResult:
        """Produce the job of `job_file`; assert success."""
        return self.call("produce", self.job_file, *arguments).ok()

    def finalize(self) -> CommandResult:
        """Finalize the output; do not check the exit code."""
        return self.call("finalize", self.output)

    def status(self) -> dict[str, Any]:
        """Return what `chunkq status --json` prints."""
        status: dict[str, Any] = json.loads(self.call("status", self.output, "--json").ok().out)
        return status

    def work(self, *arguments: str, **environment: str) -> CommandResult:
        """Run workers until the queue is empty; do not check the exit code."""
        with self.start("work", "--burst", "--gpus", "none", *arguments, **environment) as command:
            return command.wait()

    def compute_inline(
        self,
        only: Callable[[tuple[int, ...]], bool] = lambda index: True,
        output: str | None = None,
    ) -> None:
        """Compute uncommitted chunks in this process without a queue; ignore errors of tasks."""
        with mock.patch.dict(os.environ, self.env, clear=True):
            job = open_job(f"{output or self.output}.chunkq")
            for index in filter(only, job.items[0].plan.active_indices()):
                with contextlib.suppress(Exception):
                    run_task(job.items[0].task("infer", index), Attempt(1, "inline"))

    # ------------------------------------------------------------------------- the queue

    @contextmanager
    def queue(self) -> Iterator[Executor]:
        """Open the queue for the duration of the block."""
        executor = open_executor(self.queue_url)
        yield executor
        executor.close()

    def counts(self) -> TaskCounts:
        """Return the queue's task counts of this job."""
        with self.queue() as queue:
            return queue.counts(self.job.id)

    def running(self) -> list[RunningTask]:
        """Return the running tasks of this job; none before a command has created it."""
        if JobFolder(str(self.job_folder)).read_record() is None:
            return []
        with self.queue() as queue:
            return queue.running(self.job.id)

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
        """The subfolder of the job folder for the job's epoch."""
        return self.job_folder / JobFolder(str(self.job_folder)).require_record().epoch

    @property
    def item(self) -> ItemHandle:
        """The first item, which is the only one of most jobs."""
        return self.job.items[0]

    @property
    def ledger(self) -> ItemLedger:
        return self.item.ledger

    def failures(self) -> list[Failure]:
        """Return the failure records of the job."""
        return failures(self.job)

    @property
    def array(self) -> Path:
        """The output array, under its current name."""
        sealed = self.output / "0"
        return sealed if sealed.exists() else self.output / self.job.record.array

    def commits(self, kind: str = "infer") -> list[Commit]:
        """Return the commit records of all committed tasks of a kind."""
        return self.ledger.commits(kind, self.ledger.committed(kind))

    def done(self, kind: str = "infer") -> dict[str, tuple[bytes, int]]:
        """Return content and mtime of every commit record, by chunk name; none without a job."""
        if not (self.job_folder / "job.json").exists():
            return {}
        folder = self.done_folder(kind)
        records = folder.glob("[!.]*") if folder.is_dir() else iter(())
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in records}

    def done_folder(self, kind: str = "infer") -> Path:
        """Return the folder of the commit records."""
        return self.epoch_folder / "done" / kind / "0"

    def pieces_folder(self) -> Path:
        """Return the folder of the pieces."""
        return self.epoch_folder / "pieces" / "0"

    def record(self, name: str) -> dict[str, Any]:
        """Return the commit record of a chunk."""
        record: dict[str, Any] = json.loads(self.done()[name][0])
        return record

    def pieces(self) -> list[Path]:
        """Return the files of all pieces."""
        return [path for path in (self.epoch_folder / "pieces").rglob("*") if path.is_file()]

    def report(self) -> dict[str, Any]:
        """Return the content of `report.json`; assert that its checksum is valid."""
        report = documents.decode((self.epoch_folder / "report.json").read_bytes())
        assert report is not None
        return report

    def stored(self) -> dict[str, bytes]:
        """Return the files of the output as `output_files` does."""
        return output_files(self.output)


def output_files(output: Path) -> dict[str, bytes]:
    """Return every file of an output, without the job's epoch in the group's metadata."""
    files = files_below(output)
    group = {name: EPOCH.sub(b"", files[name]) for name in GROUP_DOCUMENTS & files.keys()}
    return files | group


def run_inline(values: dict[str, Any] | Path) -> tuple[JobHandle, dict[str, Any]]:
    """Produce, compute every chunk and finalize in this process; return the job and its report."""
    job = create_job(check_job(load_job(values)))
    run_tasks(job)
    return job, finalize_job(job, worker="inline")


def run_tasks(job: JobHandle) -> None:
    """Compute every chunk of a job that is a task, in this process and without its blocks."""
    for task in queued_tasks(job, stage_of("ingest")):
        run_task(task, Attempt(1, "inline"))
    for item in job.items:
        for index in item.tasks.chunks():
            run_task(item.task("infer", index), Attempt(1, "inline"))


def _command(arguments: tuple[str | Path, ...]) -> list[str]:
    return [sys.executable, "-m", "chunkq", *map(str, arguments)]


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
