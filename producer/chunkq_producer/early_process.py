"""The process of a run's workers, which starts before the run has read its job file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from chunkq.queue.registry import BACKENDS, QUEUE_VARIABLE
from chunkq.system.python_process import python_module
from chunkq.system.signal_masks import sigterm_blocked
from chunkq.worker_start import EARLY_WORK
from chunkq_producer.engine_names import ENGINES, WITH_PROCESSES

USED_BACKENDS = {BACKENDS[ENGINES[name]] for name in WITH_PROCESSES}
SCHEMES = frozenset(scheme for scheme, backend in BACKENDS.items() if backend in USED_BACKENDS)
"""Schemes of the queues of the engines `WITH_PROCESSES`."""


@dataclass
class EarlyProcess:
    """A process that becomes `chunkq work` when it gets its arguments on its standard input.

    It writes the result of the check of the network to the pipe `report`, a descriptor.
    """

    process: subprocess.Popen[bytes]
    report: int

    @classmethod
    def start(cls, workers: int | None) -> EarlyProcess:
        """Start the process, with the likely number of worker processes below it.

        It gets the signals that are sent to all processes of a run, but only the run acts on them
        before the work begins. So it starts with SIGTERM blocked.
        """
        read, write = os.pipe()
        with sigterm_blocked():
            process = subprocess.Popen(
                python_module(EARLY_WORK, str(write), str(workers or 1)),
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                pass_fds=(write,),
            )
        os.close(write)
        return cls(process, read)

    def end(self) -> None:
        """End the process before it has got its arguments; those below it end, too."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stderr):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        os.close(self.report)


class EarlyStart:
    """An early process of a run, until the run uses it."""

    def __init__(self, process: EarlyProcess) -> None:
        self._process: EarlyProcess | None = process

    def take(self) -> EarlyProcess | None:
        """Return the process, which the caller ends; None if it was taken or has ended."""
        process, self._process = self._process, None
        return process

    def end(self) -> None:
        """End the process, unless it was taken."""
        if (process := self.take()) is not None:
            process.end()


@contextmanager
def early_start(
    engine: str | None, queue: str | None, workers: int | None
) -> Iterator[EarlyStart | None]:
    """Start a process for the workers of a run; end it unless it is taken.

    The arguments are the values of the command's options. Yields None if they, or the environment,
    name a queue whose workers start in another way. The job file can do so too.
    """
    scheme = (queue or os.environ.get(QUEUE_VARIABLE) or "sqlite").partition("://")[0]
    is_likely = engine in (None, *WITH_PROCESSES) and scheme in SCHEMES
    if not is_likely:
        yield None
        return
    start = EarlyStart(EarlyProcess.start(workers))
    try:
        yield start
    finally:
        start.end()
