"""Interface of the queue backends, and the types that they share with workers."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from chunkq.errors import (
    ChunkqError,
    ErrorCode,
    FrameworkConflictError,
    IncompleteError,
    QueueError,
)
from chunkq.job.tasks import JobId, Task
from chunkq.queue.contract.settings import WorkerSettings

MAX_ATTEMPTS = 3
"""A task fails for good after this many unsuccessful attempts; `retry` queues it again."""

DEFAULT_DEPTH_CPU, DEFAULT_DEPTH_GPU = 3, 6
"""Chunks in flight by default: one is read, one computed, one written.

Two chunks at a time are on a GPU. The other four are read, written or finalized, which together
take up to twice as long as the GPU computes a chunk.
"""

EXIT_CRASHED = 1
EXIT_INCOMPLETE = IncompleteError.exit_code
"""Tasks wait for a stage of their job that cannot be completed."""
EXIT_REFUSED = 4
"""The error affects every chunk, so the supervisor does not restart the process."""
EXIT_QUEUE_UNREACHABLE = 6
EXIT_TASK_TIMEOUT = 7
"""A task exceeded its time limit; only the end of the process frees its resources."""
EXIT_RESTART = 8
"""The remaining jobs need another deep-learning framework, and therefore a new process."""
EXIT_DIED_LOADING = 10
"""The worker's process ended while it loaded a network."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a task: its number, starting at 1, and the name of the worker."""

    number: int
    worker: str

    @property
    def is_last(self) -> bool:
        """Return whether the task fails for good if this attempt fails."""
        return self.number >= MAX_ATTEMPTS


class Contribution(NamedTuple):
    """A committed task is number `number` (from 0) of the `total` tasks that `task` waits for."""

    task: Task
    number: int
    total: int


class GateState(Enum):
    """Whether the stages before the tasks behind a gate are complete."""

    OPEN = auto()
    """All are committed."""
    CLOSED = auto()
    """Another process completes them."""
    BLOCKED = auto()
    """A task has failed, or is missing and not on the queue."""


@dataclass(frozen=True, slots=True)
class WorkerName:
    """Unique name of a worker process: host, device (`cpu` or the name of a GPU), random suffix."""

    host: str
    device: str
    suffix: str

    @classmethod
    def new(cls, device: str) -> WorkerName:
        """Return a new name for a process on this host."""
        return cls(socket.gethostname(), device, uuid.uuid4().hex[:8])

    @classmethod
    def parse(cls, text: str) -> WorkerName:
        """Parse a `name`. A text without colons is taken as the host."""
        host, device, suffix = (*text.rsplit(":", 2), "", "")[:3]
        return cls(host, device, suffix)

    @property
    def name(self) -> str:
        """The name as text: `HOST:DEVICE:SUFFIX`."""
        return f"{self.host}:{self.device}:{self.suffix}"


class TaskResult(NamedTuple):
    """Result of a task: one contribution for each task that waits for it.

    `ran_network` is False if the task did not run the network. Its duration is then not used for
    the time limit of later tasks.
    """

    contributions: Sequence[Contribution] = ()
    ran_network: bool = True


Handler = Callable[[Task, Attempt], TaskResult | None]
"""Run one task to completion, or raise."""


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """Numbers of the tasks of one job on the queue. Finished tasks are in the ledger only.

    `waiting` tasks are behind a closed gate and not among the `queued` ones.
    """

    queued: int = 0
    running: int = 0
    failed: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class RunningTask:
    """A running task, the name of its worker and its start time (s, Unix)."""

    task: Task
    worker: str
    since: float


def default_depth(*, gpu: bool) -> int:
    """Return the default number of chunks in flight in each worker process."""
    return DEFAULT_DEPTH_GPU if gpu else DEFAULT_DEPTH_CPU


