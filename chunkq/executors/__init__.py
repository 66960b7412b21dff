"""Queue backends, selected by the scheme of the URL and imported on first use."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import import_module
from types import MappingProxyType

from chunkq.errors import ErrorCode, JobError, QueueError, suggestion
from chunkq.executors.base import Executor

BACKENDS: MappingProxyType[str, str] = MappingProxyType(
    {
        "inprocess": "chunkq.executors.inprocess:InProcessExecutor",
        "sqlite": "chunkq.executors.sqlite:SqliteExecutor",
        "redis": "chunkq.executors.rq:RqExecutor",
        "rediss": "chunkq.executors.rq:RqExecutor",
        "unix": "chunkq.executors.rq:RqExecutor",
        "dask": "chunkq.executors.dask:DaskExecutor",
        "ray": "chunkq.executors.ray:RayExecutor",
    }
)
"""URL scheme -> class."""
EXTRAS: MappingProxyType[str, str] = MappingProxyType(
    {"rq": "redis", "redis": "redis", "distributed": "dask", "dask": "dask", "ray": "ray"}
)
"""Package -> the extra of chunkq that installs it."""
QUEUE_VARIABLE = "CHUNKQ_QUEUE"


def default_url() -> str:
    """Return the URL of the embedded queue: a SQLite file in the state folder of the user."""
    import platformdirs

    return f"sqlite:///{platformdirs.user_state_path('chunkq') / 'queue.db'}"


def queue_url(option: str | None, job_url: str | None = None) -> str:
    """Return the first URL that is set: option, environment, job file, embedded queue."""
    return option or os.environ.get(QUEUE_VARIABLE) or job_url or default_url()


def open_executor(url: str) -> Executor:
    """Connect to a queue.

    Raises JobError for an unknown scheme, QueueError if the queue cannot be reached or used.
    """
    scheme = url.partition("://")[0]
    if "://" not in url or scheme not in BACKENDS:
        hint = suggestion(scheme, list(BACKENDS))
        printed = re.sub(r"(?s)^([\w+.-]*:/*)?.*@", r"\1***@", url)
        raise JobError(
            f"queue: {printed}: unknown scheme; "
            f"use one of {', '.join(name + '://' for name in BACKENDS)}{hint}",
            code=ErrorCode.QUEUE_ADDRESS_INVALID,
        )
    return load_backend(scheme)(url)


def open_shared(url: str) -> Executor:
    """Connect to a queue that other processes can reach. Raises JobError for `inprocess://`."""
    if url.startswith("inprocess:"):
        raise JobError(
            "queue: inprocess:// is not shared with other processes; use `chunkq run` for a job in "
            "one process, or a queue such as sqlite:///path/queue.db",
            code=ErrorCode.QUEUE_ADDRESS_INVALID,
        )
    return open_executor(url)


def load_backend(scheme: str) -> Callable[[str], Executor]:
    """Import the class for a scheme. Raises QueueError if a package that it needs is missing."""
    module, _, name = BACKENDS[scheme].partition(":")
    try:
        backend: Callable[[str], Executor] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        hint = install_hint(error)
        if hint is None:
            raise
        raise QueueError(
            f"queue: {scheme}:// needs the package {hint}",
            code=ErrorCode.PACKAGE_MISSING,
        ) from None
    return backend


def install_hint(error: ModuleNotFoundError) -> str | None:
    """Return how to install a missing package, or None if no extra of chunkq installs it."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"{package}; run pip install 'chunkq[{EXTRAS[package]}]'"
