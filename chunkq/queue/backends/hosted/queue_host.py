"""Queue in the memory of a cluster's head process: the side of the head.

The head is the scheduler of Dask, or an actor of Ray. Requests and responses are JSON texts,
independent of the serialization of the cluster. If the head is lost, so is the queue; the ledger
stores which chunks are done.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from chunkq.errors import ErrorCode, QueueError
from chunkq.job.tasks import Task, chunk_name
from chunkq.queue.backends.tables.contract import Skipped
from chunkq.queue.backends.tables.task_table import TaskTable

VERSION = version("chunkq")
LOADING_LEASE = 300.0
"""Lease time (s) of a worker that loads a network and cannot renew its leases meanwhile."""
MAX_LOADING_DEATHS = 3
"""How often a process may die while it loads a network before its attempts count."""
LOST_WORKER_LEASE = 2.0
"""Remaining lease time (s) of a worker whose process or node the cluster has lost."""
MAX_OUTAGES, OUTAGES_SECONDS = 3, 60.0
"""How often, and for how long, workers may end because they could not reach the queue, without a
finished task in between, before their messages count as errors."""


@dataclass
class WorkerGroup:
    """Remote workers of a job: whether to stop, how many have ended, and their error messages.

    A cluster that starts them as they are needed sets `job`, the `url` of the queue, the `depth` of
    each, what each uses (a `gpu`, or a number of `cores`), how many are `active`, and whether it
    `has_room` for one; both are None before the first look.

    Since the time `outages_since` (s, monotonic), `outages` workers have ended because they could
    not reach the queue; `done_before` tasks were done then.
    """

    job: str = ""
    url: str = ""
    depth: int = 1
    gpu: bool = False
    cores: int = 1
    active: int | None = None
    has_room: bool | None = None
    outages: int = 0
    outages_since: float = 0.0
    done_before: int = -1
    is_stopped: bool = False
    ended: int = 0
    messages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class JobProgress:
    """Tasks of a job, as the dashboard of a cluster shows them: `done` since the head started."""

    path: str
    epoch: str
    done: int
    queued: int
    running: int
    waiting: int
    failed: int

    @property
    def output(self) -> str:
        """Path of the output."""
        return self.path.removesuffix(".chunkq")


class QueueHost:
    """The task table, the owners of workers, and worker groups."""

    def __init__(self) -> None:
        self._table = TaskTable(":memory:", _steady_clock())
        self._done: Counter[tuple[str, str]] = Counter()
        self._loading: set[str] = set()
        self._loading_deaths: Counter[str] = Counter()
        self._workers: defaultdict[str, set[str]] = defaultdict(set)
        self._lost_processes = 0
        self._leaving: dict[str, float] = {}
        """Remote worker whose process has ended -> time (s, monotonic) until which it may report
        that it leaves in order."""
        self._expected: dict[str, float] = {}
        """Remote worker -> time (s, monotonic) until which it sends a request, if it runs."""
        self._groups: defaultdict[str, WorkerGroup] = defaultdict(WorkerGroup)
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
            "reserve": self.reserve,
            "delete": table.delete,
            "ack": self.ack,
            "nack": table.nack,
            "requeue": table.requeue,
            "record_contributions": table.record_contributions,
            "is_drained": table.is_drained,
            "renew": self.renew,
            "release": self.release,
            "extend": self.extend,
            "set_loading": self.set_loading,
            "is_loading": self.is_loading,
            "register_worker": self.register_worker,
            "start_group": self.start_group,
            "group_status": self.group_status,
            "stop_group": self.stop_group,
            "record_exit": self.record_exit,
            "record_outage": self.record_outage,
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

    def reserve(
        self, worker: str, lease: float, job: str | None, skipped_jobs: Skipped
    ) -> tuple[str, str, str, str, int] | None:
        """Lease one task to a worker, see `Table`."""
        self._expect(worker, lease)
        return self._table.reserve(worker, lease, job, skipped_jobs)

    def renew(self, worker: str, leases: Sequence[tuple[str, str, str]], lease: float) -> None:
        """Extend leases of a worker."""
        self._expect(worker, lease)
        self._table.renew(worker, leases, lease)

    def _expect(self, worker: str, seconds: float) -> None:
        if worker in self._expected:
            self._expected[worker] = time.monotonic() + seconds

    def ack(self, path: str, epoch: str, id: str, worker: str) -> int:
        """Delete a finished task; return how many tasks that were."""
        count = self._table.ack(path, epoch, id, worker)
        self._done[path, epoch] += count
        return count

    def progress(self) -> list[JobProgress]:
        """Return the progress of the jobs that have tasks, or had some since this head started."""
        counts = {(path, epoch): states for path, epoch, states in self._table.jobs()}
        rows = []
        for job in dict.fromkeys((*counts, *self._done)):
            states = counts.get(job, {})
            numbers = [states.get(name, 0) for name in ("queued", "running", "waiting", "failed")]
            rows.append(JobProgress(*job, self._done[job], *numbers))
        return rows

    def running(self) -> list[tuple[str, str, float]]:
        """Return job path and chunk, worker and age (s) of the running tasks of all jobs."""
        now = time.time()
        rows = []
        for path, epoch, _ in self._table.jobs():
            for message, worker, since in self._table.running(path, epoch):
                task = Task.from_dict(json.loads(message))
                name = f"{path.removesuffix('.chunkq')} {task.kind} {chunk_name(task.chunk)}"
                rows.append((name, worker, max(0.0, now - since)))
        return rows

    def release(self, worker: str, counted: bool) -> int:
        """Requeue the tasks of a worker, or of all workers of an owner; return how many tasks."""
        names = {worker, *self._workers.pop(worker, ())}
        self._loading -= names
        self._forget(names)
        for name in names:
            self._leaving.pop(name, None)
        return sum(self._table.release(name, counted) for name in names)

    def extend(self, worker: str, seconds: float) -> None:
        """Make the leases of a worker, or of all workers of an owner, last for `seconds`."""
        for name in {worker, *self._workers.get(worker, ())}:
            self._table.extend(name, seconds)

    def set_loading(self, worker: str, is_loading: bool) -> None:
        """Store whether a worker loads a network. Its leases are longer then.

        No other process renews them, and the cluster reports that a worker is lost.
        """
        if is_loading:
            self._loading.add(worker)
            self._expect(worker, LOADING_LEASE)
            self._table.extend(worker, LOADING_LEASE)
        else:
            self._loading.discard(worker)

    def is_loading(self, owner: str) -> bool:
        """Return whether a worker of an owner loads a network."""
        return not self._loading.isdisjoint(self._workers.get(owner, ()))

    def register_worker(self, worker: str, owner: str, is_remote: bool = False) -> None:
        """Store the process that a worker ends with: a Dask worker, or the parent of an actor."""
        self._workers[owner].add(worker)
        if is_remote:  # it imports its libraries first
            self._expected[worker] = time.monotonic() + LOADING_LEASE

    def is_silent(self, owner: str) -> bool:
        """Return whether no worker of a process sends requests, because it is suspended.

        Its leases have ended, so others compute its chunks.
        """
        workers = self._workers.get(owner, set())
        times = [self._expected[name] for name in workers & self._expected.keys()]
        return bool(times) and max(times) < time.monotonic()

    def expire_workers(self, owner: str) -> bool:
        """Shorten the leases of the workers of a process that ended or was lost.

        They do not end immediately, because a supervisor may release the worker first, and decides
        whether its attempts count. Attempts of a worker that was loading its network do not count,
        unless the process dies again and again. Return whether a worker had its network.
        """
        workers = self._workers.pop(owner, set())
        lost_at = time.monotonic() + LOST_WORKER_LEASE
        self._leaving |= dict.fromkeys(workers & self._expected.keys(), lost_at)
        self._forget(workers)
        for worker in workers - self._loading:
            self._table.shorten(worker, LOST_WORKER_LEASE)
        has_worked = bool(workers - self._loading)
        for worker in workers & self._loading:
            self._loading.discard(worker)
            self._loading_deaths[owner] += 1
            counted = self._loading_deaths[owner] > MAX_LOADING_DEATHS
            self._table.release(worker, counted)
        return has_worked

    def start_group(self, name: str, job: str, url: str, depth: int, gpu: bool, cores: int) -> None:
        """Let the cluster start remote workers for a job folder, as many as are needed."""
        self._groups[name] = WorkerGroup(job, url, depth, gpu, cores)

    def group(self, name: str) -> WorkerGroup:
        """Return a group of remote workers."""
        return self._groups[name]

    def tasks_done(self) -> int:
        """Return how many tasks of all jobs were done since this head started."""
        return self._done.total()

    def has_work(self) -> bool:
        """Return whether any task is queued, waiting or running."""
        return self._table.has_work()

    def open_groups(self) -> list[str]:
        """Return the groups that the cluster starts workers for and that are not over."""
        return [
            name for name, group in self._groups.items() if group.job and not self._is_over(group)
        ]

    def set_active(self, name: str, count: int, *, has_room: bool) -> None:
        """Store how many remote workers of a group run or wait, and whether one has room.

        Those that are silent are left out.
        """
        self._groups[name].active, self._groups[name].has_room = count, has_room

    def wanted_workers(self, name: str, active: int, limit: int) -> int:
        """Return how many remote workers a group can use, of which `active` ones run chunks.

        Each one has `depth` chunks; there are at most `limit` in total. Chunks that run may belong
        to the active ones.
        """
        group = self._groups[name]
        if group.is_stopped or group.messages:
            return 0
        queued, running = self._table.demand(group.job, limit * group.depth)
        wanted = -(-queued // group.depth) + min(-(-running // group.depth), active)
        return min(wanted, limit)

    def _is_over(self, group: WorkerGroup) -> bool:
        if group.active != 0:
            return False
        return (
            group.is_stopped or bool(group.messages) or self._table.demand(group.job, 1) == (0, 0)
        )

    def group_status(self, name: str) -> dict[str, Any]:
        """Return the state of a group of remote workers, see `GroupStatus`."""
        group = self._groups[name]
        queued, running = self._table.demand(group.job, 1) if group.job else (1, 0)
        return {
            "is_stopped": group.is_stopped,
            "is_needed": bool(queued) or not running,
            "is_over": self._is_over(group),
            "has_room": group.has_room,
            "lost_processes": self._count_lost(),
            "ended": group.ended,
            "messages": group.messages,
        }

    def _count_lost(self) -> int:
        """Return how many processes of remote workers have died since this head started."""
        lost = [name for name, until in self._leaving.items() if until < time.monotonic()]
        for name in lost:
            del self._leaving[name]
        self._lost_processes += len(lost)
        return self._lost_processes

    def stop_group(self, name: str) -> None:
        """Make remote workers finish their tasks in flight and end."""
        self._groups[name].is_stopped = True

    def record_exit(self, name: str, messages: list[str], worker: str = "") -> None:
        """Record that a remote worker has ended, with its error messages."""
        group = self._groups[name]
        group.ended += 1
        group.messages += [message for message in messages if message not in group.messages]
        self._forget([worker])

    def record_outage(self, name: str, messages: list[str], worker: str = "") -> None:
        """Record that a remote worker has ended because it could not reach this queue.

        It can again, so its messages are errors only if this happens again and again.
        """
        group, done = self._groups[name], self.tasks_done()
        if group.done_before != done:
            group.done_before, group.outages, group.outages_since = done, 0, time.monotonic()
        group.outages += 1
        lasts = time.monotonic() - group.outages_since > OUTAGES_SECONDS
        is_error = lasts and group.outages > MAX_OUTAGES
        self.record_exit(name, messages if is_error else [], worker)

    def _forget(self, workers: Iterable[str]) -> None:
        for worker in workers:
            self._expected.pop(worker, None)


def _steady_clock() -> Callable[[], float]:
    """Return a clock that starts with the current time (s, Unix) and is never put forward or back.

    The leases of the queue end as if the clock of its machine was right.
    """
    offset = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset


def _error_response(message: str, code: ErrorCode) -> str:
    return json.dumps({"error": message, "code": code})
