"""What every queue backend offers: the contract, and the vocabulary it speaks."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from chunkq.errors import ChunkqError, ErrorCode, FrameworkConflictError, QueueError
from chunkq.executors.settings import WorkerSettings
from chunkq.tasks import Task, run_worker

MAX_ATTEMPTS = 3
"""A task that was begun this often without success is failed, until `retry`."""

DEPTH_ON_CPU, DEPTH_ON_GPU = 3, 4
"""One chunk is read, one computed, one written; a GPU must not wait where one of them is late."""

EXIT_DIED = 1
EXIT_REFUSED = 4
"""Every chunk would fail alike, so that starting a worker again is of no use."""
EXIT_QUEUE_UNREACHABLE = 6
EXIT_TASK_TIMEOUT = 7
"""A chunk hangs, and only the end of its process frees what it holds."""
EXIT_RESTART = 8
"""The jobs left need another deep-learning framework, and so a new process."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a task: its number from 1 and the worker's name."""

    number: int
    worker: str

    @property
    def is_last(self) -> bool:
        """Tell whether no further try will follow by itself."""
        return self.number >= MAX_ATTEMPTS


class BlockContribution(NamedTuple):
    """Says that a chunk is committed, as contributor number `member` of the `of` of a block."""

    block: tuple[int, ...]
    member: int
    of: int


@dataclass(frozen=True, slots=True)
class WorkerName:
    """A worker process by its host, its device (`cpu`, or a GPU's name) and a part of its own."""

    host: str
    device: str
    suffix: str

    @classmethod
    def new(cls, device: str) -> WorkerName:
        """Name a process of this host."""
        return cls(socket.gethostname(), device, uuid.uuid4().hex[:8])

    @classmethod
    def parse(cls, text: str) -> WorkerName:
        """Invert `text`; a name of another form counts as a host's."""
        host, device, own = (*text.rsplit(":", 2), "", "")[:3]
        return cls(host, device, own)

    @property
    def name(self) -> str:
        """The name as one word."""
        return f"{self.host}:{self.device}:{self.suffix}"


class TaskResult(NamedTuple):
    """What came of a task: its contributions, one for each block it contributed to.

    One that never `ran` the network says nothing about those still to come.
    """

    contributions: Sequence[BlockContribution] = ()
    ran: bool = True


Handler = Callable[[Task, Attempt], TaskResult | None]
"""Runs one task to its end, or raises."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Tasks of one job on the queue. What is done is not: the ledger knows."""

    queued: int = 0
    running: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Running:
    """A task being worked on: by whom, and since when (s, Unix)."""

    task: Task
    worker: str
    since: float


def default_depth(*, gpu: bool) -> int:
    """Return the chunks in flight in each process, where nobody says how many."""
    return DEPTH_ON_GPU if gpu else DEPTH_ON_CPU


@dataclass
class WorkerOptions:
    """How long one worker process goes on, and how it is told to stop.

    `depth` tasks are in flight at once. With `burst` it ends when its job or the whole queue
    has neither queued nor running tasks; `deadline` (s, Unix) is when its time is up: nothing
    is begun that would, judged by the longest task so far, not fit. `stopping` lets what is in
    flight finish. Jobs that cannot be done at all are `set_aside`, so that others go on. A task
    may take `time_limit` (s); None lets the limit follow the tasks seen so far. One that `waits`
    for another of this process, because there is one device, is not held to it. A process that
    is `replaceable` is started again when it ends with EXIT_REPLACE. `settings` default to those
    of the environment.
    """

    worker: str
    depth: int = 1
    burst: bool = False
    job: str | None = None
    deadline: float | None = None
    time_limit: float | None = None
    is_waiting: Callable[[Task], bool] = lambda task: False
    replaceable: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    settings: WorkerSettings = field(default_factory=WorkerSettings.from_environment)
    longest_task: float = 0.0
    skipped_jobs: set[str] = field(default_factory=set)

    def can_start(self) -> bool:
        """Tell whether another task may be begun."""
        if self.stop.is_set():
            return False
        return self.deadline is None or time.time() + self.longest_task < self.deadline


