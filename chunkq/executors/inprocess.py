"""The reference queue backend: a queue in this process's memory, for workers that are threads."""

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
    Counts,
    Running,
    WorkerOptions,
)
from chunkq.executors.leases import Lease, LeaseQueue
from chunkq.tasks import Task

log = logging.getLogger("chunkq.queue")


@dataclass(slots=True)
class _Leased:
    """A message in the hands of a worker until `expires` (s, Unix)."""

    message: str
    attempt: Attempt
    since: float
    expires: float


@dataclass(slots=True)
class _JobQueue:
    """One job's tasks by id, each in one of three states, and its blocks' contributors.

    `queued` maps an id to its message and the attempts so far. `blocks` maps a block to the
    contributors that have not committed yet; an empty set marks a complete block.
    """

    queued: OrderedDict[str, tuple[str, int]] = field(default_factory=OrderedDict)
    leased: dict[str, _Leased] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    blocks: dict[tuple[int, ...], set[int]] = field(default_factory=dict)

    def counts(self, now: float) -> Counts:
        expired = sum(leased.expires < now for leased in self.leased.values())
        return Counts(len(self.queued) + expired, len(self.leased) - expired, len(self.failed))

    def end_attempt(self, id: str, *, counted: bool) -> None:
        """Fail a leased task after its last attempt; queue it otherwise."""
        leased = self.leased.pop(id)
        attempts = leased.attempt.number - (not counted)
        if counted and attempts >= MAX_ATTEMPTS:
            self.failed[id] = leased.message
            return
        self.queued[id] = leased.message, attempts
        if not counted:  # a task that was not tried keeps its turn
            self.queued.move_to_end(id, last=False)

    def expire(self, now: float) -> None:
        """End the attempts whose lease has run out, oldest first, ahead of the queued tasks."""
        for id in [id for id, leased in self.leased.items() if leased.expires < now][::-1]:
            self.end_attempt(id, counted=True)
            if id in self.queued:
                self.queued.move_to_end(id, last=False)


