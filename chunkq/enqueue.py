"""Fill a queue with the tasks of a job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from chunkq.errors import ErrorCode, JobError
from chunkq.job.events import Message, Sink, StageProgress, ignore
from chunkq.job.job_handle import JobHandle
from chunkq.job.job_path import output_of
from chunkq.job.tasks import JobId, Task
from chunkq.paths import without_secret
from chunkq.queue.contract.executor import Executor, GateState, jobs_at
from chunkq.stages.completion import chunks_of, gate_state, job_completion
from chunkq.stages.registry import stages

PROGRESS_STAGE = "queueing chunks"
PROGRESS_STEP = 1000
"""Number of tasks between two events."""


@dataclass(frozen=True)
class EnqueueResult:
    """A job and the numbers of its chunks: all, already computed, newly queued.

    `staging` is the number of newly queued inputs that are staged first.
    """

    job: JobHandle
    chunks: int
    done: int
    queued: int
    staging: int = 0


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
    _warn_of_other_epochs(job, executor, emit)
    completion = job_completion(job)
    total = len(completion.missing())
    emit(StageProgress(PROGRESS_STAGE, 0, total))
    queued = staging = done = 0

    def tasks(kind: str) -> Iterator[Task]:
        nonlocal done
        for item, chunk in completion.pending[kind]:
            yield item.task(kind, chunk)
            done += 1
            if done % PROGRESS_STEP == 0 or done == total:
                emit(StageProgress(PROGRESS_STAGE, done, total))

    # Gates go with a job's last task, so the tasks behind them are queued first.
    for stage in reversed(stages()):
        if not stage.is_queued or not completion.pending[stage.kind]:
            continue
        if stage.is_temporary:
            pending = completion.pending[stage.kind]
            staging += executor.submit(item.task(stage.kind, chunk) for item, chunk in pending)
            continue
        if gate_state(job, stage.kind) is not GateState.OPEN:
            executor.close_gate(job.id, stage.kind)
        queued += executor.submit(tasks(stage.kind))
    chunks = chunks_of(job)
    return EnqueueResult(job, chunks, chunks - total, queued, staging)


def _warn_of_other_epochs(job: JobHandle, executor: Executor, emit: Sink) -> None:
    """Report if the queue has tasks of jobs that were replaced by this one."""
    others = [id for id in jobs_at(executor, job.folder.path) if id != job.id]
    if others:
        emit(
            Message(
                f"{without_secret(job.folder.output)}: the queue also has tasks of "
                f"{'a job' if len(others) == 1 else f'{len(others)} jobs'} that this one replaced "
                f"(epoch {', '.join(id.epoch for id in others)}); workers skip them, "
                "`chunkq cancel` removes them and those of this job"
            )
        )


def check_not_running(job_folder: str, replaced: JobId | None, executor: Executor) -> None:
    """Raise JobError if a worker runs a task of the job that is to be replaced.

    Without it, because its record is damaged, all jobs of the folder are looked at.
    """
    jobs = [replaced] if replaced else list(jobs_at(executor, job_folder))
    running = [task for job in jobs for task in executor.running(job)]
    if running:
        raise JobError(
            f"output: {without_secret(output_of(job_folder))} is in use by worker "
            f"{running[0].worker}; stop the workers before --overwrite",
            code=ErrorCode.OUTPUT_IN_USE,
        )
