"""How long a test waits for what is bound to come, and how it waits."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
TIMEOUT = 120.0
"""Seconds until a test that waits for something gives up: longer than anything should take."""


def wait_until(find: Callable[[], T], what: str, patience: float = TIMEOUT) -> T:
    """Return the first true value of `find`; fails after a while."""
    limit = time.monotonic() + patience
    while not (found := find()):
        assert time.monotonic() < limit, f"waited in vain until {what}"
        time.sleep(0.005)
    return found
