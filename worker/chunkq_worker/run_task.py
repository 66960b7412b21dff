"""The one entry that every executor calls."""

from __future__ import annotations

import logging
import time
import traceback
from dataclasses import replace

from chunkq.allowed_paths import accepted_files, accepted_job, is_restricted
from chunkq.errors import (
    ChunkqError,
    ErrorCode,
    FrameworkConflictError,
    JobError,
    MissingJobError,
    ModelError,
)
from chunkq.executors.base import Attempt, TaskResult
from chunkq.job_handle import open_job
from chunkq.job_path import output_of, printable_path
from chunkq.ledger import Failure, JobFolder
from chunkq.tasks import Task, chunk_name, entry_point

log = logging.getLogger("chunkq.worker")


def run_task(task: Task, attempt: Attempt) -> TaskResult:
    """Run one task to its end; thread-safe, and nothing happens if it is committed.

    An error is recorded in the ledger and raised again. Raises JobError, and opens nothing, if
    the worker does not accept the job folder; see `chunkq.allowed_paths`.
    """
    # From here on the task has the path that was checked, and no other is opened.
    task = replace(task, job=accepted_job(task.job))
    started = time.time()
    try:
        if is_restricted():
            accepted_files(open_job(task.job).record.job, task.job)
        outcome: TaskResult = entry_point(task.kind)(task, attempt) or TaskResult()
    except (JobError, ModelError, FrameworkConflictError) as error:
        if error.code == ErrorCode.PATH_NOT_ALLOWED:
            raise  # names the job already
        # Every chunk of the job would end like this; the worker stops and logs it.
        output = printable_path(output_of(task.job))
        raise type(error)(f"{output}: {error}", code=error.code) from error
    except (Exception, SystemExit) as error:
        record_failure(task, attempt, error)
        raise
    name = chunk_name(task.chunk)
    log.info("%s chunk %s done in %.1f s", task.kind, name, time.time() - started)
    return outcome


def record_failure(task: Task, attempt: Attempt, error: BaseException) -> None:
    """Keep the error; a ledger that cannot be written must not hide it."""
    message = str(error) or type(error).__name__
    if not isinstance(error, ChunkqError):
        message = f"{type(error).__name__}: {message}"
    log.error(
        "%s chunk %s, attempt %d: %s", task.kind, chunk_name(task.chunk), attempt.number, message
    )
    if isinstance(error, MissingJobError):
        return  # a record would bring back the folder that someone removed
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
        folder = JobFolder(accepted_job(task.job))
        record = folder.read_record()
        if record is not None:
            folder.ledger(record.epoch).record_failure(failure)
    except (OSError, JobError) as second:
        log.error("the failure of chunk %s cannot be recorded: %s", chunk_name(task.chunk), second)
