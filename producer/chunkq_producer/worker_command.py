"""A `chunkq work` process on this machine, which can start before its job exists."""

from __future__ import annotations

import io
import os
import subprocess
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chunkq.errors import ChunkqError, ErrorCode
from chunkq.job.events import Message, Sink
from chunkq.job.job_file import Job
from chunkq.model_check import CheckReport, ModelCheck
from chunkq.queue.registry import QUEUE_VARIABLE
from chunkq.system.python_process import python_module
from chunkq.worker_start import Step, encode_arguments, encode_line, work_line
from chunkq_producer.early_process import EarlyProcess, EarlyStart
from chunkq_producer.engine import Engine, is_cpu_only

if TYPE_CHECKING:
    from chunkq.job.record import JobRecord

END_SECONDS = 10.0
"""Time in which workers whose work has not begun end, before they are killed."""
MAX_LINES = 1000
"""Lines of the workers that are kept. The user's code can print any number of them."""


@dataclass(frozen=True)
class RunOptions:
    """The user's options for the workers of a run. None selects the job's value or a default."""

    workers: int | None = None
    gpus: str = "all"
    depth: int | None = None


class Workers(ABC):
    """Workers that end on their own when the job has no more tasks."""

    messages: Sequence[str] = ()
    """Error lines of workers that ended for another reason."""

    @abstractmethod
    def have_ended(self) -> bool:
        """Return whether all workers have ended."""

    @abstractmethod
    def wait(self, seconds: float) -> None:
        """Wait at most `seconds` for the workers to end."""

    @abstractmethod
    def stop(self) -> None:
        """Stop after the tasks in flight. A second call requeues these tasks."""

    @property
    @abstractmethod
    def exit_code(self) -> int:
        """Exit code of `chunkq work`, or its equivalent; valid after the workers have ended."""

    def kill(self) -> None:  # noqa: B027 -- remote workers continue without this process
        """Kill workers that cannot continue without this process."""


class WorkerCommand(Workers):
    """A `chunkq work` process on this machine.

    With an `early` process, it starts before its job exists: call `import_runtime`, `start_check`,
    `check` and `begin` in this order, or `end`. Until `begin`, what it writes to standard error is
    kept.

    The queue URL, which may contain a password, is passed in the environment because all users
    can read command lines.
    """

    def __init__(
        self,
        options: Sequence[str],
        environment: Mapping[str, str],
        emit: Sink,
        early: EarlyProcess | None = None,
    ) -> None:
        arguments = ["--burst", "--quiet", "--lifeline", *options]
        self._report: int | None = None
        if early is None:
            self._process = subprocess.Popen(
                python_module("chunkq", "work", *arguments),
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        else:
            self._process, self._report = early.process, early.report
            self._write(encode_arguments(arguments, environment))
        self._emit = emit
        self._has_begun = early is None
        self._lock = threading.Lock()
        self._lines = deque[str](maxlen=MAX_LINES)
        self._reader = threading.Thread(target=self._forward_stderr, daemon=True)
        self._reader.start()
        self._ended = threading.Event()
        threading.Thread(target=self._wait, daemon=True).start()

    def import_runtime(self, runtime: str) -> None:
        """Let the workers import the libraries of a runtime."""
        self._send(Step.IMPORT, runtime)

    def start_check(self, record: JobRecord) -> None:
        """Let the workers load the network, and the first one check it."""
        self._send(Step.CHECK, record.to_json().decode())

    def check(self) -> ModelCheck:
        """Wait for the check; return its result.

        Raises ModelError if the network cannot be used, and ChunkqError if the workers cannot
        start.
        """
        if self._report is None:
            raise RuntimeError("the process was not started early")
        with open(self._report, "rb") as pipe:
            self._report = None
            report = CheckReport.read(pipe.readline())
        if report is not None and report.exit_code is None:
            return report.result(())
        self.end()
        if report is not None:
            return report.result(list(self._lines))
        self._show_lines()
        raise ChunkqError(
            "run: a worker ended with an error; fix the cause above, then run the same command",
            code=ErrorCode.WORKER_FAILED,
        ).with_notes(list(self._lines))

    def begin(self) -> None:
        """Let the workers run the tasks of the job, which is now on the queue."""
        self._show_lines()
        self._write(work_line())

    def end(self) -> None:
        """End the processes at once if their work has not begun."""
        if not self._has_begun:
            self._close_stdin()
            self.wait(END_SECONDS)
            self.kill()
            self._reader.join()
        if self._report is not None:
            os.close(self._report)
            self._report = None

    def have_ended(self) -> bool:
        """Return whether the process has ended."""
        return self._ended.is_set()

    def wait(self, seconds: float) -> None:
        """Wait at most `seconds` for the process to end."""
        self._ended.wait(seconds)

    def stop(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    @property
    def exit_code(self) -> int:
        """Exit code of the process."""
        self._reader.join()
        self.messages = list(self._lines)
        return self._process.wait()

    def kill(self) -> None:
        """Kill the process if it is still running."""
        self._process.kill()
        self._process.wait()
        self._close_stdin()

    def _close_stdin(self) -> None:
        """Close the pipe of which this process is the owner; the workers end with it."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def _send(self, step: Step, argument: str = "") -> None:
        """Write a line with a step."""
        self._write(encode_line(step, argument))

    def _write(self, line: bytes) -> None:
        """Write a line; do nothing if the process has ended."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.write(line)
                self._process.stdin.flush()

    def _wait(self) -> None:
        self._process.wait()
        self._ended.set()

    def _show_lines(self) -> None:
        """Print the lines that were kept, and each line from now on."""
        with self._lock:
            self._has_begun = True
            for line in self._lines:
                self._emit(Message(line))

    def _forward_stderr(self) -> None:
        """Record the lines that the process writes to stderr; print them unless they are kept."""
        if self._process.stderr is None:
            return
        with io.TextIOWrapper(self._process.stderr, errors="replace") as lines:
            for line in lines:
                with self._lock:
                    self._lines.append(line.rstrip("\n"))
                    if self._has_begun:
                        self._emit(Message(self._lines[-1]))


@contextmanager
def early_workers(
    job: Job, engine: Engine, options: RunOptions, emit: Sink, start: EarlyStart | None
) -> Iterator[WorkerCommand | None]:
    """Yield workers that load the libraries of a job while the job is checked.

    The process of `start` is used, if it is not None. Yields None if the engine starts its workers
    in another way. Workers whose work has not begun end with the context.
    """
    if engine.url is None or not engine.starts_early:
        yield None
        return
    process = None if start is None else start.take()
    process = process or EarlyProcess.start(options.workers)
    variables = {QUEUE_VARIABLE: engine.url}
    workers = WorkerCommand(work_options(job, options), variables, emit, process)
    try:
        workers.import_runtime(job.model.runtime)
        yield workers
    finally:
        workers.end()


def work_options(
    job: Job, options: RunOptions, *, per_node: int | None = None, depth: int | None = None
) -> list[str]:
    """Return the options of `chunkq work` for a run. The user's have precedence over the job's."""
    arguments = ["--gpus", "none" if is_cpu_only(job) else options.gpus, "--job", job.output]
    if options.workers:
        arguments += ["-w", str(options.workers)]
    elif per_node:
        arguments += ["--per-node", str(per_node)]
    depth = options.depth or depth
    return arguments + (["--depth", str(depth)] if depth else [])
