"""Complete blocks on the workers: submit finalize tasks to the job's queue and wait."""

from __future__ import annotations

import logging
import time

from chunkq.errors import ChunkqError, ErrorCode
from chunkq.job.events import Sink, StageProgress, ignore
from chunkq.job.job_handle import JobHandle
from chunkq.queue.contract.executor import Executor
from chunkq.stages.base import Stage
from chunkq.stages.completion import Pending, check_completion

log = logging.getLogger("chunkq.queue")

PROGRESS_STAGE = "finalizing blocks on workers"
POLL_SECONDS = 1.0
IDLE_SECONDS = 30.0
"""Time without a reserved task after which a warning is logged."""


def distribute(
    job: JobHandle,
    executor: Executor,
    *,
    allow_missing: bool = False,
    emit: Sink = ignore,
) -> None:
    """Submit every task that can run and that no queue has; wait until workers have run them.

    Raises IncompleteError like `finalize_job`, and ChunkqError if tasks fail on every attempt.
    """

    def run(stage: Stage, tasks: Pending) -> Pending:
        if stage.is_final:
            return []
        _run_on_workers(job, executor, stage.kind, tasks, emit)
        return tasks

    check_completion(job, allow_missing=allow_missing).complete(run)


def _run_on_workers(
    job: JobHandle, executor: Executor, kind: str, tasks: Pending, emit: Sink
) -> None:
    """Submit tasks of a stage and wait until workers have run them."""
    before, total = job.recent_commits(kind, 0).total, len(tasks)
    executor.submit(item.task(kind, chunk) for item, chunk in tasks)
    last_change, warned, last_state = time.monotonic(), False, None
    while True:
        counts = executor.counts(job.id)
        done = min(total, job.recent_commits(kind, 0).total - before)
        emit(StageProgress(PROGRESS_STAGE, done, total))
        if not counts.queued and not counts.running:
            break
        if (done, counts) != last_state or counts.running:
            last_state, last_change, warned = (done, counts), time.monotonic(), False
        elif not warned and time.monotonic() - last_change > IDLE_SECONDS:
            warned = True
            log.warning(
                "queue: no worker has reserved any of the %d tasks for %.0f s; start `chunkq "
                "work`, or interrupt and finalize without --distribute",
                counts.queued,
                IDLE_SECONDS,
            )
        time.sleep(POLL_SECONDS)
    failed = [task for task in executor.failed(job.id) if task.kind == kind]
    if failed:
        names = ", ".join(job.chunk_name(task.item, task.chunk) for task in failed[:6])
        what = "blocks" if kind == "finalize" else f"{kind} tasks"
        raise ChunkqError(
            f"finalize: {len(failed)} {what} failed ({names}); see `chunkq status`, fix the cause, "
            "then run `chunkq retry` and this command again",
            code=ErrorCode.BLOCKS_FAILED,
        )
