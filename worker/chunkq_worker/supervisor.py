"""Keeps one child process per device alive, and hands back what a dead one held."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType

from chunkq.errors import QueueError
from chunkq.executors.base import (
    EXIT_QUEUE_UNREACHABLE,
    EXIT_REFUSED,
    EXIT_RESTART,
    EXIT_TASK_TIMEOUT,
    Executor,
    WorkerName,
)
from chunkq.executors.settings import WorkerSettings
from chunkq.paths import without_secret
from chunkq.scratch import delete_abandoned
from chunkq_worker.child_env import child_env
from chunkq_worker.devices import VISIBLE, Slot, cores
from chunkq_worker.worker_process import WorkerProcessOptions

POLL_SECONDS = 0.1
REQUEUE_SECONDS = 1.0
"""Between tries to tell an absent queue what a child has let go."""


@dataclass
class _WorkerSlot:
    """One slot and the process in it. `deaths` counts instant ones in a row."""

    slot: Slot
    process: subprocess.Popen[str] | None = None
    worker: str = ""
    started: float = 0.0
    not_before: float = 0.0
    deaths: int = 0
    away_since: float | None = None
    absences: int = 0
    done: bool = False
    gave_up: bool = False


@dataclass
class Supervisor:
    """Runs children until each has ended its shift; none outlives it."""

    queue: str
    executor: Executor
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
    _signals: int = field(default=0, init=False)
    _passed_on: int = field(default=0, init=False)
    _pending_requeues: dict[str, bool] = field(default_factory=dict, init=False)
    _next_requeue: float = field(default=0.0, init=False)

    def run(self) -> int:
        """Return 0 when all children ended well, 1 when some could not go on."""
        signal.signal(signal.SIGTERM, self._count_signal)
        signal.signal(signal.SIGINT, self._count_signal)
        places = [_WorkerSlot(slot) for slot in self.slots]
        if not self.quiet:
            self._say(self._greeting())
        try:
            while not all(place.done for place in places):
                for place in places:
                    self._check_slot(place)
                self._pass_on_signals(places)
                if self._pending_requeues and time.time() >= self._next_requeue:
                    self._send_pending_requeues()
                time.sleep(POLL_SECONDS)
            return 1 if any(place.gave_up for place in places) else 0
        finally:
            self._end_all(places)

    def _greeting(self) -> str:
        gpus = [slot.gpu for slot in self.slots if slot.gpu is not None]
        where = f"GPUs {', '.join(gpus)}" if gpus else "the CPU"
        until = "until nothing is left" if self.burst else "waiting for more when all is done"
        return (
            f"{len(self.slots)} worker processes on {where}, {self.depth} chunks in flight each, "
            f"queue {without_secret(self.queue)}, {until}; Ctrl-C to stop"
        )

    def _count_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _check_slot(self, place: _WorkerSlot) -> None:
        """Start or restart a place's child, or write the place off; the others go on."""
        if place.done:
            return
        if place.process is None:
            if self._signals:
                place.done = True
            elif time.time() >= place.not_before:
                self._start(place)
            return
        code = place.process.poll()
        if code is None:
            return
        _close_streams(place)
        if code == 0 or self._signals:
            self._requeue(place.worker, counted=False)
            place.done = True
        elif code == EXIT_REFUSED:
            self._requeue(place.worker, counted=False)
            place.done = place.gave_up = True
        elif code == EXIT_QUEUE_UNREACHABLE:
            self._after_absence(place)
        elif code == EXIT_RESTART:
            self._requeue(place.worker, counted=False)
            if not self.quiet:
                self._say(f"worker {place.worker} is replaced: the next job needs a new process")
        else:
            self._after_death(place, code)

    def _after_death(self, place: _WorkerSlot, code: int) -> None:
        returned = self._requeue(place.worker, counted=True)
        instant = time.time() - place.started < self.settings.early_death
        place.deaths = place.deaths + 1 if instant else 1
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        if code == EXIT_TASK_TIMEOUT:
            how = "was ended because it hung"
        self._say(f"worker {place.worker} {how}; {returned} chunks handed back")
        if place.deaths >= self.settings.early_deaths:
            self._say(f"gave up after {place.deaths} deaths within seconds of starting")
            place.done = place.gave_up = True
            return
        self._wait(place, place.deaths)

    def _after_absence(self, place: _WorkerSlot) -> None:
        """Start a child again that lost the queue: a queue comes back, and nobody is to watch."""
        self.queue_was_unreachable = True
        self._requeue(place.worker, counted=False)
        now = time.time()
        if place.away_since is None or now - place.started > self.settings.early_death:
            place.away_since, place.absences = now, 0
        elif now - place.away_since > self.settings.queue_absence:
            self._say("gave up: the queue stays away")
            place.done = place.gave_up = True
            return
        place.absences += 1
        self._wait(place, place.absences)

    def _wait(self, place: _WorkerSlot, times: int) -> None:
        pause = self.settings.restart_delay * 2 ** min(times - 1, 10)
        place.not_before = time.time() + min(self.settings.longest_restart_delay, pause)

    def _requeue(self, worker: str, *, counted: bool) -> int:
        """Return a child's chunks to the queue, later if that is away now; returns how many."""
        try:
            return self.executor.release(worker, counted=counted)
        except QueueError:
            self._pending_requeues[worker] = counted
            self._next_requeue = time.time() + REQUEUE_SECONDS
            return 0

    def _send_pending_requeues(self) -> None:
        """Hand back what an absent queue could not be told; if it never is, leases run out."""
        owed, self._pending_requeues = self._pending_requeues, {}
        for worker, counted in owed.items():
            returned = self._requeue(worker, counted=counted)
            if returned:
                self._say(f"worker {worker}: {returned} chunks handed back")

    def _start(self, place: _WorkerSlot) -> None:
        place.worker = WorkerName.new(place.slot.gpu or "cpu").name
        place.started = time.time()
        orders = WorkerProcessOptions(
            queue=self.queue,
            worker=place.worker,
            depth=self.depth,
            burst=self.burst,
            job=self.job,
            deadline=self.deadline,
            time_limit=self.time_limit,
            quiet=self.quiet,
        )
        environment = {**os.environ, **child_env(max(1, cores() // len(self.slots)))}
        if place.slot.gpu is not None or self.hide_gpus:
            environment[VISIBLE] = place.slot.gpu or ""
        # A session of its own: Ctrl-C reaches only the supervisor, which passes it on.
        place.process = subprocess.Popen(
            [sys.executable, "-m", "chunkq_worker.worker_process"],
            stdin=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
        )
        pipe = place.process.stdin
        if pipe is not None:
            try:
                pipe.write(orders.to_json() + "\n")
                pipe.flush()
            except BrokenPipeError:
                pass  # it is dead already; the next look at it says so

    def _pass_on_signals(self, places: Sequence[_WorkerSlot]) -> None:
        while self._passed_on < self._signals:
            self._passed_on += 1
            self._say(
                "stopping: chunks in flight are finished first; once more hands them back at once"
                if self._passed_on == 1
                else "handing back what is in flight"
            )
            for place in places:
                if place.process is not None and self._passed_on == 1:
                    place.process.terminate()
                elif place.process is not None:
                    # A child takes two signals in short order for one; its leases end in `_tend`.
                    place.process.kill()

    def _end_all(self, places: Sequence[_WorkerSlot]) -> None:
        for place in places:
            if place.process is not None:
                place.process.kill()
                place.process.wait()
                _close_streams(place)
                self._requeue(place.worker, counted=False)
        delete_abandoned()  # what killed children have left
        if self._pending_requeues:
            self._send_pending_requeues()

    def _say(self, line: str) -> None:
        sys.stderr.write(f"chunkq: {line}\n")


def _close_streams(place: _WorkerSlot) -> None:
    """Forget a process that has ended; what it did not read of its orders is lost."""
    if place.process is not None and place.process.stdin is not None:
        with suppress(BrokenPipeError):
            place.process.stdin.close()
    place.process = None
