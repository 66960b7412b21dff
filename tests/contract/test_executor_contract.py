"""The contract of every queue backend; see chunkq/executors/base.py.

A new backend adds one entry to BACKENDS and gets the whole suite. Tests speak to it through
`Executor` alone; what they need besides stands in the entry.
"""

import multiprocessing
import os
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis

from chunkq.errors import JobError, ModelError, QueueError
from chunkq.executors import leases, open_executor
from chunkq.executors.base import MAX_ATTEMPTS, Attempt, Counts, Executor, Handler, Shift
from chunkq.executors.rq.executor import queue_name
from chunkq.tasks import ENTRY_POINTS, Task

PATIENCE = 30.0
"""Seconds until a test that waits for something gives up."""
MOMENT = 0.4
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


BACKENDS = (
    Backend(
        "sqlite",
        lambda folder, request: f"sqlite://{folder / 'queue.db'}",
        smuggle_into_sqlite,
    ),
    Backend("rq", lambda folder, request: request.getfixturevalue("redis").url, smuggle_into_redis),
)


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    return chosen


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


def burst(worker: str = "worker-a", depth: int = 1, **more: object) -> Shift:
    return Shift(worker=worker, depth=depth, burst=True, **more)  # type: ignore[arg-type]


def raises(error: Exception) -> Handler:
    def handler(task: Task, attempt: Attempt) -> None:
        raise error

    return handler


def wait_until(condition: Callable[[], object], what: str) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, f"waited in vain until {what}"
        time.sleep(0.005)


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
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@contextmanager
def hand(url: str, shift: Shift, then: Handler = lambda task, attempt: None) -> Iterator[Hand]:
    go = threading.Event()

    def wait_and(task: Task, attempt: Attempt) -> None:
        assert go.wait(PATIENCE)
        then(task, attempt)

    diary = Diary(wait_and)

    def work() -> None:
        executor = open_executor(url)
        executor.work(diary, shift)
        executor.close()

    thread = threading.Thread(target=work)
    thread.start()
    helper = Hand(thread, diary, go)
    try:
        yield helper
    finally:
        shift.stopping.set()
        helper.end()


def vanish_holding(url: str, worker: str, lease: float | None = None) -> None:
    """Begin one task in another process and die with it, as if killed."""
    process = SPAWN.Process(target=begin_and_die, args=(url, worker, lease))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 9


def begin_and_die(url: str, worker: str, lease: float | None) -> None:
    if lease is not None:
        leases.LEASE_SECONDS = lease
    open_executor(url).work(lambda task, attempt: os._exit(9), Shift(worker))


def note_every_task(url: str, number: int, notes: str, start: str) -> None:
    """Work a queue to its end, with a line in `notes` for each task begun."""
    executor = open_executor(url)
    Path(f"{start}.{number}").touch()
    while not os.path.exists(start):
        time.sleep(0.001)
    file = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(task: Task, attempt: Attempt) -> None:
        os.write(file, f"{number} {task.id} {attempt.number}\n".encode())

    executor.work(note, burst(f"process-{number}", depth=2))
    executor.close()


SPAWN = multiprocessing.get_context("spawn")
SHORT_LEASE = 0.6


# ------------------------------------------------------------------------------ submitting


def test_every_task_has_an_id_of_its_own_that_never_changes() -> None:
    task = Task("infer", JOB, (1, 22, 3))
    assert task.id == "c0ff96520ed8ac89-infer-1_22_3" == Task.from_json(task.to_json()).id
    others = [Task("finalize", JOB, (1, 22, 3)), Task("infer", OTHER_JOB, (1, 22, 3))]
    others += [Task("infer", JOB, (12, 2, 3)), Task("infer", JOB, (1, 22))]
    assert len({task.id, *(other.id for other in others)}) == 5
    assert all(re.fullmatch(r"[\w-]+", one.id) for one in [task, *others])


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
    queue.work(diary, burst())
    assert sorted(diary.tasks, key=lambda task: task.chunk) == tasks(7)
    assert queue.counts(JOB) == Counts()


