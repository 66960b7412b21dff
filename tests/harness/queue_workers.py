"""Tasks, handlers and workers for tests of the queue backends."""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chunkq.job.tasks import JobId, Task
from chunkq.queue.contract.executor import Attempt, Handler, WorkerOptions
from chunkq.queue.contract.settings import WorkerSettings
from chunkq.queue.leases.task_loop import LeaseQueue
from chunkq.queue.registry import open_executor
from tests.harness.waiting import TIMEOUT

MOMENT = 0.2
"""Time (s) that a test waits to verify that something does not happen."""
JOB = JobId("/data/brain.zarr.chunkq", "0a1b2c3d")
OTHER_JOB = JobId("s3://bucket/rock.zarr.chunkq", "76543210")


@dataclass
class Recorder:
    """A handler that records started and finished tasks, and runs `action` in between."""

    action: Handler = lambda task, attempt: None
    started: list[tuple[Task, Attempt]] = field(default_factory=list)
    finished: list[Task] = field(default_factory=list)

    def __call__(self, task: Task, attempt: Attempt) -> None:
        self.started.append((task, attempt))
        self.action(task, attempt)
        self.finished.append(task)

    @property
    def tasks(self) -> list[Task]:
        return [task for task, _ in self.started]

    @property
    def numbers(self) -> list[int]:
        return [attempt.number for _, attempt in self.started]


def tasks(count: int, job: JobId = JOB) -> list[Task]:
    return [Task("infer", *job, 0, (number, 0)) for number in range(count)]


QUICK = WorkerSettings(shortest_poll=0.005, longest_poll=0.02)
SHORT_LEASE = replace(QUICK, lease=0.5)


def options(worker: str = "worker-a", depth: int = 1, **more: Any) -> WorkerOptions:
    return WorkerOptions(worker=worker, depth=depth, **{"settings": QUICK, **more})


def burst(worker: str = "worker-a", depth: int = 1, **more: Any) -> WorkerOptions:
    return options(worker, depth, burst=True, **more)


def raises(error: Exception) -> Handler:
    def handler(task: Task, attempt: Attempt) -> None:
        raise error

    return handler


@dataclass
class BlockedWorker:
    """A worker in a thread, whose handler waits for the event `go`."""

    thread: threading.Thread
    recorder: Recorder
    go: threading.Event

    @property
    def is_working(self) -> bool:
        return self.thread.is_alive()

    def end(self) -> None:
        self.go.set()
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()


@contextmanager
def blocked_worker(
    url: str, options: WorkerOptions, action: Handler = lambda task, attempt: None
) -> Iterator[BlockedWorker]:
    go = threading.Event()

    def wait_and(task: Task, attempt: Attempt) -> None:
        assert go.wait(TIMEOUT)
        action(task, attempt)

    recorder = Recorder(wait_and)

    def work() -> None:
        executor = open_executor(url)
        executor.run_tasks(recorder, options)
        executor.close()

    thread = threading.Thread(target=work)
    thread.start()
    blocked = BlockedWorker(thread, recorder, go)
    try:
        yield blocked
    finally:
        options.stop.set()
        blocked.end()


def lease_and_disappear(url: str, worker: str, settings: WorkerSettings = QUICK) -> None:
    """Lease one task for a worker that never renews or ends the lease."""
    executor = open_executor(url)
    assert isinstance(executor, LeaseQueue)
    assert executor.reserve(options(worker, settings=settings)) is not None
    executor.close()


def start_task_and_die(url: str, worker: str) -> None:
    open_executor(url).run_tasks(lambda task, attempt: os._exit(9), options(worker))


def log_every_task(url: str, number: int, log: str, start: str) -> None:
    """Run all tasks of a queue; append a line to the file `log` for each started task."""
    executor = open_executor(url)
    Path(f"{start}.{number}").touch()
    while not os.path.exists(start):
        time.sleep(0.001)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write_line(task: Task, attempt: Attempt) -> None:
        os.write(file, f"{number} {task.id} {attempt.number}\n".encode())
        time.sleep(0.02)  # otherwise one process may finish before another one starts

    executor.run_tasks(write_line, burst(f"process-{number}", depth=2))
    executor.close()


SPAWN = multiprocessing.get_context("spawn")
