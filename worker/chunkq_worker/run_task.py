"""Run one task: the function that every executor calls."""

from __future__ import annotations

import time
import traceback
from contextlib import suppress
from dataclasses import replace

from chunkq.errors import (
    ChunkqError,
    ChunkReadError,
    ErrorCode,
    FrameworkConflictError,
    GateClosedError,
    IncompleteError,
    JobError,
    MissingJobError,
    ModelError,
)
from chunkq.job.allowed_paths import allowed_job_path, is_restricted, with_allowed_files
from chunkq.job.events import Message, Sink, TaskEnded, TaskFailed, write_log
from chunkq.job.job_folder import JobFolder
from chunkq.job.job_handle import JobHandle, open_job
from chunkq.job.job_path import output_of, printable_path
from chunkq.job.task_records import Failure
from chunkq.job.tasks import JobId, Task, chunk_name
from chunkq.paths import without_secret
from chunkq.queue.contract.executor import Attempt, GateState, TaskResult
from chunkq.stages import registry
from chunkq.stages.base import Stage, TaskKey
from chunkq.stages.completion import (
    Pending,
    contributions,
    gate_state,
    job_completion,
    missing_prerequisites,
)
from chunkq_worker.infer import ComputingStage

registry.replace_stage(ComputingStage())


def run_task(task: Task, attempt: Attempt, emit: Sink = write_log) -> TaskResult:
    """Run one task unless it is committed; return its contributions to other tasks. Thread-safe.

    Record an error in the ledger and raise it again. Raise JobError, without opening a file, if
    the worker does not accept the job folder (see `chunkq.job.allowed_paths`). Raise
    MissingJobError if the folder belongs to another job.
    """
    # From this line on, only the checked path is opened.
    task = replace(task, job=allowed_job_path(task.job))
    started = time.time()
    try:
        job = _open_job(task.job, task.epoch)
        if is_restricted():
            with_allowed_files(job.record.job, task.job)
        try:
            result = _run(job, task, attempt)
        except ChunkReadError as error:
            if error.code is ErrorCode.INPUT_MISSING and not job.sees_inputs():
                # Another machine may see them: a file system is not mounted here.
                raise JobError(str(error), code=error.code) from error
            raise
    except (JobError, ModelError, FrameworkConflictError) as error:
        if error.code == ErrorCode.PATH_NOT_ALLOWED:
            raise  # its message names the job
        # Every chunk of the job would fail like this; the worker skips the job and logs it.
        output = printable_path(output_of(task.job))
        raise type(error)(f"{output}: {error}", code=error.code) from error
    except (MissingJobError, GateClosedError):
        raise  # the task is put back; it has not failed
    except (Exception, SystemExit) as error:
        record_failure(task, attempt, error, emit)
        raise
    emit(TaskEnded(task, time.time() - started, job.chunk_name(task.item, task.chunk)))
    return result


def _open_job(path: str, epoch: str) -> JobHandle:
    """Return the job in a folder. Raises MissingJobError if it has another epoch."""
    job = open_job(path)
    if job.record.epoch != epoch:
        raise MissingJobError(
            f"{without_secret(job.folder.output)}: another job has replaced this one",
            code=ErrorCode.JOB_REPLACED,
        )
    return job


def _run(job: JobHandle, task: Task, attempt: Attempt) -> TaskResult:
    stage, item, ran_network = registry.stage_of(task.kind), job.item(task.item), False
    if not item.ledger.is_committed(task.kind, task.chunk):
        if missing := missing_prerequisites(item, stage, task.chunk):
            names = [item.chunk_name(key.chunk) for key in missing]
            raise IncompleteError(
                f"{task.kind} {item.chunk_name(task.chunk)}: chunks {', '.join(names)} are not "
                "computed yet",
                names,
            )
        ran_network = stage.run(item, task.chunk, attempt)
    return TaskResult(list(contributions(item, TaskKey(task.kind, task.chunk))), ran_network)


def check_gate(job_id: JobId, kind: str, *, worker: str) -> GateState:
    """Return whether the tasks of a gated stage may start, judged by the job folder.

    Tasks of earlier stages that no queue has, because the worker that was to run them was killed,
    are run here. Those that fail are recorded in the ledger and keep the gate closed.
    """
    job = _open_job(allowed_job_path(job_id.path), job_id.epoch)

    def run(stage: Stage, tasks: Pending) -> Pending:
        attempt = Attempt(1, worker)
        return [(i, chunk) for i, chunk in tasks if _succeeds(i.task(stage.kind, chunk), attempt)]

    job_completion(job).complete(run)
    return gate_state(job, kind)


def _succeeds(task: Task, attempt: Attempt) -> bool:
    """Run a task; return whether it succeeded. Raises errors that concern the whole job."""
    try:
        run_task(task, attempt)
    except (JobError, MissingJobError):
        raise
    except (Exception, SystemExit):  # `run_task` has recorded it
        return False
    return True


def record_failure(
    task: Task, attempt: Attempt, error: BaseException, emit: Sink = write_log
) -> None:
    """Emit an error and record it in the ledger; only emit it if the ledger cannot be written."""
    message = str(error) or type(error).__name__
    if not isinstance(error, ChunkqError):
        message = f"{type(error).__name__}: {message}"
    name = ""
    with suppress(Exception):  # the job itself can be what cannot be read
        name = _open_job(task.job, task.epoch).chunk_name(task.item, task.chunk)
    emit(TaskFailed(task, attempt.number, message, name))
    failure = Failure(
        kind=task.kind,
        item=task.item,
        chunk=task.chunk,
        attempt=attempt.number,
        worker=attempt.worker,
        error=type(error).__name__,
        message=_valid_text(message),
        traceback=_valid_text("".join(traceback.format_exception(error))),
    )
    try:
        folder = JobFolder(allowed_job_path(task.job))
        record = folder.read_record()
        if record is not None and record.epoch == task.epoch:
            folder.ledger(task.epoch).item(task.item).record_failure(failure)
    except (OSError, JobError) as write_error:
        name = chunk_name(task.chunk)
        emit(Message(f"the failure of chunk {name} cannot be recorded: {write_error}"))


def _valid_text(text: str) -> str:
    """Return text without surrogates, which a name of a file can contain and JSON cannot."""
    return text.encode("utf-8", "replace").decode()
