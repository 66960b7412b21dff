"""Model-based test of leases: any sequence of calls by any worker, with old and new leases.

The model allows any order of tasks. It also allows a queue to end an expired lease immediately or
in the next `reserve`.
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

from chunkq.job.tasks import JobId, Task
from chunkq.queue.backends.inprocess import InProcessExecutor
from chunkq.queue.backends.rq.names import queue_name, rq_id
from chunkq.queue.contract.executor import MAX_ATTEMPTS, TaskCounts, WorkerOptions
from chunkq.queue.contract.settings import WorkerSettings
from chunkq.queue.leases.task_loop import Lease, LeaseQueue
from chunkq.queue.registry import open_executor
from tests.harness.queue_backends import LOCAL, parameters
from tests.harness.queue_workers import JOB, OTHER_JOB

REPLACED_JOB = JobId(JOB.path, "ffffffff")
JOBS = (JOB, REPLACED_JOB, OTHER_JOB)
KINDS = ("infer", "finalize")
CLOSE = st.sampled_from([False, False, True])
"""Most gates are open, so that tasks have many leases."""
WORKERS = ("worker-a", "worker-b", "worker-c")
TASKS = [
    Task("infer", *JOB, 0, (0,)),
    Task("finalize", *JOB, 0, (0,)),
    Task("infer", *REPLACED_JOB, 0, (0,)),
    Task("infer", *OTHER_JOB, 0, (0,)),
]
"""Few tasks, so that attempts are used up and a task has several leases."""
NEVER = 1000.0
"""A lease (s) that only `expire` ends, even on a slow machine."""
NEVER_EXPIRES = WorkerSettings(lease=NEVER)
THOROUGH = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    database=None,
    derandomize=os.environ.get("HYPOTHESIS_PROFILE") != "explore",
    suppress_health_check=[HealthCheck.too_slow],
)


# -------------------------------------------------------------- direct access to the queues


def expire_in_sqlite(url: str, lease: Lease) -> None:
    with closing(sqlite3.connect(url.removeprefix("sqlite://"), timeout=60)) as database:
        database.execute(
            "UPDATE tasks SET lease_until = 0 WHERE id = ? AND state = 'running' AND job = "
            "(SELECT number FROM jobs WHERE path = ? AND epoch = ?)",
            (lease.task.id, *lease.task.job_id),
        )
        database.commit()


def expire_in_redis(url: str, lease: Lease) -> None:
    entry = f"{rq_id(lease.task)}:{lease.token}"
    with redis.Redis.from_url(url) as client:
        client.zadd(f"rq:wip:{queue_name(lease.task.job_id)}", {entry: 1}, xx=True)


def remaining_in_sqlite(url: str) -> set[str]:
    with closing(sqlite3.connect(url.removeprefix("sqlite://"), timeout=60)) as database:
        names = ("jobs", "tasks", "contributions", "gates")
        return {n for n in names if database.execute(f"SELECT 1 FROM {n} LIMIT 1").fetchone()}


def remaining_in_redis(url: str) -> set[str]:
    with redis.Redis.from_url(url) as client:
        return {key.decode() for key in client.scan_iter()} - {"chunkq:seen", "chunkq:grace"}


def options(worker: str, **more: Any) -> WorkerOptions:
    return WorkerOptions(worker, settings=NEVER_EXPIRES, **more)


@dataclass(frozen=True)
class QueueAccess:
    """Functions that expire a lease, and return the remaining keys of a queue.

    `by_worker`: a late end of an attempt also ends a newer attempt of the same worker.
    """

    expire: Callable[[str, Lease], None]
    remaining: Callable[[str], set[str]]
    by_worker: bool = False


def expire_in_process(url: str, lease: Lease) -> None:
    queue = open_executor(url)
    assert isinstance(queue, InProcessExecutor)
    queue.renew(WorkerOptions(lease.attempt.worker, settings=WorkerSettings(lease=-1)), [lease])


def remaining_in_process(url: str) -> set[str]:
    queue = open_executor(url)
    assert isinstance(queue, InProcessExecutor)
    return {job.path for job in queue._queue.jobs}


QUEUE_ACCESS = {
    "inprocess": QueueAccess(expire_in_process, remaining_in_process),
    "sqlite": QueueAccess(expire_in_sqlite, remaining_in_sqlite, by_worker=True),
    "rq": QueueAccess(expire_in_redis, remaining_in_redis),
}


# ----------------------------------------------------------------------------------- a model


@dataclass
class TaskModel:
    """Expected state of one task.

    `attempts` are the possible numbers of used attempts. `expired` is whether the lease has
    expired; after the next `reserve` the queue may have requeued the task (`maybe_requeued`).
    A `queued` task waits while the gate of its kind is closed.
    """

    state: str = "queued"
    attempts: set[int] = field(default_factory=lambda: {0})
    lease: Lease | None = None
    expired: bool = False
    maybe_requeued: bool = False
    last_worker: str | None = None

    def requeue(self, attempts: set[int]) -> None:
        self.state, self.attempts = "queued", attempts
        self.lease, self.expired, self.maybe_requeued = None, False, False

    def fail(self) -> None:
        self.requeue(self.attempts)
        self.state = "failed"

    def end_counted(self) -> None:
        if max(self.attempts) >= MAX_ATTEMPTS:
            self.fail()
        else:
            self.requeue(self.attempts)

    def end_uncounted(self) -> None:
        fewer = {number - 1 for number in self.attempts}
        # If the queue had already requeued the task, it counted the attempt.
        self.requeue(fewer | self.attempts if self.maybe_requeued else fewer)

    @property
    def may_start(self) -> bool:
        # An expired lease uses up the last attempt.
        return self.state == "queued" or (self.expired and max(self.attempts) < MAX_ATTEMPTS)


class Model(RuleBasedStateMachine):
    """Two connections to one queue, used in turn, and the expected state of the queue."""

    url: str
    queues: tuple[LeaseQueue, LeaseQueue]
    access: QueueAccess
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self._turns = cycle(self.queues)
        self._counted_jobs = cycle(JOBS)
        self._options = cycle(
            [options("w"), options("w", job=JOB.path), options("w", skipped_jobs={JOB})]
        )
        self.models: dict[Task, TaskModel] = {}
        self.gates: dict[JobId, list[str]] = {job: [] for job in JOBS}
        self.unfinished: dict[str, list[Lease]] = {worker: [] for worker in WORKERS}

    @property
    def queue(self) -> LeaseQueue:
        return next(self._turns)

    def of(self, job: JobId) -> dict[Task, TaskModel]:
        return {task: model for task, model in self.models.items() if task.job_id == job}

    def is_closed(self, task: Task) -> bool:
        return task.kind in self.gates[task.job_id]

    def state(self, task: Task) -> str:
        """Return the state that the queue reports."""
        model = self.models[task]
        state = "queued" if model.expired else model.state
        return "waiting" if state == "queued" and self.is_closed(task) else state

    def is_unsure(self, task: Task) -> bool:
        """Return whether the queue treats a task as running until its next `reserve`."""
        return self.models[task].expired and self.is_closed(task)

    def delete(self, task: Task) -> None:
        """Delete a task, and the gates of its job with the last one."""
        del self.models[task]
        if not self.of(task.job_id):
            self.gates[task.job_id].clear()

    def current(self, lease: Lease) -> TaskModel | None:
        """Return the model of the task of a lease if the lease is its current one."""
        model = self.models.get(lease.task)
        return model if model is not None and model.lease is lease else None

    def is_ambiguous(self, lease: Lease) -> bool:
        """Return whether the queue cannot distinguish a lease from a newer one of its worker."""
        model = self.models.get(lease.task)
        if model is None or model.lease is lease or not self.access.by_worker:
            return False
        return model.last_worker == lease.attempt.worker

    def update_failed(self) -> None:
        """Update the tasks whose last attempt the queue has expired, from the failed tasks."""
        for task, model in self.models.items():
            if model.maybe_requeued and max(model.attempts) >= MAX_ATTEMPTS:
                if task in self.queue.failed(task.job_id):
                    model.fail()
                else:
                    model.maybe_requeued = False

    # ------------------------------------------------------------------------------- rules

    @initialize()
    def submit_all(self) -> None:
        self.submit(TASKS)

    @rule(chosen=st.lists(st.sampled_from(TASKS), min_size=1, max_size=5))
    def submit_some(self, chosen: list[Task]) -> None:
        self.submit(chosen)

    def submit(self, chosen: list[Task]) -> None:
        new = 0
        for task in chosen:
            model = self.models.get(task)
            if model is None or model.state == "failed":
                self.models[task] = TaskModel()
                new += 1
        assert self.queue.submit(iter(chosen)) == new

    @rule(
        target=leases,
        worker=st.sampled_from(WORKERS),
        only=st.sampled_from([None, JOB.path, OTHER_JOB.path]),
        skipped=st.sampled_from([(), *((job,) for job in JOBS), JOBS]),
    )
    def reserve_selected(self, worker: str, only: str | None, skipped: tuple[JobId, ...]) -> object:
        return self.reserve(options(worker, job=only, skipped_jobs=set(skipped))) or multiple()

    @rule(target=leases, worker=st.sampled_from(WORKERS))
    def reserve_any(self, worker: str) -> object:
        return self.reserve(options(worker)) or multiple()

    @rule(
        target=leases,
        worker=st.sampled_from(WORKERS),
        job=st.sampled_from(JOBS),
        ends=st.lists(st.sampled_from(["nack", "expire"]), min_size=2, max_size=MAX_ATTEMPTS + 1),
    )
    def use_up_attempts(self, worker: str, job: JobId, ends: list[str]) -> object:
        """Use up all attempts, which single steps rarely do."""
        leases = []
        for how in ends:
            lease = self.reserve(options(worker, job=job.path))
            if lease is None:
                break
            if how == "nack":
                self.end_lease(lease, how)
            else:
                self.expire_lease(lease)
            leases.append(lease)
        return multiple(*leases[-1:])

    def reserve(self, options: WorkerOptions) -> Lease | None:
        able = {
            task
            for task, model in self.selected(options).items()
            if model.may_start and not self.is_closed(task)
        }
        lease = self.queue.reserve(options)
        for model in self.models.values():
            model.maybe_requeued = model.expired
        if lease is None:
            assert not able
            # `reserve` has failed the tasks whose last attempt expired.
            for task, model in self.selected(options).items():
                is_expired = model.expired and not self.is_closed(task)
                assert not is_expired or task in self.queue.failed(task.job_id)
        else:
            assert lease.task in able
            model = self.models[lease.task]
            assert lease.attempt.worker == options.worker
            assert lease.attempt.number - 1 in model.attempts
            model.requeue({lease.attempt.number})
            model.state, model.lease, model.last_worker = "running", lease, options.worker
            self.unfinished[options.worker].append(lease)
        self.update_failed()
        return lease

    def selected(self, options: WorkerOptions) -> dict[Task, TaskModel]:
        return {
            task: model
            for task, model in self.models.items()
            if options.job in (None, task.job) and task.job_id not in options.skipped_jobs
        }

    @precondition(lambda self: self.running())
    @rule(which=st.integers(0, 5), how=st.sampled_from(["nack", "nack", "requeue", "ack"]))
    def end(self, which: int, how: str) -> None:
        running = self.running()
        self.end_lease(running[which % len(running)], how)

    @rule(lease=leases, how=st.sampled_from(["nack", "requeue", "ack"]))
    def end_again(self, lease: Lease, how: str) -> None:
        if not self.is_ambiguous(lease):
            self.end_lease(lease, how)

    def end_lease(self, lease: Lease, how: str) -> None:
        model, before = self.current(lease), self.total(lease.task.job_id)
        if how == "nack":
            self.queue.nack(lease, ValueError("no"))
        elif how == "requeue":
            self.queue.requeue(lease)
        else:
            self.queue.ack(lease)
        worker = lease.attempt.worker
        self.unfinished[worker] = [other for other in self.unfinished[worker] if other is not lease]
        if model is None:
            return
        if how == "nack":
            model.end_counted()
        elif how == "requeue":
            model.end_uncounted()
        elif model.maybe_requeued and self.total(lease.task.job_id) == before:
            model.requeue(model.attempts)
        else:
            self.delete(lease.task)

    def running(self) -> list[Lease]:
        """Return the current leases, including expired ones."""
        return [model.lease for model in self.models.values() if model.lease is not None]

    @rule(worker=st.sampled_from(WORKERS), counted=st.booleans())
    def release(self, worker: str, counted: bool) -> None:
        models = [m for m in self.models.values() if m.lease and m.lease.attempt.worker == worker]
        unsure = sum(model.maybe_requeued for model in models)
        released = self.queue.release(worker, counted=counted)
        assert len(models) - unsure <= released <= len(models)
        for model in models:
            model.end_counted() if counted else model.end_uncounted()
            model.last_worker = None

    @rule(worker=st.sampled_from(WORKERS))
    def renew(self, worker: str) -> None:
        leases = self.unfinished[worker]
        self.queue.renew(options(worker), leases)
        for lease in leases:
            model = self.current(lease)
            if model is not None and model.expired:
                if not model.maybe_requeued or self.is_running(lease):
                    model.expired = model.maybe_requeued = False
                else:
                    model.requeue(model.attempts)

    @precondition(lambda self: self.running())
    @rule(which=st.integers(0, 5))
    def expire(self, which: int) -> None:
        self.expire_lease(self.running()[which % len(self.running())])

    def expire_lease(self, lease: Lease) -> None:
        self.access.expire(self.url, lease)
        self.models[lease.task].expired = True

    @rule(job=st.sampled_from(JOBS), kind=st.sampled_from(KINDS), close=CLOSE)
    def change_gate(self, job: JobId, kind: str, close: bool) -> None:
        if close:
            self.queue.close_gate(job, kind)
            if kind not in self.gates[job]:
                self.gates[job].append(kind)
        else:
            self.queue.open_gate(job, kind)
            if kind in self.gates[job]:
                self.gates[job].remove(kind)

    @rule(job=st.sampled_from(JOBS), cancel=st.sampled_from([False, False, True]))
    def manage(self, job: JobId, cancel: bool) -> None:
        if cancel:
            self.cancel(job)
        else:
            self.retry(job)

    def retry(self, job: JobId) -> None:
        failed = [model for model in self.of(job).values() if model.state == "failed"]
        assert self.queue.retry(job) == len(failed)
        for model in failed:
            model.requeue({0})

    def cancel(self, job: JobId) -> None:
        assert self.queue.cancel(job) == len(self.of(job))
        for task in self.of(job):
            self.delete(task)
        self.gates[job].clear()

    # --------------------------------------------------------------------------- invariants

    def total(self, job: JobId) -> int:
        counts = self.queue.counts(job)
        return counts.queued + counts.running + counts.failed + counts.waiting

    def is_running(self, lease: Lease) -> bool:
        return lease.task in {item.task for item in self.queue.running(lease.task.job_id)}

    def expected(self, job: JobId) -> TaskCounts:
        states = [self.state(task) for task in self.of(job)]
        return TaskCounts(*map(states.count, ("queued", "running", "failed", "waiting")))

    @invariant()
    def every_task_is_counted_once(self) -> None:
        expected = {job: self.expected(job) for job in JOBS}
        assert self.queue.jobs() == {job: c for job, c in expected.items() if c != TaskCounts()}
        job = next(self._counted_jobs)
        assert self.queue.counts(job) == expected[job]

    @invariant()
    def running_and_failed_tasks_are_listed(self) -> None:
        for job in JOBS:
            running = {(item.task, item.worker) for item in self.queue.running(job)}
            assert running == {
                (task, model.lease.attempt.worker)
                for task, model in self.of(job).items()
                if model.lease is not None and not model.expired
            }
            failed = self.queue.failed(job)
            assert len(failed) == len(set(failed))
            assert set(failed) == {
                task for task, model in self.of(job).items() if model.state == "failed"
            }

    @invariant()
    def a_queue_without_queued_or_running_tasks_is_drained(self) -> None:
        worker = next(self._options)
        tasks = [task for task in self.selected(worker) if not self.is_unsure(task)]
        states = {self.models[task].state for task in tasks if self.state(task) != "waiting"}
        if states - {"failed"}:
            assert not self.queue.is_drained(worker)
        elif len(tasks) == len(self.selected(worker)):
            assert self.queue.is_drained(worker)

    @invariant()
    def jobs_whose_tasks_only_wait_are_listed_with_the_gate_that_was_closed_first(self) -> None:
        worker, expected, unsure = next(self._options), {}, set()
        for job in JOBS:
            tasks = [task for task in self.of(job) if task in self.selected(worker)]
            states = {self.state(task) for task in tasks}
            kinds = {task.kind for task in tasks if self.state(task) == "waiting"}
            if any(self.models[task].expired for task in tasks):
                unsure.add(job)  # until the next `reserve`
            elif kinds and not states & {"queued", "running"}:
                expected[job] = next(kind for kind in self.gates[job] if kind in kinds)
        listed = {job: kind for job, kind in self.queue.waiting(worker) if job not in unsure}
        assert listed == expected

    @invariant()
    def deleted_tasks_leave_no_keys(self) -> None:
        if not self.models and not any(self.gates.values()):
            assert self.access.remaining(self.url) == set()

    def teardown(self) -> None:
        for job in JOBS:
            self.queue.cancel(job)
        assert self.access.remaining(self.url) == set()


# ------------------------------------------------------------------------------------- tests


@pytest.fixture(params=parameters(LOCAL))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[type[Model]]:
    url = request.param.make_url(tmp_path, request)
    pair = open_executor(url), open_executor(url)
    assert all(isinstance(queue, LeaseQueue) for queue in pair)
    values = {"url": url, "queues": pair, "access": QUEUE_ACCESS[request.param.name]}
    yield type("Model", (Model,), values)
    for queue in pair:
        queue.close()


def test_leases_agree_with_the_model_for_any_sequence_of_calls(
    model: type[Model],
) -> None:
    run_state_machine_as_test(model, settings=THOROUGH)