def test_submitting_streams_so_that_workers_can_start_before_the_last_task_is_known(
    queue: Executor, url: str
) -> None:
    seen = []

    def slowly_found() -> Iterator[Task]:
        looker = open_executor(url)
        yield from tasks(3500)
        seen.append(looker.counts(JOB).queued)
        looker.close()

    assert queue.submit(slowly_found()) == 3500
    assert 0 < seen[0] < 3500


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
    queue.work(Diary(raises(ValueError("no"))), burst())
    assert queue.counts(JOB) == Counts(failed=1)
    assert queue.submit(tasks(2)) == 2
    assert queue.counts(JOB) == Counts(queued=2)
    diary = Diary(raises(ValueError("no")))
    queue.work(diary, burst())
    assert sorted(diary.numbers) == sorted([*range(1, MAX_ATTEMPTS + 1)] * 2)


# -------------------------------------------------------------------- what is on the queue


def test_several_jobs_lie_side_by_side_and_are_counted_apart(queue: Executor, url: str) -> None:
    assert queue.jobs() == {}
    assert queue.counts(JOB) == Counts()
    queue.submit(tasks(3))
    queue.submit(tasks(2, OTHER_JOB))
    queue.work(Diary(raises(ValueError("no"))), burst(job=OTHER_JOB))
    with hand(url, Shift("worker-b", job=JOB)) as helper:
        wait_until(lambda: helper.diary.begun, "a task is begun")
        expected = {JOB: Counts(queued=2, running=1), OTHER_JOB: Counts(failed=2)}
        assert queue.jobs() == expected
        assert {job: queue.counts(job) for job in expected} == expected
        assert queue.failed(JOB) == []
        assert set(queue.failed(OTHER_JOB)) == set(tasks(2, OTHER_JOB))


def test_what_runs_is_listed_with_its_worker_and_since_when(queue: Executor, url: str) -> None:
    queue.submit(tasks(3))
    before = time.time()
    with hand(url, Shift("worker-b", depth=2)) as helper:
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
    queue.work(diary, burst(job=OTHER_JOB))
    assert set(diary.tasks) == set(tasks(2, OTHER_JOB))
    assert queue.jobs() == {JOB: Counts(queued=2)}


def test_retry_queues_the_failed_tasks_of_one_job_afresh(queue: Executor) -> None:
    queue.submit([*tasks(2), *tasks(1, OTHER_JOB)])
    queue.work(Diary(raises(ValueError("no"))), burst())
    queue.submit([Task("infer", JOB, (9, 9))])
    assert queue.retry(JOB) == 2
    assert queue.jobs() == {JOB: Counts(queued=3), OTHER_JOB: Counts(failed=1)}
    assert queue.retry(JOB) == 0
    diary = Diary()
    queue.work(diary, burst())
    assert diary.numbers == [1, 1, 1]


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
    with hand(url, Shift("worker-b")) as helper:
        wait_until(lambda: helper.diary.begun, "the task is begun")
        queue.cancel(JOB)
        assert queue.submit(tasks(1)) == 1
        diary = Diary()
        queue.work(diary, burst())
        assert diary.numbers == [1]


# -------------------------------------------------------------------------------- attempts


def test_an_error_costs_an_attempt_and_the_task_is_tried_again(queue: Executor) -> None:
    queue.submit(tasks(1))

    def fail_once(task: Task, attempt: Attempt) -> None:
        if attempt.number == 1:
            raise ValueError("this time not")

    diary = Diary(fail_once)
    queue.work(diary, burst("worker-a"))
    assert diary.begun == [(tasks(1)[0], Attempt(n, "worker-a")) for n in (1, 2)]
    assert queue.counts(JOB) == Counts()


def test_a_task_that_fails_every_attempt_ends_failed_and_the_others_are_done(
    queue: Executor,
) -> None:
    queue.submit(tasks(4))

    def fail_second(task: Task, attempt: Attempt) -> None:
        if task.chunk == (1, 0):
            raise ValueError("never")

    diary = Diary(fail_second)
    queue.work(diary, burst())
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
        queue.work(diary, Shift("worker-a", depth=2))
    assert 1 <= len(diary.begun) <= 2
    assert queue.counts(JOB) == Counts(queued=5)
    second = Diary()
    queue.work(second, burst())
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
        queue.work(diary, burst())
    assert set(diary.ended) == set(tasks(3, OTHER_JOB))
    assert len(diary.begun) == 4
    assert queue.jobs() == {JOB: Counts(queued=5)}


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
    queue.work(diary, burst("heir"))
    assert diary.begun == [(tasks(1)[0], Attempt(2, "heir"))]
    assert time.monotonic() - before < 5


