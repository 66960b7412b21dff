"""The contract of every queue backend; see chunkq/executors/base.py.

A new backend adds one entry to BACKENDS and gets the whole suite. Tests speak to it through
`Executor` alone; what they need besides stands in the entry.
"""

import multiprocessing
import os
import random
import re
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
    JobError,
    ModelError,
    PredictionError,
    QueueError,
    SameFailureError,
    TaskTimeoutError,
)
from chunkq.executors import open_executor
from chunkq.executors.base import (
    MAX_ATTEMPTS,
    Attempt,
    BlockContribution,
    Counts,
    Executor,
    Handler,
    TaskResult,
    WorkerOptions,
)
from chunkq.executors.hosted import HostedQueue
from chunkq.executors.inprocess import InProcessExecutor, _JobQueue
from chunkq.executors.leases import LeaseQueue
from chunkq.executors.rq import executor as rq_executor
from chunkq.executors.rq.executor import queue_name
from chunkq.executors.settings import WorkerSettings
from chunkq.tasks import ENTRY_POINTS, Task
from tests.harness.waiting import TIMEOUT, wait_until

MOMENT = 0.2
"""Seconds in which something that must not happen is given the chance to."""
JOB, OTHER_JOB = "/data/brain.zarr.chunkq", "s3://bucket/rock.zarr.chunkq"


@dataclass(frozen=True)
class Backend:
    """How to make a fresh queue of one kind, and to reach behind its back.

    `smuggle(url, message)` puts a raw message on the queue.
    """

    name: str
    make_url: Callable[[Path, pytest.FixtureRequest], str]
    smuggle: Callable[[str, str | bytes], None]


def smuggle_into_sqlite(url: str, message: str | bytes) -> None:
    with sqlite3.connect(url.removeprefix("sqlite://")) as database:
        row = (os.urandom(4).hex(), JOB, message)
        database.execute("INSERT INTO tasks (id, job, message) VALUES (?, ?, ?)", row)
    database.close()


def smuggle_into_redis(url: str, message: str | bytes) -> None:
    with redis.Redis.from_url(url) as client:
        name, task_id = queue_name(JOB), os.urandom(4).hex()
        client.hset(f"rq:job:{task_id}", mapping={"status": "queued", "data": message})
        client.rpush(f"rq:queue:{name}", task_id)
        client.zadd("chunkq:queues", {name: 1})
        client.hset("chunkq:jobs", name, JOB)


def smuggle_into_host(url: str, message: str | bytes) -> None:
    executor = open_executor(url)
    assert isinstance(executor, HostedQueue)
    text = message.decode("latin-1") if isinstance(message, bytes) else message
    executor.table.submit([(os.urandom(4).hex(), JOB, text)])
    executor.close()


def smuggle_into_process(url: str, message: str | bytes) -> None:
    executor = open_executor(url)
    assert isinstance(executor, InProcessExecutor)
    executor._memory.jobs.setdefault(JOB, _JobQueue()).queued[os.urandom(4).hex()] = message, 0


LOCAL = (
    Backend(
        "inprocess",
        lambda folder, request: f"inprocess://{folder}",
        smuggle_into_process,
    ),
    Backend(
        "sqlite",
        lambda folder, request: f"sqlite://{folder / 'queue.db'}",
        smuggle_into_sqlite,
    ),
    Backend(
        "rq",
        lambda folder, request: request.getfixturevalue("redis").url,
        smuggle_into_redis,
    ),
)
CLUSTERS = (
    Backend(
        "dask",
        lambda folder, request: request.getfixturevalue("dask"),
        smuggle_into_host,
    ),
    Backend(
        "ray",
        lambda folder, request: request.getfixturevalue("ray"),
        smuggle_into_host,
    ),
)


SHARED = tuple(backend for backend in LOCAL if backend.name != "inprocess")
"""Backends whose workers can be processes."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test on the local backends; those marked `transport` on clusters too.

    A cluster's head keeps its queue in the table that sqlite keeps in a file, so that only the
    way there and back is another. Tests marked `processes` need worker processes.
    """
    if "backend" not in metafunc.fixturenames:
        return
    chosen = LOCAL
    if metafunc.definition.get_closest_marker("transport"):
        chosen = (*LOCAL, *CLUSTERS)
    if metafunc.definition.get_closest_marker("processes"):
        chosen = SHARED
    metafunc.parametrize("backend", parameters(chosen))


def parameters(backends: Sequence[Backend]) -> list[Any]:
    """One parameter per backend, marked if it needs a server."""
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
class Diary:
    """A handler that remembers what it was given and then does what it is told."""

    then: Handler = lambda task, attempt: None
    begun: list[tuple[Task, Attempt]] = field(default_factory=list)
    ended: list[Task] = field(default_factory=list)

    def __call__(self, task: Task, attempt: Attempt) -> None:
        self.begun.append((task, attempt))
        self.then(task, attempt)
        self.ended.append(task)

    @property
    def tasks(self) -> list[Task]:
        return [task for task, _ in self.begun]

    @property
    def numbers(self) -> list[int]:
        return [attempt.number for _, attempt in self.begun]


def tasks(count: int, job: str = JOB) -> list[Task]:
    return [Task("infer", job, (number, 0)) for number in range(count)]


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
class Hand:
    """A worker in a thread whose handler waits until it is let go."""

    thread: threading.Thread
    diary: Diary
    go: threading.Event

    @property
    def is_working(self) -> bool:
        return self.thread.is_alive()

    def end(self) -> None:
        self.go.set()
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()


@contextmanager
def hand(
    url: str, options: WorkerOptions, then: Handler = lambda task, attempt: None
) -> Iterator[Hand]:
    go = threading.Event()

    def wait_and(task: Task, attempt: Attempt) -> None:
        assert go.wait(TIMEOUT)
        then(task, attempt)

    diary = Diary(wait_and)

    def work() -> None:
        executor = open_executor(url)
        executor.run_tasks(diary, options)
        executor.close()

    thread = threading.Thread(target=work)
    thread.start()
    helper = Hand(thread, diary, go)
    try:
        yield helper
    finally:
        options.stop.set()
        helper.end()


