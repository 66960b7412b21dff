"""Start the workers of one run and wait for them."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Self

from chunkq.errors import (
    ChunkqError,
    ErrorCode,
    IncompleteError,
    InterruptedCommandError,
    QueueError,
)
from chunkq.job.events import Message, Sink
from chunkq.job.job_handle import JobHandle
from chunkq.job.tasks import JobId
from chunkq.queue.backends.hosted.hosted import HostedQueue
from chunkq.queue.backends.hosted.remote_workers import load_serve
from chunkq.queue.backends.hosted.worker_group import RemoteWorkers
from chunkq.queue.contract.executor import Executor, WorkerName, WorkerOptions, default_depth
from chunkq.queue.contract.settings import WorkerSettings
from chunkq.queue.registry import QUEUE_VARIABLE
from chunkq_producer.cluster import Cluster
from chunkq_producer.engine import is_cpu_only
from chunkq_producer.job_status import FailureGroup, StatusPoller, WorkersRunning
from chunkq_producer.worker_command import RunOptions, WorkerCommand, Workers, work_options

REFRESH_SECONDS = 0.5
LOOK_SECONDS = 1.0
"""Longest time between two looks whether the workers, or their cluster, have ended."""
BEGIN_SECONDS = 0.1
"""Longest time between two looks whether the first chunk has begun, if a signal waits for it."""
QUEUE_ABSENCE_SECONDS = 15.0
"""Time without the queue of a running cluster after which the run ends."""


NO_ROOM_SECONDS = 15.0
"""Time without a worker or node of a running cluster after which the run says so. One whose process
ended is started again within it."""

log = logging.getLogger("chunkq.run")


class InterruptedRunError(InterruptedCommandError):
    """A signal stopped the run. Computed chunks are kept."""

    @classmethod
    def of(cls, rerun: str) -> Self:
        """Return the error of a run that `rerun`, what the user does, continues."""
        return cls(f"run: interrupted; {rerun} to continue")


class ClusterWorkers(Workers):
    """Remote workers inside a Dask or Ray cluster."""

    def __init__(
        self, remote_workers: RemoteWorkers, emit: Sink, has_died: Callable[[], bool]
    ) -> None:
        self._remote_workers, self._emit, self._has_died = remote_workers, emit, has_died
        self._reached = self._had_room = time.monotonic()
        self._lost: int | None = None
        self._lacks_room = not remote_workers.has_room
        if self._lacks_room:
            log.warning("%s", remote_workers.no_room)

    def have_ended(self) -> bool:
        """Return whether all workers have ended, or their cluster has died.

        Raises QueueError if the queue is lost, or cannot be reached for `QUEUE_ABSENCE_SECONDS`.
        """
        if self._has_died():
            return True
        try:
            status = self._remote_workers.status()
        except QueueError as error:
            absence = time.monotonic() - self._reached
            if error.code is ErrorCode.QUEUE_LOST or absence > QUEUE_ABSENCE_SECONDS:
                raise
            return self._has_died()
        self._reached = time.monotonic()
        self._report_losses(status.lost_processes)
        if status.has_room is not None and not status.is_over:
            self._report_room(status.has_room)
        return status.is_over

    def _report_losses(self, lost: int) -> None:
        """Log how many processes of the cluster were lost since the last call."""
        new, self._lost = 0 if self._lost is None else lost - self._lost, lost
        if new:
            log.warning(
                "queue: %s: %s lost; other workers compute the chunks",
                self._remote_workers.url,
                "1 worker process was" if new == 1 else f"{new} worker processes were",
            )

    def _report_room(self, has_room: bool) -> None:
        """Log once that the cluster has no worker or node any more, and once that it has one."""
        now, lacks_room = time.monotonic(), False
        if has_room:
            self._had_room = now
        else:
            lacks_room = self._lacks_room or now - self._had_room > NO_ROOM_SECONDS
        if lacks_room != self._lacks_room:
            self._lacks_room = lacks_room
            lines = self._remote_workers
            log.warning("%s", lines.no_room if lacks_room else lines.room)

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


class WorkersOfLeader(Workers):
    """Workers of a node that another process starts and stops.

    `is_over` returns whether they have ended. They need this node until then, so only a second stop
    ends the wait.
    """

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over
        self._stops = 0

    def have_ended(self) -> bool:
        """Return whether the node is needed no longer."""
        return self._stops > 1 or self._is_over()

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds`."""
        time.sleep(seconds)

    def stop(self) -> None:
        """Count a stop."""
        self._stops += 1

    @property
    def exit_code(self) -> int:
        """0: the other process reports errors."""
        return 0


