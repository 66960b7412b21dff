"""Task loop of a worker on a queue that leases tasks, independent of how the queue is stored."""

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
    RESUME,
    FrameworkConflictError,
    GateClosedError,
    IncompleteError,
    JobError,
    MissingJobError,
    ModelError,
    RepeatedFailureError,
    TaskTimeoutError,
    failure_key,
)
from chunkq.job.tasks import JobId, Task, chunk_name
from chunkq.paths import without_secret
from chunkq.queue.contract.executor import Attempt, Executor, Handler, TaskResult, WorkerOptions
from chunkq.queue.contract.settings import WorkerSettings
from chunkq.queue.leases.gates import GateWatch
from chunkq.terminal import argument

log = logging.getLogger("chunkq.queue")


@dataclass(frozen=True, slots=True)
class Lease:
    """A reserved task: the attempt, its start time (s, Unix), the attempt's id on the queue."""

    task: Task
    attempt: Attempt
    token: str = ""
    since: float = field(default_factory=time.time)


class LeaseQueue(Executor):
    """A queue that leases tasks to workers; a worker renews its leases until the tasks end.

    Ending a lease has no effect if the task has since been leased to another worker.
    """

    @abstractmethod
    def reserve(self, options: WorkerOptions) -> Lease | None:
        """Lease one task, or return None if no task is available."""

    @abstractmethod
    def ack(self, lease: Lease) -> None:
        """Delete a finished task."""

    @abstractmethod
    def nack(self, lease: Lease, error: BaseException) -> None:
        """End an unsuccessful attempt: queue the task last, or fail it after the last attempt."""

    @abstractmethod
    def requeue(self, lease: Lease) -> None:
        """Queue a task first, without counting the attempt."""

    @abstractmethod
    def is_drained(self, options: WorkerOptions) -> bool:
        """Return whether the jobs of a worker have neither queued nor running tasks."""

    @abstractmethod
    def renew(self, options: WorkerOptions, leases: Sequence[Lease]) -> None:
        """Extend leases of a worker, and update its heartbeat."""

    @contextmanager
    def registered(self, options: WorkerOptions) -> Iterator[None]:
        """Register a worker with monitoring tools while the context is open."""
        yield

    def run_tasks(self, handler: Handler, options: WorkerOptions) -> None:
        """Run `options.depth` task loops in threads; renew their leases from this thread."""
        loops = _TaskLoops(self, handler, options)
        threads = [
            threading.Thread(target=loops.loop, name=f"chunk-{n}", daemon=True)
            for n in range(options.depth)
        ]
        with self.registered(options):
            for thread in threads:
                thread.start()
            try:
                while any(thread.is_alive() for thread in threads):
                    self.renew(options, loops.leases())
                    loops.check_timeouts()
                    loops.wait(threads)
            finally:
                options.stop.set()
        if loops.error is not None:
            raise loops.error


@dataclass
class _JobHistory:
    """Longest successful task (s) of one job, and the tasks that last failed with one cause."""

    longest_task: float | None = None
    cause: tuple[str, str] | None = None
    failed_tasks: set[str] = field(default_factory=set)

    def record_success(self, seconds: float) -> None:
        self.longest_task = max(self.longest_task or 0.0, seconds)
        self.cause = None
        self.failed_tasks.clear()

    def record_failure(self, task: Task, error: BaseException, settings: WorkerSettings) -> bool:
        """Record a failure; return whether enough tasks failed with one cause to skip the job."""
        new_cause = failure_key(type(error).__name__, str(error))
        if new_cause != self.cause:
            self.cause = new_cause
            self.failed_tasks.clear()
        self.failed_tasks.add(task.id)
        first, later = settings.same_failures_at_first, settings.same_failures_later
        return len(self.failed_tasks) >= (first if self.longest_task is None else later)

    def time_limit(self, settings: WorkerSettings) -> float:
        if self.longest_task is None:
            return settings.first_time_limit
        return max(settings.least_time_limit, settings.time_limit_factor * self.longest_task)


class _RunTime:
    """Time for which this process has run, without the time for which it was suspended."""

    def __init__(self, longest: float) -> None:
        """Expect a `tick` at least every `longest` seconds."""
        self._longest, self._ticked, self._seconds = longest, time.monotonic(), 0.0

    def now(self) -> float:
        """Return the time (s) since the object was created."""
        return self._seconds + min(time.monotonic() - self._ticked, self._longest)

    def tick(self) -> None:
        """Note that the process runs."""
        self._seconds, self._ticked = self.now(), time.monotonic()


