"""The one entry that every executor calls."""

from __future__ import annotations

import logging
import os
import time
import traceback

from chunkq.errors import (
    ChunkqError,
    FrameworkConflictError,
    JobError,
    MissingJobError,
    ModelError,
)
from chunkq.executors.base import Attempt, Outcome
from chunkq.ledger import Failure, JobFolder
from chunkq.paths import is_url, without_secret
from chunkq.tasks import Task, chunk_name, entry_point

ALLOW_VARIABLE = "CHUNKQ_ALLOW"
"""Path prefixes of the job folders that a worker accepts, one a line."""

log = logging.getLogger("chunkq.worker")


def run_task(task: Task, attempt: Attempt) -> Outcome:
    """Run one task to its end; thread-safe, and nothing happens if it is committed.

    An error is recorded in the ledger and raised again.
    """
    _refuse_strangers(task.job)
    started = time.time()
    try:
        outcome: Outcome = entry_point(task.kind)(task, attempt) or Outcome()
    except (JobError, ModelError, FrameworkConflictError) as error:
        # Every chunk of the job would end like this; the worker stops and says so.
        shown = without_secret(JobFolder(task.job).output)
        raise type(error)(f"{shown}: {error}") from error
    except (Exception, SystemExit) as error:
        record_failure(task, attempt, error)
        raise
    name = chunk_name(task.chunk)
    log.info("%s chunk %s done in %.1f s", task.kind, name, time.time() - started)
    return outcome


def _refuse_strangers(job: str) -> None:
    allowed = [p for p in os.environ.get(ALLOW_VARIABLE, "").splitlines() if p]
    place = _real(job) + "/"
    if allowed and not any(place.startswith(_real(p).rstrip("/") + "/") for p in allowed):
        raise JobError(
            f"{without_secret(job)}: this worker only accepts jobs below "
            f"{', '.join(allowed)}; widen --allow or {ALLOW_VARIABLE}"
        )


def _real(path: str) -> str:
    """Return the path without links and `..`, which could lead out of what is allowed."""
    return path if is_url(path) and "/../" not in path else os.path.realpath(path)


def record_failure(task: Task, attempt: Attempt, error: BaseException) -> None:
    """Keep the error; a ledger that cannot be written must not hide it."""
    shown = str(error) or type(error).__name__
    if not isinstance(error, ChunkqError):
        shown = f"{type(error).__name__}: {shown}"
    log.error(
        "%s chunk %s, attempt %d: %s", task.kind, chunk_name(task.chunk), attempt.number, shown
    )
    if isinstance(error, MissingJobError):
        return  # a record would bring back the folder that someone removed
    failure = Failure(
        kind=task.kind,
        chunk=task.chunk,
        attempt=attempt.number,
        worker=attempt.worker,
        error=type(error).__name__,
        message=shown,
        traceback="".join(traceback.format_exception(error)),
    )
    try:
        folder = JobFolder(task.job)
        record = folder.read_record()
        if record is not None:
            folder.ledger(record.epoch).record_failure(failure)
    except (OSError, JobError) as second:
        log.error("the failure of chunk %s cannot be recorded: %s", chunk_name(task.chunk), second)
