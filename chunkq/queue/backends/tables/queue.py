"""Queue in a task table of this process or of another one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import islice

from chunkq.errors import QueueError
from chunkq.job.tasks import JobId, Task
from chunkq.queue.backends.tables.contract import Skipped, Table
from chunkq.queue.contract.executor import (
    Attempt,
    Contribution,
    RunningTask,
    TaskCounts,
    WorkerOptions,
)
from chunkq.queue.leases.task_loop import Lease, LeaseQueue

log = logging.getLogger("chunkq.queue")

BATCH = 1000


class TableQueue(LeaseQueue):
    """Queue in a `Table`."""

    table: Table

    def submit(self, tasks: Iterable[Task]) -> int:
        """Queue tasks in transactions of 1000, so that workers can start immediately."""
        queued, stream = 0, iter(tasks)
        while batch := list(islice(stream, BATCH)):
            queued += self.table.submit(
                [(task.job, task.epoch, task.id, task.to_json()) for task in batch]
            )
        return queued

    def counts(self, job: JobId) -> TaskCounts:
        """Return the numbers of tasks of a job by state."""
        return TaskCounts(**self.table.counts(*job))

    def jobs(self) -> dict[JobId, TaskCounts]:
        """Return the numbers of tasks of every job on the queue."""
        return {
            JobId(path, epoch): TaskCounts(**counts) for path, epoch, counts in self.table.jobs()
        }

    def running(self, job: JobId) -> list[RunningTask]:
        """Return the tasks of a job whose leases have not expired."""
        return [
            RunningTask(Task.from_json(message), worker, since)
            for message, worker, since in self.table.running(*job)
        ]

    def failed(self, job: JobId) -> list[Task]:
        """Return the failed tasks of a job."""
        return [Task.from_json(message) for message in self.table.failed(*job)]

    def retry(self, job: JobId) -> int:
        """Queue the failed tasks of a job with all their attempts."""
        return self.table.retry(*job)

    def cancel(self, job: JobId) -> int:
        """Remove all tasks and gates of a job."""
        return self.table.cancel(*job)

    def close_gate(self, job: JobId, kind: str) -> None:
        """Make the queued tasks of a kind wait, one batch per transaction."""
        while self.table.close_gate(*job, kind):
            pass

    def open_gate(self, job: JobId, kind: str) -> None:
        """Queue the waiting tasks of a kind, one batch per transaction."""
        while self.table.open_gate(*job, kind):
            pass

    def waiting(self, options: WorkerOptions) -> list[tuple[JobId, str]]:
        """Return the jobs of a worker whose tasks only wait, with the first waiting kind."""
        rows = self.table.waiting(options.job, _skipped(options))
        return [(JobId(path, epoch), kind) for path, epoch, kind in rows]

    def release(self, worker: str, *, counted: bool = True) -> int:
        """End the leases of a worker."""
        return self.table.release(worker, counted)

    def extend(self, worker: str, seconds: float) -> None:
        """Make the leases of a worker last for at least `seconds` from now."""
        self.table.extend(worker, seconds)

    def reserve(self, options: WorkerOptions) -> Lease | None:
        """Lease one task, or return None if no task is available."""
        while row := self.table.reserve(
            options.worker, options.settings.lease, options.job, _skipped(options)
        ):
            path, epoch, id, message, attempts = row
            try:
                return Lease(Task.from_json(message), Attempt(attempts, options.worker))
            except QueueError as error:
                log.error("deleted from the queue: %s", error)
                self.table.delete(path, epoch, id)
        return None

    def ack(self, lease: Lease) -> None:
        """Delete a finished task, unless it is now leased to another worker."""
        self.table.ack(*_key(lease.task), lease.attempt.worker)

    def nack(self, lease: Lease, error: BaseException) -> None:
        """End an unsuccessful attempt."""
        self.table.nack(*_key(lease.task), lease.attempt.worker)

    def requeue(self, lease: Lease) -> None:
        """Queue a task without counting the attempt."""
        self.table.requeue(*_key(lease.task), lease.attempt.worker)

    def record_contributions(self, job: JobId, contributions: Sequence[Contribution]) -> list[Task]:
        """Record contributions of a committed task; return the tasks that this completes."""
        tasks = {c.task.id: c.task for c in contributions}
        rows = [(c.task.id, c.number, c.total) for c in contributions]
        return [tasks[id] for id in self.table.record_contributions(*job, rows)]

    def is_drained(self, options: WorkerOptions) -> bool:
        """Return whether the jobs of a worker have neither queued nor running tasks."""
        return self.table.is_drained(options.job, _skipped(options))

    def renew(self, options: WorkerOptions, leases: Sequence[Lease]) -> None:
        """Extend leases of a worker."""
        keys = [_key(lease.task) for lease in leases]
        self.table.renew(options.worker, keys, options.settings.lease)

    def close(self) -> None:
        """Close the connections."""
        self.table.close()


def _key(task: Task) -> tuple[str, str, str]:
    return task.job, task.epoch, task.id


def _skipped(options: WorkerOptions) -> Skipped:
    return sorted(options.skipped_jobs)
