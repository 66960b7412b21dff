"""Keep SIGTERM from ending processes that a run needs until it has finished its chunks.

SLURM and service managers send SIGTERM to all processes of a run. Its workers then finish their
chunks, so the head of its cluster has to outlive them. The check of its network goes on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM in this thread, and for good in the processes that it starts meanwhile.

    A blocked signal stays pending, whatever handler the program installs.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def unblock_sigterm() -> None:
    """Unblock SIGTERM in this thread; a pending one is handled now.

    Child processes of this thread, and of the threads that it starts, then handle SIGTERM as usual.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def discard_blocked_sigterm() -> None:
    """Discard SIGTERM in this process, if it is blocked, and unblock it in this thread."""
    if signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: None)
    elif signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        return
    unblock_sigterm()
