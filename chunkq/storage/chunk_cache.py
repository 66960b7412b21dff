"""The storage chunks of inputs that this process keeps in memory, and what it has fetched."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from chunkq.errors import JobError
from chunkq.web_requests import RECEIVED

VARIABLE = "CHUNKQ_CACHE_BYTES"
"""Environment variable with the size of the cache (bytes)."""
MAX_BYTES = 1 << 30
MEMORY_SHARE = 16
"""Without the variable, the cache takes at most this fraction of the memory that is available."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """Requests for stored objects, or for parts of them, and their answers (bytes)."""

    requests: int = 0
    bytes: int = 0


@lru_cache(maxsize=1)
def size() -> int:
    """Return the size of this process's cache (bytes). Raises JobError for an invalid variable."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        from chunkq.system.available_memory import available_memory

        return min(MAX_BYTES, available_memory() // MEMORY_SHARE)
    if not text.isdecimal():
        raise JobError(f"{VARIABLE}: expected a number of bytes, found {text!r}; correct it")
    return int(text)


@lru_cache(maxsize=1)
def context() -> Any:
    """Return tensorstore's context with the cache of this process."""
    import tensorstore as ts

    return ts.Context({"cache_pool": {"total_bytes_limit": size()}})


class FetchCounter:
    """Counts what this process fetches through tensorstore, and from web servers through fsspec.

    Its methods are thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = Fetched(), Fetched()

    def take(self, *, has_storage_chunks: bool = True) -> Fetched:
        """Return what was fetched since the last call.

        Unless an input `has_storage_chunks`, what tensorstore has fetched is of outputs only, and
        is left out.
        """
        with self._lock:
            before, self._taken = self._taken, (_by_tensorstore(), Fetched(*RECEIVED.total()))
            (stored, web), (stored_before, web_before) = self._taken, before
        requests, received = web.requests - web_before.requests, web.bytes - web_before.bytes
        if has_storage_chunks:
            requests += stored.requests - stored_before.requests
            received += stored.bytes - stored_before.bytes
        return Fetched(requests, received)


def _by_tensorstore() -> Fetched:
    """Return what this process has fetched through tensorstore since it started."""
    import tensorstore as ts

    requests = received = 0
    for metric in ts.experimental_collect_matching_metrics("/tensorstore/kvstore/"):
        kind = metric["name"].rpartition("/")[2]
        value = _sum(metric["values"])
        requests += value if kind == "read" else 0
        received += value if kind == "bytes_read" else 0
    return Fetched(requests, received)


def _sum(values: Iterable[dict[str, Any]]) -> int:
    return sum(int(entry.get("value", 0)) for entry in values)
