"""Queue in the memory of a cluster's head process: the side of workers and producers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress

from chunkq.errors import QueueError
from chunkq.queue.backends.hosted.remote_table import RemoteTable
from chunkq.queue.backends.hosted.worker_group import RemoteWorkers
from chunkq.queue.backends.tables.queue import TableQueue
from chunkq.queue.contract.executor import WorkerOptions
from chunkq.queue.leases.task_loop import Lease

LOOK_SECONDS, ANSWER_LOOKS = 1.0, 30
"""Time of one look whether a response has come, and their number, after which none will come.

Looks are counted, not their time, because a process can be suspended while it waits.
"""


class HostedQueue(TableQueue):
    """Queue whose task table is called over the network."""

    table: RemoteTable

    def __init__(self, url: str) -> None:
        self.url = url
        self.table = RemoteTable(self.request, url)

    def renew(self, options: WorkerOptions, leases: Sequence[Lease]) -> None:
        """Extend leases of a worker. Ignore an unreachable head.

        The worker finishes the tasks in flight, because their commits count without the queue.
        """
        with suppress(QueueError):
            super().renew(options, leases)

    @abstractmethod
    def request(self, request: str) -> str:
        """Send a request to the host and return its response. Raises QueueError."""

    @abstractmethod
    def launch_remote_workers(
        self, job: str, *, gpu: bool, depth: int, threads: int | None = None
    ) -> RemoteWorkers:
        """Let the cluster start workers for a job in its processes, which outlive this process.

        `threads` is what the job sets.
        """
