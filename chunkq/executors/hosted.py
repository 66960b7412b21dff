"""Queue in the memory of a cluster's head process: the scheduler of Dask, or an actor of Ray.

Requests and responses are JSON texts, independent of the serialization of the cluster. If the head
is lost, so is the queue; the ledger stores which chunks are done.
"""

from __future__ import annotations

import json
import os
import uuid
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar, cast

from chunkq.errors import ErrorCode, QueueError
from chunkq.executors.base import WorkerOptions
from chunkq.executors.leases import Lease
from chunkq.executors.tables import TableQueue, TaskTable
from chunkq.tasks import run_worker

VERSION = version("chunkq")
LOST_WORKER_LEASE = 2.0
"""Remaining lease time (s) of a worker whose process or node the cluster has lost."""
TABLE_OPERATIONS = frozenset(
    name for name, kind in vars(TaskTable).items() if callable(kind) and name[0] != "_"
) - {"close"}


@dataclass
class _WorkerGroup:
    """Remote workers of a job: whether to stop, how many have ended, and their error messages."""

    is_stopped: bool = False
    ended: int = 0
    messages: list[str] = field(default_factory=list)


class QueueHost:
    """Server side, in the head process: the task table, owners of workers, worker groups."""

    _OPERATIONS: ClassVar[frozenset[str]] = frozenset(
        {"release", "register_worker", "group_status", "stop_group", "record_exit"}
    )

    def __init__(self) -> None:
        self._table = TaskTable(":memory:")
        self._workers: defaultdict[str, set[str]] = defaultdict(set)
        self._groups: defaultdict[str, _WorkerGroup] = defaultdict(_WorkerGroup)

    def close(self) -> None:
        """Delete the queue."""
        self._table.close()

    def answer(self, request: str) -> str:
        """Run the operation {"method": NAME, "params": [...], "version": ...} -> {"result": ...}.

        The response to a failed operation is {"error": LINE, "code": ERROR_CODE}.
        """
        values = json.loads(request)
        if values["version"] != VERSION:
            return _error_response(
                f"the cluster runs chunkq {VERSION}, but this process runs chunkq "
                f"{values['version']}; install the same version everywhere",
                ErrorCode.QUEUE_VERSION_MISMATCH,
            )
        name = values["method"]
        if name in self._OPERATIONS:
            target: object = self
        elif name in TABLE_OPERATIONS:
            target = self._table
        else:
            return _error_response(f"unsupported operation {name!r}", ErrorCode.QUEUE_UNAVAILABLE)
        try:
            return json.dumps({"result": getattr(target, name)(*values["params"])})
        except QueueError as error:
            return _error_response(str(error), error.code)

    def release(self, worker: str, counted: bool) -> int:
        """Requeue the tasks of a worker, or of all workers of an owner; return how many tasks."""
        return sum(
            self._table.release(name, counted) for name in {worker, *self._workers.pop(worker, ())}
        )

    def register_worker(self, worker: str, owner: str) -> None:
        """Store the process that a worker ends with: a Dask worker, or the parent of an actor."""
        self._workers[owner].add(worker)

    def expire_workers(self, owner: str) -> None:
        """Shorten the leases of the workers of a process that ended or was lost.

        They do not end immediately, because a supervisor may release the worker first, and decides
        whether its attempts count.
        """
        for worker in self._workers.pop(owner, ()):
            self._table.shorten(worker, LOST_WORKER_LEASE)

    def group_status(self, name: str) -> dict[str, Any]:
        """Return the state of a group of remote workers."""
        return vars(self._groups[name])

    def stop_group(self, name: str) -> None:
        """Make remote workers finish their tasks in flight and end."""
        self._groups[name].is_stopped = True

    def record_exit(self, name: str, messages: list[str]) -> None:
        """Record that a remote worker has ended, with its error messages."""
        group = self._groups[name]
        group.ended += 1
        group.messages += [message for message in messages if message not in group.messages]


def _error_response(message: str, code: ErrorCode) -> str:
    return json.dumps({"error": message, "code": code})


class _RemoteTable:
    """Operations of a host as methods that send requests to it."""

    def __init__(self, request: Callable[[str], str], url: str) -> None:
        self._request, self._url = request, url

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, name)

    def _call(self, name: str, *values: Any) -> Any:
        request = {"method": name, "params": values, "version": VERSION}
        response = json.loads(self._request(json.dumps(request)))
        if "error" in response:
            raise QueueError(
                f"queue: {self._url}: {response['error']}",
                code=ErrorCode(response.get("code", ErrorCode.QUEUE_UNAVAILABLE)),
            )
        return response["result"]


class HostedQueue(TableQueue):
    """Client side, in workers and producers."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host: Any = _RemoteTable(self.request, url)
        self.table = cast(TaskTable, self.host)

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
        self, job: str, *, gpu: bool, depth: int, nodes: int = 1
    ) -> RemoteWorkers:
        """Start workers for a job in processes of the cluster, which outlive this process.

        Wait a limited time until the cluster has `nodes` nodes. Raises QueueError if it has no
        free workers or GPUs.
        """


class RemoteWorkerOptions(WorkerOptions):
    """Options of a remote worker, which ends when its job is done or its group is stopped."""

    def __init__(self, queue: HostedQueue, group: str, worker: str, job: str, depth: int) -> None:
        super().__init__(worker=worker, job=job, depth=depth, burst=True)
        self._queue, self._group = queue, group

    def can_start(self) -> bool:
        """Return whether the worker may reserve another task."""
        if self._queue.host.group_status(self._group)["is_stopped"]:
            self.stop.set()
        return super().can_start()


class RemoteWorkers:
    """A group of `count` remote workers."""

    def __init__(self, queue: HostedQueue, name: str, count: int) -> None:
        self._queue, self.name, self.count = queue, name, count

    def have_ended(self) -> bool:
        """Return whether all workers have ended."""
        return bool(self._queue.host.group_status(self.name)["ended"] >= self.count)

    def messages(self) -> list[str]:
        """Return the error messages of workers that ended."""
        messages: list[str] = self._queue.host.group_status(self.name)["messages"]
        return messages

    def stop(self) -> None:
        """Make the workers finish their tasks in flight and end."""
        self._queue.host.stop_group(self.name)


def run_remote_worker(queue: HostedQueue, group: str, worker: str, job: str, depth: int) -> None:
    """Run a worker of a group in this process of the cluster."""
    status = run_worker(queue, RemoteWorkerOptions(queue, group, worker, job, depth))
    queue.host.record_exit(group, status.lines)


def current_device() -> str:
    """Return the device of this process of the cluster, for the name of its worker."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").strip(" ,") or "cpu"


def new_group_name() -> str:
    """Return a new name for a group of remote workers."""
    return uuid.uuid4().hex[:8]
