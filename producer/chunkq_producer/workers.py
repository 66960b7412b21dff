"""Workers of one run: a `chunkq work` process, remote workers of a cluster, or a thread."""

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
from dataclasses import dataclass
from types import FrameType

from chunkq.errors import ChunkqError, ErrorCode, IncompleteError, QueueError
from chunkq.job.events import Message, Sink
from chunkq.job.job_handle import JobHandle
from chunkq.queue.backends.hosted.hosted import HostedQueue
from chunkq.queue.backends.hosted.remote_workers import load_serve
from chunkq.queue.backends.hosted.worker_group import RemoteWorkers
from chunkq.queue.contract.executor import Executor, WorkerName, WorkerOptions, default_depth
from chunkq.queue.registry import QUEUE_VARIABLE
from chunkq_producer.cluster import Cluster
from chunkq_producer.engine import is_cpu_only
from chunkq_producer.job_status import FailureGroup, StatusPoller, WorkersRunning

REFRESH_SECONDS = 0.5


class InterruptedRunError(ChunkqError):
    """A signal stopped the run. Computed chunks are kept."""

    exit_code = 130
    code = ErrorCode.INTERRUPTED


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

    @property
    def failed(self) -> bool:
        """Whether a worker ended with an error other than failed chunks."""
        return self.exit_code not in (0, IncompleteError.exit_code)

    def kill(self) -> None:  # noqa: B027 -- remote workers continue without this process
        """Kill workers that cannot continue without this process."""


class WorkerCommand(Workers):
    """A `chunkq work` process on this machine.

    The queue URL, which may contain a password, is passed in the environment because all users
    can read command lines.
    """

    def __init__(self, options: Sequence[str], environment: Mapping[str, str], emit: Sink) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chunkq", "work", "--burst", "--quiet", "--lifeline", *options],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._emit = emit
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._forward_stderr, daemon=True)
        self._reader.start()

    def have_ended(self) -> bool:
        """Return whether the process has ended."""
        return self._process.poll() is not None

    def wait(self, seconds: float) -> None:
        """Wait at most `seconds` for the process to end."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def stop(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    @property
    def exit_code(self) -> int:
        """Exit code of the process."""
        self._reader.join()
        self.messages = self._lines
        return self._process.wait()

    def kill(self) -> None:
        """Kill the process if it is still running."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _forward_stderr(self) -> None:
        """Record and print the lines that the process writes to stderr."""
        if self._process.stderr is None:
            return
        with self._process.stderr as lines:
            for line in lines:
                self._lines.append(line.rstrip("\n"))
                self._emit(Message(self._lines[-1]))


