"""Run one task: the function that every executor calls."""

from __future__ import annotations

import time
import traceback
from dataclasses import replace

from chunkq.allowed_paths import allowed_job_path, is_restricted, with_allowed_files
from chunkq.errors import (
    ChunkqError,
    ErrorCode,
    FrameworkConflictError,
    JobError,
    MissingJobError,
    ModelError,
)
from chunkq.events import Message, Sink, TaskEnded, TaskFailed, write_log
from chunkq.executors.base import Attempt, TaskResult
from chunkq.job_handle import open_job
from chunkq.job_path import output_of, printable_path
from chunkq.ledger import Failure, JobFolder
from chunkq.tasks import Task, chunk_name, entry_point


def run_task(task: Task, attempt: Attempt, emit: Sink = write_log) -> TaskResult:
    """Run one task; do nothing if it is committed. Thread-safe.

    Record an error in the ledger and raise it again. Raise JobError, without opening a file, if
    the worker does not accept the job folder (see `chunkq.allowed_paths`).
    """
    # From this line on, only the checked path is opened.
    task = replace(task, job=allowed_job_path(task.job))
    started = time.time()
    try:
        if is_restricted():
            with_allowed_files(open_job(task.job).record.job, task.job)
        result: TaskResult = entry_point(task.kind)(task, attempt) or TaskResult()
    except (JobError, ModelError, FrameworkConflictError) as error:
        if error.code == ErrorCode.PATH_NOT_ALLOWED:
            raise  # its message names the job
        # Every chunk of the job would fail like this; the worker skips the job and logs it.
        output = printable_path(output_of(task.job))
        raise type(error)(f"{output}: {error}", code=error.code) from error
    except (Exception, SystemExit) as error:
        record_failure(task, attempt, error, emit)
        raise
    emit(TaskEnded(task, time.time() - started))
    return result


def record_failure(
    task: Task, attempt: Attempt, error: BaseException, emit: Sink = write_log
) -> None:
    """Emit an error and record it in the ledger; only emit it if the ledger cannot be written."""
    message = str(error) or type(error).__name__
    if not isinstance(error, ChunkqError):
        message = f"{type(error).__name__}: {message}"
    emit(TaskFailed(task, attempt.number, message))
    if isinstance(error, MissingJobError):
        return  # a record would create the removed job folder again
    failure = Failure(
        kind=task.kind,
        chunk=task.chunk,
        attempt=attempt.number,
        worker=attempt.worker,
        error=type(error).__name__,
        message=message,
        traceback="".join(traceback.format_exception(error)),
    )
    try:
        folder = JobFolder(allowed_job_path(task.job))
        record = folder.read_record()
        if record is not None:
            folder.ledger(record.epoch).record_failure(failure)
    except (OSError, JobError) as write_error:
        name = chunk_name(task.chunk)
        emit(Message(f"the failure of chunk {name} cannot be recorded: {write_error}"))
