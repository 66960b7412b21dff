"""A limit on the threads of the libraries that NumPy computes with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import ThreadpoolController


class ThreadLimit:
    """Limits the BLAS and OpenMP libraries of this process to `threads`; None for no limit.

    Other runtimes may use the same libraries, so `applied` restores the earlier limits. A BLAS
    library has one limit for the process, OpenMP one per thread: use it on the computing thread.
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
        # An import may have loaded another library; a search before each batch would be slow.
        if self._controller is None or len(sys.modules) != self._modules:
            self._controller, self._modules = ThreadpoolController(), len(sys.modules)
        with self._controller.limit(limits=self._threads):
            yield
