"""SIGINT and SIGTERM end a command by one exception, at any moment of its start.

Without a handler, SIGTERM would end the process without a line, and Ctrl-C while Python imports the
command would print a traceback. Commands that stop their workers in order replace the handlers.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SIGNAL_SECONDS = 0.5
"""Signals within this time count as one: a service manager sends it to all processes of a command,
and some of them pass it on."""


class _Received:
    """The last signal that counted (s, monotonic), how many contexts defer signals, and whether one
    was deferred."""

    last: float | None = None
    deferrals = 0
    is_pending = False


def raise_on_signals() -> None:
    """Raise KeyboardInterrupt in the main thread for SIGINT and SIGTERM that are not ignored."""
    _handle(_raise)


def end_on_signals(code: int) -> None:
    """End the process with `code` for SIGINT and SIGTERM: the command has ended already."""
    _handle(lambda number, frame: os._exit(code))


@contextmanager
def deferred() -> Iterator[None]:
    """Raise for signals at the end of the context, when what is created in it has an owner."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Received.deferrals += 1
    try:
        yield
    finally:
        _Received.deferrals -= 1
    if _Received.is_pending and not _Received.deferrals:
        _Received.is_pending = False
        raise KeyboardInterrupt


@contextmanager
def first_signal_kept(report: Callable[[], object]) -> Iterator[threading.Event]:
    """Raise for the second signal only; the first one sets the event and calls `report`.

    `report` is called in another thread, because the interrupted code can hold a lock. Outside the
    main thread the handlers stay as they are.
    """
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if _is_repeated():
            return
        if received.is_set():
            _interrupt()
        else:
            received.set()
            threading.Thread(target=report, daemon=True).start()

    previous = {number: signal.getsignal(number) for number in SIGNALS}
    _handle(handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            if handler is not None:  # of C code, which Python cannot install again
                signal.signal(number, handler)


def _handle(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    if not _is_repeated():
        _interrupt()


def _is_repeated() -> bool:
    """Return whether a signal is the same as the last one that counted; else count it."""
    now = time.monotonic()
    if _Received.last is not None and now - _Received.last <= SAME_SIGNAL_SECONDS:
        return True
    _Received.last = now
    return False


def _interrupt() -> None:
    """Raise KeyboardInterrupt, or let the context that defers signals do so."""
    if not _Received.deferrals:
        raise KeyboardInterrupt
    _Received.is_pending = True
