"""Count what this process receives from web servers through fsspec."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace
from typing import Any

from typing_extensions import Buffer, override


class Received:
    """Numbers of requests, and of bytes of their answers. Its methods are thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = self._bytes = 0

    def add(self, *, requests: int = 0, size: int = 0) -> None:
        """Count requests, and bytes of answers."""
        with self._lock:
            self._requests += requests
            self._bytes += size

    def total(self) -> tuple[int, int]:
        """Return the numbers of requests and bytes so far."""
        with self._lock:
            return self._requests, self._bytes


RECEIVED = Received()
"""What this process has received."""


class CountedStream(io.RawIOBase):
    """A file that is read once from its start, as it arrives from a web server."""

    def __init__(self, file: Any) -> None:
        self._file = file

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        part = self._file.read(len(view))
        RECEIVED.add(size=len(part))
        view[: len(part)] = part
        return len(part)

    @override
    def close(self) -> None:
        self._file.close()
        super().close()


async def counting_client(**options: Any) -> Any:
    """Return a client session for fsspec's `get_client`, which counts what it receives."""
    import aiohttp
    from fsspec.implementations.http import get_client

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(_count_request)
    trace.on_response_chunk_received.append(_count_answer)
    return await get_client(**options, trace_configs=[trace])


async def _count_request(session: Any, context: SimpleNamespace, params: Any) -> None:
    if params.method == "GET":
        RECEIVED.add(requests=1)


async def _count_answer(session: Any, context: SimpleNamespace, params: Any) -> None:
    RECEIVED.add(size=len(params.chunk))  # of an answer that is read at once
