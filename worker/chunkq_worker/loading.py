"""Report when this process starts and stops loading a network.

Libraries can hold Python's lock while they load a network, so that no other thread runs. The leases
of the process are then renewed by another process, or made longer beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[bool], None]
"""Called with True before a network is loaded, and with False afterwards."""

_listeners: list[Listener] = []


@contextmanager
def reporting_to(listener: Listener) -> Iterator[None]:
    """Call a listener while the context is open. A process can have several workers."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def loading() -> Iterator[None]:
    """Report that a network is loaded inside the context."""
    listeners = tuple(_listeners)
    for listener in listeners:
        listener(True)
    try:
        yield
    finally:
        for listener in listeners:
            listener(False)
