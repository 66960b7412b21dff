"""Queue backends, selected by the scheme of the URL and imported on first use.

Another package adds a backend with an entry point in the group `chunkq.queues`: its name is the
scheme, its value a class with the interface `Executor`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import import_module
from types import MappingProxyType

from chunkq.errors import ErrorCode, JobError, QueueError, suggestion
from chunkq.extensions import ExtensionPoint
from chunkq.install_hint import package_hint
from chunkq.queue.contract.executor import Executor

BACKENDS: MappingProxyType[str, str] = MappingProxyType(
    {
        "inprocess": "chunkq.queue.backends.inprocess:InProcessExecutor",
        "sqlite": "chunkq.queue.backends.sqlite:SqliteExecutor",
        "redis": "chunkq.queue.backends.rq:RqExecutor",
        "rediss": "chunkq.queue.backends.rq:RqExecutor",
        "unix": "chunkq.queue.backends.rq:RqExecutor",
        "dask": "chunkq.queue.backends.dask.executor:DaskExecutor",
        "ray": "chunkq.queue.backends.ray.executor:RayExecutor",
    }
)
"""URL scheme -> class, of the backends of chunkq."""
EXTENSIONS = ExtensionPoint(
    "chunkq.queues",
    Executor,
    "queue: backend",
    QueueError,
    frozenset(BACKENDS),
)
QUEUE_VARIABLE = "CHUNKQ_QUEUE"


def default_url() -> str:
    """Return the URL of the embedded queue: a SQLite file in the state folder of the user."""
    from chunkq.system.user_folders import state_folder

    return f"sqlite:///{state_folder() / 'queue.db'}"


def queue_url(option: str | None, job_url: str | None = None) -> str:
    """Return the first URL that is set: option, environment, job file, embedded queue."""
    return option or os.environ.get(QUEUE_VARIABLE) or job_url or default_url()


def open_executor(url: str) -> Executor:
    """Connect to a queue.

    Raises JobError for an unknown scheme, QueueError if the queue cannot be reached or used.
    """
    return load_backend(checked_scheme(url))(url)


def checked_scheme(url: str) -> str:
    """Return the scheme of a queue. Raises JobError if no backend has it."""
    scheme = url.partition("://")[0]
    if "://" not in url or (scheme not in BACKENDS and scheme not in EXTENSIONS.find()):
        known = schemes()
        name = url.partition(":")[0]
        if "://" not in url and name in known:
            hint = f"; use two slashes after {name}:"
        else:
            hint = _foreign_hint(scheme) or suggestion(scheme, known)
        printed = re.sub(r"(?s)^([\w+.-]*:/*)?.*@", r"\1***@", url)
        raise JobError(
            f"queue: {printed}: unknown scheme; "
            f"use one of {', '.join(name + '://' for name in known)}{hint}",
            code=ErrorCode.QUEUE_ADDRESS_INVALID,
        )
    return scheme


def _foreign_hint(scheme: str) -> str:
    """Return what to use in place of an address as other programs write it."""
    if "sentinel" in scheme:
        return "; Redis Sentinel is unsupported, use the address of the primary server, redis://"
    if "cluster" in scheme:
        return "; a Redis cluster is unsupported, use a single server, redis://"
    if scheme in ("valkey", "valkeys"):
        return f"; for Valkey use redis{scheme.removeprefix('valkey')}://"
    if scheme in ("tcp", "tls", "ucx"):
        protocol = "" if scheme == "tcp" else f"?protocol={scheme}"
        return f"; for a Dask scheduler use dask://HOST:PORT{protocol}"
    return ""


def open_shared(url: str) -> Executor:
    """Connect to a queue that other processes can reach. Raises JobError for `inprocess://`."""
    if url.startswith("inprocess:"):
        raise JobError(
            "queue: inprocess:// is not shared with other processes; use `chunkq run` for a job in "
            "one process, or a queue such as sqlite:///path/queue.db",
            code=ErrorCode.QUEUE_ADDRESS_INVALID,
        )
    return open_executor(url)


def schemes() -> list[str]:
    """Return the schemes of all installed backends. Raises QueueError if two have one scheme."""
    return [*BACKENDS, *EXTENSIONS.find()]


def load_backend(scheme: str) -> Callable[[str], Executor]:
    """Import the class for a scheme.

    Raises QueueError if a package that it needs is missing, or if the backend of another package
    cannot be used.
    """
    if scheme not in BACKENDS:
        return EXTENSIONS.load(EXTENSIONS.find()[scheme])
    module, name = BACKENDS[scheme].split(":")
    try:
        backend: Callable[[str], Executor] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        hint = package_hint(error)
        if hint is None:
            raise
        raise QueueError(
            f"queue: {scheme}:// needs the package {hint}",
            code=ErrorCode.PACKAGE_MISSING,
        ) from None
    return backend
