"""Check the network in a separate process, so that this one does not load its libraries."""

from __future__ import annotations

import signal
import subprocess
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from chunkq.create import stored_record
from chunkq.job.events import Message, Sink, StageProgress, ignore
from chunkq.job.items import find_sources
from chunkq.job.job_file import Job
from chunkq.job.job_path import job_folder_of
from chunkq.job.output_shapes import from_complete_job, unknown_heads, with_output_shapes
from chunkq.job.record import KEYS_WITHOUT_EFFECT, JobRecord
from chunkq.job.sample_job import copy_job
from chunkq.model_check import CheckReport, ModelCheck
from chunkq.system.parent_process import with_parent_death_signal
from chunkq.system.python_process import python_module
from chunkq.system.scratch import scratch_folder
from chunkq.system.signal_masks import sigterm_blocked

STAGE = "checking the network on one batch"
MEASURING_STAGE = "measuring time and memory of the network"
SHAPES_STAGE = "finding the shapes of the outputs"
MAX_LINES = 10
"""Last lines of the process that are kept, for the message of one that ends without a report."""


def check_model(record: JobRecord, *, depth: int | None = None, emit: Sink = ignore) -> ModelCheck:
    """Load a job's network on this machine and run a batch of patches.

    With `depth`, also time patches and run whole chunks, `depth` chunks in flight. What the
    network's code prints is emitted line by line. Raises ModelError if the network cannot be used,
    and JobError if a `dtype` cannot hold the values.
    """
    emit(StageProgress(MEASURING_STAGE if depth else STAGE))
    # The system may kill the other process for its memory use, so the folder is created here. The
    # job is too, because a worker does not import the libraries that create arrays.
    with scratch_folder("model-check") as folder:
        options = []
        if depth and record.job.is_image:
            options = ["--depth", str(depth)]
        elif depth:
            job = copy_job(record, str(folder))
            options = ["--depth", str(depth), "--job", job.folder.path]
        report, lines = _report(record, folder, options, emit)
    return report.result(lines)


def complete_job(job: Job, emit: Sink = ignore) -> Job:
    """Return a job with the shapes that its network returns.

    A job without the key `outputs`, or with all shapes, is returned as it is. If it is the job at
    its output path, it has the shapes of that. Else a separate process runs the network on one
    batch. Raises JobError, StoreError, and ModelError if the network cannot be used.
    """
    unknown = unknown_heads(job)
    if not unknown:
        return job
    stored = stored_record(job_folder_of(job.output))
    complete = None if stored is None else from_complete_job(job, stored.job, KEYS_WITHOUT_EFFECT)
    if complete is not None:
        return complete
    emit(StageProgress(SHAPES_STAGE))
    with scratch_folder("model-check") as folder:
        record = JobRecord.create(job, find_sources(job))
        report, lines = _report(record, folder, ["--shapes"], emit)
    if report.shapes is None:
        report.result(lines)
        raise RuntimeError("a report has neither shapes nor an error")
    return with_output_shapes(job, dict(zip(unknown, report.shapes, strict=True)))


def _report(
    record: JobRecord, folder: Path, options: Sequence[str], emit: Sink
) -> tuple[CheckReport, list[str]]:
    """Run the check of a record in a process; return its report, and the last lines it printed."""
    path, record_file = folder / "report.json", folder / "record.json"
    record_file.write_bytes(record.to_json())
    # Not standard output, to which the network may print.
    command = python_module("chunkq", "check-model", "--report", str(path), *options)
    exit_code, lines = _run(command, record_file, emit)
    line = path.read_bytes() if path.exists() else b""
    return CheckReport.read(line) or CheckReport(exit_code=exit_code), lines


def _run(command: Sequence[str], stdin: Path, emit: Sink) -> tuple[int, list[str]]:
    """Run a command that reads a file; emit each line that it prints.

    Return its exit code and the last lines. Only this process acts on signals.
    """
    lines = deque[str](maxlen=MAX_LINES)
    with stdin.open("rb") as file, sigterm_blocked():
        process = subprocess.Popen(
            with_parent_death_signal(command, signal.SIGKILL),
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    with process:
        try:
            for line in process.stdout or ():
                lines.append(line.rstrip("\n"))
                emit(Message(lines[-1]))
        except BaseException:
            process.kill()
            raise
    return process.returncode, list(lines)
