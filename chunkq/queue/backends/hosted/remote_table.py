"""Calls to the queue in a cluster's head process, see `QueueHost`: one method per call."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from chunkq.errors import ErrorCode, QueueError
from chunkq.queue.backends.hosted.queue_host import VERSION
from chunkq.queue.backends.tables.contract import Skipped, Table


@dataclass(frozen=True)
class GroupStatus:
    """State of a group of remote workers.

    A worker without tasks ends if it is not needed, because all chunks that are left are running.
    The cluster starts others when more are queued. The group `is_over` when none runs or is needed.
    It `has_room` if the cluster has a thread, core or GPU for a worker, free or not; None before
    the first look. `lost_processes` of remote workers have ended since the head started.
    """

    is_stopped: bool
    is_needed: bool
    is_over: bool
    has_room: bool | None
    lost_processes: int
    ended: int
    messages: list[str]


class RemoteTable(Table):
    """The table of a head, and its calls for remote workers. Each method sends one request.

    `release` releases all workers of an owner, if `worker` is one.
    """

    def __init__(self, request: Callable[[str], str], url: str) -> None:
        self._request, self.url = request, url

    @override
    def submit(self, rows: Sequence[tuple[str, str, str, str]]) -> int:
        return int(self._call("submit", rows))

    @override
    def counts(self, path: str, epoch: str) -> dict[str, int]:
        return dict(self._call("counts", path, epoch))

    @override
    def jobs(self) -> list[tuple[str, str, dict[str, int]]]:
        return [(path, epoch, counts) for path, epoch, counts in self._call("jobs")]

    @override
    def running(self, path: str, epoch: str) -> list[tuple[str, str, float]]:
        return [(message, worker, s) for message, worker, s in self._call("running", path, epoch)]

    @override
    def failed(self, path: str, epoch: str) -> list[str]:
        return list(self._call("failed", path, epoch))

    @override
    def retry(self, path: str, epoch: str) -> int:
        return int(self._call("retry", path, epoch))

    @override
    def cancel(self, path: str, epoch: str) -> int:
        return int(self._call("cancel", path, epoch))

    @override
    def close_gate(self, path: str, epoch: str, kind: str) -> int:
        return int(self._call("close_gate", path, epoch, kind))

    @override
    def open_gate(self, path: str, epoch: str, kind: str) -> int:
        return int(self._call("open_gate", path, epoch, kind))

    @override
    def waiting(self, job: str | None, skipped_jobs: Skipped) -> list[tuple[str, str, str]]:
        rows = self._call("waiting", job, skipped_jobs)
        return [(path, epoch, kind) for path, epoch, kind in rows]

    @override
    def reserve(
        self, worker: str, lease: float, job: str | None, skipped_jobs: Skipped
    ) -> tuple[str, str, str, str, int] | None:
        row = self._call("reserve", worker, lease, job, skipped_jobs)
        if row is None:
            return None
        path, epoch, id, message, attempts = row
        return path, epoch, id, message, attempts

    @override
    def delete(self, path: str, epoch: str, id: str) -> None:
        self._call("delete", path, epoch, id)

    @override
    def ack(self, path: str, epoch: str, id: str, worker: str) -> int:
        return int(self._call("ack", path, epoch, id, worker))

    @override
    def nack(self, path: str, epoch: str, id: str, worker: str) -> None:
        self._call("nack", path, epoch, id, worker)

    @override
    def requeue(self, path: str, epoch: str, id: str, worker: str) -> None:
        self._call("requeue", path, epoch, id, worker)

    @override
    def record_contributions(
        self, path: str, epoch: str, contributions: Sequence[tuple[str, int, int]]
    ) -> list[str]:
        return list(self._call("record_contributions", path, epoch, contributions))

    @override
    def is_drained(self, job: str | None, skipped_jobs: Skipped) -> bool:
        return bool(self._call("is_drained", job, skipped_jobs))

    @override
    def renew(self, worker: str, leases: Sequence[tuple[str, str, str]], lease: float) -> None:
        self._call("renew", worker, leases, lease)

    @override
    def release(self, worker: str, counted: bool) -> int:
        return int(self._call("release", worker, counted))

    @override
    def extend(self, worker: str, seconds: float) -> None:
        self._call("extend", worker, seconds)

    def set_loading(self, worker: str, is_loading: bool) -> None:
        """Store whether a worker loads a network."""
        self._call("set_loading", worker, is_loading)

    def is_loading(self, owner: str) -> bool:
        """Return whether a worker of an owner loads a network."""
        return bool(self._call("is_loading", owner))

    def report_loading(self, worker: str) -> Callable[[bool], None]:
        """Return the function that a worker calls before and after it loads a network."""

        def report(is_loading: bool) -> None:
            with suppress(QueueError):  # the network is loaded without the queue, too
                self.set_loading(worker, is_loading)

        return report

    def register_worker(self, worker: str, owner: str, *, is_remote: bool = False) -> None:
        """Store the process that a worker ends with."""
        self._call("register_worker", worker, owner, is_remote)

    def start_group(
        self, name: str, job: str, url: str, depth: int, *, gpu: bool = False, cores: int = 1
    ) -> None:
        """Let the cluster start remote workers for a job folder, as many as are needed.

        Each has `depth` chunks in flight, and uses a GPU or a number of cores.
        """
        self._call("start_group", name, job, url, depth, gpu, cores)

    def group_status(self, name: str) -> GroupStatus:
        """Return the state of a group of remote workers."""
        return GroupStatus(**self._call("group_status", name))

    def stop_group(self, name: str) -> None:
        """Make remote workers finish their tasks in flight and end."""
        self._call("stop_group", name)

    def record_exit(self, name: str, messages: Sequence[str], worker: str) -> None:
        """Record that a remote worker has ended, with its error messages."""
        self._call("record_exit", name, messages, worker)

    def record_outage(self, name: str, messages: Sequence[str], worker: str) -> None:
        """Record that a remote worker has ended because it could not reach the queue."""
        self._call("record_outage", name, messages, worker)

    @override
    def close(self) -> None:
        """Do nothing: the executor closes its connection to the head."""

    def _call(self, name: str, *values: object) -> Any:
        """Return the result of a call. Raises QueueError."""
        request = {"method": name, "params": values, "version": VERSION}
        response = json.loads(self._request(json.dumps(request)))
        if "error" in response:
            raise QueueError(
                f"queue: {self.url}: {response['error']}",
                code=ErrorCode(response.get("code", ErrorCode.QUEUE_UNAVAILABLE)),
            )
        return response["result"]
