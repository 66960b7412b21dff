"""Complete blocks on the workers: submit finalize tasks to the job's queue and wait."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from chunkq.errors import ChunkqError, ErrorCode
from chunkq.executors.base import Executor
from chunkq.finalize import check_completion, ready_blocks
from chunkq.job_handle import JobHandle
from chunkq.tasks import Task, chunk_name

log = logging.getLogger("chunkq.queue")

POLL_SECONDS = 1.0
IDLE_SECONDS = 30.0
"""Time without a reserved task after which a warning is logged."""


def distribute(
    job: JobHandle,
    executor: Executor,
    *,
    allow_missing: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Submit every block that can be completed and wait until workers have completed them.

    Raises IncompleteError like `finalize_job`, and ChunkqError if blocks fail on every attempt.
    """
    blocks = ready_blocks(job, check_completion(job, allow_missing=allow_missing))
    executor.submit(Task("finalize", *job.id, 0, index) for index in blocks)
    before, total = job.ledger.count("finalize"), len(blocks)
    last_change, warned, last_state = time.monotonic(), False, None
    while True:
        counts = executor.counts(job.id)
        done = min(total, job.ledger.count("finalize") - before)
        progress(done, total)
        if not counts.queued and not counts.running:
            break
        if (done, counts) != last_state or counts.running:
            last_state, last_change, warned = (done, counts), time.monotonic(), False
        elif not warned and time.monotonic() - last_change > IDLE_SECONDS:
            warned = True
            log.warning(
                "queue: no worker has reserved any of the %d blocks for %.0f s; start `chunkq "
                "work`, or interrupt and finalize without --distribute",
                counts.queued,
                IDLE_SECONDS,
            )
        time.sleep(POLL_SECONDS)
    failed = [task.chunk for task in executor.failed(job.id) if task.kind == "finalize"]
    if failed:
        names = ", ".join(chunk_name(index) for index in failed[:6])
        raise ChunkqError(
            f"finalize: {len(failed)} blocks failed ({names}); see `chunkq status`, fix the cause, "
            "then run `chunkq retry` and this command again",
            code=ErrorCode.BLOCKS_FAILED,
        )
