"""Interface of a task table: what a queue asks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

Skipped = Sequence[tuple[str, str]]
"""Paths and epochs of the jobs that a worker does not reserve tasks of."""


class Table(ABC):
    """Tasks with their states and leases, in this process or in a cluster's head.

    `path` and `epoch` identify a job; they, `id` and `message` of a task are text. Times are Unix
    times (s). Arguments and results are JSON values. Ending a lease has no effect if the task is
    now leased to another worker. Methods raise QueueError.
    """

    @abstractmethod
    def submit(self, rows: Sequence[tuple[str, str, str, str]]) -> int:
        """Queue (path, epoch, id, message) rows in one transaction; return how many are new."""

    @abstractmethod
    def counts(self, path: str, epoch: str) -> dict[str, int]:
        """Return the numbers of tasks of a job by state; a task with an expired lease is queued."""

    @abstractmethod
    def jobs(self) -> list[tuple[str, str, dict[str, int]]]:
        """Return path, epoch and numbers of tasks by state of each job; see `counts`."""

    @abstractmethod
    def running(self, path: str, epoch: str) -> list[tuple[str, str, float]]:
        """Return message, worker and start time of the tasks of a job with unexpired leases."""

    @abstractmethod
    def failed(self, path: str, epoch: str) -> list[str]:
        """Return the messages of the failed tasks of a job."""

    @abstractmethod
    def retry(self, path: str, epoch: str) -> int:
        """Queue the failed tasks of a job with all their attempts."""

    @abstractmethod
    def cancel(self, path: str, epoch: str) -> int:
        """Delete the tasks and gates of a job; return how many tasks."""

    @abstractmethod
    def close_gate(self, path: str, epoch: str, kind: str) -> int:
        """Close a gate and make a batch of queued tasks wait; return how many.

        Call it until it returns 0.
        """

    @abstractmethod
    def open_gate(self, path: str, epoch: str, kind: str) -> int:
        """Open a gate and queue a batch of waiting tasks; return how many.

        Call it until it returns 0. The gate is open for tasks that are submitted meanwhile, and
        deleted at the end.
        """

    @abstractmethod
    def waiting(self, job: str | None, skipped_jobs: Skipped) -> list[tuple[str, str, str]]:
        """Return path, epoch and first waiting kind of the jobs whose tasks only wait."""

    @abstractmethod
    def release(self, worker: str, counted: bool) -> int:
        """End the leases of a worker. A second call has no effect."""

    @abstractmethod
    def extend(self, worker: str, seconds: float) -> None:
        """Make the leases of a worker end at least `seconds` from now."""

    @abstractmethod
    def reserve(
        self, worker: str, lease: float, job: str | None, skipped_jobs: Skipped
    ) -> tuple[str, str, str, str, int] | None:
        """Lease one task for `lease` seconds: of the path `job`, if set, and no skipped job.

        Return path and epoch of its job, its id, message and the number of this attempt, or None.
        """

    @abstractmethod
    def delete(self, path: str, epoch: str, id: str) -> None:
        """Delete a message that is not a task."""

    @abstractmethod
    def ack(self, path: str, epoch: str, id: str, worker: str) -> int:
        """Delete a finished task; return how many tasks that were, 0 or 1."""

    @abstractmethod
    def nack(self, path: str, epoch: str, id: str, worker: str) -> None:
        """End an unsuccessful attempt."""

    @abstractmethod
    def requeue(self, path: str, epoch: str, id: str, worker: str) -> None:
        """Queue a task without counting the attempt."""

    @abstractmethod
    def record_contributions(
        self, path: str, epoch: str, contributions: Sequence[tuple[str, int, int]]
    ) -> list[str]:
        """Record committed contributors, each as (id of a task, number, total number for the task).

        Return the tasks that this completes; each is returned to one caller only.
        """

    @abstractmethod
    def is_drained(self, job: str | None, skipped_jobs: Skipped) -> bool:
        """Return whether the jobs selected as in `reserve` have no queued or running tasks."""

    @abstractmethod
    def renew(self, worker: str, leases: Sequence[tuple[str, str, str]], lease: float) -> None:
        """Extend leases of a worker, as (path, epoch, id), to `lease` seconds from now.

        A lease with the name of the worker that is not in `leases` expires: the worker never
        received the response to its `reserve`.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connections of all threads."""
