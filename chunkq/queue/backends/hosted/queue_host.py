"""Queue in the memory of a cluster's head process: the side of the head.

The head is the scheduler of Dask, or an actor of Ray. Requests and responses are JSON texts,
independent of the serialization of the cluster. If the head is lost, so is the queue; the ledger
stores which chunks are done.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from chunkq.errors import ErrorCode, QueueError
from chunkq.queue.backends.tables.task_table import TaskTable

VERSION = version("chunkq")
LOST_WORKER_LEASE = 2.0
"""Remaining lease time (s) of a worker whose process or node the cluster has lost."""


@dataclass
class _WorkerGroup:
    """Remote workers of a job: whether to stop, how many have ended, and their error messages."""

    is_stopped: bool = False
    ended: int = 0
    messages: list[str] = field(default_factory=list)


class QueueHost:
    """The task table, the owners of workers, and worker groups."""

    def __init__(self) -> None:
        self._table = TaskTable(":memory:")
        self._workers: defaultdict[str, set[str]] = defaultdict(set)
        self._groups: defaultdict[str, _WorkerGroup] = defaultdict(_WorkerGroup)
        table = self._table
        self._calls: dict[str, Callable[..., Any]] = {
            "submit": table.submit,
            "counts": table.counts,
            "jobs": table.jobs,
            "running": table.running,
            "failed": table.failed,
            "retry": table.retry,
            "cancel": table.cancel,
            "close_gate": table.close_gate,
            "open_gate": table.open_gate,
            "waiting": table.waiting,
            "reserve": table.reserve,
            "delete": table.delete,
            "ack": table.ack,
            "nack": table.nack,
            "requeue": table.requeue,
            "record_contributions": table.record_contributions,
            "is_drained": table.is_drained,
            "renew": table.renew,
            "release": self.release,
            "register_worker": self.register_worker,
            "group_status": self.group_status,
            "stop_group": self.stop_group,
            "record_exit": self.record_exit,
        }

    def close(self) -> None:
        """Delete the queue."""
        self._table.close()

    def answer(self, request: str) -> str:
        """Run the call {"method": NAME, "params": [...], "version": ...} -> {"result": ...}.

        The response to a failed call is {"error": LINE, "code": ERROR_CODE}.
        """
        values = json.loads(request)
        if values["version"] != VERSION:
            return _error_response(
                f"the cluster runs chunkq {VERSION}, but this process runs chunkq "
                f"{values['version']}; install the same version everywhere",
                ErrorCode.QUEUE_VERSION_MISMATCH,
            )
        call = self._calls.get(values["method"])
        if call is None:
            return _error_response(
                f"unsupported operation {values['method']!r}", ErrorCode.QUEUE_UNAVAILABLE
            )
        try:
            return json.dumps({"result": call(*values["params"])})
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
        """Return the state of a group of remote workers, see `GroupStatus`."""
        return asdict(self._groups[name])

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