@dataclass
class WorkerOptions:
    """Options of one worker process, and its stop signal.

    - `depth`: number of tasks in flight.
    - `burst`: end when the job, or the whole queue, has neither queued nor running tasks.
    - `job`: run tasks of the job folder with this path only, whatever their epoch.
    - `deadline` (s, Unix): start no task that would end later, judged by the longest task so far.
    - `time_limit` (s): limit of every task; None derives it from the tasks so far.
    - `is_waiting`: return whether a task waits for another task of this process to free the
      device. The time limit does not apply to such a task.
    - `check_gate`: look into a job folder whether the tasks of a kind may start. It is called when
      such tasks wait and their job has neither queued nor running tasks.
    - `on_loading`: called with True before a network is loaded, and with False afterwards. No other
      thread of the process may run in the meantime.
    - `on_success`: called with each task after which the network has run, when it is acknowledged.
    - `replaceable`: the supervisor starts a new process when this one ends with EXIT_RESTART.
    - `stop`: when set, the worker finishes the tasks in flight and reserves no more.
    - `settings`: default to those of the environment.
    - `longest_task` (s): duration of the longest task so far.
    - `skipped_jobs`: jobs that failed as a whole or were replaced; the worker reserves no more
      tasks of them.
    """

    worker: str
    depth: int = 1
    burst: bool = False
    job: str | None = None
    deadline: float | None = None
    time_limit: float | None = None
    is_waiting: Callable[[Task], bool] = lambda task: False
    check_gate: Callable[[JobId, str], GateState] = lambda job, kind: GateState.CLOSED
    on_loading: Callable[[bool], None] = lambda is_loading: None
    on_success: Callable[[Task], None] = lambda task: None
    replaceable: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    settings: WorkerSettings = field(default_factory=WorkerSettings.from_environment)
    longest_task: float = 0.0
    skipped_jobs: set[JobId] = field(default_factory=set)

    def can_start(self) -> bool:
        """Return whether the worker may reserve another task."""
        if self.stop.is_set():
            return False
        return self.deadline is None or time.time() + self.longest_task < self.deadline


class ExitStatus(NamedTuple):
    """How a worker process ended: its exit code, and the reason as lines of text."""

    code: int = 0
    lines: Sequence[str] = ()

    @classmethod
    def from_error(cls, error: ChunkqError) -> ExitStatus:
        """Return the exit status for an error.

        An unreachable queue may come back, so the supervisor restarts the process. Any other
        error would occur again.
        """
        if isinstance(error, FrameworkConflictError):
            return cls(EXIT_RESTART)
        if isinstance(error, IncompleteError):
            return cls(EXIT_INCOMPLETE, str(error).splitlines())
        may_return = isinstance(error, QueueError) and error.code is not ErrorCode.QUEUE_UNSUPPORTED
        code = EXIT_QUEUE_UNREACHABLE if may_return else EXIT_REFUSED
        return cls(code, str(error).splitlines())


Serve = Callable[["Executor", WorkerOptions], ExitStatus]
"""Run a worker in this process until its options or an error end it."""


