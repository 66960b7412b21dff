"""Compute the chunks of a job in this process, without a queue."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from typing_extensions import override

from chunkq.executors.base import (
    Attempt,
    Contribution,
    Executor,
    Handler,
    RunningTask,
    TaskCounts,
    TaskResult,
    WorkerName,
    WorkerOptions,
    default_depth,
)
from chunkq.finalize import complete_block, job_completion, max_concurrent_blocks
from chunkq.job_handle import JobHandle
from chunkq.plan import Index
from chunkq.tasks import JobId, Task
from chunkq_worker.run_task import run_task

Item = TypeVar("Item")
Result = TypeVar("Result")


class NoQueue(Executor):
    """An executor that stores no tasks; the ledger alone records which chunks are committed.

    `url` is the queue that the job record names, used when an unfinished job is produced again.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @override
    def submit(self, tasks: Iterable[Task]) -> int:
        return 0

    @override
    def counts(self, job: JobId) -> TaskCounts:
        return TaskCounts()

    @override
    def jobs(self) -> dict[JobId, TaskCounts]:
        return {}

    @override
    def running(self, job: JobId) -> list[RunningTask]:
        return []

    @override
    def failed(self, job: JobId) -> list[Task]:
        return []

    @override
    def retry(self, job: JobId) -> int:
        return 0

    @override
    def cancel(self, job: JobId) -> int:
        return 0

    @override
    def release(self, worker: str, *, counted: bool = True) -> int:
        return 0

    @override
    def run_tasks(self, handler: Handler, options: WorkerOptions) -> None:
        return

    @override
    def record_contributions(self, job: JobId, contributions: Sequence[Contribution]) -> list[Task]:
        return []

    @override
    def close_gate(self, job: JobId, kind: str) -> None:
        return

    @override
    def open_gate(self, job: JobId, kind: str) -> None:
        return

    @override
    def waiting(self, options: WorkerOptions) -> list[tuple[JobId, str]]:
        return []

    @override
    def close(self) -> None:
        return


class Contributions:
    """Count the committed contributors of each block in this process. Thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[Index] = Counter()
        self._lock = threading.Lock()

    def record(self, contributions: Sequence[Contribution]) -> list[Index]:
        """Count the contributions of a committed chunk; return the blocks that are now complete.

        Call it once per chunk.
        """
        with self._lock:
            self._counts.update(contribution.task.chunk for contribution in contributions)
            return [
                contribution.task.chunk
                for contribution in contributions
                if self._counts[contribution.task.chunk] == contribution.total
            ]


def compute_inline(job: JobHandle, progress: Callable[[int, int], None]) -> str:
    """Compute every chunk that is not committed, in index order; return this worker's name.

    A block is finalized as soon as all its contributors have committed in this call. Blocks with
    contributors from an earlier run are left to the finalizer. The first error of a chunk is
    recorded in the ledger and raised; committed chunks stay committed. `progress` is called with
    (committed chunks, all chunks).
    """
    worker = WorkerName.new(job.plan.job.model.device).name
    unfinished, total = job_completion(job).unfinished, job.plan.costs.chunks
    committed = total - len(unfinished)
    progress(committed, total)
    contributions = Contributions()
    blocks: list[Future[None]] = []
    finalizers, depth = (
        max_concurrent_blocks(job.plan),
        default_depth(gpu=job.plan.job.model.device == "cuda"),
    )
    with ThreadPoolExecutor(depth) as pool, ThreadPoolExecutor(finalizers) as finalizer:

        def start(index: Index) -> Future[TaskResult]:
            task = Task("infer", *job.id, 0, index)
            return pool.submit(run_task, task, Attempt(1, worker))

        for done, result in enumerate(pipelined(start, unfinished, depth), start=committed + 1):
            for block in contributions.record(result.contributions):
                blocks.append(finalizer.submit(complete_block, job, block, Attempt(1, worker)))
            progress(done, total)
        for future in blocks:
            future.result()
    return worker


def pipelined(
    start: Callable[[Item], Future[Result]], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """Start items with up to `depth` in flight, and yield their results in order.

    At the end, or if the caller stops early, futures that have not started are cancelled.
    """
    in_flight: deque[Future[Result]] = deque()
    try:
        for item in items:
            in_flight.append(start(item))
            if len(in_flight) == depth:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    finally:
        for future in in_flight:
            future.cancel()