class _TaskLoops:
    """Task loops of one worker, their current leases, and the history of each job."""

    def __init__(self, queue: LeaseQueue, handler: Handler, options: WorkerOptions) -> None:
        self._queue, self._handler, self._options = queue, handler, options
        self._leases: dict[int, Lease] = {}
        self._begun: dict[int, float] = {}
        """Thread -> when its task began, by `_run_time`."""
        self._jobs: defaultdict[JobId, _JobHistory] = defaultdict(_JobHistory)
        self._lock, self._reserve_lock = threading.Lock(), threading.Lock()
        self._changed = threading.Event()
        """Set when a task of this worker has ended or the worker stops; wakes an idle loop."""
        self._settings = options.settings
        self._run_time = _RunTime(2 * self._heartbeat_interval())
        self._pause = self._settings.shortest_poll
        self._gates = GateWatch(queue, options)
        self._conflict: FrameworkConflictError | None = None
        self._conflict_since = 0.0
        self.error: Exception | None = None

    def leases(self) -> list[Lease]:
        with self._lock:
            return list(self._leases.values())

    def wait(self, threads: Sequence[threading.Thread]) -> None:
        """Wait until all threads have ended, or the leases must be renewed."""
        until = time.monotonic() + self._heartbeat_interval()
        if self._options.stop.wait(self._heartbeat_interval()):
            self._changed.set()
            _join(threads, until)

    def _heartbeat_interval(self) -> float:
        """Return the time (s) between two renewals."""
        limit, lease = self._options.time_limit, self._settings.lease
        return lease / 3 if limit is None else min(lease, limit) / 3

    def loop(self) -> None:
        """Reserve and run tasks one after another. Several threads run this.

        What ends one loop ends them all.
        """
        try:
            while (lease := self._next()) is not None:
                self._run(lease)
        except Exception as error:
            self.error = error
        finally:
            self._options.stop.set()

    def _next(self) -> Lease | None:
        """Wait for a task and reserve it; return None when the worker ends.

        One thread polls for all, so that an idle worker sends few requests.
        """
        with self._reserve_lock:
            while self._can_start():
                lease = None if self._is_replacement_due() else self._queue.reserve(self._options)
                if lease is not None:
                    self._pause = self._settings.shortest_poll
                    self._add_lease(lease)
                    return lease
                if self._conflict is not None:
                    self.error = self._conflict
                    self._options.stop.set()
                    return None
                ends_when_drained = self._options.burst or self.error is not None
                is_drained = ends_when_drained and self._queue.is_drained(self._options)
                if self._gates.open_ready(at_once=is_drained):
                    continue
                # Another worker may have opened a gate meanwhile.
                is_over = is_drained and not self._gates.is_opening
                if is_over and self._queue.is_drained(self._options):
                    self.error = self.error or self._incomplete_job()
                    return None
                self._changed.wait(self._pause)
                # Redis treats a gap of half a lease between requests as an outage of the server.
                longest = min(self._settings.longest_poll, self._settings.lease / 8)
                self._pause = min(longest, 1.5 * self._pause)
        return None

    def _can_start(self) -> bool:
        """Return whether to look for a task; `_changed` is set by what happens from now on."""
        self._changed.clear()
        return self._options.can_start()

    def _incomplete_job(self) -> IncompleteError | None:
        """Return the error for jobs whose waiting tasks cannot start, or None."""
        if not self._gates.blocked:
            return None
        outputs = sorted({_output(job) for job, _ in self._gates.blocked})
        first = argument(outputs[0])
        return IncompleteError(
            f"{', '.join(outputs)}: tasks wait for chunks that failed or are missing; run `chunkq "
            f"status {first}` to see why, then `chunkq retry {first}`, or {RESUME}",
            [],
        )

    def _add_lease(self, lease: Lease) -> None:
        with self._lock:
            self._leases[threading.get_ident()] = lease
            self._begun[threading.get_ident()] = self._run_time.now()

    def check_timeouts(self) -> None:
        """Raise TaskTimeoutError if a task is over its limit, and end all leases.

        Time for which this process was suspended does not count.
        """
        self._run_time.tick()
        now = self._run_time.now()
        with self._lock:
            running = [(lease, now - self._begun[thread]) for thread, lease in self._leases.items()]
        leases = [lease for lease, _ in running]
        over = [
            lease
            for lease, seconds in running
            if seconds > self._limit(lease.task.job_id) and not self._options.is_waiting(lease.task)
        ]
        if not over:
            return
        self._options.stop.set()
        names = ", ".join(chunk_name(lease.task.chunk) for lease in over)
        error = TaskTimeoutError(
            f"{over[0].task.kind} chunk {names}: exceeded the time limit of "
            f"{self._limit(over[0].task.job_id):.0f} s; this process ends, the chunk is tried "
            "again",
            over,
        )
        for lease in leases:
            if lease in over:
                self._queue.nack(lease, error)
            else:
                self._queue.requeue(lease)
        raise error

    def _limit(self, job: JobId) -> float:
        fixed = self._options.time_limit
        return self._jobs[job].time_limit(self._settings) if fixed is None else fixed

    def _run(self, lease: Lease) -> None:
        try:
            self._run_one(lease)
        finally:
            with self._lock:
                del self._leases[threading.get_ident()]
            self._changed.set()
            seconds = time.time() - lease.since
            self._options.longest_task = max(self._options.longest_task, seconds)

    def _run_one(self, lease: Lease) -> None:
        job = lease.task.job_id
        history = self._jobs[job]
        try:
            result = self._handler(lease.task, lease.attempt) or TaskResult()
        except FrameworkConflictError as error:
            self._restart_for_job(job, error)
            self._queue.requeue(lease)
        except MissingJobError as error:
            self._queue.requeue(lease)
            self._set_aside(job, error)
        except GateClosedError as error:
            log.info("%s", error)
            self._queue.close_gate(job, lease.task.kind)  # first, so that the task waits, too
            self._queue.requeue(lease)
        except (JobError, ModelError) as error:
            self._queue.requeue(lease)
            self._skip_job(job, error)
        except (Exception, SystemExit) as error:
            # The handler has recorded the error in the ledger; the queue counts attempts only.
            self._queue.nack(lease, error)
            if history.record_failure(lease.task, error, self._settings):
                self._skip_job(job, _same_failure(job, history, error))
        else:
            if result.contributions:
                self._continue(lease, result)
            if result.ran_network:
                history.record_success(time.time() - lease.since)
            self._queue.ack(lease)
            self._gates.reset(job)
            if result.ran_network:
                self._options.on_success(lease.task)

    def _continue(self, lease: Lease, result: TaskResult) -> None:
        """Run the tasks for which a task was the last one that they waited for, and so on."""
        job = lease.task.job_id
        tasks = self._queue.record_contributions(job, result.contributions)
        while tasks:
            task = tasks.pop(0)
            try:
                result = self._handler(task, lease.attempt) or TaskResult()
                if result.contributions:
                    tasks += self._queue.record_contributions(job, result.contributions)
            except Exception:
                # The ledger has the error, and the finalizer completes every block.
                log.warning(
                    "%s %s is left to the finalizer",
                    "block" if task.kind == "finalize" else f"{task.kind} task",
                    chunk_name(task.chunk),
                )

    def _restart_for_job(self, job: JobId, error: FrameworkConflictError) -> None:
        """Skip a job; `_next` ends the worker when no other job has tasks."""
        self._options.skipped_jobs.add(job)
        if self._conflict is None:
            log.info("%s", error)
            self._conflict, self._conflict_since = error, time.time()

    def _is_replacement_due(self) -> bool:
        waited = time.time() - self._conflict_since
        return self._conflict is not None and waited > self._settings.longest_replacement_delay

    def _set_aside(self, job: JobId, error: MissingJobError) -> None:
        """Reserve no more tasks of a job that does not exist; this is no error of the worker."""
        with self._lock:
            is_new = job not in self._options.skipped_jobs
            self._options.skipped_jobs.add(job)
        if is_new:
            log.warning(
                "%s; skipping its tasks on the queue (epoch %s); if the job is gone, "
                "`chunkq cancel` removes them",
                error,
                job.epoch,
            )

    def _skip_job(self, job: JobId, error: Exception) -> None:
        """Reserve no more tasks of a job; the loops end when no other job has tasks."""
        was_skipped = job in self._options.skipped_jobs
        self._options.skipped_jobs.add(job)
        self.error = error  # raised at the end, and reported then
        if self._options.job is not None:
            self._options.stop.set()
        elif not was_skipped and not self._queue.is_drained(self._options):
            log.error("%s", error)


def _output(job: JobId) -> str:
    return without_secret(job.path).removesuffix(".chunkq")


def _same_failure(job: JobId, history: _JobHistory, error: BaseException) -> RepeatedFailureError:
    message = str(error) or type(error).__name__
    return RepeatedFailureError(
        f"{_output(job)}: {len(history.failed_tasks)} consecutive chunks failed with the same "
        f"error ({type(error).__name__}: {message.splitlines()[0][:300]}), so the worker skips "
        "this job; read the traceback with `chunkq status --json`, fix the cause, then restart the "
        "worker"
    )


def _join(threads: Sequence[threading.Thread], until: float) -> None:
    """Wait until all threads end, or until a time of the monotonic clock."""
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
