"""Completing blocks on the workers: finalize tasks on the job's queue."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from chunkq.errors import ChunkqError
from chunkq.executors.base import Executor
from chunkq.finalize import check_completion, ready_blocks
from chunkq.job_handle import JobHandle
from chunkq.tasks import Task, chunk_name

log = logging.getLogger("chunkq.queue")

POLL_SECONDS = 1.0
IDLE_SECONDS = 30.0
"""How long nobody may take a task before the user is told that workers are wanted."""


def distribute(
    job: JobHandle,
    executor: Executor,
    *,
    allow_missing: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Have workers complete every block that can be, and wait for them.

    Raises IncompleteError as `finalize_job` does, ChunkqError if blocks fail on every attempt.
    """
    blocks = ready_blocks(job, check_completion(job, allow_missing=allow_missing))
    path = job.folder.path
    executor.submit(Task("finalize", path, index) for index in blocks)
    before, total = job.ledger.count("finalize"), len(blocks)
    moved, told, last = time.monotonic(), False, None
    while True:
        counts = executor.counts(path)
        done = min(total, job.ledger.count("finalize") - before)
        progress(done, total)
        if not counts.queued and not counts.running:
            break
        if (done, counts) != last or counts.running:
            last, moved, told = (done, counts), time.monotonic(), False
        elif not told and time.monotonic() - moved > IDLE_SECONDS:
            told = True
            log.warning(
                "no worker takes the %d blocks on the queue; start `chunkq work`, or stop this and "
                "finalize without --distribute",
                counts.queued,
            )
        time.sleep(POLL_SECONDS)
    failed = [task.chunk for task in executor.failed(path) if task.kind == "finalize"]
    if failed:
        named = ", ".join(chunk_name(index) for index in failed[:6])
        raise ChunkqError(
            f"{len(failed)} blocks could not be completed ({named}); `chunkq status` says why, "
            "`chunkq retry` and the same command again go on"
        )