class ExitStatus(NamedTuple):
    """How a worker's options ended: the process's exit code, and why in lines."""

    code: int = 0
    lines: Sequence[str] = ()

    @classmethod
    def from_error(cls, error: ChunkqError) -> ExitStatus:
        """Return how a worker ends with an error: an absent queue may return, a bad job may not."""
        if isinstance(error, FrameworkConflictError):
            return cls(EXIT_RESTART)
        may_return = isinstance(error, QueueError) and error.code is not ErrorCode.QUEUE_UNSUPPORTED
        code = EXIT_QUEUE_UNREACHABLE if may_return else EXIT_REFUSED
        return cls(code, str(error).splitlines())


class Executor(ABC):
    """A queue of tasks, shared by producers and workers.

    - A task is on the queue at most once; submitting one that is queued or running changes
      nothing, submitting one that failed or was cancelled queues it afresh.
    - Every task is begun at most MAX_ATTEMPTS times; a worker that vanishes has begun it.
      The last attempt's failure leaves the task failed.
    - A vanished worker's tasks are begun again by others when its lease runs out, or at once by
      `release`.
    - A message that is no task of ours is never run; it is dropped, and the log says so.
    - Losing the queue loses no work: the ledger says what is left.

    Methods raise QueueError in one line when the backend is away or refuses.
    """

    url: str
    owns_process: bool = True
    """Whether a worker has a process of its own, which ends when a task hangs."""

    def ready(self) -> None:
        """Check that tasks can be queued and taken here; raises QueueError if not."""
        self.jobs()

    @abstractmethod
    def submit(self, tasks: Iterable[Task]) -> int:
        """Queue tasks, streaming; returns how many are newly queued."""

    @abstractmethod
    def counts(self, job: str) -> Counts:
        """Count a job's tasks by state."""

    @abstractmethod
    def jobs(self) -> dict[str, Counts]:
        """Count the tasks of every job on the queue."""

    @abstractmethod
    def running(self, job: str) -> list[Running]:
        """List a job's tasks being worked on."""

    @abstractmethod
    def failed(self, job: str) -> list[Task]:
        """List a job's failed tasks."""

    @abstractmethod
    def retry(self, job: str) -> int:
        """Queue a job's failed tasks afresh; returns how many."""

    @abstractmethod
    def cancel(self, job: str) -> int:
        """Take a job off the queue; what is running may finish. Returns how many were taken."""

    @abstractmethod
    def release(self, worker: str, *, counted: bool = True) -> int:
        """Hand back what a worker held, to be begun again at once; returns how many.

        `counted` tells whether the tries it had begun count: they do for a dead worker, which
        the task may have killed, and not for one that was told to stop.
        """

    @abstractmethod
    def run_tasks(self, handler: Handler, options: WorkerOptions) -> None:
        """Take tasks and run them until the options ends.

        A handler's error costs the task an attempt, save a JobError or ModelError: that one
        would strike every chunk, so the task goes back uncounted and its job is set aside. So is
        a job whose chunks fail alike one after another. The error is raised here once nothing
        else is left to do.

        A FrameworkConflictError means that this process cannot run the task, but a new one can.
        The task goes back uncounted, and the process goes on with the other jobs. It finishes
        what is in flight and raises the error as soon as these have no task to begin, or after
        `settings.longest_replacement_delay`.

        A task over its time limit cannot be stopped from inside the process: it costs an
        attempt, all else in flight is handed back, and TaskTimeoutError is raised for the process
        to end.
        """

    def run_worker(self, options: WorkerOptions) -> ExitStatus:
        """Run tasks until the worker ends, in a process that the engine manages.

        Unless an engine has such processes of its own, that is this one.
        """
        ended: ExitStatus = run_worker(self, options)
        return ended

    @abstractmethod
    def record_contributions(
        self, job: str, contributions: Sequence[BlockContribution]
    ) -> list[Task]:
        """Record a committed chunk's contributions; return the finalize tasks of complete blocks.

        Each is returned to one caller only, and may be lost: what is not completed so is left
        to the finalizer. Of a job without tasks on the queue nothing is remembered.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of connections."""
