"""The backends of the queue that tests run on.

A new backend adds an entry to LOCAL or CLUSTERS and runs the whole contract. The entry has the
functions that access the backend directly.
"""

import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from chunkq.queue.backends.hosted.hosted import HostedQueue
from chunkq.queue.backends.inprocess import InProcessExecutor, _JobQueue
from chunkq.queue.backends.rq.names import queue_name, stored_job
from chunkq.queue.registry import open_executor
from tests.harness.queue_workers import JOB


@dataclass(frozen=True)
class Backend:
    """A backend: create the URL of a new queue, and insert a raw message into a queue."""

    name: str
    make_url: Callable[[Path, pytest.FixtureRequest], str]
    insert: Callable[[str, str | bytes], None]


def insert_into_sqlite(url: str, message: str | bytes) -> None:
    with sqlite3.connect(url.removeprefix("sqlite://")) as database:
        database.execute("INSERT OR IGNORE INTO jobs (path, epoch) VALUES (?, ?)", JOB)
        row = (os.urandom(4).hex(), message)
        database.execute("INSERT INTO tasks (job, id, message) VALUES (1, ?, ?)", row)
    database.close()


def insert_into_redis(url: str, message: str | bytes) -> None:
    with redis.Redis.from_url(url) as client:
        name, task_id = queue_name(JOB), os.urandom(4).hex()
        client.hset(f"rq:job:{task_id}", mapping={"status": "queued", "data": message})
        client.rpush(f"rq:queue:{name}", task_id)
        client.zadd("chunkq:queues", {name: 1})
        client.hset("chunkq:jobs", name, stored_job(JOB))


def insert_into_host(url: str, message: str | bytes) -> None:
    executor = open_executor(url)
    assert isinstance(executor, HostedQueue)
    text = message.decode("latin-1") if isinstance(message, bytes) else message
    executor.table.submit([(*JOB, os.urandom(4).hex(), text)])
    executor.close()


def insert_into_process(url: str, message: str | bytes) -> None:
    executor = open_executor(url)
    assert isinstance(executor, InProcessExecutor)
    executor._queue.jobs.setdefault(JOB, _JobQueue()).queued[os.urandom(4).hex()] = message, 0


LOCAL = (
    Backend(
        "inprocess",
        lambda folder, request: f"inprocess://{folder}",
        insert_into_process,
    ),
    Backend(
        "sqlite",
        lambda folder, request: f"sqlite://{folder / 'queue.db'}",
        insert_into_sqlite,
    ),
    Backend(
        "rq",
        lambda folder, request: request.getfixturevalue("redis").url,
        insert_into_redis,
    ),
)
CLUSTERS = (
    Backend(
        "dask",
        lambda folder, request: request.getfixturevalue("dask"),
        insert_into_host,
    ),
    Backend(
        "ray",
        lambda folder, request: request.getfixturevalue("ray"),
        insert_into_host,
    ),
)


SHARED = tuple(backend for backend in LOCAL if backend.name != "inprocess")
"""Backends whose workers can be processes."""


def parameters(backends: Sequence[Backend]) -> list[Any]:
    """Return one parameter per backend, marked if it needs a server."""
    return [
        pytest.param(
            backend,
            id=backend.name,
            marks=[] if backend.name in ("inprocess", "sqlite") else [pytest.mark.server],
        )
        for backend in backends
    ]
