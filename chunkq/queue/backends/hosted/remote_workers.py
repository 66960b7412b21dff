"""Run a worker in a process of a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import entry_points

from chunkq.errors import ErrorCode, QueueError
from chunkq.job.tasks import Task
from chunkq.queue.backends.hosted.hosted import HostedQueue
from chunkq.queue.backends.hosted.worker_group import RemoteWorkerOptions
from chunkq.queue.contract.executor import EXIT_QUEUE_UNREACHABLE, Serve

ENTRY_POINT_GROUP = "chunkq.worker"
SERVE = "serve"
"""Entry point for the function that runs a worker in a process of a cluster, see `Serve`."""


def load_serve() -> Serve:
    """Return the function that runs a worker, from the installed worker package.

    Raises QueueError if this environment has none.
    """
    for entry_point in entry_points(group=ENTRY_POINT_GROUP, name=SERVE):
        serve: Serve = entry_point.load()
        return serve
    raise QueueError(
        f"queue: no installed package has the entry point {ENTRY_POINT_GROUP}:{SERVE}; run pip "
        "install chunkq in the environment of the worker",
        code=ErrorCode.PACKAGE_MISSING,
    )


def run_remote_worker(
    queue: HostedQueue,
    group: str,
    worker: str,
    job: str,
    depth: int,
    on_success: Callable[[Task], None] = lambda task: None,
) -> None:
    """Run a worker of a group in this process of the cluster."""
    options = RemoteWorkerOptions(queue.table, group, worker, job, depth)
    options.on_success = on_success
    status = load_serve()(queue, options)
    table = queue.table
    is_outage = status.code == EXIT_QUEUE_UNREACHABLE
    (table.record_outage if is_outage else table.record_exit)(group, status.lines, worker)


def is_outage(error: BaseException) -> bool:
    """Return whether a remote worker ended because it could not reach the queue."""
    return isinstance(error, QueueError) and error.code is ErrorCode.QUEUE_UNAVAILABLE


def current_device() -> str:
    """Return the device of this process of the cluster, for the name of its worker."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").strip(" ,") or "cpu"