class Executor(ABC):
    """A queue of tasks, shared by producers and workers.

    - A task is on the queue at most once. Submitting a queued or running task changes nothing;
      submitting a failed or cancelled task queues it with all its attempts.
    - A task has at most MAX_ATTEMPTS attempts. A worker that disappears uses up an attempt. A
      task whose last attempt is unsuccessful is failed.
    - The tasks of a worker that disappears are queued again when their leases expire, or
      immediately by `release`.
    - Tasks of successive jobs on one path (`JobId`) are separate, also if their ids are equal.
    - A task whose kind has a closed gate is waiting: it is not reserved and not counted as queued.
      It is queued when the gate opens. The gates of a job are deleted with its last task.
    - A message that is not a task of chunkq is never run. It is deleted and logged.
    - A lost queue loses no results: the ledger stores which chunks are done.

    Methods raise QueueError, with a message of one line, if the backend is unreachable or refuses
    the request.
    """

    url: str
    owns_process: bool = True
    """Whether each worker is a separate process, which can end when a task hangs."""

    def check_ready(self) -> None:
        """Raise QueueError unless tasks can be submitted and reserved."""
        self.jobs()

    def risks(self) -> list[str]:
        """Return one line for each setting of the server that can lose tasks."""
        return []

    @abstractmethod
    def submit(self, tasks: Iterable[Task]) -> int:
        """Queue tasks from an iterator in batches; return how many are newly queued."""

    @abstractmethod
    def counts(self, job: JobId) -> TaskCounts:
        """Return the numbers of tasks of a job by state."""

    @abstractmethod
    def jobs(self) -> dict[JobId, TaskCounts]:
        """Return the numbers of tasks of every job on the queue."""

    @abstractmethod
    def running(self, job: JobId) -> list[RunningTask]:
        """Return the running tasks of a job."""

    @abstractmethod
    def failed(self, job: JobId) -> list[Task]:
        """Return the failed tasks of a job."""

    @abstractmethod
    def retry(self, job: JobId) -> int:
        """Queue the failed tasks of a job with all their attempts; return how many."""

    @abstractmethod
    def cancel(self, job: JobId) -> int:
        """Remove all tasks and gates of a job; running tasks may finish. Return how many tasks."""

    @abstractmethod
    def close_gate(self, job: JobId, kind: str) -> None:
        """Make the queued tasks of a kind, and those submitted later, wait.

        Running tasks are not affected; they wait if their attempt is unsuccessful.
        """

    @abstractmethod
    def open_gate(self, job: JobId, kind: str) -> None:
        """Queue the waiting tasks of a kind in batches.

        A repeated call has no effect. If the caller dies, another call queues the rest.
        """

    @abstractmethod
    def waiting(self, options: WorkerOptions) -> list[tuple[JobId, str]]:
        """Return the jobs of a worker that have waiting tasks, but neither queued nor running ones.

        Each has the kind of its first gate with waiting tasks, in the order in which the gates
        were closed.
        """

    @abstractmethod
    def release(self, worker: str, *, counted: bool = True) -> int:
        """Requeue the tasks that a worker holds leases of; return how many.

        `counted` is whether their attempts count. Attempts of a dead worker count, because the
        task may have killed it. Attempts of a worker that was stopped do not.
        """

    @abstractmethod
    def extend(self, worker: str, seconds: float) -> None:
        """Make the leases of a worker last for at least `seconds` from now.

        Another process calls this while the worker loads a network and may be unable to renew its
        leases itself. It has no effect on leases that have ended.
        """

    @abstractmethod
    def run_tasks(self, handler: Handler, options: WorkerOptions) -> None:
        """Reserve tasks and run them until `options` or an error ends the worker.

        An exception of the handler costs the task an attempt, except JobError and ModelError:
        they would affect every chunk, so the task is requeued without counting the attempt, and
        the job is skipped. A job is also skipped if consecutive chunks fail with one cause. The
        error is raised once no other job has tasks.

        MissingJobError means that the job was deleted or replaced. The task is requeued without
        counting the attempt, the job is skipped, and the worker goes on with the others.
        GateClosedError means that an earlier stage is incomplete. The task is handed back without
        counting the attempt, and the gate of its kind is closed.

        If tasks wait, `options.check_gate` decides: the worker opens the gate, or, if an earlier
        stage cannot be completed, a burst raises IncompleteError once nothing else is left.

        FrameworkConflictError means that only a new process can run the task. The task is
        requeued without counting the attempt, and the worker continues with the other jobs. Once
        these have no task to reserve, or after `settings.longest_replacement_delay`, it finishes
        the tasks in flight and raises the error.

        A task over its time limit cannot be stopped from inside the process. It costs an attempt,
        the other tasks in flight are requeued, and TaskTimeoutError is raised so that the process
        ends.
        """

    def run_worker(self, serve: Serve, options: WorkerOptions) -> ExitStatus:
        """Run a worker with `serve` until it ends; return its exit status.

        It runs in this process, unless the engine runs workers in processes that it manages.
        """
        return serve(self, options)

    @abstractmethod
    def record_contributions(self, job: JobId, contributions: Sequence[Contribution]) -> list[Task]:
        """Record the contributions of a committed task; return the tasks that this completes.

        A task is complete when all tasks that it waits for are committed. It is returned to one
        caller only. If that caller crashes, the task is lost, and the finalizer runs it. Nothing
        is stored for a job without tasks on the queue.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""


def jobs_at(executor: Executor, path: str) -> dict[JobId, TaskCounts]:
    """Return the jobs on the queue that have the same folder, in the order of their epochs."""
    jobs = executor.jobs()
    return {job: jobs[job] for job in sorted(jobs) if job.path == path}