class StoppingWorkers(Workers):
    """Workers that get a signal that came before they ran: they stop after their first chunks.

    `has_begun` returns whether a chunk is in flight.
    """

    def __init__(self, workers: Workers, has_begun: Callable[[], bool]) -> None:
        self._workers, self._has_begun = workers, has_begun
        self._lock = threading.Lock()
        self._is_stopping = False

    def have_ended(self) -> bool:
        """Return whether all workers have ended. Stop them when a chunk is in flight."""
        if not self._is_stopping and self._has_begun():
            self._pass_on()
        return self._workers.have_ended()

    def wait(self, seconds: float) -> None:
        """Wait at most `seconds` for the workers to end, or until it is time to look again."""
        self._workers.wait(seconds if self._is_stopping else min(seconds, BEGIN_SECONDS))

    def stop(self) -> None:
        """Pass on a second signal, after the first one."""
        if self._pass_on():
            time.sleep(2 * WorkerSettings.from_environment().same_signal)
        self._workers.stop()

    @property
    def exit_code(self) -> int:
        """Exit code of the workers."""
        return self._workers.exit_code

    def kill(self) -> None:
        """Kill workers that cannot continue without this process."""
        self._workers.kill()

    def _pass_on(self) -> bool:
        """Pass on the first signal; return False if it was passed on before."""
        with self._lock:
            was_stopping, self._is_stopping = self._is_stopping, True
            if not was_stopping:
                self._workers.stop()
        return not was_stopping


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
    early: WorkerCommand | None = None,
    *,
    is_interrupted: bool = False,
) -> Sequence[FailureGroup]:
    """Start the workers of a job and wait until they end; return the failures.

    Workers that started `early` are used. A run that `is_interrupted`, by a signal before this
    call, stops after its first chunks. `rerun` is what the user does to continue a run that was cut
    off. Raises InterruptedRunError after a signal, and ChunkqError if the cluster or a worker ended
    with an error.
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

    has_begun = _begins(executor, job.id) if is_interrupted else None
    if early is None:
        workers = start_workers(executor, job, cluster, options, emit)
    else:
        workers = early
        early.begin()
    if has_begun is not None:
        workers = StoppingWorkers(workers, has_begun)
    if wait_for_workers(workers, poll, cluster.has_died) or is_interrupted:
        raise InterruptedRunError.of(rerun)
    if cluster.has_died():
        raise ended_cluster(rerun)
    if have_failed(workers):
        raise ChunkqError(
            f"run: a worker ended with an error; fix the cause above, then {rerun}",
            code=ErrorCode.WORKER_FAILED,
        ).with_notes(workers.messages)
    return poller().failures


def ended_cluster(rerun: str) -> ChunkqError:
    """Return the error of a run whose own cluster has ended."""
    return ChunkqError(
        f"run: the cluster that this run started has ended; {rerun} to continue",
        code=ErrorCode.CLUSTER_UNAVAILABLE,
    )


def _begins(executor: Executor, job: JobId) -> Callable[[], bool]:
    """Return a function that returns whether a task has been reserved since this call."""
    queued = executor.counts(job).queued

    def has_begun() -> bool:
        try:
            counts = executor.counts(job)
        except QueueError:
            return False
        return counts.running > 0 or counts.queued < queued

    return has_begun


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
            job.folder.path, gpu=gpu, depth=depth, threads=config.threads
        )
        return ClusterWorkers(remote_workers, emit, cluster.has_died)
    if not executor.owns_process:
        return _worker_thread(executor, job, depth, emit)
    arguments = work_options(config, options, per_node=cluster.per_node, depth=cluster.depth)
    return WorkerCommand(arguments, {QUEUE_VARIABLE: cluster.url}, emit)


def _worker_thread(executor: Executor, job: JobHandle, depth: int | None, emit: Sink) -> Workers:
    """Start the worker of a queue that exists only in this process."""
    device = job.record.job.model.device
    worker = WorkerName.new(device).name
    depth = depth or default_depth(gpu=device == "cuda")
    options = WorkerOptions(worker, depth=depth, burst=True, job=job.folder.path)
    return WorkerThread(executor, options, emit)


def have_failed(workers: Workers) -> bool:
    """Return whether a worker ended with an error other than failed chunks."""
    return workers.exit_code not in (0, IncompleteError.exit_code)


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
            next_poll = 0.0
            while not workers.have_ended():
                if time.monotonic() >= next_poll:
                    next_poll = time.monotonic() + poll()
                workers.wait(max(0.0, min(LOOK_SECONDS, next_poll - time.monotonic())))
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
