"""Limit the threads of the BLAS and OpenMP libraries that NumPy uses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import ThreadpoolController


class ThreadLimit:
    """Limits the BLAS and OpenMP libraries of this process to `threads`; None means no limit.

    `applied` restores the previous limits, because other runtimes can use the same libraries.
    Call it on the computing thread: OpenMP has one limit per thread, BLAS one per process.
    """

    def __init__(self, threads: int | None) -> None:
        self._threads = threads
        self._controller: ThreadpoolController | None = None
        self._modules = 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Limit the loaded libraries inside a `with` block."""
        if self._threads is None:
            yield
            return
        # An import can load another library. Searching before every batch would be slow.
        if self._controller is None or len(sys.modules) != self._modules:
            self._controller, self._modules = ThreadpoolController(), len(sys.modules)
        with self._controller.limit(limits=self._threads):
            yield
