"""Contract tests of all queue backends; the contract is in chunkq/queue/contract/executor.py.

A new backend adds an entry to LOCAL or CLUSTERS and runs all tests. Tests use the interface
`Executor` only; the entry has the functions that access the backend directly.
"""

import json
import multiprocessing
import os
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import redis

from chunkq.errors import (
    ErrorCode,
    JobError,
    ModelError,
    PredictionError,
    QueueError,
    RepeatedFailureError,
    TaskTimeoutError,
)
from chunkq.job.tasks import JobId, Task
from chunkq.queue.backends.hosted.hosted import HostedQueue
from chunkq.queue.backends.inprocess import InProcessExecutor, _JobQueue
from chunkq.queue.backends.rq import executor as rq_executor
from chunkq.queue.backends.rq.names import queue_name, stored_job
from chunkq.queue.contract.executor import (
    MAX_ATTEMPTS,
    Attempt,
    Contribution,
    Executor,
    Handler,
    TaskCounts,
    TaskResult,
    WorkerOptions,
)
from chunkq.queue.contract.settings import WorkerSettings
from chunkq.queue.leases.task_loop import LeaseQueue
from chunkq.queue.registry import open_executor
from tests.harness.waiting import TIMEOUT, wait_until

MOMENT = 0.2
"""Time (s) that a test waits to verify that something does not happen."""
JOB = JobId("/data/brain.zarr.chunkq", "0a1b2c3d")
OTHER_JOB = JobId("s3://bucket/rock.zarr.chunkq", "76543210")


@dataclass(frozen=True)
class Backend:
    """A backend: create the URL of a new queue, and insert a raw message into a queue."""

    name: str
    make_url: Callable[[Path, pytest.FixtureRequest], str]
    insert: Callable[[str, str | bytes], None]


def insert_into_sqlite(url: str, message: str | bytes) -> None:
    with sqlite3.connect(url.removeprefix("sqlite://")) as database:
        database.execute("INSERT OR IGNORE INTO jobs (path, epoch) VALUES (?, ?)", JOB)
        row = (os.urandom(4).hex(), message)
        database.execute("INSERT INTO tasks (job, id, message) VALUES (1, ?, ?)", row)
    database.close()


def insert_into_redis(url: str, message: str | bytes) -> None:
    with redis.Redis.from_url(url) as client:
        name, task_id = queue_name(JOB), os.urandom(4).hex()
        client.hset(f"rq:job:{task_id}", mapping={"status": "queued", "data": message})
        client.rpush(f"rq:queue:{name}", task_id)
        client.zadd("chunkq:queues", {name: 1})
        client.hset("chunkq:jobs", name, stored_job(JOB))


def insert_into_host(url: str, message: str | bytes) -> None:
    executor = open_executor(url)
    assert isinstance(executor, HostedQueue)
    text = message.decode("latin-1") if isinstance(message, bytes) else message
    executor.table.submit([(*JOB, os.urandom(4).hex(), text)])
    executor.close()


def insert_into_process(url: str, message: str | bytes) -> None:
    executor = open_executor(url)
    assert isinstance(executor, InProcessExecutor)
    executor._queue.jobs.setdefault(JOB, _JobQueue()).queued[os.urandom(4).hex()] = message, 0


LOCAL = (
    Backend(
        "inprocess",
        lambda folder, request: f"inprocess://{folder}",
        insert_into_process,
    ),
    Backend(
        "sqlite",
        lambda folder, request: f"sqlite://{folder / 'queue.db'}",
        insert_into_sqlite,
    ),
    Backend(
        "rq",
        lambda folder, request: request.getfixturevalue("redis").url,
        insert_into_redis,
    ),
)
CLUSTERS = (
    Backend(
        "dask",
        lambda folder, request: request.getfixturevalue("dask"),
        insert_into_host,
    ),
    Backend(
        "ray",
        lambda folder, request: request.getfixturevalue("ray"),
        insert_into_host,
    ),
)


SHARED = tuple(backend for backend in LOCAL if backend.name != "inprocess")
"""Backends whose workers can be processes."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test on the local backends, and tests marked `transport` also on clusters.

    Clusters use the same task table as sqlite, so that only the transport differs. Tests marked
    `processes` need worker processes.
    """
    if "backend" not in metafunc.fixturenames:
        return
    backends = LOCAL
    if metafunc.definition.get_closest_marker("transport"):
        backends = (*LOCAL, *CLUSTERS)
    if metafunc.definition.get_closest_marker("processes"):
        backends = SHARED
    metafunc.parametrize("backend", parameters(backends))


def parameters(backends: Sequence[Backend]) -> list[Any]:
    """Return one parameter per backend, marked if it needs a server."""
    return [
        pytest.param(
            backend,
            id=backend.name,
            marks=[] if backend.name in ("inprocess", "sqlite") else [pytest.mark.server],
        )
        for backend in backends
    ]


