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

from chunkq.errors import QueueError
from chunkq.executors.base import (
    MAX_ATTEMPTS,
    Attempt,
    BlockContribution,
    RunningTask,
    TaskCounts,
    WorkerOptions,
)
from chunkq.executors.leases import Lease, LeaseQueue
from chunkq.tasks import Task

log = logging.getLogger("chunkq.queue")


@dataclass(slots=True)
class _Leased:
    """A message leased to a worker from `since` until `expires` (s, Unix)."""

    message: str
    attempt: Attempt
    since: float
    expires: float


@dataclass(slots=True)
class _JobQueue:
    """Tasks of one job by id, each in one of three states, and the contributors of its blocks.

    `queued` maps an id to its message and the number of attempts so far. `blocks` maps a block to
    the contributors that have not committed yet; an empty set marks a complete block.
    """

    queued: OrderedDict[str, tuple[str, int]] = field(default_factory=OrderedDict)
    leased: dict[str, _Leased] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    blocks: dict[tuple[int, ...], set[int]] = field(default_factory=dict)

    def counts(self, now: float) -> TaskCounts:
        expired = sum(leased.expires < now for leased in self.leased.values())
        return TaskCounts(len(self.queued) + expired, len(self.leased) - expired, len(self.failed))

    def end_attempt(self, id: str, *, counted: bool) -> None:
        """End the lease of a task: fail it after its last attempt, else queue it.

        A task whose attempt does not count is queued first, another one last.
        """
        leased = self.leased.pop(id)
        attempts = leased.attempt.number - (not counted)
        if counted and attempts >= MAX_ATTEMPTS:
            self.failed[id] = leased.message
            return
        self.queued[id] = leased.message, attempts
        if not counted:
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
    jobs: dict[str, _JobQueue] = field(default_factory=dict)

    def job(self, job: str) -> _JobQueue:
        return self.jobs.get(job) or _JobQueue()

    def select(self, options: WorkerOptions) -> Iterator[_JobQueue]:
        """Yield the jobs that a worker may reserve tasks of."""
        for name, job in self.jobs.items():
            if name == options.job or (options.job is None and name not in options.skipped_jobs):
                yield job

    def remove_empty(self) -> None:
        """Delete jobs without tasks, with their blocks."""
        for name, job in list(self.jobs.items()):
            if not (job.queued or job.leased or job.failed):
                del self.jobs[name]


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
                job = self._queue.jobs.setdefault(task.job, _JobQueue())
                if task.id in job.queued or task.id in job.leased:
                    continue
                job.failed.pop(task.id, None)
                job.queued[task.id] = task.to_json(), 0
                count += 1
        return count

    def counts(self, job: str) -> TaskCounts:
        """Return the numbers of tasks of a job by state; a task with an expired lease is queued."""
        with self._queue.lock:
            return self._queue.job(job).counts(time.time())

    def jobs(self) -> dict[str, TaskCounts]:
        """Return the numbers of tasks of every job on the queue."""
        with self._queue.lock:
            return {name: job.counts(time.time()) for name, job in self._queue.jobs.items()}

    def running(self, job: str) -> list[RunningTask]:
        """Return the tasks of a job whose leases have not expired."""
        with self._queue.lock:
            return [
                RunningTask(Task.from_json(leased.message), leased.attempt.worker, leased.since)
                for leased in self._queue.job(job).leased.values()
                if leased.expires >= time.time()
            ]

    def failed(self, job: str) -> list[Task]:
        """Return the failed tasks of a job."""
        with self._queue.lock:
            return [Task.from_json(message) for message in self._queue.job(job).failed.values()]

    def retry(self, job: str) -> int:
        """Queue the failed tasks of a job with all their attempts."""
        with self._queue.lock:
            tasks = self._queue.job(job)
            retried = {id: (message, 0) for id, message in tasks.failed.items()}
            tasks.queued.update(retried)
            tasks.failed.clear()
            return len(retried)

    def cancel(self, job: str) -> int:
        """Remove the tasks and the blocks of a job."""
        with self._queue.lock:
            removed = self._queue.jobs.pop(job, _JobQueue())
            return len(removed.queued) + len(removed.leased) + len(removed.failed)

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

    def record_contributions(
        self, job: str, contributions: Sequence[BlockContribution]
    ) -> list[Task]:
        """Record a contributor of blocks; return tasks to finalize the complete ones."""
        complete = []
        with self._queue.lock:
            if job not in self._queue.jobs:
                return []
            blocks = self._queue.jobs[job].blocks
            for block, member, of in contributions:
                missing = blocks.setdefault(block, set(range(of)))
                if missing and not missing - {member}:
                    complete.append(Task("finalize", job, block))
                missing.discard(member)
        return complete

    def reserve(self, options: WorkerOptions) -> Lease | None:
        """Lease one task of the oldest job that has one, or return None."""
        with self._queue.lock:
            now = time.time()
            for job in self._queue.jobs.values():
                job.expire(now)
            for job in self._queue.select(options):
                while job.queued:
                    id, (message, attempts) = job.queued.popitem(last=False)
                    try:
                        task = Task.from_json(message)
                    except QueueError as error:
                        log.error("deleted from the queue: %s", error)
                        continue
                    attempt = Attempt(attempts + 1, options.worker)
                    expires = now + options.settings.lease
                    job.leased[id] = _Leased(message, attempt, now, expires)
                    return Lease(task, attempt, since=now)
            self._queue.remove_empty()
        return None

    def ack(self, lease: Lease) -> None:
        """Delete a finished task."""
        with self._queue.lock:
            job = self._leased_job(lease)
            if job is not None:
                del job.leased[lease.task.id]
                self._queue.remove_empty()

    def nack(self, lease: Lease, error: BaseException) -> None:
        """End an unsuccessful attempt."""
        self._end(lease, counted=True)

    def requeue(self, lease: Lease) -> None:
        """Queue a task first, without counting the attempt."""
        self._end(lease, counted=False)

    def is_drained(self, options: WorkerOptions) -> bool:
        """Return whether the jobs of a worker have neither queued nor running tasks."""
        with self._queue.lock:
            return not any(job.queued or job.leased for job in self._queue.select(options))

    def renew(self, options: WorkerOptions, leases: Sequence[Lease]) -> None:
        """Extend leases of a worker."""
        with self._queue.lock:
            for lease in leases:
                job = self._leased_job(lease)
                if job is not None:
                    job.leased[lease.task.id].expires = time.time() + options.settings.lease

    def close(self) -> None:
        """Do nothing. The queue exists until the process ends."""

    def _leased_job(self, lease: Lease) -> _JobQueue | None:
        """Return the job of a lease, or None if the task is leased to another worker."""
        job = self._queue.job(lease.task.job)
        leased = job.leased.get(lease.task.id)
        return job if leased is not None and leased.attempt is lease.attempt else None

    def _end(self, lease: Lease, *, counted: bool) -> None:
        with self._queue.lock:
            job = self._leased_job(lease)
            if job is not None:
                job.end_attempt(lease.task.id, counted=counted)
