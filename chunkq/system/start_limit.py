"""Limit the time in which a child process must report that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

START_SECONDS = 180.0
"""Longest start of a server, with its libraries on a slow file system."""


@contextmanager
def killed_unless_started(
    process: subprocess.Popen[str], seconds: float = START_SECONDS
) -> Iterator[threading.Event]:
    """Kill a process, which leads its process group, `seconds` after the context was entered.

    Leaving the context keeps the process. The event is set if it was killed.
    """
    late = threading.Event()

    def kill() -> None:
        late.set()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
