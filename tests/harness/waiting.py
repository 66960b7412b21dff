"""Wait for a condition, with one time limit for all tests."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
TIMEOUT = 120.0
"""Seconds until a waiting test fails: longer than anything should take."""


def wait_until(find: Callable[[], T], condition: str, timeout: float = TIMEOUT) -> T:
    """Return the first true value of `find`; raise AssertionError after `timeout` seconds."""
    limit = time.monotonic() + timeout
    while not (value := find()):
        assert time.monotonic() < limit, f"timed out waiting until {condition}"
        time.sleep(0.005)
    return value
