"""Check the network in a separate process, so that this one does not load its libraries."""

from __future__ import annotations

import signal
import subprocess
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from chunkq.job.events import Message, Sink, StageProgress, ignore
from chunkq.job.record import JobRecord
from chunkq.job.sample_job import copy_job
from chunkq.model_check import CheckReport, ModelCheck
from chunkq.system.parent_process import with_parent_death_signal
from chunkq.system.python_process import python_module
from chunkq.system.scratch import scratch_folder

STAGE = "checking the network on one batch"
MAX_LINES = 10
"""Last lines of the process that are kept, for the message of one that ends without a report."""


def check_model(record: JobRecord, *, depth: int | None = None, emit: Sink = ignore) -> ModelCheck:
    """Load a job's network on this machine and run a batch of patches.

    With `depth`, also time patches and run whole chunks, `depth` chunks in flight. What the
    network's code prints is emitted line by line. Raises ModelError if the network cannot be used,
    and JobError if a `dtype` cannot hold the values.
    """
    emit(StageProgress(STAGE))
    # The system may kill the other process for its memory use, so the folder is created here. The
    # job is too, because a worker does not import the libraries that create arrays.
    with scratch_folder("model-check") as folder:
        options = []
        if depth:
            job = copy_job(record, str(folder))
            options = ["--depth", str(depth), "--job", job.folder.path]
        # Not standard output, to which the network may print.
        path = folder / "report.json"
        record_file = folder / "record.json"
        record_file.write_bytes(record.to_json())
        command = python_module("chunkq", "check-model", "--report", str(path), *options)
        exit_code, lines = _run(command, record_file, emit)
        line = path.read_bytes() if path.exists() else b""
    return (CheckReport.read(line) or CheckReport(exit_code=exit_code)).result(lines)


def _run(command: Sequence[str], stdin: Path, emit: Sink) -> tuple[int, list[str]]:
    """Run a command that reads a file; emit each line that it prints.

    Return its exit code and the last lines.
    """
    lines = deque[str](maxlen=MAX_LINES)
    with (
        stdin.open("rb") as file,
        subprocess.Popen(
            with_parent_death_signal(command, signal.SIGKILL),
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                lines.append(line.rstrip("\n"))
                emit(Message(lines[-1]))
        except BaseException:
            process.kill()
            raise
    return process.returncode, list(lines)
