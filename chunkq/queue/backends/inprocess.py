"""Queue in the memory of one process, for workers that are threads of it.

This is the reference implementation of the other backends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from chunkq.errors import QueueError
from chunkq.job.tasks import JobId, Task
from chunkq.queue.contract.executor import (
    MAX_ATTEMPTS,
    Attempt,
    Contribution,
    RunningTask,
    TaskCounts,
    WorkerOptions,
)
from chunkq.queue.leases.task_loop import Lease, LeaseQueue

log = logging.getLogger("chunkq.queue")


@dataclass(slots=True)
class _Leased:
    """A message leased to a worker from `since` (s, Unix) until `expires` (s, monotonic)."""

    message: str
    attempt: Attempt
    since: float
    expires: float


@dataclass(slots=True)
class _JobQueue:
    """Tasks of one job by id, each in one of four states, and what they wait for.

    `queued` and `waiting` map an id to its message and the number of attempts so far. `gates` has
    the kinds with a closed gate, in the order in which these were closed. `missing` maps a task to
    the numbers of its contributors that have not committed; it is empty for a complete task.
    """

    queued: OrderedDict[str, tuple[str, int]] = field(default_factory=OrderedDict)
    leased: dict[str, _Leased] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, tuple[str, int]] = field(default_factory=dict)
    gates: dict[str, None] = field(default_factory=dict)
    missing: dict[Task, set[int]] = field(default_factory=dict)

    def counts(self, now: float) -> TaskCounts:
        expired = [_kind(id) for id, leased in self.leased.items() if leased.expires < now]
        behind_gates = sum(kind in self.gates for kind in expired)
        return TaskCounts(
            len(self.queued) + len(expired) - behind_gates,
            len(self.leased) - len(expired),
            len(self.failed),
            len(self.waiting) + behind_gates,
        )

    @property
    def is_active(self) -> bool:
        """Whether tasks are queued or running."""
        return bool(self.queued or self.leased)

    @property
    def is_empty(self) -> bool:
        return not (self.is_active or self.failed or self.waiting)

    @property
    def first_waiting_kind(self) -> str | None:
        kinds = {_kind(id) for id in self.waiting}
        return next((kind for kind in self.gates if kind in kinds), None)

    def add(self, id: str, message: str, attempts: int) -> None:
        """Queue a task last, or let it wait if its gate is closed."""
        tasks = self.waiting if _kind(id) in self.gates else self.queued
        tasks[id] = message, attempts

    def move(self, kind: str, source: dict[str, Any], target: dict[str, Any]) -> None:
        for id in [id for id in source if _kind(id) == kind]:
            target[id] = source.pop(id)

    def end_attempt(self, id: str, *, counted: bool) -> None:
        """End the lease of a task: fail it after its last attempt, else queue it.

        A task whose attempt does not count is queued first, another one last.
        """
        leased = self.leased.pop(id)
        attempts = leased.attempt.number - (not counted)
        if counted and attempts >= MAX_ATTEMPTS:
            self.failed[id] = leased.message
            return
        self.add(id, leased.message, attempts)
        if not counted and id in self.queued:
            self.queued.move_to_end(id, last=False)

    def expire(self, now: float) -> None:
        """End expired leases. Their tasks go before the queued ones, the oldest lease first."""
        for id in [id for id, leased in self.leased.items() if leased.expires < now][::-1]:
            self.end_attempt(id, counted=True)
            if id in self.queued:
                self.queued.move_to_end(id, last=False)


@dataclass
class _Queue:
    """One named queue: its jobs in the order of their first task, guarded by `lock`."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    jobs: dict[JobId, _JobQueue] = field(default_factory=dict)

    def job(self, job: JobId) -> _JobQueue:
        return self.jobs.get(job) or _JobQueue()

    def select(self, options: WorkerOptions) -> Iterator[tuple[JobId, _JobQueue]]:
        """Yield the jobs that a worker may reserve tasks of."""
        for id, job in list(self.jobs.items()):
            if options.job in (None, id.path) and id not in options.skipped_jobs:
                yield id, job

    def remove_if_empty(self, job: JobId) -> None:
        """Delete a job without tasks, with its gates."""
        if self.job(job).is_empty:
            self.jobs.pop(job, None)


def _kind(id: str) -> str:
    return id.partition("/")[0]


_queues: dict[str, _Queue] = {}
_queues_lock = threading.Lock()


