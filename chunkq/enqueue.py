"""Fill a queue with the tasks of a job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from chunkq.errors import ErrorCode, JobError
from chunkq.events import Sink, StageProgress, ignore
from chunkq.executors.base import Executor, GateState, jobs_at
from chunkq.job_handle import JobHandle
from chunkq.job_path import output_of
from chunkq.paths import without_secret
from chunkq.stages.completion import gate_state, job_completion
from chunkq.stages.registry import stages
from chunkq.tasks import JobId, Task

PROGRESS_STAGE = "queueing chunks"
PROGRESS_STEP = 1000
"""Number of tasks between two events."""


@dataclass(frozen=True)
class EnqueueResult:
    """A job and the numbers of its chunks: all, already computed, newly queued."""

    job: JobHandle
    chunks: int
    done: int
    queued: int


def enqueue(
    job: JobHandle,
    executor: Executor,
    *,
    replaced: JobId | None = None,
    emit: Sink = ignore,
) -> EnqueueResult:
    """Queue every task of a job without a commit record, except those that other tasks start.

    Tasks that follow an incomplete stage as a whole wait behind a gate. Repeating the call is safe,
    also after the queue was lost. The tasks of the job that this one has `replaced` are removed
    first.
    """
    if replaced is not None:
        executor.cancel(replaced)
    completion = job_completion(job)
    total = len(completion.missing())
    emit(StageProgress(PROGRESS_STAGE, 0, total))
    queued = done = 0

    def tasks(kind: str) -> Iterator[Task]:
        nonlocal done
        for item, chunk in completion.pending[kind]:
            yield item.task(kind, chunk)
            done += 1
            if done % PROGRESS_STEP == 0 or done == total:
                emit(StageProgress(PROGRESS_STAGE, done, total))

    for stage in stages():
        if stage.is_queued and completion.pending[stage.kind]:
            if gate_state(job, stage.kind) is not GateState.OPEN:
                executor.close_gate(job.id, stage.kind)
            queued += executor.submit(tasks(stage.kind))
    chunks = sum(s.count(item) for s in stages() if s.is_queued for item in job.items)
    return EnqueueResult(job, chunks, chunks - total, queued)


def check_not_running(job_folder: str, executor: Executor) -> None:
    """Raise JobError if a worker runs a task of the job, which must not be replaced then."""
    running = [task for job in jobs_at(executor, job_folder) for task in executor.running(job)]
    if running:
        raise JobError(
            f"output: {without_secret(output_of(job_folder))} is in use by worker "
            f"{running[0].worker}; stop the workers before --overwrite",
            code=ErrorCode.OUTPUT_IN_USE,
        )
