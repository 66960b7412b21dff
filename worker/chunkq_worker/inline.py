"""Compute the chunks of a job in this process, without a queue."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from chunkq.events import Sink, StageProgress
from chunkq.executors.base import (
    Attempt,
    BlockContribution,
    TaskResult,
    WorkerName,
    default_depth,
)
from chunkq.finalize import complete_block, job_completion, max_concurrent_blocks
from chunkq.job_handle import JobHandle
from chunkq.plan import Index
from chunkq.tasks import Task
from chunkq_worker.run_task import run_task

STAGE = "computing chunks"
Item = TypeVar("Item")
Result = TypeVar("Result")


class Contributions:
    """Count the committed contributors of each block in this process. Thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[Index] = Counter()
        self._lock = threading.Lock()

    def record(self, contributions: Sequence[BlockContribution]) -> list[Index]:
        """Count the contributions of a committed chunk; return the blocks that are now complete.

        Call it once per chunk.
        """
        with self._lock:
            self._counts.update(contribution.block for contribution in contributions)
            return [
                contribution.block
                for contribution in contributions
                if self._counts[contribution.block] == contribution.total
            ]


def compute_inline(job: JobHandle, emit: Sink) -> str:
    """Compute every chunk that is not committed, in index order; return this worker's name.

    A block is finalized as soon as all its contributors have committed in this call. Blocks with
    contributors from an earlier run are left to the finalizer. The first error of a chunk is
    recorded in the ledger and raised; committed chunks stay committed.
    """
    worker = WorkerName.new(job.plan.job.model.device).name
    unfinished, total = job_completion(job).unfinished, job.plan.costs.chunks
    committed = total - len(unfinished)
    emit(StageProgress(STAGE, committed, total))
    contributions = Contributions()
    blocks: list[Future[None]] = []
    finalizers, depth = (
        max_concurrent_blocks(job.plan),
        default_depth(gpu=job.plan.job.model.device == "cuda"),
    )
    with ThreadPoolExecutor(depth) as pool, ThreadPoolExecutor(finalizers) as finalizer:

        def start(index: Index) -> Future[TaskResult]:
            task = Task("infer", job.folder.path, index)
            return pool.submit(run_task, task, Attempt(1, worker))

        for done, result in enumerate(pipelined(start, unfinished, depth), start=committed + 1):
            for block in contributions.record(result.contributions):
                blocks.append(finalizer.submit(complete_block, job, block, Attempt(1, worker)))
            emit(StageProgress(STAGE, done, total))
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