class InProcessExecutor(LeaseQueue):
    """Queue `inprocess://NAME`, shared by all executors of this process with that name.

    The queue ends with the process. Other processes, including forked ones, do not share it.
    """

    owns_process = False

    def __init__(self, url: str) -> None:
        self.url = url
        with _queues_lock:
            self._queue = _queues.setdefault(url.removeprefix("inprocess://"), _Queue())

    def submit(self, tasks: Iterable[Task]) -> int:
        """Queue tasks one by one; each is available to workers immediately."""
        count = 0
        for task in tasks:
            with self._queue.lock:
                job = self._queue.jobs.setdefault(task.job_id, _JobQueue())
                if any(task.id in tasks for tasks in (job.queued, job.leased, job.waiting)):
                    continue
                job.failed.pop(task.id, None)
                job.add(task.id, task.to_json(), 0)
                count += 1
        return count

    def counts(self, job: JobId) -> TaskCounts:
        """Return the numbers of tasks of a job by state; a task with an expired lease is queued."""
        with self._queue.lock:
            return self._queue.job(job).counts(time.monotonic())

    def jobs(self) -> dict[JobId, TaskCounts]:
        """Return the numbers of tasks of every job on the queue."""
        with self._queue.lock:
            return {
                id: job.counts(time.monotonic())
                for id, job in self._queue.jobs.items()
                if not job.is_empty
            }

    def running(self, job: JobId) -> list[RunningTask]:
        """Return the tasks of a job whose leases have not expired."""
        with self._queue.lock:
            return [
                RunningTask(Task.from_json(leased.message), leased.attempt.worker, leased.since)
                for leased in self._queue.job(job).leased.values()
                if leased.expires >= time.monotonic()
            ]

    def failed(self, job: JobId) -> list[Task]:
        """Return the failed tasks of a job."""
        with self._queue.lock:
            return [Task.from_json(message) for message in self._queue.job(job).failed.values()]

    def retry(self, job: JobId) -> int:
        """Queue the failed tasks of a job with all their attempts."""
        with self._queue.lock:
            tasks = self._queue.job(job)
            retried, tasks.failed = tasks.failed, {}
            for id, message in retried.items():
                tasks.add(id, message, 0)
            return len(retried)

    def cancel(self, job: JobId) -> int:
        """Remove the tasks and the gates of a job."""
        with self._queue.lock:
            removed = self._queue.jobs.pop(job, _JobQueue()).counts(time.monotonic())
            return removed.queued + removed.running + removed.failed + removed.waiting

    def close_gate(self, job: JobId, kind: str) -> None:
        """Make the queued tasks of a kind wait."""
        with self._queue.lock:
            tasks = self._queue.jobs.setdefault(job, _JobQueue())
            tasks.gates.setdefault(kind)
            tasks.move(kind, tasks.queued, tasks.waiting)

    def open_gate(self, job: JobId, kind: str) -> None:
        """Queue the waiting tasks of a kind."""
        with self._queue.lock:
            tasks = self._queue.job(job)
            tasks.gates.pop(kind, None)
            tasks.move(kind, tasks.waiting, tasks.queued)
            self._queue.remove_if_empty(job)

    def waiting(self, options: WorkerOptions) -> list[tuple[JobId, str]]:
        """Return the jobs of a worker whose tasks only wait, with the first waiting kind."""
        with self._queue.lock:
            return [
                (id, kind)
                for id, job in self._queue.select(options)
                if not job.is_active and (kind := job.first_waiting_kind) is not None
            ]

    def release(self, worker: str, *, counted: bool = True) -> int:
        """End the leases of a worker."""
        with self._queue.lock:
            leases = [
                (job, id)
                for job in self._queue.jobs.values()
                for id, leased in job.leased.items()
                if leased.attempt.worker == worker
            ]
            for job, id in leases[::-1]:
                job.end_attempt(id, counted=counted)
            return len(leases)

    def extend(self, worker: str, seconds: float) -> None:
        """Make the leases of a worker last for at least `seconds` from now."""
        with self._queue.lock:
            for job in self._queue.jobs.values():
                for leased in job.leased.values():
                    if leased.attempt.worker == worker:
                        leased.expires = max(leased.expires, time.monotonic() + seconds)

    def record_contributions(self, job: JobId, contributions: Sequence[Contribution]) -> list[Task]:
        """Record contributions of a committed task; return the tasks that this completes."""
        complete = []
        with self._queue.lock:
            tasks = self._queue.job(job)
            if tasks.is_empty:
                return []
            for task, number, total in contributions:
                missing = tasks.missing.setdefault(task, set(range(total)))
                if missing and not missing - {number}:
                    complete.append(task)
                missing.discard(number)
        return complete

    def reserve(self, options: WorkerOptions) -> Lease | None:
        """Lease one task of the oldest job that has one, or return None."""
        with self._queue.lock:
            now = time.monotonic()
            for job in self._queue.jobs.values():
                job.expire(now)
            for job_id, job in self._queue.select(options):
                while job.queued:
                    id, (message, attempts) = job.queued.popitem(last=False)
                    try:
                        task = Task.from_json(message)
                    except QueueError as error:
                        log.error("deleted from the queue: %s", error)
                        self._queue.remove_if_empty(job_id)
                        continue
                    attempt = Attempt(attempts + 1, options.worker)
                    expires = now + options.settings.lease
                    job.leased[id] = _Leased(message, attempt, time.time(), expires)
                    return Lease(task, attempt)
        return None

    def ack(self, lease: Lease) -> None:
        """Delete a finished task."""
        with self._queue.lock:
            job = self._leased_job(lease)
            if job is not None:
                del job.leased[lease.task.id]
                self._queue.remove_if_empty(lease.task.job_id)

    def nack(self, lease: Lease, error: BaseException) -> None:
        """End an unsuccessful attempt."""
        self._end(lease, counted=True)

    def requeue(self, lease: Lease) -> None:
        """Queue a task first, without counting the attempt."""
        self._end(lease, counted=False)

    def is_drained(self, options: WorkerOptions) -> bool:
        """Return whether the jobs of a worker have neither queued nor running tasks."""
        with self._queue.lock:
            return not any(job.is_active for _, job in self._queue.select(options))

    def renew(self, options: WorkerOptions, leases: Sequence[Lease]) -> None:
        """Extend leases of a worker."""
        with self._queue.lock:
            for lease in leases:
                job = self._leased_job(lease)
                if job is not None:
                    job.leased[lease.task.id].expires = time.monotonic() + options.settings.lease

    def close(self) -> None:
        """Do nothing. The queue exists until the process ends."""

    def _leased_job(self, lease: Lease) -> _JobQueue | None:
        """Return the job of a lease, or None if the task is leased to another worker."""
        job = self._queue.job(lease.task.job_id)
        leased = job.leased.get(lease.task.id)
        return job if leased is not None and leased.attempt is lease.attempt else None

    def _end(self, lease: Lease, *, counted: bool) -> None:
        with self._queue.lock:
            job = self._leased_job(lease)
            if job is not None:
                job.end_attempt(lease.task.id, counted=counted)
