"""Run one task: the function that every executor calls."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

from chunkq.allowed_paths import allowed_job_path, is_restricted, with_allowed_files
from chunkq.errors import (
    ChunkqError,
    ErrorCode,
    FrameworkConflictError,
    JobError,
    MissingJobError,
    ModelError,
)
from chunkq.executors.base import Attempt, TaskResult
from chunkq.finalize import finalize_block
from chunkq.job_handle import open_job
from chunkq.job_path import output_of, printable_path
from chunkq.ledger import Failure, JobFolder
from chunkq.tasks import Task, chunk_name
from chunkq_worker.infer import infer_chunk

log = logging.getLogger("chunkq.worker")

STAGES: MappingProxyType[str, Callable[[Task, Attempt], TaskResult | None]] = MappingProxyType(
    {"infer": infer_chunk, "finalize": finalize_block}
)
"""Kind of task -> the function that runs it. A message cannot run any other code."""


def run_task(task: Task, attempt: Attempt) -> TaskResult:
    """Run one task; do nothing if it is committed. Thread-safe.

    Record an error in the ledger and raise it again. Raise JobError, without opening a file, if
    the worker does not accept the job folder (see `chunkq.allowed_paths`). Raise MissingJobError
    if the folder has no job, or a job of another epoch.
    """
    # From this line on, only the checked path is opened.
    task = replace(task, job=allowed_job_path(task.job))
    started = time.time()
    try:
        job = open_job(task.job)
        if job.record.epoch != task.epoch:
            raise MissingJobError(
                f"{printable_path(output_of(task.job))}: the job of this task was replaced",
                code=ErrorCode.JOB_REPLACED,
            )
        if is_restricted():
            with_allowed_files(job.record.job, task.job)
        result = _stage(task.kind)(task, attempt) or TaskResult()
    except MissingJobError:
        raise  # another worker may run other jobs' tasks; nothing can be recorded
    except (JobError, ModelError, FrameworkConflictError) as error:
        if error.code == ErrorCode.PATH_NOT_ALLOWED:
            raise  # its message names the job
        # Every chunk of the job would fail like this; the worker skips the job and logs it.
        output = printable_path(output_of(task.job))
        raise type(error)(f"{output}: {error}", code=error.code) from error
    except (Exception, SystemExit) as error:
        record_failure(task, attempt, error)
        raise
    name = chunk_name(task.chunk)
    log.info("%s chunk %s done in %.1f s", task.kind, name, time.time() - started)
    return result


def _stage(kind: str) -> Callable[[Task, Attempt], TaskResult | None]:
    """Return the function that runs tasks of a kind. Raises JobError if there is none."""
    if kind not in STAGES:
        raise JobError(
            f"tasks of the kind {kind!r} are unsupported; install the version of chunkq that "
            "produced the job",
            code=ErrorCode.TASK_INVALID,
        )
    return STAGES[kind]


def record_failure(task: Task, attempt: Attempt, error: BaseException) -> None:
    """Log an error and record it in the ledger; only log it if the ledger cannot be written."""
    message = str(error) or type(error).__name__
    if not isinstance(error, ChunkqError):
        message = f"{type(error).__name__}: {message}"
    log.error(
        "%s chunk %s, attempt %d: %s", task.kind, chunk_name(task.chunk), attempt.number, message
    )
    if isinstance(error, MissingJobError):
        return
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
        # Do not create a removed folder again, and do not blame the job that replaced this one.
        if record is not None and record.epoch == task.epoch:
            folder.ledger(task.epoch).record_failure(failure)
    except (OSError, JobError) as write_error:
        log.error(
            "the failure of chunk %s cannot be recorded: %s", chunk_name(task.chunk), write_error
        )