def test_a_task_that_kills_every_worker_ends_failed(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    for number in range(MAX_ATTEMPTS):
        vanish_holding(url, f"dead-{number}")
        queue.release(f"dead-{number}")
    diary = Diary()
    queue.work(diary, burst())
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
    queue.work(diary, burst())
    assert diary.numbers == [*range(1, MAX_ATTEMPTS + 1)]


def test_a_vanished_workers_task_goes_to_another_when_its_lease_runs_out(
    queue: Executor, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", SHORT_LEASE)
    queue.submit(tasks(1))
    vanish_holding(url, "dead", SHORT_LEASE)
    wait_until(lambda: queue.counts(JOB) == Counts(queued=1), "the lease has run out")
    assert queue.running(JOB) == []
    diary = Diary()
    queue.work(diary, burst("heir"))
    assert diary.begun == [(tasks(1)[0], Attempt(2, "heir"))]
    assert queue.counts(JOB) == Counts()


def test_a_long_task_keeps_its_lease_as_long_as_its_worker_lives(
    queue: Executor, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", SHORT_LEASE)
    queue.submit(tasks(1))
    with hand(url, burst("slow"), lambda task, attempt: time.sleep(3 * SHORT_LEASE)) as slow:
        wait_until(lambda: slow.diary.begun, "the task is begun")
        slow.go.set()
        diary = Diary()
        queue.work(diary, burst("eager"))
    assert diary.begun == []
    assert slow.diary.numbers == [1]


def test_a_worker_that_lost_its_task_to_another_cannot_end_it_for_them(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    with hand(url, Shift("slow")) as slow:
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


# --------------------------------------------------------------------------------- a shift


def test_a_burst_ends_at_once_on_an_empty_queue(queue: Executor) -> None:
    before = time.monotonic()
    queue.work(Diary(), burst())
    queue.submit(tasks(1, OTHER_JOB))
    queue.work(Diary(), burst(job=JOB))
    assert time.monotonic() - before < 5


def test_a_burst_waits_for_what_others_run_since_it_may_come_back(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    error = raises(ValueError("no"))
    with hand(url, Shift("first"), error) as first:
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
    shift = Shift("patient")
    with hand(url, shift) as helper:
        helper.go.set()
        time.sleep(MOMENT)
        assert helper.is_working
        queue.submit(tasks(1))
        wait_until(lambda: helper.diary.ended, "the late task is done")
        shift.stopping.set()
        wait_until(lambda: not helper.is_working, "the worker stops")


def test_as_many_tasks_are_in_flight_as_the_shift_is_deep(queue: Executor) -> None:
    depth = 4
    queue.submit(tasks(2 * depth))
    together = threading.Barrier(depth)

    def meet(task: Task, attempt: Attempt) -> None:
        # Passes only when `depth` tasks are here at the same time.
        together.wait(PATIENCE)

    diary = Diary(meet)
    queue.work(diary, burst(depth=depth))
    assert len(diary.ended) == 2 * depth
    assert set(diary.numbers) == {1}


def test_stopping_finishes_what_is_in_flight_and_begins_no_more(queue: Executor, url: str) -> None:
    queue.submit(tasks(6))
    shift = Shift("worker-b", depth=2)
    with hand(url, shift) as helper:
        wait_until(lambda: len(helper.diary.begun) == 2, "two tasks are begun")
        shift.stopping.set()
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

    queue.work(take_a_while, Shift("worker-a", deadline=deadline))
    # Lateness of this machine makes tasks longer, never a late one begun.
    assert begun
    assert max(begun) + seconds < deadline + 0.05
    assert queue.counts(JOB) == Counts(queued=30 - len(begun))


def test_a_worker_whose_time_is_already_up_begins_nothing(queue: Executor) -> None:
    queue.submit(tasks(1))
    diary = Diary()
    queue.work(diary, Shift("worker-a", deadline=time.time() - 1))
    assert diary.begun == []


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
def test_a_foreign_message_on_the_queue_is_never_run_and_hinders_nothing(
    queue: Executor, url: str, backend: Backend, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend.smuggle(url, FOREIGN[name])
    queue.submit(tasks(1))
    diary = Diary()
    queue.work(diary, burst())
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
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0] * crew
    lines = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert Counter(task for _, task, _ in lines) == Counter(task.id for task in tasks(count))
    assert {number for _, _, number in lines} == {"1"}
    assert len({process for process, _, _ in lines}) == crew
    assert queue.counts(JOB) == Counts()
