"""The contract of queues that hold a limited number of tasks."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from chunkq.queue.backends.rq import executor as rq_executor
from chunkq.queue.contract.executor import Executor, TaskCounts
from chunkq.queue.leases.task_loop import LeaseQueue
from chunkq.queue.registry import open_executor
from tests.harness.queue_workers import JOB, MOMENT, Recorder, burst, options, tasks
from tests.harness.waiting import TIMEOUT, wait_until


@dataclass
class Producer:
    """A thread that submits tasks to a small queue. `results` holds the result of `submit`."""

    thread: threading.Thread
    results: list[int]

    @property
    def is_waiting(self) -> bool:
        return self.thread.is_alive()


@contextmanager
def producer(url: str, count: int) -> Iterator[Producer]:
    results: list[int] = []

    def produce() -> None:
        executor = open_executor(url)
        results.append(executor.submit(tasks(count)))
        executor.close()

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        yield Producer(thread, results)
    finally:
        limit = time.monotonic() + TIMEOUT
        with open_queue(url) as executor:
            while thread.is_alive():
                assert time.monotonic() < limit
                executor.run_tasks(Recorder(), burst("last"))
                thread.join(0.1)


@contextmanager
def open_queue(url: str) -> Iterator[Executor]:
    executor = open_executor(url)
    yield executor
    executor.close()


def run_and_ack(queue: Executor, count: int) -> None:
    assert isinstance(queue, LeaseQueue)
    for _ in range(count):
        lease = queue.reserve(options("worker-a"))
        assert lease is not None
        queue.ack(lease)


@pytest.fixture
def small_queue(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A queue that is full with three tasks, with batches of two."""
    monkeypatch.setattr(rq_executor, "MAX_QUEUED", 3)
    monkeypatch.setattr(rq_executor, "BATCH", 2)
    url: str = request.getfixturevalue("redis").url
    return url


def test_a_producer_waits_while_the_queue_is_full(
    small_queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    with producer(small_queue, 6) as filler, open_queue(small_queue) as queue:
        wait_until(lambda: queue.counts(JOB).queued == 4, "the queue is full")
        time.sleep(MOMENT)
        assert filler.is_waiting
        assert queue.counts(JOB) == TaskCounts(queued=4)
        [record] = [r for r in caplog.records if r.levelname == "WARNING"]
        assert "produce --resume" in record.getMessage()
        run_and_ack(queue, 1)
        time.sleep(3 * MOMENT)
        assert filler.is_waiting
        assert queue.counts(JOB) == TaskCounts(queued=3)
        run_and_ack(queue, 1)
        wait_until(lambda: queue.counts(JOB).queued == 4, "the rest is queued")
        run_and_ack(queue, 2)
        wait_until(lambda: not filler.is_waiting, "the producer ends")
    assert filler.results == [6]


def test_a_waiting_producer_logs_one_warning(
    small_queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    with producer(small_queue, 8) as filler, open_queue(small_queue) as queue:
        for _ in range(2):
            wait_until(lambda: queue.counts(JOB).queued == 4, "the queue is full")
            run_and_ack(queue, 2)
        wait_until(lambda: queue.counts(JOB).queued == 4, "all is queued")
    assert filler.results == [8]
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1


def test_a_producer_does_not_wait_once_all_is_queued(small_queue: str) -> None:
    with producer(small_queue, 4) as filler, open_queue(small_queue) as queue:
        wait_until(lambda: queue.counts(JOB).queued == 4, "all is queued")
        filler.thread.join(3 * MOMENT)
        assert not filler.is_waiting
