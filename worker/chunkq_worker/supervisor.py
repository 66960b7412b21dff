"""Run one worker process per slot, restart it if it crashes, and requeue its chunks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from queue import Empty, SimpleQueue
from types import FrameType

from chunkq.errors import QueueError
from chunkq.job.tasks import chunk_count
from chunkq.model_check import CheckReport
from chunkq.paths import without_secret
from chunkq.queue.contract.executor import (
    EXIT_DIED_LOADING,
    EXIT_INCOMPLETE,
    EXIT_QUEUE_UNREACHABLE,
    EXIT_REFUSED,
    EXIT_RESTART,
    EXIT_TASK_TIMEOUT,
    Executor,
    WorkerName,
)
from chunkq.queue.contract.settings import WorkerSettings
from chunkq.system.cores import available_cores
from chunkq.system.gpus import VISIBLE
from chunkq.system.scratch import delete_abandoned
from chunkq.system.signal_masks import unblock_sigterm
from chunkq.terminal import columns, wrapped
from chunkq.worker_start import Step, decode_line
from chunkq_worker.child_env import child_env
from chunkq_worker.child_process import ChildProcess, waiting
from chunkq_worker.devices import Slot
from chunkq_worker.worker_process import LOADING, WorkerProcessOptions

POLL_SECONDS = 0.1
WAKE, END = b"", b"end"
"""What wakes the supervisor, apart from the lines of a run: a signal or the end of a process; the
end of the run."""
CLOSE_SECONDS = 1.0
"""Time in which the pipe of a process that has ended closes."""
REQUEUE_SECONDS = 1.0
"""Pause between attempts to requeue chunks on an unreachable queue."""


@dataclass
class _WorkerSlot:
    """A device with its current worker process, and the state that decides on a restart.

    The process has loaded a network since `loading_since` (s, monotonic), if that is not None; the
    thread `watch` sets it.
    `crashes` counts consecutive crashes; all but the first came soon after a start. Since
    `unreachable_since` (s, Unix), `reconnects` processes have ended because they lost the queue;
    `is_cut_off` is whether the last process has.
    `not_before` (s, Unix) is the earliest restart. A slot that is `done` is not restarted; it
    `has_failed` if that is an error, and `is_incomplete` if tasks wait for failed ones.
    """

    device: Slot
    process: subprocess.Popen[bytes] | None = None
    worker: str = ""
    loading_since: float | None = None
    watch: threading.Thread | None = None
    started: float = 0.0
    not_before: float = 0.0
    crashes: int = 0
    unreachable_since: float | None = None
    reconnects: int = 0
    is_cut_off: bool = False
    done: bool = False
    has_failed: bool = False
    is_incomplete: bool = False


@dataclass(repr=False)  # Python makes a text of a signal handler's object; `queue` has a password
class Supervisor:
    """Run worker processes until each one has finished; end them all before returning.

    The fields up to `quiet` are passed to the processes, see `WorkerOptions`.
    """

    queue: str
    slots: Sequence[Slot]
    depth: int
    burst: bool = False
    job: str | None = None
    deadline: float | None = None
    time_limit: float | None = None
    quiet: bool = False
    hide_gpus: bool = False
    settings: WorkerSettings = field(default_factory=WorkerSettings.from_environment)
    queue_was_unreachable: bool = field(default=False, init=False)
    executor: Executor = field(init=False)
    _slots: Sequence[_WorkerSlot] = field(init=False)
    _wakes: SimpleQueue[bytes] = field(default_factory=SimpleQueue, init=False)
    _signals: list[float] = field(default_factory=list, init=False)
    """Times (s, monotonic) of the signals, without those that follow within `same_signal`."""
    _forwarded: int = field(default=0, init=False)
    _work_line: bytes = field(default=b"", init=False)
    _pending_requeues: dict[str, bool] = field(default_factory=dict, init=False)
    _next_requeue: float = field(default=0.0, init=False)
    _next_renewal: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._slots = [_WorkerSlot(device) for device in self.slots]

    def receive(self, line: bytes) -> None:
        """Accept a line of the run that has started this process. Thread-safe."""
        self._wakes.put(line)

    def end_early(self) -> None:
        """End `start_early`, if it runs, because the run has ended. Thread-safe."""
        self._wakes.put(END)

    def start_early(self, report: int) -> bool:
        """Start the worker processes before their job exists; return whether the work begins.

        Those that wait for options are used. They get the lines of the run, the last one by `run`.
        The first process writes the result of its check to the descriptor `report`. If it ends
        before it can do that, its exit code is reported. Signals are left to the run, which gets
        them too, until the time in its last line.
        """
        self._handle_signals()
        first = self._slots[0]
        for slot in self._slots:
            self._start(slot, is_early=True, report=report if slot is first else None)
        while waiting:  # more than slots
            waiting.pop().kill()
        is_reported = False
        while (line := self._wakes.get()) != END:
            if line and decode_line(line)[0] is Step.WORK:
                self._work_line = line
                break
            for slot in self._slots:
                _send(slot, line)
            code = None if first.process is None else first.process.poll()
            if code is not None and not is_reported:
                is_reported = True
                CheckReport(exit_code=code).write(report)
        os.close(report)
        if not self._work_line:
            _kill_all(self._slots)
            return False
        until = float(decode_line(self._work_line)[1])
        del self._signals[: sum(moment <= until for moment in self._signals)]
        return True

    def run(self, executor: Executor) -> int:
        """Run until all worker processes have finished; return the exit code of the command.

        It is 1 if a process has failed, else EXIT_INCOMPLETE if tasks wait for failed ones, else 0.
        """
        self.executor, slots = executor, self._slots
        self._handle_signals()
        for slot in slots:
            _send(slot, self._work_line)  # to processes that started early
        if not self.quiet:
            self._log(self._greeting())
        try:
            while not all(slot.done for slot in slots):
                for slot in slots:
                    self._check_slot(slot)
                self._forward_signals(slots)
                self._renew_while_loading()
                if self._pending_requeues and time.time() >= self._next_requeue:
                    self._send_pending_requeues()
                if not all(slot.done for slot in slots):
                    with suppress(Empty):
                        self._wakes.get(timeout=POLL_SECONDS)
            if any(slot.has_failed for slot in slots):
                return 1
            return EXIT_INCOMPLETE if any(slot.is_incomplete for slot in slots) else 0
        finally:
            self._stop_all(slots)

    def _greeting(self) -> str:
        gpus = [device.gpu for device in self.slots if device.gpu is not None]
        where = f"GPUs {', '.join(gpus)}" if gpus else "the CPU"
        count = len(self.slots)
        end = "exits when the queue is empty" if self.burst else "waits when the queue is empty"
        return (
            f"{count} worker process{'es' if count > 1 else ''} on {where}, {self.depth} chunks in "
            f"flight each, queue {without_secret(self.queue)}, {end}; press Ctrl-C to stop"
        )

    def _handle_signals(self) -> None:
        signal.signal(signal.SIGTERM, self._count_signal)
        signal.signal(signal.SIGINT, self._count_signal)
        unblock_sigterm()

    def _count_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signals and now - self._signals[-1] <= self.settings.same_signal:
            return  # sent to all processes of a run, which also passes it on
        self._signals.append(now)
        self._wakes.put(WAKE)  # the only kind of queue that a signal handler may use

    def _check_slot(self, slot: _WorkerSlot) -> None:
        """Start or restart the process of a slot, or mark the slot as done."""
        if slot.done:
            return
        if slot.process is None:
            if self._signals:
                slot.done = True
            elif time.time() >= slot.not_before:
                self._start(slot)
            return
        code = slot.process.poll()
        if code is None:
            return
        _close_streams(slot)
        if code in (0, EXIT_INCOMPLETE) or self._signals:
            self._requeue(slot.worker, counted=False)
            slot.done, slot.is_incomplete = True, code == EXIT_INCOMPLETE
        elif code == EXIT_REFUSED:
            self._requeue(slot.worker, counted=False)
            slot.done = slot.has_failed = True
        elif code == EXIT_QUEUE_UNREACHABLE:
            self._handle_unreachable_queue(slot)
        elif code == EXIT_RESTART:
            self._requeue(slot.worker, counted=False)
            if not self.quiet:
                self._log(f"worker {slot.worker} restarts: the next job needs a new process")
        else:
            self._handle_crash(slot, code)

    def _renew_while_loading(self) -> None:
        """Renew the leases of processes that load a network, up to its time limit.

        Loading can hold Python's lock, so that the process itself cannot renew them.
        """
        now = time.monotonic()
        if now < self._next_renewal:
            return
        self._next_renewal = now + self.settings.lease / 3
        for slot in self._slots:
            since = slot.loading_since
            if since is not None and now - since < self.settings.first_time_limit:
                with suppress(QueueError):  # the process commits its chunks without the queue
                    self.executor.extend(slot.worker, self.settings.lease)

    def _handle_crash(self, slot: _WorkerSlot, code: int) -> None:
        """Restart a process, unless it dies again and again.

        The chunks of a process that was loading a network have not caused its end.
        """
        if slot.watch is not None:
            slot.watch.join(CLOSE_SECONDS)
        was_loading = slot.loading_since is not None or code == EXIT_DIED_LOADING
        returned = self._requeue(slot.worker, counted=not was_loading)
        is_early = time.time() - slot.started < self.settings.early_death
        slot.crashes = slot.crashes + 1 if is_early or was_loading else 1
        reason = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        if code == EXIT_TASK_TIMEOUT:
            reason = "ended because a chunk exceeded its time limit"
        elif was_loading:
            reason += " while it loaded a network"
        self._log(f"worker {slot.worker} {reason}; {chunk_count(returned)} requeued")
        if slot.crashes >= self.settings.early_deaths:
            when = (
                "while it loaded a network, possibly out of memory"
                if was_loading
                else f"within {self.settings.early_death:g} s"
            )
            self._log(
                f"giving up: the worker process crashed {slot.crashes} times in a row {when}; "
                "fix the cause, then restart the worker"
            )
            slot.done = slot.has_failed = True
            return
        self._delay_restart(slot, slot.crashes)

    def _handle_unreachable_queue(self, slot: _WorkerSlot) -> None:
        """Restart a process that ended because the queue is unreachable, up to a time limit."""
        self.queue_was_unreachable = True
        self._requeue(slot.worker, counted=False)
        now = time.time()
        if slot.unreachable_since is None or now - slot.started > self.settings.early_death:
            slot.unreachable_since, slot.reconnects = now, 0
        elif now - slot.unreachable_since > self.settings.queue_absence:
            self._log(
                f"giving up: the queue has been unreachable for {now - slot.unreachable_since:.0f} "
                "s; start the queue, then restart the worker"
            )
            slot.done = slot.has_failed = True
            return
        slot.reconnects += 1
        slot.is_cut_off = True
        self._delay_restart(slot, slot.reconnects)

    def _delay_restart(self, slot: _WorkerSlot, count: int) -> None:
        pause = self.settings.restart_delay * 2 ** min(count - 1, 10)
        slot.not_before = time.time() + min(self.settings.longest_restart_delay, pause)

    def _requeue(self, worker: str, *, counted: bool) -> int:
        """Requeue the chunks of an ended process; return how many.

        If the queue is unreachable, remember them for `_send_pending_requeues` and return 0.
        """
        try:
            return self.executor.release(worker, counted=counted)
        except QueueError:
            self._pending_requeues[worker] = counted
            self._next_requeue = time.time() + REQUEUE_SECONDS
            return 0

    def _send_pending_requeues(self) -> None:
        """Requeue chunks that failed to be requeued before; without it their leases expire."""
        pending, self._pending_requeues = self._pending_requeues, {}
        for worker, counted in pending.items():
            returned = self._requeue(worker, counted=counted)
            if returned:
                self._log(f"worker {worker}: {chunk_count(returned)} requeued")

    def _start(
        self, slot: _WorkerSlot, *, is_early: bool = False, report: int | None = None
    ) -> None:
        slot.worker = WorkerName.new(slot.device.gpu or "cpu").name
        slot.started, slot.loading_since = time.time(), None
        env = {**os.environ, **child_env(max(1, available_cores() // len(self.slots)))}
        if slot.device.gpu is not None or self.hide_gpus:
            env[VISIBLE] = slot.device.gpu or ""
        if is_early and waiting and waiting[0].report == report:
            child = waiting.pop(0)
        else:
            child = ChildProcess.start(env, report)
        options = WorkerProcessOptions(
            queue=self.queue,
            worker=slot.worker,
            depth=self.depth,
            burst=self.burst,
            job=self.job,
            deadline=self.deadline,
            time_limit=self.time_limit,
            quiet=self.quiet,
            is_early=is_early,
            report=report,
            loading=child.loading,
            environment=child.changes(env),
            is_cut_off=slot.is_cut_off,
        )
        slot.is_cut_off = False
        slot.process = child.process
        slot.watch = threading.Thread(
            target=_watch_loading, args=[slot, child.reports], daemon=True
        )
        slot.watch.start()
        _send(slot, json.dumps(asdict(options)).encode() + b"\n")
        threading.Thread(target=self._wake_at_end, args=[slot.process], daemon=True).start()

    def _wake_at_end(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._wakes.put(WAKE)

    def _forward_signals(self, slots: Sequence[_WorkerSlot]) -> None:
        while self._forwarded < len(self._signals):
            self._forwarded += 1
            self._log(
                "stopping after the chunks in flight; press Ctrl-C again to stop now, "
                "unfinished chunks return to the queue"
                if self._forwarded == 1
                else "requeueing the chunks in flight"
            )
            for slot in slots:
                if slot.process is not None and self._forwarded == 1:
                    slot.process.terminate()
                elif slot.process is not None:
                    # A worker process merges two signals in short order into one, so kill it;
                    # `_check_slot` requeues its chunks.
                    slot.process.kill()

    def _stop_all(self, slots: Sequence[_WorkerSlot]) -> None:
        for slot in _kill_all(slots):
            self._requeue(slot.worker, counted=False)
        if self._pending_requeues:
            self._send_pending_requeues()

    def _log(self, line: str) -> None:
        sys.stderr.write(wrapped(f"chunkq: {line}", columns(sys.stderr)) + "\n")


def _watch_loading(slot: _WorkerSlot, reports: int) -> None:
    """Store in a slot since when its process loads a network, until the pipe is closed."""
    with open(reports, "rb", buffering=0) as pipe:
        while report := pipe.read(1):
            slot.loading_since = time.monotonic() if report == LOADING else None


def _send(slot: _WorkerSlot, line: bytes) -> None:
    """Write a line to the process of a slot. If that has ended, the next check handles it."""
    if slot.process is not None and slot.process.stdin is not None:
        with suppress(BrokenPipeError):
            slot.process.stdin.write(line)
            slot.process.stdin.flush()


def _kill_all(slots: Sequence[_WorkerSlot]) -> list[_WorkerSlot]:
    """Kill all processes, and delete their temporary files; return their slots."""
    running = [slot for slot in slots if slot.process is not None]
    for slot in running:
        if slot.process is not None:
            slot.process.kill()
            slot.process.wait()
            _close_streams(slot)
    delete_abandoned()
    return running


def _close_streams(slot: _WorkerSlot) -> None:
    """Close the pipe of an ended process and forget the process."""
    if slot.process is not None and slot.process.stdin is not None:
        with suppress(BrokenPipeError):
            slot.process.stdin.close()
    slot.process = None