@pytest.fixture
def url(backend: Backend, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return backend.make_url(tmp_path, request)


@pytest.fixture
def queue(url: str) -> Iterator[Executor]:
    executor = open_executor(url)
    yield executor
    executor.close()


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


# ---------------------------------------------------------------------------------- submit


def test_every_task_has_a_constant_id_that_is_unique_in_its_job() -> None:
    task = Task("infer", *JOB, 0, (1, 22, 3))
    assert task.id == "infer/0/1.22.3" == Task.from_json(task.to_json()).id
    others = [Task("finalize", *JOB, 0, (1, 22, 3)), Task("infer", *JOB, 1, (1, 22, 3))]
    others += [Task("infer", *JOB, 0, (12, 2, 3)), Task("infer", *JOB, 0, (1, 22))]
    assert len({task.id, *(other.id for other in others)}) == 5


@pytest.mark.transport
def test_a_task_is_on_the_queue_once_even_if_submitted_repeatedly(
    queue: Executor, url: str
) -> None:
    assert queue.submit(iter(tasks(5))) == 5
    assert queue.submit(tasks(5)) == 0
    other = open_executor(url)
    assert other.submit(tasks(7)) == 2
    other.close()
    assert queue.counts(JOB) == TaskCounts(queued=7)
    recorder = Recorder()
    queue.run_tasks(recorder, burst())
    assert sorted(recorder.tasks, key=lambda task: task.chunk) == tasks(7)
    assert queue.counts(JOB) == TaskCounts()


def test_jobs_that_are_submitted_together_run_in_their_order(queue: Executor) -> None:
    submitted = [task for n in range(8) for task in tasks(2, JobId(f"/data/{n}.chunkq", JOB.epoch))]
    queue.submit(submitted)
    recorder = Recorder()
    queue.run_tasks(recorder, burst())
    assert recorder.tasks == submitted


def test_submit_queues_the_first_tasks_before_it_reads_the_last_one(
    queue: Executor, url: str
) -> None:
    counts = []

    def task_stream() -> Iterator[Task]:
        other = open_executor(url)
        yield from tasks(2500)
        counts.append(other.counts(JOB).queued)
        other.close()
        yield from tasks(2600)

    assert queue.submit(task_stream()) == 2600
    assert 0 < counts[0] <= 2500


def test_submitting_a_running_task_again_changes_nothing(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    with blocked_worker(url, burst()) as blocked:
        wait_until(lambda: blocked.recorder.started, "the task is started")
        before = queue.running(JOB)
        assert queue.submit(tasks(1)) == 0
        assert queue.running(JOB) == before
        assert queue.counts(JOB) == TaskCounts(running=1)
        blocked.end()
    assert queue.counts(JOB) == TaskCounts()
    assert blocked.recorder.numbers == [1]


def test_a_failed_task_submitted_again_has_all_its_attempts(
    queue: Executor,
) -> None:
    queue.submit(tasks(1))
    queue.run_tasks(Recorder(raises(ValueError("no"))), burst())
    assert queue.counts(JOB) == TaskCounts(failed=1)
    assert queue.submit(tasks(2)) == 2
    assert queue.counts(JOB) == TaskCounts(queued=2)
    recorder = Recorder(raises(ValueError("no")))
    queue.run_tasks(recorder, burst())
    assert sorted(recorder.numbers) == sorted([*range(1, MAX_ATTEMPTS + 1)] * 2)


# ---------------------------------------------------------------------------- queue states


@pytest.mark.transport
def test_tasks_of_several_jobs_are_counted_separately(queue: Executor, url: str) -> None:
    assert queue.jobs() == {}
    assert queue.counts(JOB) == TaskCounts()
    queue.submit(tasks(3))
    queue.submit(tasks(2, OTHER_JOB))
    queue.run_tasks(Recorder(raises(ValueError("no"))), burst(job=OTHER_JOB.path))
    with blocked_worker(url, options("worker-b", job=JOB.path)) as blocked:
        wait_until(lambda: blocked.recorder.started, "a task is started")
        expected = {JOB: TaskCounts(queued=2, running=1), OTHER_JOB: TaskCounts(failed=2)}
        assert queue.jobs() == expected
        assert {job: queue.counts(job) for job in expected} == expected
        assert queue.failed(JOB) == []
        assert set(queue.failed(OTHER_JOB)) == set(tasks(2, OTHER_JOB))


@pytest.mark.transport
def test_running_tasks_are_listed_with_worker_and_start_time(queue: Executor, url: str) -> None:
    queue.submit(tasks(3))
    before = time.time()
    with blocked_worker(url, options("worker-b", depth=2)) as blocked:
        wait_until(lambda: len(blocked.recorder.started) == 2, "two tasks are started")
        running = queue.running(JOB)
        assert {item.task for item in running} == set(blocked.recorder.tasks)
        assert {item.worker for item in running} == {"worker-b"}
        assert all(before - 1 <= item.since <= time.time() + 1 for item in running)
        assert queue.running(OTHER_JOB) == []
    assert queue.running(JOB) == []


def test_a_worker_of_one_job_runs_no_tasks_of_other_jobs(queue: Executor) -> None:
    queue.submit(tasks(2))
    queue.submit(tasks(2, OTHER_JOB))
    recorder = Recorder()
    queue.run_tasks(recorder, burst(job=OTHER_JOB.path))
    assert set(recorder.tasks) == set(tasks(2, OTHER_JOB))
    assert queue.jobs() == {JOB: TaskCounts(queued=2)}


@pytest.mark.transport
def test_retry_queues_the_failed_tasks_of_one_job_with_all_attempts(queue: Executor) -> None:
    queue.submit([*tasks(2), *tasks(1, OTHER_JOB)])
    queue.run_tasks(Recorder(raises(ValueError("no"))), burst())
    queue.submit([Task("infer", *JOB, 0, (9, 9))])
    assert queue.retry(JOB) == 2
    assert queue.jobs() == {JOB: TaskCounts(queued=3), OTHER_JOB: TaskCounts(failed=1)}
    assert queue.retry(JOB) == 0
    recorder = Recorder()
    queue.run_tasks(recorder, burst())
    assert recorder.numbers == [1, 1, 1]


@pytest.mark.transport
def test_cancel_removes_one_job_and_lets_running_tasks_finish(queue: Executor, url: str) -> None:
    queue.submit([*tasks(3), *tasks(1, OTHER_JOB)])
    with blocked_worker(url, burst(job=JOB.path)) as blocked:
        wait_until(lambda: blocked.recorder.started, "a task is started")
        assert queue.cancel(JOB) in (2, 3)
        blocked.end()
    assert len(blocked.recorder.finished) == 1
    assert queue.jobs() == {OTHER_JOB: TaskCounts(queued=1)}


def test_a_cancelled_task_can_be_submitted_and_started_while_it_still_runs(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    with blocked_worker(url, options("worker-b")) as blocked:
        wait_until(lambda: blocked.recorder.started, "the task is started")
        queue.cancel(JOB)
        assert queue.submit(tasks(1)) == 1
        recorder = Recorder()
        queue.run_tasks(recorder, burst())
        assert recorder.numbers == [1]


# -------------------------------------------------------------------------------- attempts


def test_an_error_costs_an_attempt_and_the_task_is_tried_again(queue: Executor) -> None:
    queue.submit(tasks(1))

    def fail_once(task: Task, attempt: Attempt) -> None:
        if attempt.number == 1:
            raise ValueError("first attempt")

    recorder = Recorder(fail_once)
    queue.run_tasks(recorder, burst("worker-a"))
    assert recorder.started == [(tasks(1)[0], Attempt(n, "worker-a")) for n in (1, 2)]
    assert queue.counts(JOB) == TaskCounts()


def test_a_task_that_failed_is_tried_again_after_all_others(queue: Executor) -> None:
    first, *others = tasks(3)
    queue.submit([first, *others])

    def fail_once(task: Task, attempt: Attempt) -> None:
        if task == first and attempt.number == 1:
            raise ValueError("first attempt")

    recorder = Recorder(fail_once)
    queue.run_tasks(recorder, burst())
    assert recorder.tasks == [first, *others, first]


@pytest.mark.transport
def test_a_task_that_fails_every_attempt_ends_failed_and_the_others_are_done(
    queue: Executor,
) -> None:
    queue.submit(tasks(4))

    def fail_second(task: Task, attempt: Attempt) -> None:
        if task.chunk == (1, 0):
            raise ValueError("never")

    recorder = Recorder(fail_second)
    queue.run_tasks(recorder, burst())
    tries = [attempt for task, attempt in recorder.started if task.chunk == (1, 0)]
    assert [attempt.number for attempt in tries] == [*range(1, MAX_ATTEMPTS + 1)]
    assert [attempt.is_last for attempt in tries] == [False, False, True]
    assert len(recorder.finished) == 3
    assert queue.counts(JOB) == TaskCounts(failed=1)
    assert queue.failed(JOB) == [Task("infer", *JOB, 0, (1, 0))]


@pytest.mark.parametrize("error", [ModelError("no such network"), JobError("no such job")])
def test_an_error_that_affects_every_chunk_is_raised_and_costs_no_attempt(
    queue: Executor, error: Exception
) -> None:
    queue.submit(tasks(5))
    recorder = Recorder(raises(error))
    with pytest.raises(type(error), match="no such"):
        queue.run_tasks(recorder, options("worker-a", depth=2))
    assert 1 <= len(recorder.started) <= 2
    assert queue.counts(JOB) == TaskCounts(queued=5)
    second = Recorder()
    queue.run_tasks(second, burst())
    assert second.numbers == [1] * 5


def test_a_job_that_cannot_run_is_skipped_and_other_jobs_finish_first(
    queue: Executor,
) -> None:
    queue.submit([*tasks(5), *tasks(3, OTHER_JOB)])

    def reject(task: Task, attempt: Attempt) -> None:
        if task.job_id == JOB:
            raise ModelError("no such network")

    recorder = Recorder(reject)
    with pytest.raises(ModelError, match="no such network"):
        queue.run_tasks(recorder, burst())
    assert set(recorder.finished) == set(tasks(3, OTHER_JOB))
    assert len(recorder.started) == 4
    assert queue.jobs() == {JOB: TaskCounts(queued=5)}


@pytest.mark.transport
def test_tasks_of_a_dead_worker_are_available_immediately_after_release(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    lease_and_disappear(url, "dead")
    assert queue.counts(JOB) == TaskCounts(running=1)
    assert queue.release("another worker") == 0
    assert queue.release("dead") == 1
    assert queue.counts(JOB) == TaskCounts(queued=1)
    recorder, before = Recorder(), time.monotonic()
    queue.run_tasks(recorder, burst("heir"))
    assert recorder.started == [(tasks(1)[0], Attempt(2, "heir"))]
    assert time.monotonic() - before < 5


def test_a_task_that_kills_every_worker_ends_failed(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    for number in range(MAX_ATTEMPTS):
        lease_and_disappear(url, f"dead-{number}")
        queue.release(f"dead-{number}")
    recorder = Recorder()
    queue.run_tasks(recorder, burst())
    assert recorder.started == []
    assert queue.counts(JOB) == TaskCounts(failed=1)
    assert queue.failed(JOB) == tasks(1)


def test_releasing_a_stopped_worker_repeatedly_counts_no_attempts(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    for number in range(2):
        lease_and_disappear(url, f"stopped-{number}")
        for _ in range(3):
            queue.release(f"stopped-{number}", counted=False)
    recorder = Recorder(raises(ValueError("no")))
    queue.run_tasks(recorder, burst())
    assert recorder.numbers == [*range(1, MAX_ATTEMPTS + 1)]


@pytest.mark.processes
def test_a_killed_worker_process_holds_its_task_until_released(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    process = SPAWN.Process(target=start_task_and_die, args=(url, "dead"))
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode == 9
    assert queue.counts(JOB) == TaskCounts(running=1)
    assert queue.release("dead") == 1
    recorder = Recorder()
    queue.run_tasks(recorder, burst("heir"))
    assert recorder.started == [(tasks(1)[0], Attempt(2, "heir"))]


@pytest.mark.transport
def test_the_task_of_a_lost_worker_runs_again_when_its_lease_expires(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    lease_and_disappear(url, "dead", SHORT_LEASE)
    wait_until(lambda: queue.counts(JOB) == TaskCounts(queued=1), "the lease expires")
    assert queue.running(JOB) == []
    recorder = Recorder()
    queue.run_tasks(recorder, burst("heir"))
    assert recorder.started == [(tasks(1)[0], Attempt(2, "heir"))]
    assert queue.counts(JOB) == TaskCounts()


def test_a_lease_that_its_worker_never_received_expires(queue: Executor) -> None:
    """If the response to `reserve` is lost, the worker does not renew the lease."""
    assert isinstance(queue, LeaseQueue)
    queue.submit(tasks(2))
    worker = options(settings=SHORT_LEASE)
    assert queue.reserve(worker) is not None  # lost
    lease = queue.reserve(worker)
    assert lease is not None

    def only_the_other_task_runs() -> bool:
        queue.renew(worker, [lease])
        return [item.task for item in queue.running(JOB)] == [lease.task]

    wait_until(only_the_other_task_runs, "the lost lease expires")
    assert queue.counts(JOB) == TaskCounts(queued=1, running=1)


@pytest.mark.transport
def test_a_long_task_keeps_its_lease_while_its_worker_runs(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    slow_worker = burst("slow", settings=SHORT_LEASE)
    with blocked_worker(
        url, slow_worker, lambda *arguments: time.sleep(3 * SHORT_LEASE.lease)
    ) as slow:
        wait_until(lambda: slow.recorder.started, "the task is started")
        slow.go.set()
        recorder = Recorder()
        queue.run_tasks(recorder, burst("eager"))
    assert recorder.started == []
    assert slow.recorder.numbers == [1]


def test_extended_leases_of_a_silent_worker_do_not_expire(queue: Executor, url: str) -> None:
    queue.submit(tasks(2))
    lease_and_disappear(url, "loading", SHORT_LEASE)
    lease_and_disappear(url, "dead", SHORT_LEASE)
    queue.extend("loading", TIMEOUT)
    recorder = Recorder()
    wait_until(lambda: queue.counts(JOB) == TaskCounts(1, 1), "the other lease expires")
    queue.run_tasks(recorder, options(deadline=time.time() + MOMENT))
    assert recorder.started == [(tasks(2)[1], Attempt(2, "worker-a"))]
    queue.extend("unknown", TIMEOUT)
    assert queue.counts(JOB) == TaskCounts(running=1)


def test_a_worker_cannot_end_a_task_that_is_leased_to_another_worker_now(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    with blocked_worker(url, options("slow")) as slow:
        wait_until(lambda: slow.recorder.started, "the task is started")
        queue.release("slow")
        with blocked_worker(url, burst("heir")) as heir:
            wait_until(lambda: heir.recorder.started, "the task is started again")
            slow.go.set()
            wait_until(lambda: slow.recorder.finished, "the slow worker finishes")
            time.sleep(MOMENT)
            assert [item.worker for item in queue.running(JOB)] == ["heir"]
            heir.end()
    assert queue.counts(JOB) == TaskCounts()


# --------------------------------------------------------------------------------- workers


def test_a_burst_ends_immediately_on_an_empty_queue(queue: Executor) -> None:
    before = time.monotonic()
    queue.run_tasks(Recorder(), burst())
    queue.submit(tasks(1, OTHER_JOB))
    queue.run_tasks(Recorder(), burst(job=JOB.path))
    assert time.monotonic() - before < 5


def test_a_burst_waits_for_running_tasks_of_other_workers(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    error = raises(ValueError("no"))
    with blocked_worker(url, options("first"), error) as first:
        wait_until(lambda: first.recorder.started, "the task is started")
        with blocked_worker(url, burst("second")) as second:
            second.go.set()
            time.sleep(MOMENT)
            assert second.is_working
            assert second.recorder.started == []
            first.go.set()
            wait_until(lambda: not second.is_working, "the burst ends")
    numbers = first.recorder.numbers + second.recorder.numbers
    assert sorted(numbers) == [*range(1, len(numbers) + 1)]
    assert len(numbers) >= 2


def test_without_burst_a_worker_waits_for_tasks_until_it_is_stopped(
    queue: Executor, url: str
) -> None:
    worker = options("patient")
    with blocked_worker(url, worker) as blocked:
        blocked.go.set()
        time.sleep(MOMENT)
        assert blocked.is_working
        queue.submit(tasks(1))
        wait_until(lambda: blocked.recorder.finished, "the late task is done")
        worker.stop.set()
        wait_until(lambda: not blocked.is_working, "the worker stops")


def test_depth_tasks_are_in_flight_at_once(queue: Executor) -> None:
    depth = 4
    queue.submit(tasks(2 * depth))
    barrier = threading.Barrier(depth)

    def wait_for_others(task: Task, attempt: Attempt) -> None:
        # Returns when `depth` tasks wait at the same time.
        barrier.wait(TIMEOUT)

    recorder = Recorder(wait_for_others)
    queue.run_tasks(recorder, burst(depth=depth))
    assert len(recorder.finished) == 2 * depth
    assert set(recorder.numbers) == {1}


def test_a_stopped_worker_finishes_tasks_in_flight_and_starts_no_more(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(6))
    worker = options("worker-b", depth=2)
    with blocked_worker(url, worker) as blocked:
        wait_until(lambda: len(blocked.recorder.started) == 2, "two tasks are started")
        worker.stop.set()
        blocked.end()
    assert len(blocked.recorder.finished) == 2
    assert len(blocked.recorder.started) == 2
    assert queue.counts(JOB) == TaskCounts(queued=4)


def test_a_worker_starts_no_task_that_would_end_after_its_deadline(queue: Executor) -> None:
    queue.submit(tasks(30))
    seconds, deadline = 0.25, time.time() + 1.0
    started = []

    def run_for_a_while(task: Task, attempt: Attempt) -> None:
        started.append(time.time())
        time.sleep(seconds)

    queue.run_tasks(run_for_a_while, options("worker-a", deadline=deadline))
    # A slow machine makes tasks longer, but starts none too late.
    assert started
    assert max(started) + seconds < deadline + 0.05
    assert queue.counts(JOB) == TaskCounts(queued=30 - len(started))


def test_a_worker_past_its_deadline_starts_no_task(queue: Executor) -> None:
    queue.submit(tasks(1))
    recorder = Recorder()
    queue.run_tasks(recorder, options("worker-a", deadline=time.time() - 1))
    assert recorder.started == []


# ------------------------------------------------------- repeated failures and time limits


def fails_in(job: JobId, error: Callable[[Task], Exception]) -> Handler:
    def handler(task: Task, attempt: Attempt) -> None:
        if task.job_id == job:
            raise error(task)

    return handler


def unreadable(task: Task) -> Exception:
    return OSError("volume.zarr: input/output error\nsecond line")


def test_a_job_whose_chunks_fail_with_one_error_is_skipped_and_other_jobs_finish_first(
    queue: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    queue.submit([*tasks(10), *tasks(3, OTHER_JOB)])
    recorder = Recorder(fails_in(JOB, unreadable))
    with pytest.raises(RepeatedFailureError) as failure:
        queue.run_tasks(recorder, burst())
    first, line = QUICK.same_failures_at_first, str(failure.value)
    assert failure.value.code is ErrorCode.REPEATED_FAILURE
    assert line.startswith(f"/data/brain.zarr: {first} ")
    assert "(OSError: volume.zarr: input/output error)" in line
    assert len(line.splitlines()) == 1
    assert [record.getMessage() for record in caplog.records].count(line) == 1
    assert [task.chunk[0] for task in recorder.tasks if task.job_id == JOB] == [*range(first)]
    assert recorder.finished == tasks(3, OTHER_JOB)
    assert queue.jobs() == {JOB: TaskCounts(queued=10)}
    again = Recorder()
    queue.run_tasks(again, burst())
    assert sorted(again.numbers) == [1] * (10 - first) + [2] * first


def test_after_a_success_more_failures_with_one_error_are_tolerated(
    queue: Executor,
) -> None:
    settings = replace(QUICK, same_failures_at_first=2, same_failures_later=6)
    queue.submit(tasks(20))

    def succeed_first(task: Task, attempt: Attempt) -> None:
        if task.chunk[0] > 0:
            raise unreadable(task)

    recorder = Recorder(succeed_first)
    with pytest.raises(RepeatedFailureError, match=r"brain\.zarr: 6 "):
        queue.run_tasks(recorder, burst(settings=settings))
    assert len(recorder.started) == 1 + 6


def test_chunks_that_did_not_run_the_network_are_not_a_success(
    queue: Executor,
) -> None:
    settings = replace(QUICK, same_failures_at_first=3)
    queue.submit(tasks(10))

    def run_every_second(task: Task, attempt: Attempt) -> TaskResult:
        if task.chunk[0] % 2:
            raise unreadable(task)
        return TaskResult(ran_network=False)

    with pytest.raises(RepeatedFailureError, match=r"brain\.zarr: 3 "):
        queue.run_tasks(run_every_second, burst(settings=settings))
    assert queue.counts(JOB) == TaskCounts(queued=7)


def test_a_success_resets_the_count_of_failures(
    queue: Executor,
) -> None:
    settings = replace(QUICK, same_failures_later=3)
    queue.submit(tasks(12))

    def succeed_every_third(task: Task, attempt: Attempt) -> None:
        if task.chunk[0] % 3 > 0 and attempt.number == 1:
            raise unreadable(task)

    recorder = Recorder(succeed_every_third)
    queue.run_tasks(recorder, burst(settings=settings))
    assert len(recorder.started) == 12 + 8
    assert queue.jobs() == {}


@pytest.mark.parametrize(
    "errors",
    [(OSError("no disk"), OSError("no network")), (ValueError("no"), KeyError("no"))],
    ids=["different messages", "different classes"],
)
def test_different_causes_do_not_add_up(queue: Executor, errors: tuple[Exception, ...]) -> None:
    count = 4 * QUICK.same_failures_at_first
    queue.submit(tasks(count))
    recorder = Recorder(fails_in(JOB, lambda task: errors[task.chunk[0] % 2]))
    queue.run_tasks(recorder, burst())
    assert len(recorder.started) == MAX_ATTEMPTS * count
    assert queue.counts(JOB) == TaskCounts(failed=count)


def test_failures_of_two_jobs_do_not_add_up(queue: Executor) -> None:
    count = QUICK.same_failures_at_first - 1
    queue.submit(tasks(count))
    queue.submit(Task("infer", *OTHER_JOB, 0, (number, 1)) for number in range(count))
    recorder = Recorder(raises(unreadable(tasks(1)[0])))
    queue.run_tasks(recorder, burst())
    assert queue.jobs() == {JOB: TaskCounts(failed=count), OTHER_JOB: TaskCounts(failed=count)}


def test_one_failing_chunk_never_skips_its_job(
    queue: Executor,
) -> None:
    settings = replace(QUICK, same_failures_at_first=2)
    queue.submit(tasks(1))
    retries = 4

    def fail(task: Task, attempt: Attempt) -> None:
        raise unreadable(task)

    recorder = Recorder(fail)

    class RetryingOptions(WorkerOptions):
        """Options of a worker whose failed chunk is queued again a few times before it ends."""

        def can_start(self) -> bool:
            nonlocal retries
            if retries and queue.counts(JOB).failed:
                retries -= queue.retry(JOB)
            return super().can_start()

    queue.run_tasks(recorder, RetryingOptions("worker-a", burst=True, settings=settings))
    assert retries == 0
    assert recorder.numbers == [*range(1, MAX_ATTEMPTS + 1)] * 5
    assert queue.counts(JOB) == TaskCounts(failed=1)


def test_failures_that_differ_only_in_coordinates_count_as_one_error(queue: Executor) -> None:
    chunks = [(i, j) for i in range(4) for j in range(4)]
    queue.submit(Task("infer", *JOB, 0, chunk) for chunk in chunks)

    def not_finite(task: Task) -> Exception:
        low = [64 * i for i in task.chunk]
        return PredictionError(f"the network gave NaN for the patch that reads {low}")

    recorder = Recorder(fails_in(JOB, not_finite))
    with pytest.raises(RepeatedFailureError):
        queue.run_tasks(recorder, burst())
    assert len(recorder.started) == QUICK.same_failures_at_first


def test_a_worker_that_skips_a_job_ends_when_no_other_tasks_remain(
    queue: Executor, url: str
) -> None:
    queue.submit([*tasks(2), *tasks(2, OTHER_JOB)])

    def reject(task: Task, attempt: Attempt) -> None:
        if task.job_id == JOB:
            raise ModelError("no such network")
        time.sleep(0.05)

    worker, errors = options("patient"), []

    def work() -> None:
        executor = open_executor(url)
        try:
            executor.run_tasks(reject, worker)
        except ModelError as error:
            errors.append(error)
        executor.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(3)
    ended = not thread.is_alive()
    worker.stop.set()
    thread.join(TIMEOUT)
    assert queue.jobs() == {JOB: TaskCounts(queued=2)}
    assert len(errors) == 1
    assert ended


@contextmanager
def hanging() -> Iterator[threading.Event]:
    """Yield an event that tasks wait for; at the end set it and join their threads."""
    go = threading.Event()
    try:
        yield go
    finally:
        go.set()
        for thread in threading.enumerate():
            if thread.name.startswith("chunk-"):
                thread.join(TIMEOUT)


def test_a_task_over_its_time_limit_costs_an_attempt_and_requeues_the_others(
    queue: Executor,
) -> None:
    limit = 1.5
    hangs, short, late, *never = tasks(5)
    queue.submit(tasks(5))
    started = []
    with hanging() as go:

        def handler(task: Task, attempt: Attempt) -> None:
            started.append(task)
            if task == short:
                time.sleep(limit * 2 / 3)
            else:
                go.wait(TIMEOUT)

        worker = options("slow", depth=2, time_limit=limit)
        with pytest.raises(TaskTimeoutError, match=r"infer chunk 0\.0\b") as timeout:
            queue.run_tasks(handler, worker)
        assert timeout.value.code is ErrorCode.TASK_TIMEOUT
        assert len(str(timeout.value).splitlines()) == 1
        assert [lease.task for lease in timeout.value.leases] == [hangs]
        assert [lease.attempt for lease in timeout.value.leases] == [Attempt(1, "slow")]
        assert queue.counts(JOB) == TaskCounts(queued=4)
        time.sleep(MOMENT)
        assert set(started) == {hangs, short, late}
        recorder = Recorder()
        queue.run_tasks(recorder, burst("heir"))
        assert {task: attempt.number for task, attempt in recorder.started} == {
            hangs: 2,
            late: 1,
            **dict.fromkeys(never, 1),
        }


def test_the_time_limit_does_not_apply_to_a_task_that_waits_for_another_one(
    queue: Executor,
) -> None:
    hangs, waits = tasks(2)
    queue.submit(tasks(2))
    with hanging() as go:
        worker = options("slow", depth=2, time_limit=0.3, is_waiting=lambda task: task == waits)
        with pytest.raises(TaskTimeoutError) as timeout:
            queue.run_tasks(lambda task, attempt: wait_for(go), worker)
        assert [lease.task for lease in timeout.value.leases] == [hangs]
        recorder = Recorder()
        queue.run_tasks(recorder, burst("heir"))
        assert {task: attempt.number for task, attempt in recorder.started} == {hangs: 2, waits: 1}


def test_a_task_that_hangs_on_every_attempt_ends_failed(queue: Executor) -> None:
    queue.submit(tasks(1))
    with hanging() as go:
        for number in range(MAX_ATTEMPTS):
            with pytest.raises(TaskTimeoutError):
                queue.run_tasks(
                    lambda task, attempt: wait_for(go), options(f"w{number}", time_limit=0.1)
                )
        assert queue.counts(JOB) == TaskCounts(failed=1)


def wait_for(event: threading.Event) -> None:
    event.wait(TIMEOUT)


def test_the_time_limit_follows_the_longest_task_seen(
    queue: Executor,
) -> None:
    settings = replace(SHORT_LEASE, least_time_limit=0.1, time_limit_factor=3.0)
    queue.submit(tasks(3))
    seconds, started = {0: 0.3, 1: 0.5}, {}
    with hanging() as go:

        def handler(task: Task, attempt: Attempt) -> None:
            started[task.chunk[0]] = time.monotonic()
            if task.chunk[0] in seconds:
                time.sleep(seconds[task.chunk[0]])
            else:
                go.wait(TIMEOUT)

        with pytest.raises(TaskTimeoutError) as timeout:
            queue.run_tasks(handler, options("slow", settings=settings))
        assert [lease.task.chunk[0] for lease in timeout.value.leases] == [2]
        assert time.monotonic() - started[2] >= 3.0 * seconds[1]


@pytest.mark.parametrize(
    ("jobs", "hung"), [((JOB,), 0), ((JOB, OTHER_JOB), 1)], ids=["the first", "another job's first"]
)
def test_the_first_task_of_a_job_has_a_separate_time_limit(
    queue: Executor, jobs: tuple[JobId, ...], hung: int
) -> None:
    settings = replace(SHORT_LEASE, first_time_limit=0.5)
    queue.submit(Task("infer", *job, 0, (number,)) for number, job in enumerate(jobs))
    with hanging() as go:

        def handler(task: Task, attempt: Attempt) -> None:
            if task.chunk == (hung,):
                go.wait(TIMEOUT)

        before = time.monotonic()
        with pytest.raises(TaskTimeoutError) as timeout:
            queue.run_tasks(handler, options("slow", settings=settings))
        assert [lease.task.job_id for lease in timeout.value.leases] == [jobs[hung]]
        assert time.monotonic() - before < 10


# -------------------------------------------------------------------------- complete blocks


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


# ------------------------------------------------------------------------------ full queues


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


# ------------------------------------------------------------------------ foreign messages


def message(**changes: Any) -> str:
    """Return a message that is a task, except for the changes."""
    return json.dumps({**Task("infer", *JOB, 0, (0,)).as_dict(), **changes})


FOREIGN: dict[str, str | bytes] = {
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94.",
    "a dotted path": message(kind="os.system"),
    "an entry point": message(kind="chunkq_worker.infer:infer_chunk"),
    "no kind": '{"job": "j", "epoch": "00000000", "item": 0, "chunk": [0]}',
    "a kind that is a list": message(kind=["infer"]),
    "a chunk that is a word": message(chunk="0"),
    "no chunk": message(chunk=[]),
    "a negative chunk": message(chunk=[-1]),
    "a chunk of fractions": message(chunk=[0.5]),
    "a job that is a list": message(job=["j"]),
    "an epoch of another form": message(epoch="../../.."),
    "an epoch that is a number": message(epoch=12345678),
    "a negative item": message(item=-1),
    "an item that is a boolean": message(item=True),
    "null": "null",
    "half a message": '{"kind": "infer", "jo',
    "nothing": "",
    "deep nesting": "[" * 100_000,
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_message_that_is_not_a_task_is_rejected(text: str | bytes) -> None:
    Task.from_json(message())
    with pytest.raises(QueueError) as error:
        Task.from_json(text)  # type: ignore[arg-type]
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["a pickle", "a dotted path", "an entry point", "deep nesting"])
@pytest.mark.transport
def test_a_foreign_message_on_the_queue_is_deleted_and_never_run(
    queue: Executor, url: str, backend: Backend, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend.insert(url, FOREIGN[name])
    queue.submit(tasks(1))
    recorder = Recorder()
    queue.run_tasks(recorder, burst())
    assert recorder.tasks == tasks(1)
    assert queue.jobs() == {}
    [record] = [r for r in caplog.records if r.levelname == "ERROR"]
    assert len(record.getMessage()) < 1000


# -------------------------------------------------------------------------- many processes


@pytest.mark.processes
def test_many_processes_share_a_queue_and_no_task_runs_twice(
    queue: Executor, url: str, tmp_path: Path
) -> None:
    workers, count, start = 4, 300, tmp_path / "start"
    queue.submit(tasks(count))
    arguments = [(url, n, str(tmp_path / "log"), str(start)) for n in range(workers)]
    processes = [SPAWN.Process(target=log_every_task, args=values) for values in arguments]
    for process in processes:
        process.start()
    wait_until(lambda: len(list(tmp_path.glob("start.*"))) == workers, "all processes are ready")
    start.touch()
    for process in processes:
        process.join(TIMEOUT)
    assert [process.exitcode for process in processes] == [0] * workers
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert Counter(task for _, task, _ in lines) == Counter(task.id for task in tasks(count))
    assert {number for _, _, number in lines} == {"1"}
    assert len({process for process, _, _ in lines}) == workers
    assert queue.counts(JOB) == TaskCounts()
