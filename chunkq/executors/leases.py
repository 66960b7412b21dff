"""How a worker works off a queue that leases tasks: the rules, whatever the queue is kept in."""

from __future__ import annotations

import logging
import threading
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from chunkq.errors import (
    FrameworkConflictError,
    JobError,
    ModelError,
    SameFailureError,
    TaskTimeoutError,
    cause,
)
from chunkq.executors.base import Attempt, Executor, Handler, TaskResult, WorkerOptions
from chunkq.executors.settings import WorkerSettings
from chunkq.paths import without_secret
from chunkq.tasks import Task, chunk_name

log = logging.getLogger("chunkq.queue")


@dataclass(frozen=True, slots=True)
class Lease:
    """A task begun: by whom, since when (s, Unix), and the queue's name for this one attempt."""

    task: Task
    attempt: Attempt
    token: str = ""
    since: float = field(default_factory=time.time)


class LeaseQueue(Executor):
    """A queue of which a worker leases tasks, and that it must tell again and again it lives.

    Ending a lease that is another's by now changes nothing.
    """

    @abstractmethod
    def reserve(self, options: WorkerOptions) -> Lease | None:
        """Begin one task, or return None if there is none to begin now."""

    @abstractmethod
    def ack(self, lease: Lease) -> None:
        """Take a finished task off the queue."""

    @abstractmethod
    def nack(self, lease: Lease, error: BaseException) -> None:
        """End an attempt without success: the task waits behind all others, or is failed."""

    @abstractmethod
    def requeue(self, lease: Lease) -> None:
        """Put a task back as if it had not been begun."""

    @abstractmethod
    def is_drained(self, options: WorkerOptions) -> bool:
        """Tell whether what a options works on has neither queued nor running tasks."""

    @abstractmethod
    def renew(self, options: WorkerOptions, held: Sequence[Lease]) -> None:
        """Extend the leases that a worker holds, and show that it lives."""

    @contextmanager
    def registered(self, options: WorkerOptions) -> Iterator[None]:
        """Announce a worker to whoever watches the queue, and its leaving."""
        yield

    def run_tasks(self, handler: Handler, options: WorkerOptions) -> None:
        """Run `options.depth` loops side by side, and a heartbeat that renews their leases."""
        crew = _TaskLoops(self, handler, options)
        threads = [
            threading.Thread(target=crew.loop, name=f"chunk-{n}", daemon=True)
            for n in range(options.depth)
        ]
        with self.registered(options):
            for thread in threads:
                thread.start()
            try:
                while any(thread.is_alive() for thread in threads):
                    self.renew(options, crew.held())
                    crew.check_timeouts()
                    _join(threads, crew.heartbeat_interval())
            finally:
                options.stop.set()
        if crew.error is not None:
            raise crew.error


@dataclass
class _JobHistory:
    """What a worker has learned about one job."""

    longest: float | None = None
    cause: tuple[str, str] | None = None
    alike: set[tuple[int, ...]] = field(default_factory=set)

    def succeeded(self, seconds: float) -> None:
        self.longest = max(self.longest or 0.0, seconds)
        self.cause = None
        self.alike.clear()

    def is_hopeless_after(self, task: Task, error: BaseException, settings: WorkerSettings) -> bool:
        """Note a failure; tell whether so many chunks failed alike that the job is given up."""
        found = cause(type(error).__name__, str(error))
        if found != self.cause:
            self.cause = found
            self.alike.clear()
        self.alike.add(task.chunk)
        first, later = settings.same_failures_at_first, settings.same_failures_later
        return len(self.alike) >= (first if self.longest is None else later)

    def time_limit(self, settings: WorkerSettings) -> float:
        if self.longest is None:
            return settings.first_time_limit
        return max(settings.least_time_limit, settings.time_limit_factor * self.longest)


