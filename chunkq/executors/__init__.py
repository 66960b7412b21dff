"""Queue backends, chosen by URL and imported only when one is asked for."""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType

from chunkq.errors import QueueError, nearest
from chunkq.executors.base import Executor
from chunkq.paths import without_secret

BACKENDS: MappingProxyType[str, str] = MappingProxyType(
    {"sqlite": "chunkq.executors.sqlite:SqliteExecutor"}
)
"""URL scheme -> class."""


def default_url() -> str:
    """Return the embedded queue's URL: a file in the user's state folder."""
    import platformdirs

    return f"sqlite:///{platformdirs.user_state_path('chunkq') / 'queue.db'}"


def open_executor(url: str) -> Executor:
    """Connect to a queue; raises QueueError in one line if it cannot be reached or used."""
    scheme = url.partition("://")[0]
    if "://" not in url or scheme not in BACKENDS:
        hint = nearest(scheme, list(BACKENDS))
        raise QueueError(
            f"queue: {without_secret(url)} is no queue this version knows{hint}; "
            f"it takes {', '.join(name + '://' for name in BACKENDS)}"
        )
    module, _, name = BACKENDS[scheme].partition(":")
    executor: Executor = getattr(import_module(module), name)(url)
    return executor
