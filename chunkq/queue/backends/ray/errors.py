"""Errors of Ray in one line."""

from __future__ import annotations

from chunkq.install_hint import remote_hint
from chunkq.terminal import without_colors

INSTALL_HINT = remote_hint("ray", "on its machines")


def start_problem(error: BaseException) -> str:
    """Return the message for an actor that failed to start."""
    if "No module named 'chunkq" in str(error):
        return f"queue: chunkq is not installed on a machine of the Ray cluster; {INSTALL_HINT}"
    return f"queue: cannot start a worker on a machine of the Ray cluster: {last_line(error)}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class."""
    return _lines(error)[0][:300]


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, or its class."""
    return _lines(error)[-1][:300]


def _lines(error: BaseException) -> list[str]:
    return without_colors(str(error)).strip().splitlines() or [type(error).__name__]
