"""SIGTERM to a worker process: the first one stops the worker, the second one ends the process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from chunkq.queue.contract.executor import WorkerOptions
from chunkq.system.signal_masks import unblock_sigterm


class StopSignals:
    """The times (s, monotonic) of SIGTERM, from the start of the process on.

    SIGINT is ignored: the supervisor receives it and sends SIGTERM. Create the object in the main
    thread before other threads start, because these would keep a mask that blocks SIGTERM.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._worker: tuple[WorkerOptions, Callable[[], object]] | None = None
        self._since = 0.0
        signal.signal(signal.SIGTERM, self._receive)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        unblock_sigterm()

    @property
    def have_stopped(self) -> bool:
        """Return whether a signal has stopped the worker."""
        return any(moment > self._since for moment in self._times)

    def forget(self, until: float) -> None:
        """Let the signals up to a time (s, monotonic) have no effect."""
        self._since = until

    def stop(self, options: WorkerOptions, end: Callable[[], object]) -> None:
        """Stop a worker from now on; call `end` in a thread at the second signal."""
        self._worker = (options, end)
        self._act()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._times.append(time.monotonic())
        self._act()

    def _act(self) -> None:
        """Set the stop signal of the worker, or end the process."""
        times = [moment for moment in self._times if moment > self._since]
        if self._worker is None or not times:
            return
        options, end = self._worker
        options.stop.set()
        if times[-1] - times[0] > options.settings.same_signal:
            threading.Thread(target=end).start()
