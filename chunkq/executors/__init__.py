"""Queue backends, chosen by URL and imported only when one is asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import import_module
from types import MappingProxyType

from chunkq.errors import JobError, QueueError, nearest
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
"""Package -> the extra of chunkq that brings it."""
QUEUE_VARIABLE = "CHUNKQ_QUEUE"


def default_url() -> str:
    """Return the embedded queue's URL: a file in the user's state folder."""
    import platformdirs

    return f"sqlite:///{platformdirs.user_state_path('chunkq') / 'queue.db'}"


def queue_url(given: str | None, of_job: str | None = None) -> str:
    """Return the queue's URL: as given, the environment's, the job's, or the embedded queue's."""
    return given or os.environ.get(QUEUE_VARIABLE) or of_job or default_url()


def open_executor(url: str) -> Executor:
    """Connect to a queue.

    Raises JobError for a URL of no known kind, QueueError if the queue cannot be reached or used.
    """
    scheme = url.partition("://")[0]
    if "://" not in url or scheme not in BACKENDS:
        hint = nearest(scheme, list(BACKENDS))
        shown = re.sub(r"(?s)^([\w+.-]*:/*)?.*@", r"\1***@", url)
        raise JobError(
            f"queue: {shown} is no queue this version knows{hint}; "
            f"it takes {', '.join(name + '://' for name in BACKENDS)}"
        )
    return load_backend(scheme)(url)


def open_shared(url: str) -> Executor:
    """Connect to a queue that other processes can reach too; raises JobError for `inprocess://`."""
    if url.startswith("inprocess:"):
        raise JobError(
            "queue: inprocess:// ends with this command; use `chunkq run` for a whole job in one "
            "process, or a queue such as sqlite:///path/queue.db"
        )
    return open_executor(url)


def load_backend(scheme: str) -> Callable[[str], Executor]:
    """Import what a scheme's URLs are opened with; raises QueueError if its package is missing."""
    module, _, name = BACKENDS[scheme].partition(":")
    try:
        backend: Callable[[str], Executor] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise QueueError(
            f"queue: {scheme}:// needs a package that is not installed; "
            f"pip install 'chunkq[{extra}]'"
        ) from None
    return backend
