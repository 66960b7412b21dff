"""Python warnings of a predictor about what is probably a mistake, once for each cause."""

from __future__ import annotations

import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterable

from chunkq.errors import PredictionWarning
from chunkq_worker.user_errors import OWN
from chunkq_worker.value_watch import Suspicion

LABELS = "labels"
"""Cause of the warnings of `OutputChecks`."""


class UserWarnings:
    """Warnings of one predictor. Thread-safe."""

    def __init__(self) -> None:
        self._causes: set[str] = set()
        self._kept: deque[str] = deque()
        self._lock = threading.Lock()

    def keep(self, text: str) -> None:
        """Keep a warning of the device thread until the caller's thread shows it."""
        self._kept.append(text)

    def show_values(self, suspicions: Iterable[Suspicion]) -> None:
        """Show what the values of a batch suggest, and the warnings that were kept."""
        while self._kept:
            self.show(LABELS, self._kept.popleft())
        for suspicion in suspicions:
            self.show(suspicion.cause, suspicion.text)

    def show(self, cause: str, text: str) -> None:
        """Warn at the line of the caller, unless this was done for the cause before."""
        with self._lock:
            is_known = cause in self._causes
            self._causes.add(cause)
        if not is_known:
            warnings.warn(text, PredictionWarning, stacklevel=_levels())


def _levels() -> int:
    """Return the `stacklevel` of the first frame that is none of chunkq's, seen from `show`."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_own(str(frame.f_globals.get("__name__", ""))):
        level, frame = level + 1, frame.f_back
    return level


def _is_own(module: str) -> bool:
    return module.partition(".")[0] in OWN