class _TaskLoops:
    """The loops of one worker: what they hold, and what they have learned about the jobs."""

    def __init__(self, queue: LeaseQueue, handler: Handler, options: WorkerOptions) -> None:
        self._queue, self._handler, self._options = queue, handler, options
        self._held: dict[int, Lease] = {}
        self._jobs: defaultdict[str, _JobHistory] = defaultdict(_JobHistory)
        self._lock, self._looking = threading.Lock(), threading.Lock()
        self._settings = options.settings
        self._pause = self._settings.shortest_poll
        self._conflict: FrameworkConflictError | None = None
        self._conflict_since = 0.0
        self.error: Exception | None = None

    def held(self) -> list[Lease]:
        with self._lock:
            return list(self._held.values())

    def heartbeat_interval(self) -> float:
        """Return how long (s) the heartbeat may wait."""
        limit, lease = self._options.time_limit, self._settings.lease
        return lease / 3 if limit is None else min(lease, limit) / 3

    def loop(self) -> None:
        """Take tasks one after another; several threads run this."""
        try:
            while (lease := self._next()) is not None:
                self._run(lease)
        except Exception as error:
            self.error = error
            self._options.stop.set()

    def _next(self) -> Lease | None:
        """Wait for a task to begin, one thread for all: an idle worker asks the queue little."""
        with self._looking:
            while self._options.can_start():
                lease = None if self._is_replacement_due() else self._queue.reserve(self._options)
                if lease is not None:
                    self._pause = self._settings.shortest_poll
                    self._hold(lease)
                    return lease
                if self._conflict is not None:
                    self.error = self._conflict
                    self._options.stop.set()
                    return None
                over = self._options.burst or self.error is not None
                if over and self._queue.is_drained(self._options):
                    return None
                self._options.stop.wait(self._pause)
                # Well below half a lease: a queue may take longer silence for its own absence.
                longest = min(self._settings.longest_poll, self._settings.lease / 8)
                self._pause = min(longest, 1.5 * self._pause)
        return None

    def _hold(self, lease: Lease) -> None:
        with self._lock:
            self._held[threading.get_ident()] = lease

    def check_timeouts(self) -> None:
        """Raise OverrunError if a task is over its limit, and let go of all that is held."""
        now, held = time.time(), self.held()
        over = [
            lease
            for lease in held
            if now - lease.since > self._limit(lease.task.job)
            and not self._options.is_waiting(lease.task)
        ]
        if not over:
            return
        self._options.stop.set()
        named = ", ".join(chunk_name(lease.task.chunk) for lease in over)
        error = TaskTimeoutError(
            f"{over[0].task.kind} chunk {named} ran for more than its time limit of "
            f"{self._limit(over[0].task.job):.0f} s; this process ends, the chunk is tried again",
            over,
        )
        for lease in held:
            if lease in over:
                self._queue.nack(lease, error)
            else:
                self._queue.requeue(lease)
        raise error

    def _limit(self, job: str) -> float:
        fixed = self._options.time_limit
        return self._jobs[job].time_limit(self._settings) if fixed is None else fixed

    def _run(self, lease: Lease) -> None:
        try:
            self._run_one(lease)
        finally:
            with self._lock:
                del self._held[threading.get_ident()]
            took = time.time() - lease.since
            self._options.longest_task = max(self._options.longest_task, took)

    def _run_one(self, lease: Lease) -> None:
        record = self._jobs[lease.task.job]
        try:
            outcome = self._handler(lease.task, lease.attempt) or TaskResult()
        except FrameworkConflictError as error:
            self._restart_for_job(lease.task.job, error)
            self._queue.requeue(lease)
        except (JobError, ModelError) as error:
            self._queue.requeue(lease)
            self._skip_job(lease.task.job, error)
        except (Exception, SystemExit) as error:
            # The handler has recorded it in the ledger; the queue only counts.
            self._queue.nack(lease, error)
            if record.is_hopeless_after(lease.task, error, self._settings):
                self._skip_job(lease.task.job, _same_failure(lease.task, record, error))
        else:
            if outcome.contributions:
                self._complete(
                    lease, self._queue.record_contributions(lease.task.job, outcome.contributions)
                )
            if outcome.ran:
                record.succeeded(time.time() - lease.since)
            self._queue.ack(lease)

    def _complete(self, lease: Lease, blocks: Sequence[Task]) -> None:
        """Complete the blocks that a chunk was the last to contribute to."""
        for block in blocks:
            try:
                self._handler(block, lease.attempt)
            except Exception:
                # It is in the ledger, and the finalizer comes by in any case.
                log.warning("block %s is left to the finalizer", chunk_name(block.chunk))

    def _restart_for_job(self, job: str, error: FrameworkConflictError) -> None:
        """Take no more tasks of a job; `_next` ends the options when there are no others."""
        self._options.skipped_jobs.add(job)
        if self._conflict is None:
            log.info("%s", error)
            self._conflict, self._conflict_since = error, time.time()

    def _is_replacement_due(self) -> bool:
        waited = time.time() - self._conflict_since
        return self._conflict is not None and waited > self._settings.longest_replacement_delay

    def _skip_job(self, job: str, error: Exception) -> None:
        """Leave a job that cannot be done; the loops end once there is no other."""
        known = job in self._options.skipped_jobs
        self._options.skipped_jobs.add(job)
        self.error = error  # raised, and said, at the end
        if self._options.job is not None:
            self._options.stop.set()
        elif not known and not self._queue.is_drained(self._options):
            log.error("%s", error)


def _same_failure(task: Task, record: _JobHistory, error: BaseException) -> SameFailureError:
    shown = str(error) or type(error).__name__
    output = without_secret(task.job).removesuffix(".chunkq")
    return SameFailureError(
        f"{output}: {len(record.alike)} chunks in a row failed alike "
        f"({type(error).__name__}: {shown.splitlines()[0][:300]}), so the worker leaves this job; "
        "`chunkq status` has the traceback; mend the cause, then work again"
    )


def _join(threads: Sequence[threading.Thread], seconds: float) -> None:
    """Wait for threads to end, for so many seconds at most."""
    until = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