def vanish_holding(url: str, worker: str, settings: WorkerSettings = QUICK) -> None:
    """Lease one task as a worker that is not heard of again."""
    executor = open_executor(url)
    assert isinstance(executor, LeaseQueue)
    assert executor.reserve(options(worker, settings=settings)) is not None
    executor.close()


def begin_and_die(url: str, worker: str) -> None:
    open_executor(url).run_tasks(lambda task, attempt: os._exit(9), options(worker))


def note_every_task(url: str, number: int, notes: str, start: str) -> None:
    """Work a queue to its end, with a line in `notes` for each task begun."""
    executor = open_executor(url)
    Path(f"{start}.{number}").touch()
    while not os.path.exists(start):
        time.sleep(0.001)
    file = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(task: Task, attempt: Attempt) -> None:
        os.write(file, f"{number} {task.id} {attempt.number}\n".encode())
        time.sleep(0.02)  # or one process may be through before another has its turn

    executor.run_tasks(note, burst(f"process-{number}", depth=2))
    executor.close()


SPAWN = multiprocessing.get_context("spawn")


# ------------------------------------------------------------------------------ submitting


def test_every_task_has_an_id_of_its_own_that_never_changes() -> None:
    task = Task("infer", JOB, (1, 22, 3))
    assert task.id == "c0ff96520ed8ac89-infer-1_22_3" == Task.from_json(task.to_json()).id
    others = [Task("finalize", JOB, (1, 22, 3)), Task("infer", OTHER_JOB, (1, 22, 3))]
    others += [Task("infer", JOB, (12, 2, 3)), Task("infer", JOB, (1, 22))]
    assert len({task.id, *(other.id for other in others)}) == 5
    assert all(re.fullmatch(r"[\w-]+", one.id) for one in [task, *others])


@pytest.mark.transport
def test_a_task_is_on_the_queue_once_however_often_it_is_submitted(
    queue: Executor, url: str
) -> None:
    assert queue.submit(iter(tasks(5))) == 5
    assert queue.submit(tasks(5)) == 0
    other = open_executor(url)
    assert other.submit(tasks(7)) == 2
    other.close()
    assert queue.counts(JOB) == Counts(queued=7)
    diary = Diary()
    queue.run_tasks(diary, burst())
    assert sorted(diary.tasks, key=lambda task: task.chunk) == tasks(7)
    assert queue.counts(JOB) == Counts()


def test_submitting_streams_so_that_workers_can_start_before_the_last_task_is_known(
    queue: Executor, url: str
) -> None:
    seen = []

    def slowly_found() -> Iterator[Task]:
        looker = open_executor(url)
        yield from tasks(2500)
        seen.append(looker.counts(JOB).queued)
        looker.close()
        yield from tasks(2600)

    assert queue.submit(slowly_found()) == 2600
    assert 0 < seen[0] <= 2500