class ClusterWorkers(Workers):
    """Remote workers inside a Dask or Ray cluster."""

    def __init__(self, remote_workers: RemoteWorkers, emit: Sink) -> None:
        self._remote_workers, self._emit = remote_workers, emit

    def have_ended(self) -> bool:
        """Return whether all workers have ended; False while the queue cannot be reached."""
        try:
            return self._remote_workers.have_ended()
        except QueueError:
            return False

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds`."""
        time.sleep(seconds)

    def stop(self) -> None:
        """Stop the workers after the tasks in flight."""
        with suppress(QueueError):  # workers that cannot reach the queue end on their own
            self._remote_workers.stop()

    @property
    def exit_code(self) -> int:
        """1 if any worker ended with an error, else 0."""
        self.messages = [f"chunkq: {line}" for line in self._remote_workers.messages()]
        for line in self.messages:
            self._emit(Message(line))
        return 1 if self.messages else 0


class WorkerThread(Workers):
    """One worker in a thread of this process."""

    def __init__(self, executor: Executor, options: WorkerOptions, emit: Sink) -> None:
        self._executor, self._options, self._emit = executor, options, emit
        self._exit_code = 0
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    def have_ended(self) -> bool:
        """Return whether the thread has ended."""
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait at most `seconds` for the thread to end."""
        self._thread.join(seconds)

    def stop(self) -> None:
        """Stop after the chunks in flight."""
        self._options.stop.set()

    @property
    def exit_code(self) -> int:
        """Exit code that a worker process would return."""
        return self._exit_code

    def kill(self) -> None:
        """Stop after the chunks in flight and wait: a thread cannot be killed."""
        self.stop()
        self._thread.join()

    def _work(self) -> None:
        status = self._executor.run_worker(load_serve(), self._options)
        self._exit_code = status.code
        self.messages = [f"chunkq: {line}" for line in status.lines]
        for line in self.messages:
            self._emit(Message(line))


def run_workers(
    executor: Executor,
    job: JobHandle,
    cluster: Cluster,
    options: RunOptions,
    rerun: str,
    emit: Sink,
) -> Sequence[FailureGroup]:
    """Start the workers of a job and wait until they end; return the failures.

    `rerun` is what the user does to continue a run that was cut off. Raises InterruptedRunError
    after a signal, and ChunkqError if the cluster or a worker ended with an error.
    """
    poller = StatusPoller(job, executor)

    def poll() -> float:
        try:
            emit(WorkersRunning(poller))
        except Exception as error:  # a failure to read the status must not stop the run
            reason = " ".join(str(error).split())
            line = f"chunkq: the progress cannot be read: {reason}; the run continues"
            emit(Message(line))
        return max(REFRESH_SECONDS, poller.min_pause)

    workers = start_workers(executor, job, cluster, options, emit)
    if wait_for_workers(workers, poll, cluster.has_died):
        raise InterruptedRunError(f"run: interrupted; {rerun} to continue")
    if cluster.has_died():
        raise ChunkqError(
            f"run: the cluster that this run started has ended; {rerun} to continue",
            code=ErrorCode.CLUSTER_UNAVAILABLE,
        )
    if workers.failed:
        raise ChunkqError(
            f"run: a worker ended with an error; fix the cause above, then {rerun}",
            code=ErrorCode.WORKER_FAILED,
        ).with_notes(workers.messages)
    return poller().failures


def start_workers(
    executor: Executor,
    job: JobHandle,
    cluster: Cluster,
    options: RunOptions,
    emit: Sink,
) -> Workers:
    """Start the workers of a job. The user's options have precedence over the job's."""
    config = job.record.job
    depth = options.depth or cluster.depth
    if cluster.launches_remote_workers and isinstance(executor, HostedQueue):
        gpu = not is_cpu_only(config)
        depth = depth or default_depth(gpu=gpu)
        remote_workers = executor.launch_remote_workers(
            job.folder.path, gpu=gpu, depth=depth, nodes=cluster.nodes
        )
        return ClusterWorkers(remote_workers, emit)
    if not executor.owns_process:
        return _worker_thread(executor, job, depth, emit)
    gpus = "none" if is_cpu_only(config) else options.gpus
    arguments = ["--gpus", gpus, "--job", job.folder.output]
    if options.workers:
        arguments += ["-w", str(options.workers)]
    elif cluster.per_node:
        arguments += ["--per-node", str(cluster.per_node)]
    arguments += ["--depth", str(depth)] if depth else []
    return WorkerCommand(arguments, {QUEUE_VARIABLE: cluster.url}, emit)


def _worker_thread(executor: Executor, job: JobHandle, depth: int | None, emit: Sink) -> Workers:
    """Start the worker of a queue that exists only in this process."""
    device = job.record.job.model.device
    worker = WorkerName.new(device).name
    depth = depth or default_depth(gpu=device == "cuda")
    options = WorkerOptions(worker, depth=depth, burst=True, job=job.folder.path)
    return WorkerThread(executor, options, emit)


def wait_for_workers(
    workers: Workers, poll: Callable[[], float], is_over: Callable[[], bool] = lambda: False
) -> bool:
    """Wait until all workers have ended; return whether a signal stopped them.

    `poll` is called repeatedly and returns the seconds until its next call. The workers are also
    stopped when `is_over` returns True.
    """
    interrupted = threading.Event()
    stop_sent = False
    try:
        with _forward_signals(workers, interrupted):
            while not workers.have_ended():
                workers.wait(poll())
                if not stop_sent and is_over():
                    stop_sent = True
                    workers.stop()
            poll()
    finally:
        workers.kill()
    return interrupted.is_set()


@contextmanager
def _forward_signals(workers: Workers, interrupted: threading.Event) -> Iterator[None]:
    """Stop the workers on SIGINT and SIGTERM. Do nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        # Use another thread: the interrupted code may be in the middle of a call to the queue.
        threading.Thread(target=workers.stop).start()

    previous = {
        number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
