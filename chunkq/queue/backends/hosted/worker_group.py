"""Groups of workers in processes of a cluster, which outlive the process that started them."""

from __future__ import annotations

import uuid

from chunkq.queue.backends.hosted.remote_table import GroupStatus, RemoteTable
from chunkq.queue.contract.executor import WorkerOptions


def new_group_name() -> str:
    """Return a new name for a group of remote workers."""
    return uuid.uuid4().hex[:8]


class RemoteWorkerOptions(WorkerOptions):
    """Options of a remote worker, which ends when its job is done or its group is stopped."""

    def __init__(self, table: RemoteTable, group: str, worker: str, job: str, depth: int) -> None:
        super().__init__(
            worker=worker,
            job=job,
            depth=depth,
            burst=True,
            on_loading=table.report_loading(worker),
        )
        self._table, self._group = table, group

    def can_start(self) -> bool:
        """Return whether the worker may reserve another task."""
        status = self._table.group_status(self._group)
        if status.is_stopped:
            self.stop.set()
        return super().can_start() and status.is_needed


class RemoteWorkers:
    """A group of remote workers that the cluster starts as they are needed.

    `has_room` is whether it has room for one at the start. `no_room` and `room` are lines for the
    user about a cluster that has none, and one that has some now.
    """

    def __init__(
        self, table: RemoteTable, name: str, *, has_room: bool, no_room: str, room: str
    ) -> None:
        self._table, self.name, self.url = table, name, table.url
        self.has_room, self.no_room, self.room = has_room, no_room, room

    def status(self) -> GroupStatus:
        """Return the state of the group."""
        return self._table.group_status(self.name)

    def messages(self) -> list[str]:
        """Return the error messages of workers that ended."""
        return self._table.group_status(self.name).messages

    def stop(self) -> None:
        """Make the workers finish their tasks in flight and end."""
        self._table.stop_group(self.name)
