"""Compute the chunks of a job in this process, without a queue."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from operator import attrgetter
from typing import TypeVar

from chunkq.finalize import max_concurrent_blocks
from chunkq.job.events import Sink, StageProgress
from chunkq.job.job_handle import JobHandle
from chunkq.job.tasks import Task
from chunkq.queue.contract.executor import (
    Attempt,
    Contribution,
    GateState,
    TaskResult,
    WorkerName,
    default_depth,
)
from chunkq.stages.completion import has_gate, queued_tasks
from chunkq.stages.registry import stages
from chunkq_worker.run_task import check_gate, run_task

PROGRESS_STAGE = "computing chunks"
WAIT_SECONDS = 1.0
STAGING = "staging inputs"
Argument = TypeVar("Argument")
Result = TypeVar("Result")


class Contributions:
    """Count the committed prerequisites of each task in this process. Thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[Task] = Counter()
        self._lock = threading.Lock()

    def record(self, contributions: Sequence[Contribution]) -> list[Task]:
        """Count the contributions of a committed task; return the tasks that can now run.

        Call it once per committed task.
        """
        with self._lock:
            self._counts.update(contribution.task for contribution in contributions)
            return [c.task for c in contributions if self._counts[c.task] == c.total]


def compute_inline(job: JobHandle, emit: Sink) -> str:
    """Compute every chunk that is not committed, in index order; return this worker's name.

    A block is finalized as soon as all its contributors have committed in this call. Blocks with
    contributors from an earlier run are left to the finalizer, unless a later stage waits for
    them. If its gate stays closed, that stage is left, too: the finalizer names what is missing.
    The first error of a chunk is recorded in the ledger and raised; committed chunks stay
    committed.
    """
    device = job.record.job.model.device
    worker, depth = WorkerName.new(device).name, default_depth(gpu=device == "cuda")
    contributions = Contributions()
    later: list[Future[None]] = []
    with (
        ThreadPoolExecutor(depth) as pool,
        ThreadPoolExecutor(max_concurrent_blocks(job)) as finalizer,
    ):

        def start(task: Task) -> Future[TaskResult]:
            return pool.submit(run_task, task, Attempt(1, worker))

        def continue_with(result: TaskResult) -> None:
            for task in contributions.record(result.contributions):
                later.append(finalizer.submit(run_later, task))

        def run_later(task: Task) -> None:
            continue_with(run_task(task, Attempt(1, worker)))

        for stage in filter(attrgetter("is_queued"), stages()):
            total = sum(stage.count(item) for item in job.items)
            if not total:
                continue
            is_gated = has_gate(job, stage)
            if is_gated and check_gate(job.id, stage.kind, worker=worker) is not GateState.OPEN:
                break
            tasks = list(queued_tasks(job, stage))
            committed = total - len(tasks)
            label = STAGING if stage.is_temporary else PROGRESS_STAGE
            emit(StageProgress(label, committed, total))
            for done, result in enumerate(pipelined(start, tasks, depth), start=committed + 1):
                continue_with(result)
                emit(StageProgress(label, done, total))
            for future in later:  # the list grows while its tasks run
                future.result()
    return worker


def result_of(future: Future[Result]) -> Result:
    """Wait for a result, so that Ctrl-C is noticed within a second.

    CPython does not end a wait for a signal that came just before it began.
    """
    while not future.done():
        wait([future], timeout=WAIT_SECONDS)
    return future.result()


def pipelined(
    start: Callable[[Argument], Future[Result]], arguments: Iterable[Argument], depth: int
) -> Generator[Result, None, None]:
    """Start calls with up to `depth` in flight, and yield their results in order.

    At the end, or if the caller stops early, futures that have not started are cancelled.
    """
    in_flight: deque[Future[Result]] = deque()
    try:
        for argument in arguments:
            in_flight.append(start(argument))
            if len(in_flight) == depth:
                yield result_of(in_flight.popleft())
        while in_flight:
            yield result_of(in_flight.popleft())
    finally:
        for future in in_flight:
            future.cancel()
