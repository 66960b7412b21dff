"""Those who work on a run, as the run sees them: a worker command of its own, or hired ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from chunkq.errors import QueueError
from chunkq.executors.base import Executor, WorkerOptions
from chunkq.executors.hosted import RemoteWorkers

PrintLine = Callable[[str], None]


class Workers(ABC):
    """Workers that end by themselves when nothing is left to do."""

    messages: Sequence[str] = ()
    """Why they left, if not for want of work, in lines."""

    @abstractmethod
    def have_ended(self) -> bool:
        """Tell whether all have left."""

    @abstractmethod
    def wait(self, seconds: float) -> None:
        """Wait for them to leave, for so long at most."""

    @abstractmethod
    def stop(self) -> None:
        """Have them finish what is in flight; said again, hand it back."""

    @property
    @abstractmethod
    def exit_code(self) -> int:
        """What the exit code of `chunkq work` is, or would be, once they are gone."""

    def kill(self) -> None:  # noqa: B027 -- nothing to do for those who go on by themselves
        """Leave none behind that is of no use without this process."""


class WorkerCommand(Workers):
    """`chunkq work` on this machine.

    The queue's address, which may hold a password, travels in the environment: a command line
    can be seen by everyone.
    """

    def __init__(
        self, options: Sequence[str], environment: Mapping[str, str], say: PrintLine
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chunkq", "work", "--burst", "--quiet", "--lifeline", *options],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._say = say
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._repeat, daemon=True)
        self._reader.start()

    def have_ended(self) -> bool:
        """Tell whether the command has ended."""
        return self._process.poll() is not None

    def wait(self, seconds: float) -> None:
        """Wait for its end."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def stop(self) -> None:
        """Pass on a signal."""
        self._process.terminate()

    @property
    def exit_code(self) -> int:
        """Its exit code."""
        self._reader.join()
        self.messages = self._lines
        return self._process.wait()

    def kill(self) -> None:
        """Kill it, if it still lives."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _repeat(self) -> None:
        """Pass on what it says."""
        if self._process.stderr is None:
            return
        with self._process.stderr as lines:
            for line in lines:
                self._lines.append(line.rstrip("\n"))
                self._say(self._lines[-1])


class ClusterWorkers(Workers):
    """Processes of the engine's own."""

    def __init__(self, hired: RemoteWorkers, say: PrintLine) -> None:
        self._hired, self._say = hired, say

    def have_ended(self) -> bool:
        """Tell whether all have left; while the queue is away nobody knows."""
        try:
            return self._hired.have_ended()
        except QueueError:
            return False

    def wait(self, seconds: float) -> None:
        """Wait a while."""
        time.sleep(seconds)

    def stop(self) -> None:
        """Have them leave."""
        with suppress(QueueError):  # those who cannot reach the queue leave by themselves
            self._hired.stop()

    @property
    def exit_code(self) -> int:
        """One if any left for another reason than want of work."""
        self.messages = [f"chunkq: {line}" for line in self._hired.messages()]
        for line in self.messages:
            self._say(line)
        return 1 if self.messages else 0


class WorkerThread(Workers):
    """One worker in a thread of this process."""

    def __init__(self, executor: Executor, options: WorkerOptions, say: PrintLine) -> None:
        self._executor, self._options, self._say = executor, options, say
        self._code = 0
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    def have_ended(self) -> bool:
        """Tell whether the worker has ended."""
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for its end."""
        self._thread.join(seconds)

    def stop(self) -> None:
        """Finish the chunks in flight."""
        self._options.stop.set()

    @property
    def exit_code(self) -> int:
        """The exit code that a worker process would have."""
        return self._code

    def kill(self) -> None:
        """Finish the chunks in flight: a thread cannot be killed."""
        self.stop()
        self._thread.join()

    def _work(self) -> None:
        ended = self._executor.run_worker(self._options)
        self._code, self.messages = ended.code, [f"chunkq: {line}" for line in ended.lines]
        for line in self.messages:
            self._say(line)


def wait_for_workers(
    crew: Workers, look: Callable[[], float], is_over: Callable[[], bool] = lambda: False
) -> bool:
    """Wait until a crew is gone; returns whether it was told to stop by a signal.

    `look` is called now and then and returns the seconds until the next time; when `is_over` the
    crew is told to stop, too.
    """
    interrupted = threading.Event()
    told = False
    try:
        with _forward_signals(crew, interrupted):
            while not crew.have_ended():
                crew.wait(look())
                if not told and is_over():
                    told = True
                    crew.stop()
            look()
    finally:
        crew.kill()
    return interrupted.is_set()


@contextmanager
def _forward_signals(crew: Workers, interrupted: threading.Event) -> Iterator[None]:
    """Have signals to stop reach the crew; only the main thread is ever sent any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        # Another thread: what a signal interrupts may be talking to the queue itself.
        threading.Thread(target=crew.stop).start()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