def test_submitting_a_running_task_again_changes_nothing(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    with hand(url, burst()) as helper:
        wait_until(lambda: helper.diary.begun, "the task is begun")
        before = queue.running(JOB)
        assert queue.submit(tasks(1)) == 0
        assert queue.running(JOB) == before
        assert queue.counts(JOB) == Counts(running=1)
        helper.end()
    assert queue.counts(JOB) == Counts()
    assert helper.diary.numbers == [1]


def test_a_failed_task_submitted_again_is_queued_afresh_with_all_its_attempts(
    queue: Executor,
) -> None:
    queue.submit(tasks(1))
    queue.run_tasks(Diary(raises(ValueError("no"))), burst())
    assert queue.counts(JOB) == Counts(failed=1)
    assert queue.submit(tasks(2)) == 2
    assert queue.counts(JOB) == Counts(queued=2)
    diary = Diary(raises(ValueError("no")))
    queue.run_tasks(diary, burst())
    assert sorted(diary.numbers) == sorted([*range(1, MAX_ATTEMPTS + 1)] * 2)


# -------------------------------------------------------------------- what is on the queue


@pytest.mark.transport
def test_several_jobs_lie_side_by_side_and_are_counted_apart(queue: Executor, url: str) -> None:
    assert queue.jobs() == {}
    assert queue.counts(JOB) == Counts()
    queue.submit(tasks(3))
    queue.submit(tasks(2, OTHER_JOB))
    queue.run_tasks(Diary(raises(ValueError("no"))), burst(job=OTHER_JOB))
    with hand(url, options("worker-b", job=JOB)) as helper:
        wait_until(lambda: helper.diary.begun, "a task is begun")
        expected = {JOB: Counts(queued=2, running=1), OTHER_JOB: Counts(failed=2)}
        assert queue.jobs() == expected
        assert {job: queue.counts(job) for job in expected} == expected
        assert queue.failed(JOB) == []
        assert set(queue.failed(OTHER_JOB)) == set(tasks(2, OTHER_JOB))


@pytest.mark.transport
def test_what_runs_is_listed_with_its_worker_and_since_when(queue: Executor, url: str) -> None:
    queue.submit(tasks(3))
    before = time.time()
    with hand(url, options("worker-b", depth=2)) as helper:
        wait_until(lambda: len(helper.diary.begun) == 2, "two tasks are begun")
        running = queue.running(JOB)
        assert {item.task for item in running} == set(helper.diary.tasks)
        assert {item.worker for item in running} == {"worker-b"}
        assert all(before - 1 <= item.since <= time.time() + 1 for item in running)
        assert queue.running(OTHER_JOB) == []
    assert queue.running(JOB) == []


def test_a_worker_of_one_job_leaves_the_others_alone(queue: Executor) -> None:
    queue.submit(tasks(2))
    queue.submit(tasks(2, OTHER_JOB))
    diary = Diary()
    queue.run_tasks(diary, burst(job=OTHER_JOB))
    assert set(diary.tasks) == set(tasks(2, OTHER_JOB))
    assert queue.jobs() == {JOB: Counts(queued=2)}


@pytest.mark.transport
def test_retry_queues_the_failed_tasks_of_one_job_afresh(queue: Executor) -> None:
    queue.submit([*tasks(2), *tasks(1, OTHER_JOB)])
    queue.run_tasks(Diary(raises(ValueError("no"))), burst())
    queue.submit([Task("infer", JOB, (9, 9))])
    assert queue.retry(JOB) == 2
    assert queue.jobs() == {JOB: Counts(queued=3), OTHER_JOB: Counts(failed=1)}
    assert queue.retry(JOB) == 0
    diary = Diary()
    queue.run_tasks(diary, burst())
    assert diary.numbers == [1, 1, 1]


@pytest.mark.transport
def test_cancel_takes_one_job_off_the_queue_and_lets_what_runs_finish(
    queue: Executor, url: str
) -> None:
    queue.submit([*tasks(3), *tasks(1, OTHER_JOB)])
    with hand(url, burst(job=JOB)) as helper:
        wait_until(lambda: helper.diary.begun, "a task is begun")
        assert queue.cancel(JOB) in (2, 3)
        helper.end()
    assert len(helper.diary.ended) == 1
    assert queue.jobs() == {OTHER_JOB: Counts(queued=1)}


def test_a_cancelled_task_can_be_submitted_while_it_still_runs_and_is_begun_again(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    with hand(url, options("worker-b")) as helper:
        wait_until(lambda: helper.diary.begun, "the task is begun")
        queue.cancel(JOB)
        assert queue.submit(tasks(1)) == 1
        diary = Diary()
        queue.run_tasks(diary, burst())
        assert diary.numbers == [1]


# -------------------------------------------------------------------------------- attempts


def test_an_error_costs_an_attempt_and_the_task_is_tried_again(queue: Executor) -> None:
    queue.submit(tasks(1))

    def fail_once(task: Task, attempt: Attempt) -> None:
        if attempt.number == 1:
            raise ValueError("this time not")

    diary = Diary(fail_once)
    queue.run_tasks(diary, burst("worker-a"))
    assert diary.begun == [(tasks(1)[0], Attempt(n, "worker-a")) for n in (1, 2)]
    assert queue.counts(JOB) == Counts()


def test_a_task_that_failed_is_tried_again_after_all_others(queue: Executor) -> None:
    first, *others = tasks(3)
    queue.submit([first, *others])

    def fail_once(task: Task, attempt: Attempt) -> None:
        if task == first and attempt.number == 1:
            raise ValueError("this time not")

    diary = Diary(fail_once)
    queue.run_tasks(diary, burst())
    assert diary.tasks == [first, *others, first]


@pytest.mark.transport
def test_a_task_that_fails_every_attempt_ends_failed_and_the_others_are_done(
    queue: Executor,
) -> None:
    queue.submit(tasks(4))

    def fail_second(task: Task, attempt: Attempt) -> None:
        if task.chunk == (1, 0):
            raise ValueError("never")

    diary = Diary(fail_second)
    queue.run_tasks(diary, burst())
    tries = [attempt for task, attempt in diary.begun if task.chunk == (1, 0)]
    assert [attempt.number for attempt in tries] == [*range(1, MAX_ATTEMPTS + 1)]
    assert [attempt.is_last for attempt in tries] == [False, False, True]
    assert len(diary.ended) == 3
    assert queue.counts(JOB) == Counts(failed=1)
    assert queue.failed(JOB) == [Task("infer", JOB, (1, 0))]


@pytest.mark.parametrize("error", [ModelError("no such network"), JobError("no such job")])
def test_an_error_that_would_strike_every_chunk_is_raised_and_costs_no_attempt(
    queue: Executor, error: Exception
) -> None:
    queue.submit(tasks(5))
    diary = Diary(raises(error))
    with pytest.raises(type(error), match="no such"):
        queue.run_tasks(diary, options("worker-a", depth=2))
    assert 1 <= len(diary.begun) <= 2
    assert queue.counts(JOB) == Counts(queued=5)
    second = Diary()
    queue.run_tasks(second, burst())
    assert second.numbers == [1] * 5


def test_a_job_that_cannot_be_done_is_set_aside_and_the_others_are_done_first(
    queue: Executor,
) -> None:
    queue.submit([*tasks(5), *tasks(3, OTHER_JOB)])

    def refuse(task: Task, attempt: Attempt) -> None:
        if task.job == JOB:
            raise ModelError("no such network")

    diary = Diary(refuse)
    with pytest.raises(ModelError, match="no such network"):
        queue.run_tasks(diary, burst())
    assert set(diary.ended) == set(tasks(3, OTHER_JOB))
    assert len(diary.begun) == 4
    assert queue.jobs() == {JOB: Counts(queued=5)}


@pytest.mark.transport
def test_a_dead_workers_tasks_are_begun_again_at_once_when_it_is_released(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    vanish_holding(url, "dead")
    assert queue.counts(JOB) == Counts(running=1)
    assert queue.release("somebody else") == 0
    assert queue.release("dead") == 1
    assert queue.counts(JOB) == Counts(queued=1)
    diary, before = Diary(), time.monotonic()
    queue.run_tasks(diary, burst("heir"))
    assert diary.begun == [(tasks(1)[0], Attempt(2, "heir"))]
    assert time.monotonic() - before < 5


def test_a_task_that_kills_every_worker_ends_failed(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    for number in range(MAX_ATTEMPTS):
        vanish_holding(url, f"dead-{number}")
        queue.release(f"dead-{number}")
    diary = Diary()
    queue.run_tasks(diary, burst())
    assert diary.begun == []
    assert queue.counts(JOB) == Counts(failed=1)
    assert queue.failed(JOB) == tasks(1)


def test_a_worker_told_to_stop_hands_back_without_counting_however_often_it_is_said(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    for number in range(2):
        vanish_holding(url, f"told-{number}")
        for _ in range(3):
            queue.release(f"told-{number}", counted=False)
    diary = Diary(raises(ValueError("no")))
    queue.run_tasks(diary, burst())
    assert diary.numbers == [*range(1, MAX_ATTEMPTS + 1)]


@pytest.mark.processes
def test_a_killed_worker_process_has_begun_its_task_and_holds_it_until_released(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    process = SPAWN.Process(target=begin_and_die, args=(url, "dead"))
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode == 9
    assert queue.counts(JOB) == Counts(running=1)
    assert queue.release("dead") == 1
    diary = Diary()
    queue.run_tasks(diary, burst("heir"))
    assert diary.begun == [(tasks(1)[0], Attempt(2, "heir"))]


@pytest.mark.transport
def test_a_vanished_workers_task_goes_to_another_when_its_lease_runs_out(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    vanish_holding(url, "dead", SHORT_LEASE)
    wait_until(lambda: queue.counts(JOB) == Counts(queued=1), "the lease has run out")
    assert queue.running(JOB) == []
    diary = Diary()
    queue.run_tasks(diary, burst("heir"))
    assert diary.begun == [(tasks(1)[0], Attempt(2, "heir"))]
    assert queue.counts(JOB) == Counts()


def test_a_lease_that_its_worker_never_received_runs_out(queue: Executor) -> None:
    """The answer of a server may be lost on the way; the worker renews only what it holds."""
    assert isinstance(queue, LeaseQueue)
    queue.submit(tasks(2))
    worker = options(settings=SHORT_LEASE)
    assert queue.reserve(worker) is not None  # lost
    held = queue.reserve(worker)
    assert held is not None

    def only_the_other_is_running() -> bool:
        queue.renew(worker, [held])
        return [item.task for item in queue.running(JOB)] == [held.task]

    wait_until(only_the_other_is_running, "the lost lease has run out")
    assert queue.counts(JOB) == Counts(queued=1, running=1)


@pytest.mark.transport
def test_a_long_task_keeps_its_lease_as_long_as_its_worker_lives(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    slow_worker = burst("slow", settings=SHORT_LEASE)
    with hand(url, slow_worker, lambda *given: time.sleep(3 * SHORT_LEASE.lease)) as slow:
        wait_until(lambda: slow.diary.begun, "the task is begun")
        slow.go.set()
        diary = Diary()
        queue.run_tasks(diary, burst("eager"))
    assert diary.begun == []
    assert slow.diary.numbers == [1]


def test_a_worker_that_lost_its_task_to_another_cannot_end_it_for_them(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    with hand(url, options("slow")) as slow:
        wait_until(lambda: slow.diary.begun, "the task is begun")
        queue.release("slow")
        with hand(url, burst("heir")) as heir:
            wait_until(lambda: heir.diary.begun, "the task is begun again")
            slow.go.set()
            wait_until(lambda: slow.diary.ended, "the slow one is through")
            time.sleep(MOMENT)
            assert [item.worker for item in queue.running(JOB)] == ["heir"]
            heir.end()
    assert queue.counts(JOB) == Counts()


# --------------------------------------------------------------------------------- a options


def test_a_burst_ends_at_once_on_an_empty_queue(queue: Executor) -> None:
    before = time.monotonic()
    queue.run_tasks(Diary(), burst())
    queue.submit(tasks(1, OTHER_JOB))
    queue.run_tasks(Diary(), burst(job=JOB))
    assert time.monotonic() - before < 5


def test_a_burst_waits_for_what_others_run_since_it_may_come_back(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    error = raises(ValueError("no"))
    with hand(url, options("first"), error) as first:
        wait_until(lambda: first.diary.begun, "the task is begun")
        with hand(url, burst("second")) as second:
            second.go.set()
            time.sleep(MOMENT)
            assert second.is_working
            assert second.diary.begun == []
            first.go.set()
            wait_until(lambda: not second.is_working, "the burst ends")
    numbers = first.diary.numbers + second.diary.numbers
    assert sorted(numbers) == [*range(1, len(numbers) + 1)]
    assert len(numbers) >= 2


def test_without_burst_a_worker_waits_for_more_until_it_is_stopped(
    queue: Executor, url: str
) -> None:
    worker = options("patient")
    with hand(url, worker) as helper:
        helper.go.set()
        time.sleep(MOMENT)
        assert helper.is_working
        queue.submit(tasks(1))
        wait_until(lambda: helper.diary.ended, "the late task is done")
        worker.stop.set()
        wait_until(lambda: not helper.is_working, "the worker stops")


def test_as_many_tasks_are_in_flight_as_the_shift_is_deep(queue: Executor) -> None:
    depth = 4
    queue.submit(tasks(2 * depth))
    together = threading.Barrier(depth)

    def meet(task: Task, attempt: Attempt) -> None:
        # Passes only when `depth` tasks are here at the same time.
        together.wait(TIMEOUT)

    diary = Diary(meet)
    queue.run_tasks(diary, burst(depth=depth))
    assert len(diary.ended) == 2 * depth
    assert set(diary.numbers) == {1}


def test_stopping_finishes_what_is_in_flight_and_begins_no_more(queue: Executor, url: str) -> None:
    queue.submit(tasks(6))
    worker = options("worker-b", depth=2)
    with hand(url, worker) as helper:
        wait_until(lambda: len(helper.diary.begun) == 2, "two tasks are begun")
        worker.stop.set()
        helper.end()
    assert len(helper.diary.ended) == 2
    assert len(helper.diary.begun) == 2
    assert queue.counts(JOB) == Counts(queued=4)


def test_before_its_deadline_a_worker_begins_nothing_that_will_not_fit(queue: Executor) -> None:
    queue.submit(tasks(30))
    seconds, deadline = 0.25, time.time() + 1.0
    begun = []

    def take_a_while(task: Task, attempt: Attempt) -> None:
        begun.append(time.time())
        time.sleep(seconds)

    queue.run_tasks(take_a_while, options("worker-a", deadline=deadline))
    # Lateness of this machine makes tasks longer, never a late one begun.
    assert begun
    assert max(begun) + seconds < deadline + 0.05
    assert queue.counts(JOB) == Counts(queued=30 - len(begun))


def test_a_worker_whose_time_is_already_up_begins_nothing(queue: Executor) -> None:
    queue.submit(tasks(1))
    diary = Diary()
    queue.run_tasks(diary, options("worker-a", deadline=time.time() - 1))
    assert diary.begun == []


# -------------------------------------------------------------- failing alike, all too long


def fails_in(job: str, error: Callable[[Task], Exception]) -> Handler:
    def handler(task: Task, attempt: Attempt) -> None:
        if task.job == job:
            raise error(task)

    return handler


def unreadable(task: Task) -> Exception:
    return OSError("volume.zarr: input/output error\nsecond line")


def test_chunks_failing_alike_set_their_job_aside_and_the_others_are_done_first(
    queue: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    queue.submit([*tasks(10), *tasks(3, OTHER_JOB)])
    diary = Diary(fails_in(JOB, unreadable))
    with pytest.raises(SameFailureError) as failure:
        queue.run_tasks(diary, burst())
    first, line = QUICK.same_failures_at_first, str(failure.value)
    assert line.startswith(f"/data/brain.zarr: {first} chunks in a row failed alike")
    assert "(OSError: volume.zarr: input/output error)" in line
    assert len(line.splitlines()) == 1
    assert [record.getMessage() for record in caplog.records].count(line) == 1
    assert [task.chunk[0] for task in diary.tasks if task.job == JOB] == [*range(first)]
    assert diary.ended == tasks(3, OTHER_JOB)
    assert queue.jobs() == {JOB: Counts(queued=10)}
    again = Diary()
    queue.run_tasks(again, burst())
    assert sorted(again.numbers) == [1] * (10 - first) + [2] * first


def test_after_a_success_it_takes_many_more_chunks_failing_alike(
    queue: Executor,
) -> None:
    settings = replace(QUICK, same_failures_at_first=2, same_failures_later=6)
    queue.submit(tasks(20))

    def succeed_first(task: Task, attempt: Attempt) -> None:
        if task.chunk[0] > 0:
            raise unreadable(task)

    diary = Diary(succeed_first)
    with pytest.raises(SameFailureError, match="6 chunks in a row"):
        queue.run_tasks(diary, burst(settings=settings))
    assert len(diary.begun) == 1 + 6


def test_chunks_that_never_ran_the_network_are_no_success(
    queue: Executor,
) -> None:
    settings = replace(QUICK, same_failures_at_first=3)
    queue.submit(tasks(10))

    def run_every_second(task: Task, attempt: Attempt) -> TaskResult:
        if task.chunk[0] % 2:
            raise unreadable(task)
        return TaskResult(ran=False)

    with pytest.raises(SameFailureError, match="3 chunks in a row"):
        queue.run_tasks(run_every_second, burst(settings=settings))
    assert queue.counts(JOB) == Counts(queued=7)


def test_a_success_in_between_begins_the_count_anew(
    queue: Executor,
) -> None:
    settings = replace(QUICK, same_failures_later=3)
    queue.submit(tasks(12))

    def succeed_every_third(task: Task, attempt: Attempt) -> None:
        if task.chunk[0] % 3 > 0 and attempt.number == 1:
            raise unreadable(task)

    diary = Diary(succeed_every_third)
    queue.run_tasks(diary, burst(settings=settings))
    assert len(diary.begun) == 12 + 8
    assert queue.jobs() == {}


@pytest.mark.parametrize(
    "errors",
    [(OSError("no disk"), OSError("no network")), (ValueError("no"), KeyError("no"))],
    ids=["told apart by what they say", "told apart by their kind"],
)
def test_different_causes_do_not_add_up(queue: Executor, errors: tuple[Exception, ...]) -> None:
    count = 4 * QUICK.same_failures_at_first
    queue.submit(tasks(count))
    diary = Diary(fails_in(JOB, lambda task: errors[task.chunk[0] % 2]))
    queue.run_tasks(diary, burst())
    assert len(diary.begun) == MAX_ATTEMPTS * count
    assert queue.counts(JOB) == Counts(failed=count)


def test_failures_of_two_jobs_do_not_add_up(queue: Executor) -> None:
    count = QUICK.same_failures_at_first - 1
    queue.submit(tasks(count))
    queue.submit(Task("infer", OTHER_JOB, (number, 1)) for number in range(count))
    diary = Diary(raises(unreadable(tasks(1)[0])))
    queue.run_tasks(diary, burst())
    assert queue.jobs() == {JOB: Counts(failed=count), OTHER_JOB: Counts(failed=count)}


def test_one_poisonous_chunk_never_sets_its_job_aside(
    queue: Executor,
) -> None:
    settings = replace(QUICK, same_failures_at_first=2)
    queue.submit(tasks(1))
    retries = 4

    def fail(task: Task, attempt: Attempt) -> None:
        raise unreadable(task)

    diary = Diary(fail)

    class Insistent(WorkerOptions):
        """Before it ends, somebody queues the failed chunk again, a few times."""

        def can_start(self) -> bool:
            nonlocal retries
            if retries and queue.counts(JOB).failed:
                retries -= queue.retry(JOB)
            return super().can_start()

    queue.run_tasks(diary, Insistent("worker-a", burst=True, settings=settings))
    assert retries == 0
    assert diary.numbers == [*range(1, MAX_ATTEMPTS + 1)] * 5
    assert queue.counts(JOB) == Counts(failed=1)


def test_failures_that_differ_only_in_where_they_happened_are_alike(queue: Executor) -> None:
    chunks = [(i, j) for i in range(4) for j in range(4)]
    queue.submit(Task("infer", JOB, chunk) for chunk in chunks)

    def not_finite(task: Task) -> Exception:
        low = [64 * i for i in task.chunk]
        return PredictionError(f"the network gave NaN for the patch that reads {low}")

    diary = Diary(fails_in(JOB, not_finite))
    with pytest.raises(SameFailureError):
        queue.run_tasks(diary, burst())
    assert len(diary.begun) == QUICK.same_failures_at_first


def test_a_worker_that_set_a_job_aside_ends_when_nothing_else_is_left(
    queue: Executor, url: str
) -> None:
    queue.submit([*tasks(2), *tasks(2, OTHER_JOB)])

    def refuse(task: Task, attempt: Attempt) -> None:
        if task.job == JOB:
            raise ModelError("no such network")
        time.sleep(0.05)

    worker, errors = options("patient"), []

    def work() -> None:
        executor = open_executor(url)
        try:
            executor.run_tasks(refuse, worker)
        except ModelError as error:
            errors.append(error)
        executor.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(3)
    ended = not thread.is_alive()
    worker.stop.set()
    thread.join(TIMEOUT)
    assert queue.jobs() == {JOB: Counts(queued=2)}
    assert len(errors) == 1
    assert ended


@contextmanager
def hanging() -> Iterator[threading.Event]:
    """What tasks may hang on; at the end they are let go, and their threads waited for."""
    go = threading.Event()
    try:
        yield go
    finally:
        go.set()
        for thread in threading.enumerate():
            if thread.name.startswith("chunk-"):
                thread.join(TIMEOUT)


def test_a_task_over_its_time_limit_costs_it_an_attempt_and_hands_the_others_back(
    queue: Executor,
) -> None:
    limit = 1.5
    hangs, short, late, *never = tasks(5)
    queue.submit(tasks(5))
    begun = []
    with hanging() as go:

        def handler(task: Task, attempt: Attempt) -> None:
            begun.append(task)
            if task == short:
                time.sleep(limit * 2 / 3)
            else:
                go.wait(TIMEOUT)

        worker = options("slow", depth=2, time_limit=limit)
        with pytest.raises(
            TaskTimeoutError, match=r"infer chunk 0\.0 ran for more than"
        ) as overrun:
            queue.run_tasks(handler, worker)
        assert len(str(overrun.value).splitlines()) == 1
        assert [lease.task for lease in overrun.value.leases] == [hangs]
        assert [lease.attempt for lease in overrun.value.leases] == [Attempt(1, "slow")]
        assert queue.counts(JOB) == Counts(queued=4)
        time.sleep(MOMENT)
        assert set(begun) == {hangs, short, late}
        diary = Diary()
        queue.run_tasks(diary, burst("heir"))
        assert {task: attempt.number for task, attempt in diary.begun} == {
            hangs: 2,
            late: 1,
            **dict.fromkeys(never, 1),
        }


def test_a_task_that_waits_for_another_of_its_process_is_not_held_to_the_limit(
    queue: Executor,
) -> None:
    hangs, waits = tasks(2)
    queue.submit(tasks(2))
    with hanging() as go:
        worker = options("slow", depth=2, time_limit=0.3, waits=lambda task: task == waits)
        with pytest.raises(TaskTimeoutError) as overrun:
            queue.run_tasks(lambda task, attempt: wait_for(go), worker)
        assert [lease.task for lease in overrun.value.leases] == [hangs]
        diary = Diary()
        queue.run_tasks(diary, burst("heir"))
        assert {task: attempt.number for task, attempt in diary.begun} == {hangs: 2, waits: 1}


def test_a_task_that_hangs_on_every_attempt_ends_failed(queue: Executor) -> None:
    queue.submit(tasks(1))
    with hanging() as go:
        for number in range(MAX_ATTEMPTS):
            with pytest.raises(TaskTimeoutError):
                queue.run_tasks(
                    lambda task, attempt: wait_for(go), options(f"w{number}", time_limit=0.1)
                )
        assert queue.counts(JOB) == Counts(failed=1)


def wait_for(event: threading.Event) -> None:
    event.wait(TIMEOUT)


def test_the_time_limit_follows_the_longest_task_seen(
    queue: Executor,
) -> None:
    settings = replace(SHORT_LEASE, least_time_limit=0.1, time_limit_factor=3.0)
    queue.submit(tasks(3))
    seconds, begun = {0: 0.3, 1: 0.5}, {}
    with hanging() as go:

        def handler(task: Task, attempt: Attempt) -> None:
            begun[task.chunk[0]] = time.monotonic()
            if task.chunk[0] in seconds:
                time.sleep(seconds[task.chunk[0]])
            else:
                go.wait(TIMEOUT)

        with pytest.raises(TaskTimeoutError) as overrun:
            queue.run_tasks(handler, options("slow", settings=settings))
        assert [lease.task.chunk[0] for lease in overrun.value.leases] == [2]
        assert time.monotonic() - begun[2] >= 3.0 * seconds[1]


@pytest.mark.parametrize(
    ("jobs", "hung"), [((JOB,), 0), ((JOB, OTHER_JOB), 1)], ids=["the first", "another job's first"]
)
def test_a_jobs_first_task_has_a_time_limit_of_its_own(
    queue: Executor, jobs: tuple[str, ...], hung: int
) -> None:
    settings = replace(SHORT_LEASE, first_time_limit=0.5)
    queue.submit(Task("infer", job, (number,)) for number, job in enumerate(jobs))
    with hanging() as go:

        def handler(task: Task, attempt: Attempt) -> None:
            if task.chunk == (hung,):
                go.wait(TIMEOUT)

        before = time.monotonic()
        with pytest.raises(TaskTimeoutError) as overrun:
            queue.run_tasks(handler, options("slow", settings=settings))
        assert [lease.task.job for lease in overrun.value.leases] == [jobs[hung]]
        assert time.monotonic() - before < 10


# --------------------------------------------------------------- blocks that become complete


def finalizing(*blocks: tuple[int, ...], job: str = JOB) -> list[Task]:
    return [Task("finalize", job, block) for block in blocks]


def of_eight(block: tuple[int, ...], *members: int) -> list[BlockContribution]:
    return [BlockContribution(block, member, 8) for member in members]


@pytest.mark.transport
def test_each_complete_block_is_given_once_to_one_caller_whoever_commits_last(
    queue: Executor, url: str
) -> None:
    blocks, crew = [(n, 0, n) for n in range(25)], 4
    contributions = [BlockContribution(block, member, 8) for block in blocks for member in range(8)]
    # Some commit again and again: workers that lost their lease, chunks begun twice.
    contributions += [mark for mark in contributions if mark.member == 3] * 2
    random.Random(1).shuffle(contributions)
    together, given, owners = threading.Barrier(crew), [], [queue, open_executor(url)]

    def commit(number: int) -> None:
        together.wait(TIMEOUT)
        mine = contributions[number::crew]
        for first in range(0, len(mine), 3):
            given.extend(owners[number % 2].record_contributions(JOB, mine[first : first + 3]))

    queue.submit(tasks(1))
    threads = [threading.Thread(target=commit, args=(n,)) for n in range(crew)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    owners[1].close()
    assert Counter(given) == Counter(finalizing(*blocks))


def test_a_block_is_not_complete_however_often_the_same_chunks_commit(queue: Executor) -> None:
    block = (1, 2, 3)
    queue.submit(tasks(1))
    for member in (0, 5, 5, 7, 0, 1, 2, 3, 4, 4, 3, 2, 1):
        assert queue.record_contributions(JOB, of_eight(block, member)) == []
    assert queue.record_contributions(OTHER_JOB, of_eight(block, 6)) == []
    assert queue.record_contributions(JOB, of_eight((1, 2, 4), 6)) == []
    assert queue.record_contributions(JOB, of_eight(block, 6)) == finalizing(block)
    assert queue.record_contributions(JOB, of_eight(block, 6)) == []


def test_a_complete_block_is_never_given_again(queue: Executor) -> None:
    queue.submit(tasks(1))
    given = [queue.record_contributions(JOB, of_eight((0, 0), *range(8))) for _ in range(2)]
    given += [queue.record_contributions(JOB, [BlockContribution((1, 1), 0, 1)]) for _ in range(2)]
    assert sum(map(len, given)) == 2


def test_a_jobs_blocks_are_forgotten_when_it_is_cancelled(queue: Executor) -> None:
    for job in (JOB, OTHER_JOB):
        queue.submit(tasks(1, job))
        assert queue.record_contributions(job, of_eight((0,), *range(7))) == []
    queue.cancel(JOB)
    queue.submit(tasks(1))
    assert queue.record_contributions(JOB, of_eight((0,), 7)) == []
    assert queue.record_contributions(OTHER_JOB, of_eight((0,), 7)) == finalizing(
        (0,), job=OTHER_JOB
    )
    assert queue.record_contributions(JOB, of_eight((0,), *range(7))) == finalizing((0,))


def test_nothing_is_remembered_of_a_job_that_has_no_task_left(queue: Executor) -> None:
    last = of_eight((0,), 7)
    queue.submit(tasks(1))
    assert queue.record_contributions(JOB, of_eight((0,), *range(7))) == []
    queue.run_tasks(lambda task, attempt: None, burst("worker-a"))
    assert queue.record_contributions(JOB, last) == []
    queue.submit(tasks(1))
    assert queue.record_contributions(JOB, last) == []
    assert queue.record_contributions(JOB, of_eight((0,), *range(7))) == finalizing((0,))


@dataclass
class Completing:
    """A handler: chunks contribute to the blocks `to` names; `block` is what a block comes to."""

    queue: Executor
    to: Sequence[tuple[int, ...]]
    block: Handler = lambda task, attempt: None
    blocks: list[tuple[Task, Attempt]] = field(default_factory=list)
    running: list[Counts] = field(default_factory=list)

    def __call__(self, task: Task, attempt: Attempt) -> TaskResult | None:
        if task.kind == "infer":
            return TaskResult([BlockContribution(block, task.chunk[0], 3) for block in self.to])
        self.blocks.append((task, attempt))
        self.running.append(self.queue.counts(task.job))
        return self.block(task, attempt)


@pytest.mark.transport
def test_a_worker_completes_the_blocks_that_its_chunk_was_the_last_to_contribute_to(
    queue: Executor,
) -> None:
    queue.submit(tasks(3))
    handler = Completing(queue, to=[(7, 7), (8, 8)])
    queue.run_tasks(handler, burst("worker-a"))
    assert handler.blocks == [(b, Attempt(1, "worker-a")) for b in finalizing((7, 7), (8, 8))]
    # Until its blocks are through the chunk is not: who dies now has it begun again.
    assert handler.running == [Counts(running=1)] * 2
    assert queue.jobs() == {}


def test_an_error_in_completing_a_block_costs_nothing_and_the_other_blocks_are_completed(
    queue: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    queue.submit(tasks(3))
    handler = Completing(queue, [(7, 7), (8, 8)], block=raises(OSError("no space left")))
    queue.run_tasks(handler, burst("worker-a"))
    expected = finalizing((7, 7), (8, 8))
    assert [task for task, _ in handler.blocks] == expected
    left = [r for r in caplog.records if "left to the finalizer" in r.getMessage()]
    assert len(left) == len(expected)
    assert queue.jobs() == {}


# ------------------------------------------------------------------- more than a queue holds


@dataclass
class Producer:
    """Submits tasks in a thread, to a queue that takes no more than three and a bit."""

    thread: threading.Thread
    told: list[int]

    @property
    def is_waiting(self) -> bool:
        return self.thread.is_alive()


@contextmanager
def producer(url: str, count: int) -> Iterator[Producer]:
    told: list[int] = []

    def produce() -> None:
        executor = open_executor(url)
        told.append(executor.submit(tasks(count)))
        executor.close()

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        yield Producer(thread, told)
    finally:
        limit = time.monotonic() + TIMEOUT
        with open_queue(url) as executor:
            while thread.is_alive():
                assert time.monotonic() < limit
                executor.run_tasks(Diary(), burst("last"))
                thread.join(0.1)


@contextmanager
def open_queue(url: str) -> Iterator[Executor]:
    executor = open_executor(url)
    yield executor
    executor.close()


def take_and_finish(queue: Executor, count: int) -> None:
    assert isinstance(queue, LeaseQueue)
    for _ in range(count):
        lease = queue.reserve(options("worker-a"))
        assert lease is not None
        queue.ack(lease)


@pytest.fixture
def small_queue(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A queue that is full with three tasks, filled two at a time."""
    monkeypatch.setattr(rq_executor, "MAX_QUEUED", 3)
    monkeypatch.setattr(rq_executor, "BATCH", 2)
    url: str = request.getfixturevalue("redis").url
    return url


def test_a_producer_waits_while_a_server_holds_plenty_until_workers_took_some(
    small_queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    with producer(small_queue, 6) as filler, open_queue(small_queue) as queue:
        wait_until(lambda: queue.counts(JOB).queued == 4, "the queue is full")
        time.sleep(MOMENT)
        assert filler.is_waiting
        assert queue.counts(JOB) == Counts(queued=4)
        [record] = [r for r in caplog.records if "plenty" in r.getMessage()]
        assert record.levelname == "WARNING"
        take_and_finish(queue, 1)
        time.sleep(3 * MOMENT)
        assert filler.is_waiting
        assert queue.counts(JOB) == Counts(queued=3)
        take_and_finish(queue, 1)
        wait_until(lambda: queue.counts(JOB).queued == 4, "the rest is queued")
        take_and_finish(queue, 2)
        wait_until(lambda: not filler.is_waiting, "the producer is through")
    assert filler.told == [6]


def test_a_producer_that_has_to_wait_says_so_once(
    small_queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    with producer(small_queue, 8) as filler, open_queue(small_queue) as queue:
        for _ in range(2):
            wait_until(lambda: queue.counts(JOB).queued == 4, "the queue is full")
            take_and_finish(queue, 2)
        wait_until(lambda: queue.counts(JOB).queued == 4, "all is queued")
    assert filler.told == [8]
    assert len([r for r in caplog.records if "plenty" in r.getMessage()]) == 1


def test_a_producer_does_not_wait_once_all_is_queued(small_queue: str) -> None:
    with producer(small_queue, 4) as filler, open_queue(small_queue) as queue:
        wait_until(lambda: queue.counts(JOB).queued == 4, "all is queued")
        filler.thread.join(3 * MOMENT)
        assert not filler.is_waiting


# ----------------------------------------------------------------------------------- trust


FOREIGN: dict[str, str | bytes] = {
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94.",
    "a dotted path": '{"kind": "os.system", "job": "true", "chunk": [0]}',
    "an entry point": '{"kind": "chunkq_worker.infer:infer_chunk", "job": "j", "chunk": [0]}',
    "no kind": '{"job": "j", "chunk": [0]}',
    "a kind that is a list": '{"kind": ["infer"], "job": "j", "chunk": [0]}',
    "a chunk that is a word": '{"kind": "infer", "job": "j", "chunk": "0"}',
    "a negative chunk": '{"kind": "infer", "job": "j", "chunk": [-1]}',
    "a chunk of fractions": '{"kind": "infer", "job": "j", "chunk": [0.5]}',
    "a job that is a list": '{"kind": "infer", "job": ["j"], "chunk": [0]}',
    "null": "null",
    "half a message": '{"kind": "infer", "jo',
    "nothing": "",
    "far too deep": "[" * 100_000,
}


@pytest.mark.parametrize("message", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_message_that_is_no_task_of_ours_is_refused(message: str | bytes) -> None:
    with pytest.raises(QueueError, match="not a chunkq task") as refusal:
        Task.from_json(message)  # type: ignore[arg-type]
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("name", ["a pickle", "a dotted path", "an entry point", "far too deep"])
@pytest.mark.transport
def test_a_foreign_message_on_the_queue_is_never_run_and_hinders_nothing(
    queue: Executor, url: str, backend: Backend, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend.smuggle(url, FOREIGN[name])
    queue.submit(tasks(1))
    diary = Diary()
    queue.run_tasks(diary, burst())
    assert diary.tasks == tasks(1)
    assert queue.jobs() == {}
    [record] = [r for r in caplog.records if "not a chunkq task" in r.getMessage()]
    assert record.levelname == "ERROR"
    assert len(record.getMessage()) < 1000


def test_only_two_kinds_of_task_exist_and_both_lead_into_this_project() -> None:
    assert set(ENTRY_POINTS) == {"infer", "finalize"}
    assert all(target.startswith("chunkq") for target in ENTRY_POINTS.values())
    with pytest.raises(TypeError):
        ENTRY_POINTS["more"] = "os:system"  # type: ignore[index]


# -------------------------------------------------------------------------- many processes


@pytest.mark.processes
def test_many_processes_share_a_queue_and_no_task_is_given_twice(
    queue: Executor, url: str, tmp_path: Path
) -> None:
    crew, count, start = 4, 300, tmp_path / "start"
    queue.submit(tasks(count))
    arguments = [(url, n, str(tmp_path / "notes"), str(start)) for n in range(crew)]
    processes = [SPAWN.Process(target=note_every_task, args=each) for each in arguments]
    for process in processes:
        process.start()
    wait_until(lambda: len(list(tmp_path.glob("start.*"))) == crew, "all processes are ready")
    start.touch()
    for process in processes:
        process.join(TIMEOUT)
    assert [process.exitcode for process in processes] == [0] * crew
    lines = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert Counter(task for _, task, _ in lines) == Counter(task.id for task in tasks(count))
    assert {number for _, _, number in lines} == {"1"}
    assert len({process for process, _, _ in lines}) == crew
    assert queue.counts(JOB) == Counts()
