"""A job's chunks computed in this process, without a queue."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from typing_extensions import override

from chunkq.executors.base import (
    Attempt,
    BlockContribution,
    Counts,
    Executor,
    Handler,
    Running,
    TaskResult,
    WorkerName,
    WorkerOptions,
    default_depth,
)
from chunkq.finalize import blocks_at_once, complete_block, job_completion
from chunkq.job_handle import JobHandle
from chunkq.plan import Index
from chunkq.tasks import Task
from chunkq_worker.run_task import run_task

A = TypeVar("A")
B = TypeVar("B")


class NoQueue(Executor):
    """A queue that takes nothing and holds nothing: the ledger alone says what is left.

    `url` is what the job's record will name, where the rest of an unfinished job may be queued.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @override
    def submit(self, tasks: Iterable[Task]) -> int:
        return 0

    @override
    def counts(self, job: str) -> Counts:
        return Counts()

    @override
    def jobs(self) -> dict[str, Counts]:
        return {}

    @override
    def running(self, job: str) -> list[Running]:
        return []

    @override
    def failed(self, job: str) -> list[Task]:
        return []

    @override
    def retry(self, job: str) -> int:
        return 0

    @override
    def cancel(self, job: str) -> int:
        return 0

    @override
    def release(self, worker: str, *, counted: bool = True) -> int:
        return 0

    @override
    def run_tasks(self, handler: Handler, options: WorkerOptions) -> None:
        return

    @override
    def record_contributions(
        self, job: str, contributions: Sequence[BlockContribution]
    ) -> list[Task]:
        return []

    @override
    def close(self) -> None:
        return


class Contributions:
    """Which blocks' contributors have committed, counted in this process; each commits once."""

    def __init__(self) -> None:
        self._marks: Counter[Index] = Counter()
        self._lock = threading.Lock()

    def note(self, contributions: Sequence[BlockContribution]) -> list[Index]:
        """Count a committed chunk's contributions; return the blocks that they complete."""
        with self._lock:
            self._marks.update(mark.block for mark in contributions)
            return [mark.block for mark in contributions if self._marks[mark.block] == mark.of]


def compute_inline(job: JobHandle, progress: Callable[[int, int], None]) -> str:
    """Compute every chunk without a commit record, in order; returns this worker's name.

    A block is completed as soon as all its contributors are committed; of a job that was begun
    before, some are left to the finalizer. The first chunk that fails ends it with its error,
    which the ledger keeps as well; what is committed stays.
    """
    worker = WorkerName.new(job.plan.job.model.device).name
    left, total = job_completion(job).unfinished, job.plan.costs.chunks
    before = total - len(left)
    progress(before, total)
    contributions = Contributions()
    blocks: list[Future[None]] = []
    most, depth = blocks_at_once(job.plan), default_depth(gpu=job.plan.job.model.device == "cuda")
    with ThreadPoolExecutor(depth) as pool, ThreadPoolExecutor(most) as finalizer:

        def start(index: Index) -> Future[TaskResult]:
            task = Task("infer", job.folder.path, index)
            return pool.submit(run_task, task, Attempt(1, worker))

        for done, outcome in enumerate(pipelined(start, left, depth), start=before + 1):
            for block in contributions.note(outcome.contributions):
                blocks.append(finalizer.submit(complete_block, job, block, Attempt(1, worker)))
            progress(done, total)
        for made in blocks:
            made.result()
    return worker


def pipelined(start: Callable[[A], Future[B]], items: Iterable[A], depth: int) -> Iterator[B]:
    """Yield what each item comes to, in order, while `depth` items are in flight."""
    flying: deque[Future[B]] = deque()
    try:
        for item in items:
            flying.append(start(item))
            if len(flying) == depth:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    finally:
        for future in flying:
            future.cancel()
