"""Metrics of Ray: tasks of each job by state, and patches that workers have run.

Ray exports them for Prometheus with the prefix `ray_`, if `ray[default]` is installed on a node.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress

from ray.util import metrics

from chunkq.errors import ChunkqError
from chunkq.job.job_handle import open_job
from chunkq.job.job_path import output_of
from chunkq.job.tasks import Task
from chunkq.paths import without_secret
from chunkq.queue.backends.hosted.queue_host import JobProgress, QueueHost

TASKS, PATCHES = "chunkq_tasks", "chunkq_patches"
STATES = ("queued", "running", "waiting", "failed", "done")
PAUSE_SECONDS = 1.0
"""Time between a request to the queue and the metrics that show its effect."""


class QueueMetrics:
    """Gauge of the tasks on a queue, updated in the event loop of its actor after requests."""

    def __init__(self, host: QueueHost) -> None:
        self._host = host
        self._gauge = metrics.Gauge(
            TASKS, "Tasks of chunkq by output and state", ("output", "state")
        )
        self._shown: set[str] = set()
        self._update: asyncio.Task[None] | None = None

    def request_update(self) -> None:
        """Update the metrics soon; requests until then are shown together."""
        if self._update is None or self._update.done():
            self._update = asyncio.create_task(self._show())

    async def _show(self) -> None:
        await asyncio.sleep(PAUSE_SECONDS)
        counts = counts_by_output(self._host.progress())
        self._shown |= {output for output, _ in counts}
        for output in self._shown:
            for state in STATES:
                self._gauge.set(counts[output, state], {"output": output, "state": state})


def counts_by_output(progress: list[JobProgress]) -> Counter[tuple[str, str]]:
    """Return the number of tasks by output and state; a job and those it replaced are one."""
    counts: Counter[tuple[str, str]] = Counter()
    for job in progress:
        for state in STATES:
            counts[without_secret(job.output), state] += getattr(job, state)
    return counts


class PatchCounter:
    """Counter of the patches of committed chunks, in the process of a worker."""

    def __init__(self) -> None:
        self._counter = metrics.Counter(PATCHES, "Patches of committed chunks", ("output",))

    def add(self, task: Task) -> None:
        """Count the patches of a task that this process has run."""
        if task.kind != "infer":
            return
        with suppress(ChunkqError, OSError):  # the job was replaced; metrics stop no worker
            patches = open_job(task.job).item(task.item).tasks.count_patches([task.chunk])
            if patches:
                self._counter.inc(patches, {"output": without_secret(output_of(task.job))})