@dataclass
class _Memory:
    """One named queue: its jobs in the order of their first task. The lock guards all of it."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    jobs: dict[str, _JobQueue] = field(default_factory=dict)

    def job(self, job: str) -> _JobQueue:
        return self.jobs.get(job) or _JobQueue()

    def chosen(self, options: WorkerOptions) -> Iterator[_JobQueue]:
        """Yield the jobs that a options takes tasks of."""
        for name, job in self.jobs.items():
            if name == options.job or (options.job is None and name not in options.skipped_jobs):
                yield job

    def remove_empty(self) -> None:
        """Forget jobs without tasks, and with them their blocks."""
        for name, job in list(self.jobs.items()):
            if not (job.queued or job.leased or job.failed):
                del self.jobs[name]


_memories: dict[str, _Memory] = {}
_memories_lock = threading.Lock()


class InProcessExecutor(LeaseQueue):
    """`inprocess://NAME`: every executor of this process with that name shares one queue.

    The queue ends with the process. Other processes, forked ones included, do not see it.
    """

    owns_process = False

    def __init__(self, url: str) -> None:
        self.url = url
        with _memories_lock:
            self._memory = _memories.setdefault(url.removeprefix("inprocess://"), _Memory())

    def submit(self, tasks: Iterable[Task]) -> int:
        """Queue tasks one by one; workers see each at once."""
        count = 0
        for task in tasks:
            with self._memory.lock:
                job = self._memory.jobs.setdefault(task.job, _JobQueue())
                if task.id in job.queued or task.id in job.leased:
                    continue
                job.failed.pop(task.id, None)
                job.queued[task.id] = task.to_json(), 0
                count += 1
        return count

    def counts(self, job: str) -> Counts:
        """Count a job's tasks by state; one whose lease ran out is queued again."""
        with self._memory.lock:
            return self._memory.job(job).counts(time.time())

    def jobs(self) -> dict[str, Counts]:
        """Count the tasks of every job on the queue."""
        with self._memory.lock:
            return {name: job.counts(time.time()) for name, job in self._memory.jobs.items()}

    def running(self, job: str) -> list[Running]:
        """List a job's tasks whose lease holds."""
        with self._memory.lock:
            return [
                Running(Task.from_json(leased.message), leased.attempt.worker, leased.since)
                for leased in self._memory.job(job).leased.values()
                if leased.expires >= time.time()
            ]

    def failed(self, job: str) -> list[Task]:
        """List a job's failed tasks."""
        with self._memory.lock:
            return [Task.from_json(message) for message in self._memory.job(job).failed.values()]

    def retry(self, job: str) -> int:
        """Queue a job's failed tasks afresh."""
        with self._memory.lock:
            found = self._memory.job(job)
            retried = {id: (message, 0) for id, message in found.failed.items()}
            found.queued.update(retried)
            found.failed.clear()
            return len(retried)

    def cancel(self, job: str) -> int:
        """Remove a job's tasks, and what is known of its blocks."""
        with self._memory.lock:
            removed = self._memory.jobs.pop(job, _JobQueue())
            return len(removed.queued) + len(removed.leased) + len(removed.failed)

    def release(self, worker: str, *, counted: bool = True) -> int:
        """End a worker's leases."""
        with self._memory.lock:
            held = [
                (job, id)
                for job in self._memory.jobs.values()
                for id, leased in job.leased.items()
                if leased.attempt.worker == worker
            ]
            for job, id in held[::-1]:
                job.end_attempt(id, counted=counted)
            return len(held)

    def record_contributions(
        self, job: str, contributions: Sequence[BlockContribution]
    ) -> list[Task]:
        """Record a chunk as contributor of blocks; return the finalize tasks of complete ones."""
        complete = []
        with self._memory.lock:
            if job not in self._memory.jobs:
                return []
            blocks = self._memory.jobs[job].blocks
            for block, member, of in contributions:
                missing = blocks.setdefault(block, set(range(of)))
                if missing and not missing - {member}:
                    complete.append(Task("finalize", job, block))
                missing.discard(member)
        return complete

    def reserve(self, options: WorkerOptions) -> Lease | None:
        """Lease one task: of the oldest job that has one, or return None."""
        with self._memory.lock:
            now = time.time()
            for job in self._memory.jobs.values():
                job.expire(now)
            for job in self._memory.chosen(options):
                while job.queued:
                    id, (message, attempts) = job.queued.popitem(last=False)
                    try:
                        task = Task.from_json(message)
                    except QueueError as error:
                        log.error("dropped from the queue: %s", error)
                        continue
                    attempt = Attempt(attempts + 1, options.worker)
                    expires = now + options.settings.lease
                    job.leased[id] = _Leased(message, attempt, now, expires)
                    return Lease(task, attempt, since=now)
            self._memory.remove_empty()
        return None

    def ack(self, lease: Lease) -> None:
        """Remove a finished task."""
        with self._memory.lock:
            job = self._held(lease)
            if job is not None:
                del job.leased[lease.task.id]
                self._memory.remove_empty()

    def nack(self, lease: Lease, error: BaseException) -> None:
        """End an attempt without success."""
        self._end(lease, counted=True)

    def requeue(self, lease: Lease) -> None:
        """Queue a task again as if it had not been tried."""
        self._end(lease, counted=False)

    def is_drained(self, options: WorkerOptions) -> bool:
        """Tell whether what a options works on has neither queued nor running tasks."""
        with self._memory.lock:
            return not any(job.queued or job.leased for job in self._memory.chosen(options))

    def renew(self, options: WorkerOptions, held: Sequence[Lease]) -> None:
        """Extend the leases that a worker holds."""
        with self._memory.lock:
            for lease in held:
                job = self._held(lease)
                if job is not None:
                    job.leased[lease.task.id].expires = time.time() + options.settings.lease

    def close(self) -> None:
        """Do nothing: the queue lives as long as the process."""

    def _held(self, lease: Lease) -> _JobQueue | None:
        """Return the job of a lease, or None if the task went to another worker."""
        job = self._memory.job(lease.task.job)
        leased = job.leased.get(lease.task.id)
        return job if leased is not None and leased.attempt is lease.attempt else None

    def _end(self, lease: Lease, *, counted: bool) -> None:
        with self._memory.lock:
            job = self._held(lease)
            if job is not None:
                job.end_attempt(lease.task.id, counted=counted)
