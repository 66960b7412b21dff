"""A queue kept by the head of a cluster, in its memory: by Dask's scheduler, by an actor of Ray's.

Requests and answers are JSON, whatever the cluster itself sends them in. A head that is lost has
lost the queue; the ledger says what is left.
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

from chunkq.errors import QueueError
from chunkq.executors.base import WorkerOptions
from chunkq.executors.leases import Lease
from chunkq.executors.tables import TableQueue, TaskTable
from chunkq.tasks import run_worker

VERSION = version("chunkq")
LOST_NODE_LEASE = 2.0
"""How long the tasks of a worker that the cluster has lost are still its own."""
TABLE_OPERATIONS = frozenset(
    name for name, kind in vars(TaskTable).items() if callable(kind) and name[0] != "_"
) - {"close"}


@dataclass
class _WorkerGroup:
    """Workers hired for a job: how many have left, what they said on leaving."""

    is_stopped: bool = False
    ended: int = 0
    lines: list[str] = field(default_factory=list)


class QueueHost:
    """The head's side: the table, who works where, and the workers hired."""

    _OWN: ClassVar[frozenset[str]] = frozenset(
        {"release", "register_worker", "group_status", "stop_group", "record_exit"}
    )

    def __init__(self) -> None:
        self._table = TaskTable(":memory:")
        self._homes: defaultdict[str, set[str]] = defaultdict(set)
        self._groups: defaultdict[str, _WorkerGroup] = defaultdict(_WorkerGroup)

    def close(self) -> None:
        """Forget the queue."""
        self._table.close()

    def answer(self, request: str) -> str:
        """Do what is asked: {"do": NAME, "with": [...], "version": ...} -> {"is": ...}.

        What goes wrong is said in the answer, as {"error": LINE}.
        """
        asked = json.loads(request)
        if asked["version"] != VERSION:
            return json.dumps(
                {
                    "error": f"is kept by chunkq {VERSION}, and here is chunkq "
                    f"{asked['version']}; install one version everywhere"
                }
            )
        name = asked["do"]
        owner = self if name in self._OWN else self._table if name in TABLE_OPERATIONS else None
        if owner is None:
            return json.dumps({"error": f"knows no {name!r}"})
        try:
            done = {"is": getattr(owner, name)(*asked["with"])}
        except QueueError as error:
            done = {"error": str(error)}
        return json.dumps(done)

    def release(self, worker: str, counted: bool) -> int:
        """Hand back what a worker held, or those whose home it is; returns how many tasks."""
        return sum(
            self._table.release(name, counted) for name in {worker, *self._homes.pop(worker, ())}
        )

    def register_worker(self, worker: str, home: str) -> None:
        """Remember that a worker lives and dies with its home."""
        self._homes[home].add(worker)

    def node_lost(self, home: str) -> None:
        """Give up soon on what a vanished home's workers held.

        Not at once: their supervisor, if there is one, knows whether their tries count.
        """
        for worker in self._homes.pop(home, ()):
            self._table.shorten(worker, LOST_NODE_LEASE)

    def group_status(self, name: str) -> dict[str, Any]:
        """Tell how hired workers stand."""
        return vars(self._groups[name])

    def stop_group(self, name: str) -> None:
        """Have hired workers finish what is in flight and leave."""
        self._groups[name].is_stopped = True

    def record_exit(self, name: str, lines: list[str]) -> None:
        """Note that a hired worker has left, and why if not for want of work."""
        group = self._groups[name]
        group.ended += 1
        group.lines += [line for line in lines if line not in group.lines]


class _RemoteTable:
    """A host's operations as methods."""

    def __init__(self, ask: Callable[[str], str], where: str) -> None:
        self._ask, self._where = ask, where

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, name)

    def _call(self, name: str, *values: Any) -> Any:
        request = {"do": name, "with": values, "version": VERSION}
        answer = json.loads(self._ask(json.dumps(request)))
        if "error" in answer:
            raise QueueError(f"queue: {self._where} {answer['error']}")
        return answer["is"]


class HostedQueue(TableQueue):
    """The workers' and producers' side."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host: Any = _RemoteTable(self.request, url)
        self.table = cast(TaskTable, self.host)

    def renew(self, options: WorkerOptions, held: Sequence[Lease]) -> None:
        """Put off the end of a worker's leases; while the head is away there is nothing to do.

        What is in flight is finished: its commit counts, whatever becomes of the queue.
        """
        with suppress(QueueError):
            super().renew(options, held)

    @abstractmethod
    def request(self, request: str) -> str:
        """Send a request to the host and return its answer; raises QueueError if it is away."""

    @abstractmethod
    def launch_remote_workers(
        self, job: str, *, gpu: bool, depth: int, nodes: int = 1
    ) -> RemoteWorkers:
        """Have processes of the cluster's own do a job; they go on without this one.

        `nodes` of the cluster are waited for, for a while. Raises QueueError if it has none.
        """


class RemoteWorkerOptions(WorkerOptions):
    """The options of a hired worker: until its job is done, or it is dismissed."""

    def __init__(self, queue: HostedQueue, group: str, worker: str, job: str, depth: int) -> None:
        super().__init__(worker=worker, job=job, depth=depth, burst=True)
        self._queue, self._group = queue, group

    def can_start(self) -> bool:
        """Tell whether another task may be begun."""
        if self._queue.host.group_status(self._group)["is_stopped"]:
            self.stop.set()
        return super().can_start()


class RemoteWorkers:
    """Workers hired through a host: `count` of them."""

    def __init__(self, queue: HostedQueue, name: str, count: int) -> None:
        self._queue, self.name, self.count = queue, name, count

    def have_ended(self) -> bool:
        """Tell whether all of them have left."""
        return bool(self._queue.host.group_status(self.name)["ended"] >= self.count)

    def messages(self) -> list[str]:
        """Return why workers left, if not for want of work."""
        lines: list[str] = self._queue.host.group_status(self.name)["lines"]
        return lines

    def stop(self) -> None:
        """Have them finish what is in flight and leave."""
        self._queue.host.stop_group(self.name)


def run_remote_worker(queue: HostedQueue, group: str, worker: str, job: str, depth: int) -> None:
    """Work as one of a group, in a process of the cluster's."""
    ended = run_worker(queue, RemoteWorkerOptions(queue, group, worker, job, depth))
    queue.host.record_exit(group, ended.lines)


def current_device() -> str:
    """Return what a worker process of the cluster's is pinned to, for its name."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").strip(" ,") or "cpu"


def new_group_name() -> str:
    """Return a name for workers hired together."""
    return uuid.uuid4().hex[:8]
