"""Leasing against a model of it: any order of calls, by any worker, with leases old and new.

The model knows nothing of the order in which tasks come, which is each queue's own affair, nor
whether a queue takes a lease back as it runs out or only when it looks; both are left open.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from chunkq.executors import open_executor
from chunkq.executors.base import MAX_ATTEMPTS, Counts, WorkerOptions
from chunkq.executors.inprocess import InProcessExecutor
from chunkq.executors.leases import Lease, LeaseQueue
from chunkq.executors.rq.executor import queue_name
from chunkq.executors.settings import WorkerSettings
from chunkq.tasks import Task
from tests.contract.test_executor_contract import JOB, LOCAL, OTHER_JOB, parameters

JOBS = (JOB, OTHER_JOB)
WORKERS = ("worker-a", "worker-b", "worker-c")
TASKS = [Task("infer", JOB, (0,)), Task("finalize", JOB, (0,)), Task("infer", OTHER_JOB, (0,))]
"""So few that attempts are used up, and that leases of one task meet."""
NEVER = 1000.0
"""A lease so long that none runs out but by `let_run_out`, however slow the machine."""
NEVER_EXPIRES = WorkerSettings(lease=NEVER)
THOROUGH = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    database=None,
    derandomize=os.environ.get("HYPOTHESIS_PROFILE") != "explore",
    suppress_health_check=[HealthCheck.too_slow],
)


# ------------------------------------------------------------------ behind the queues' backs


def let_run_out_in_sqlite(url: str, lease: Lease) -> None:
    with closing(sqlite3.connect(url.removeprefix("sqlite://"), timeout=60)) as database:
        database.execute(
            "UPDATE tasks SET lease_until = 0 WHERE id = ? AND state = 'running'", (lease.task.id,)
        )
        database.commit()


def let_run_out_in_redis(url: str, lease: Lease) -> None:
    entry = f"{lease.task.id}:{lease.token}"
    with redis.Redis.from_url(url) as client:
        client.zadd(f"rq:wip:{queue_name(lease.task.job)}", {entry: 1}, xx=True)


def left_in_sqlite(url: str) -> set[str]:
    with closing(sqlite3.connect(url.removeprefix("sqlite://"), timeout=60)) as database:
        return {name for (name,) in database.execute("SELECT id FROM tasks")}


def left_in_redis(url: str) -> set[str]:
    with redis.Redis.from_url(url) as client:
        return {key.decode() for key in client.scan_iter()} - {"chunkq:seen", "chunkq:grace"}


def options(worker: str, **more: Any) -> WorkerOptions:
    return WorkerOptions(worker, settings=NEVER_EXPIRES, **more)


@dataclass(frozen=True)
class Leasing:
    """How to let a lease run out, and to see what is left of tasks that are gone.

    `by_worker`: a late end of an attempt counts for a newer one of the same worker.
    """

    let_run_out: Callable[[str, Lease], None]
    left: Callable[[str], set[str]]
    by_worker: bool = False


def let_run_out_in_process(url: str, lease: Lease) -> None:
    queue = open_executor(url)
    assert isinstance(queue, InProcessExecutor)
    queue.renew(WorkerOptions(lease.attempt.worker, settings=WorkerSettings(lease=-1)), [lease])


def left_in_process(url: str) -> set[str]:
    queue = open_executor(url)
    assert isinstance(queue, InProcessExecutor)
    return set(queue._memory.jobs)


LEASING = {
    "inprocess": Leasing(let_run_out_in_process, left_in_process),
    "sqlite": Leasing(let_run_out_in_sqlite, left_in_sqlite, by_worker=True),
    "rq": Leasing(let_run_out_in_redis, left_in_redis),
}


# ----------------------------------------------------------------------------------- a model


@dataclass
class Known:
    """What must be true of one task.

    `begun` are the numbers of attempts that it may have used up. A lease that ran out is `lost`;
    once somebody has looked for work since, the queue `may` have taken it `back`.
    """

    state: str = "queued"
    begun: set[int] = field(default_factory=lambda: {0})
    lease: Lease | None = None
    lost: bool = False
    maybe_back: bool = False
    last_worker: str | None = None

    def put_back(self, begun: set[int]) -> None:
        self.state, self.begun = "queued", begun
        self.lease, self.lost, self.maybe_back = None, False, False

    def give_up(self) -> None:
        self.put_back(self.begun)
        self.state = "failed"

    def end_counted(self) -> None:
        if max(self.begun) >= MAX_ATTEMPTS:
            self.give_up()
        else:
            self.put_back(self.begun)

    def end_uncounted(self) -> None:
        less = {number - 1 for number in self.begun}
        # If the queue had taken it back before, the attempt had been counted then.
        self.put_back(less | self.begun if self.maybe_back else less)

    @property
    def may_begin(self) -> bool:
        # The last attempt has been used up by a lease that ran out.
        return self.state == "queued" or (self.lost and max(self.begun) < MAX_ATTEMPTS)


class Model(RuleBasedStateMachine):
    """Two connections to one queue, used in turn, and what the queue must hold."""

    url: str
    queues: tuple[LeaseQueue, LeaseQueue]
    leasing: Leasing
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self._turns = cycle(self.queues)
        self._looked_at = cycle(JOBS)
        self._shifts = cycle([options("w"), options("w", job=JOB), options("w", set_aside={JOB})])
        self.known: dict[Task, Known] = {}
        self.unended: dict[str, list[Lease]] = {worker: [] for worker in WORKERS}

    @property
    def queue(self) -> LeaseQueue:
        return next(self._turns)

    def of(self, job: str) -> dict[Task, Known]:
        return {task: known for task, known in self.known.items() if task.job == job}

    def held(self, lease: Lease) -> Known | None:
        """Return what is known of a lease's task if it is still this lease's."""
        known = self.known.get(lease.task)
        return known if known is not None and known.lease is lease else None

    def confuses(self, lease: Lease) -> bool:
        """Tell whether the queue cannot know that a lease is not its worker's newest."""
        known = self.known.get(lease.task)
        if known is None or known.lease is lease or not self.leasing.by_worker:
            return False
        return known.last_worker == lease.attempt.worker

    def look(self) -> None:
        """Learn which last attempts the queue has given up: failed tasks are listed."""
        for task, known in self.known.items():
            if known.maybe_back and max(known.begun) >= MAX_ATTEMPTS:
                if task in self.queue.failed(task.job):
                    known.give_up()
                else:
                    known.maybe_back = False

    # ------------------------------------------------------------------------------- rules

    @initialize()
    def submit_all(self) -> None:
        self.submit(TASKS)

    @rule(chosen=st.lists(st.sampled_from(TASKS), min_size=1, max_size=5))
    def submit_some(self, chosen: list[Task]) -> None:
        self.submit(chosen)

    def submit(self, chosen: list[Task]) -> None:
        fresh = 0
        for task in chosen:
            known = self.known.get(task)
            if known is None or known.state == "failed":
                self.known[task] = Known()
                fresh += 1
        assert self.queue.submit(iter(chosen)) == fresh

    @rule(
        target=leases,
        worker=st.sampled_from(WORKERS),
        only=st.sampled_from([None, *JOBS]),
        aside=st.sampled_from([(), *((job,) for job in JOBS), JOBS]),
    )
    def take_chosen(self, worker: str, only: str | None, aside: tuple[str, ...]) -> object:
        return self.take(options(worker, job=only, set_aside=set(aside))) or multiple()

    @rule(target=leases, worker=st.sampled_from(WORKERS))
    def take_any(self, worker: str) -> object:
        return self.take(options(worker)) or multiple()

    @rule(
        target=leases,
        worker=st.sampled_from(WORKERS),
        job=st.sampled_from(JOBS),
        ends=st.lists(st.sampled_from(["fail", "lose"]), min_size=2, max_size=MAX_ATTEMPTS + 1),
    )
    def use_up_attempts(self, worker: str, job: str, ends: list[str]) -> object:
        """Go where single steps seldom lead: to the last attempt and beyond."""
        taken = []
        for how in ends:
            lease = self.take(options(worker, job=job))
            if lease is None:
                break
            if how == "fail":
                self.end_lease(lease, how)
            else:
                self.lose(lease)
            taken.append(lease)
        return multiple(*taken[-1:])

    def take(self, options: WorkerOptions) -> Lease | None:
        able = {t for t, known in self.chosen(options).items() if known.may_begin}
        lease = self.queue.reserve(options)
        for known in self.known.values():
            known.maybe_back = known.lost
        if lease is None:
            assert not able
            # Who finds nothing has seen what ran out on its last attempt.
            for task, known in self.chosen(options).items():
                assert not known.lost or task in self.queue.failed(task.job)
        else:
            assert lease.task in able
            known = self.known[lease.task]
            assert lease.attempt.worker == options.worker
            assert lease.attempt.number - 1 in known.begun
            known.put_back({lease.attempt.number})
            known.state, known.lease, known.last_worker = "running", lease, options.worker
            self.unended[options.worker].append(lease)
        self.look()
        return lease

    def chosen(self, options: WorkerOptions) -> dict[Task, Known]:
        if options.job is not None:
            return self.of(options.job)
        return {t: k for t, k in self.known.items() if t.job not in options.skipped_jobs}

    @precondition(lambda self: self.running())
    @rule(which=st.integers(0, 5), how=st.sampled_from(["fail", "fail", "hand_back", "finish"]))
    def end(self, which: int, how: str) -> None:
        running = self.running()
        self.end_lease(running[which % len(running)], how)

    @rule(lease=leases, how=st.sampled_from(["fail", "hand_back", "finish"]))
    def end_perhaps_again(self, lease: Lease, how: str) -> None:
        if not self.confuses(lease):
            self.end_lease(lease, how)

    def end_lease(self, lease: Lease, how: str) -> None:
        known, before = self.held(lease), self.total(lease.task.job)
        if how == "fail":
            self.queue.nack(lease, ValueError("no"))
        elif how == "hand_back":
            self.queue.requeue(lease)
        else:
            self.queue.ack(lease)
        worker = lease.attempt.worker
        self.unended[worker] = [other for other in self.unended[worker] if other is not lease]
        if known is None:
            return
        if how == "fail":
            known.end_counted()
        elif how == "hand_back":
            known.end_uncounted()
        elif known.maybe_back and self.total(lease.task.job) == before:
            known.put_back(known.begun)
        else:
            del self.known[lease.task]

    def running(self) -> list[Lease]:
        """Return the leases that their tasks are held by, also those that ran out."""
        return [known.lease for known in self.known.values() if known.lease is not None]

    @rule(worker=st.sampled_from(WORKERS), counted=st.booleans())
    def release(self, worker: str, counted: bool) -> None:
        mine = [k for k in self.known.values() if k.lease and k.lease.attempt.worker == worker]
        unsure = sum(known.maybe_back for known in mine)
        released = self.queue.release(worker, counted=counted)
        assert len(mine) - unsure <= released <= len(mine)
        for known in mine:
            known.end_counted() if counted else known.end_uncounted()
            known.last_worker = None

    @rule(worker=st.sampled_from(WORKERS))
    def renew(self, worker: str) -> None:
        believed = self.unended[worker]
        self.queue.renew(options(worker), believed)
        for lease in believed:
            known = self.held(lease)
            if known is not None and known.lost:
                if not known.maybe_back or self.is_running(lease):
                    known.lost = known.maybe_back = False
                else:
                    known.put_back(known.begun)

    @precondition(lambda self: self.running())
    @rule(which=st.integers(0, 5))
    def let_run_out(self, which: int) -> None:
        self.lose(self.running()[which % len(self.running())])

    def lose(self, lease: Lease) -> None:
        self.leasing.let_run_out(self.url, lease)
        self.known[lease.task].lost = True

    @rule(job=st.sampled_from(JOBS), cancel=st.sampled_from([False, False, True]))
    def manage(self, job: str, cancel: bool) -> None:
        if cancel:
            self.cancel(job)
        else:
            self.retry(job)

    def retry(self, job: str) -> None:
        failed = [known for known in self.of(job).values() if known.state == "failed"]
        assert self.queue.retry(job) == len(failed)
        for known in failed:
            known.put_back({0})

    def cancel(self, job: str) -> None:
        assert self.queue.cancel(job) == len(self.of(job))
        for task in self.of(job):
            del self.known[task]

    # ------------------------------------------------------------------------- what is seen

    def total(self, job: str) -> int:
        counts = self.queue.counts(job)
        return counts.queued + counts.running + counts.failed

    def is_running(self, lease: Lease) -> bool:
        return lease.task in {item.task for item in self.queue.running(lease.task.job)}

    def expected(self, job: str) -> Counts:
        states = [("queued" if k.lost else k.state) for k in self.of(job).values()]
        return Counts(*(states.count(state) for state in ("queued", "running", "failed")))

    @invariant()
    def every_task_is_counted_once(self) -> None:
        expected = {job: self.expected(job) for job in JOBS}
        assert self.queue.jobs() == {job: c for job, c in expected.items() if c != Counts()}
        job = next(self._looked_at)
        assert self.queue.counts(job) == expected[job]

    @invariant()
    def what_runs_and_what_failed_is_listed(self) -> None:
        for job in JOBS:
            running = {(item.task, item.worker) for item in self.queue.running(job)}
            assert running == {
                (task, known.lease.attempt.worker)
                for task, known in self.of(job).items()
                if known.lease is not None and not known.lost
            }
            failed = self.queue.failed(job)
            assert len(failed) == len(set(failed))
            assert set(failed) == {t for t, k in self.of(job).items() if k.state == "failed"}

    @invariant()
    def a_queue_is_drained_when_nothing_waits_or_runs(self) -> None:
        chosen = next(self._shifts)
        left = {known.state for known in self.chosen(chosen).values()} - {"failed"}
        assert self.queue.is_drained(chosen) == (not left)

    @invariant()
    def nothing_is_left_of_tasks_that_are_gone(self) -> None:
        if not self.known:
            assert self.leasing.left(self.url) == set()

    def teardown(self) -> None:
        for job in JOBS:
            self.queue.cancel(job)
        assert self.leasing.left(self.url) == set()


# ------------------------------------------------------------------------------------- tests


@pytest.fixture(params=parameters(LOCAL))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[type[Model]]:
    url = request.param.make_url(tmp_path, request)
    pair = open_executor(url), open_executor(url)
    assert all(isinstance(queue, LeaseQueue) for queue in pair)
    values = {"url": url, "queues": pair, "leasing": LEASING[request.param.name]}
    yield type("Model", (Model,), values)
    for queue in pair:
        queue.close()


def test_leasing_agrees_with_its_model_whatever_is_called_in_whatever_order(
    model: type[Model],
) -> None:
    run_state_machine_as_test(model, settings=THOROUGH)
