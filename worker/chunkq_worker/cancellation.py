"""Stop a chunk between two batches when its caller no longer waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event

_stop: ContextVar[Event | None] = ContextVar("stop", default=None)


class CancelledChunkError(Exception):
    """The caller of a chunk was interrupted. Nobody waits for this error."""


@contextmanager
def stopped_by(event: Event | None) -> Iterator[None]:
    """Let `check_stopped` raise in this thread as soon as the event is set, inside `with`."""
    token = _stop.set(event)
    try:
        yield
    finally:
        _stop.reset(token)


def check_stopped() -> None:
    """Raise CancelledChunkError if the current chunk is no longer needed."""
    event = _stop.get()
    if event is not None and event.is_set():
        raise CancelledChunkError
