"""The contract of every queue backend, of blocks whose contributions are complete."""

import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from chunkq.job.tasks import JobId, Task
from chunkq.queue.contract.executor import (
    Attempt,
    Contribution,
    Executor,
    Handler,
    TaskCounts,
    TaskResult,
)
from chunkq.queue.registry import open_executor
from tests.harness.queue_workers import JOB, OTHER_JOB, burst, raises, tasks
from tests.harness.waiting import TIMEOUT


def finalize_tasks(*blocks: tuple[int, ...], job: JobId = JOB) -> list[Task]:
    return [Task("finalize", *job, 0, block) for block in blocks]


def contributions_of_eight(
    block: tuple[int, ...], *numbers: int, job: JobId = JOB
) -> list[Contribution]:
    [task] = finalize_tasks(block, job=job)
    return [Contribution(task, number, 8) for number in numbers]


@pytest.mark.transport
def test_each_complete_block_is_returned_once_to_one_caller(queue: Executor, url: str) -> None:
    blocks, threads_count = [(n, 0, n) for n in range(25)], 4
    contributions = [c for block in blocks for c in contributions_of_eight(block, *range(8))]
    # Some commit repeatedly, like workers whose lease expired.
    contributions += [c for c in contributions if c.number == 3] * 2
    random.Random(1).shuffle(contributions)
    barrier, complete = threading.Barrier(threads_count), []
    executors = [queue, open_executor(url)]

    def commit(number: int) -> None:
        barrier.wait(TIMEOUT)
        share, executor = contributions[number::threads_count], executors[number % 2]
        for first in range(0, len(share), 3):
            complete.extend(executor.record_contributions(JOB, share[first : first + 3]))

    queue.submit(tasks(1))
    threads = [threading.Thread(target=commit, args=(n,)) for n in range(threads_count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    executors[1].close()
    assert Counter(complete) == Counter(finalize_tasks(*blocks))


def test_repeated_commits_of_the_same_chunks_do_not_complete_a_block(queue: Executor) -> None:
    block = (1, 2, 3)
    queue.submit(tasks(1))
    for member in (0, 5, 5, 7, 0, 1, 2, 3, 4, 4, 3, 2, 1):
        assert queue.record_contributions(JOB, contributions_of_eight(block, member)) == []
    assert (
        queue.record_contributions(OTHER_JOB, contributions_of_eight(block, 6, job=OTHER_JOB)) == []
    )
    assert queue.record_contributions(JOB, contributions_of_eight((1, 2, 4), 6)) == []
    assert queue.record_contributions(JOB, contributions_of_eight(block, 6)) == finalize_tasks(
        block
    )
    assert queue.record_contributions(JOB, contributions_of_eight(block, 6)) == []


def test_a_complete_block_is_never_returned_again(queue: Executor) -> None:
    queue.submit(tasks(1))
    returned = [
        queue.record_contributions(JOB, contributions_of_eight((0, 0), *range(8))) for _ in range(2)
    ]
    returned += [
        queue.record_contributions(JOB, [Contribution(*finalize_tasks((1, 1)), 0, 1)])
        for _ in range(2)
    ]
    assert sum(map(len, returned)) == 2


def test_cancel_deletes_the_blocks_of_a_job(queue: Executor) -> None:
    for job in (JOB, OTHER_JOB):
        queue.submit(tasks(1, job))
        assert (
            queue.record_contributions(job, contributions_of_eight((0,), *range(7), job=job)) == []
        )
    queue.cancel(JOB)
    queue.submit(tasks(1))
    assert queue.record_contributions(JOB, contributions_of_eight((0,), 7)) == []
    assert queue.record_contributions(
        OTHER_JOB, contributions_of_eight((0,), 7, job=OTHER_JOB)
    ) == finalize_tasks((0,), job=OTHER_JOB)
    assert queue.record_contributions(
        JOB, contributions_of_eight((0,), *range(7))
    ) == finalize_tasks((0,))


def test_nothing_is_stored_for_a_job_without_tasks(queue: Executor) -> None:
    last = contributions_of_eight((0,), 7)
    queue.submit(tasks(1))
    assert queue.record_contributions(JOB, contributions_of_eight((0,), *range(7))) == []
    queue.run_tasks(lambda task, attempt: None, burst("worker-a"))
    assert queue.record_contributions(JOB, last) == []
    queue.submit(tasks(1))
    assert queue.record_contributions(JOB, last) == []
    assert queue.record_contributions(
        JOB, contributions_of_eight((0,), *range(7))
    ) == finalize_tasks((0,))


@dataclass
class BlockHandler:
    """A handler whose chunks contribute to the blocks `to`; `block` handles finalize tasks."""

    queue: Executor
    to: Sequence[tuple[int, ...]]
    block: Handler = lambda task, attempt: None
    blocks: list[tuple[Task, Attempt]] = field(default_factory=list)
    running: list[TaskCounts] = field(default_factory=list)

    def __call__(self, task: Task, attempt: Attempt) -> TaskResult | None:
        if task.kind == "infer":
            return TaskResult(
                [Contribution(block, task.chunk[0], 3) for block in finalize_tasks(*self.to)]
            )
        self.blocks.append((task, attempt))
        self.running.append(self.queue.counts(task.job_id))
        return self.block(task, attempt)


@pytest.mark.transport
def test_a_worker_completes_the_blocks_that_its_chunk_was_the_last_to_contribute_to(
    queue: Executor,
) -> None:
    queue.submit(tasks(3))
    handler = BlockHandler(queue, to=[(7, 7), (8, 8)])
    queue.run_tasks(handler, burst("worker-a"))
    assert handler.blocks == [(b, Attempt(1, "worker-a")) for b in finalize_tasks((7, 7), (8, 8))]
    # The chunk is running until its blocks are finalized, so a crash queues it again.
    assert handler.running == [TaskCounts(running=1)] * 2
    assert queue.jobs() == {}


def test_an_error_in_completing_a_block_costs_nothing_and_the_other_blocks_are_completed(
    queue: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    queue.submit(tasks(3))
    handler = BlockHandler(queue, [(7, 7), (8, 8)], block=raises(OSError("no space left")))
    queue.run_tasks(handler, burst("worker-a"))
    expected = finalize_tasks((7, 7), (8, 8))
    assert [task for task, _ in handler.blocks] == expected
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == len(expected)
    assert "7.7" in warnings[0]
    assert "8.8" in warnings[1]
    assert queue.jobs() == {}
