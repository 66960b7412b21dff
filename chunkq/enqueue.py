"""Fill a queue with the tasks of a job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from chunkq.create import remaining_chunks
from chunkq.errors import ErrorCode, JobError
from chunkq.events import Sink, StageProgress, ignore
from chunkq.executors.base import Executor
from chunkq.job_handle import JobHandle
from chunkq.job_path import output_of
from chunkq.paths import without_secret
from chunkq.tasks import Task

STAGE = "queueing chunks"
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
    job: JobHandle, executor: Executor, *, replaces: bool = False, emit: Sink = ignore
) -> EnqueueResult:
    """Queue every chunk of a job without a commit record.

    Repeating it is safe, also after the queue was lost. Set `replaces` for a new job that has
    replaced another one on its output: the tasks of the old one are removed first.
    """
    if replaces:
        executor.cancel(job.folder.path)
    remaining = remaining_chunks(job)
    emit(StageProgress(STAGE, 0, len(remaining)))

    def tasks() -> Iterator[Task]:
        for count, index in enumerate(remaining, start=1):
            yield Task("infer", job.folder.path, index)
            if count % PROGRESS_STEP == 0 or count == len(remaining):
                emit(StageProgress(STAGE, count, len(remaining)))

    chunks = job.plan.costs.chunks
    return EnqueueResult(job, chunks, chunks - len(remaining), executor.submit(tasks()))


def check_not_running(job_folder: str, executor: Executor) -> None:
    """Raise JobError if a worker runs a task of the job, which must not be replaced then."""
    running = executor.running(job_folder)
    if running:
        raise JobError(
            f"output: {without_secret(output_of(job_folder))} is in use by worker "
            f"{running[0].worker}; stop the workers before --overwrite",
            code=ErrorCode.OUTPUT_IN_USE,
        )
