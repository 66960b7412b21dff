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
    EXIT_OVERRUN,
    EXIT_QUEUE_AWAY,
    EXIT_REFUSED,
    EXIT_REPLACE,
    Executor,
    WorkerName,
)
from chunkq.executors.settings import WorkerSettings
from chunkq.paths import without_secret
from chunkq.scratch import sweep
from chunkq_worker.birth import child_settings
from chunkq_worker.child import Orders
from chunkq_worker.devices import VISIBLE, Slot, cores

POLL_SECONDS = 0.1
HAND_BACK_SECONDS = 1.0
"""Between tries to tell an absent queue what a child has let go."""


@dataclass
class _Place:
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
    queue_was_away: bool = field(default=False, init=False)
    _signals: int = field(default=0, init=False)
    _passed_on: int = field(default=0, init=False)
    _owed: dict[str, bool] = field(default_factory=dict, init=False)
    _owed_next: float = field(default=0.0, init=False)

    def run(self) -> int:
        """Return 0 when all children ended well, 1 when some could not go on."""
        signal.signal(signal.SIGTERM, self._count_signal)
        signal.signal(signal.SIGINT, self._count_signal)
        places = [_Place(slot) for slot in self.slots]
        if not self.quiet:
            self._say(self._greeting())
        try:
            while not all(place.done for place in places):
                for place in places:
                    self._tend(place)
                self._pass_on_signals(places)
                if self._owed and time.time() >= self._owed_next:
                    self._pay()
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

    def _tend(self, place: _Place) -> None:
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
        _let_go(place)
        if code == 0 or self._signals:
            self._hand_back(place.worker, counted=False)
            place.done = True
        elif code == EXIT_REFUSED:
            self._hand_back(place.worker, counted=False)
            place.done = place.gave_up = True
        elif code == EXIT_QUEUE_AWAY:
            self._after_absence(place)
        elif code == EXIT_REPLACE:
            self._hand_back(place.worker, counted=False)
            if not self.quiet:
                self._say(f"worker {place.worker} is replaced: the next job needs a new process")
        else:
            self._after_death(place, code)

    def _after_death(self, place: _Place, code: int) -> None:
        returned = self._hand_back(place.worker, counted=True)
        instant = time.time() - place.started < self.settings.early_death
        place.deaths = place.deaths + 1 if instant else 1
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        if code == EXIT_OVERRUN:
            how = "was ended because it hung"
        self._say(f"worker {place.worker} {how}; {returned} chunks handed back")
        if place.deaths >= self.settings.early_deaths:
            self._say(f"gave up after {place.deaths} deaths within seconds of starting")
            place.done = place.gave_up = True
            return
        self._wait(place, place.deaths)

    def _after_absence(self, place: _Place) -> None:
        """Start a child again that lost the queue: a queue comes back, and nobody is to watch."""
        self.queue_was_away = True
        self._hand_back(place.worker, counted=False)
        now = time.time()
        if place.away_since is None or now - place.started > self.settings.early_death:
            place.away_since, place.absences = now, 0
        elif now - place.away_since > self.settings.queue_absence:
            self._say("gave up: the queue stays away")
            place.done = place.gave_up = True
            return
        place.absences += 1
        self._wait(place, place.absences)

    def _wait(self, place: _Place, times: int) -> None:
        pause = self.settings.restart_delay * 2 ** min(times - 1, 10)
        place.not_before = time.time() + min(self.settings.longest_restart_delay, pause)

    def _hand_back(self, worker: str, *, counted: bool) -> int:
        """Return a child's chunks to the queue, later if that is away now; returns how many."""
        try:
            return self.executor.release(worker, counted=counted)
        except QueueError:
            self._owed[worker] = counted
            self._owed_next = time.time() + HAND_BACK_SECONDS
            return 0

    def _pay(self) -> None:
        """Hand back what an absent queue could not be told; if it never is, leases run out."""
        owed, self._owed = self._owed, {}
        for worker, counted in owed.items():
            returned = self._hand_back(worker, counted=counted)
            if returned:
                self._say(f"worker {worker}: {returned} chunks handed back")

    def _start(self, place: _Place) -> None:
        place.worker = WorkerName.new(place.slot.gpu or "cpu").text
        place.started = time.time()
        orders = Orders(
            queue=self.queue,
            worker=place.worker,
            depth=self.depth,
            burst=self.burst,
            job=self.job,
            deadline=self.deadline,
            time_limit=self.time_limit,
            quiet=self.quiet,
        )
        environment = {**os.environ, **child_settings(max(1, cores() // len(self.slots)))}
        if place.slot.gpu is not None or self.hide_gpus:
            environment[VISIBLE] = place.slot.gpu or ""
        # A session of its own: Ctrl-C reaches only the supervisor, which passes it on.
        place.process = subprocess.Popen(
            [sys.executable, "-m", "chunkq_worker.child"],
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

    def _pass_on_signals(self, places: Sequence[_Place]) -> None:
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

    def _end_all(self, places: Sequence[_Place]) -> None:
        for place in places:
            if place.process is not None:
                place.process.kill()
                place.process.wait()
                _let_go(place)
                self._hand_back(place.worker, counted=False)
        sweep()  # what killed children have left
        if self._owed:
            self._pay()

    def _say(self, line: str) -> None:
        sys.stderr.write(f"chunkq: {line}\n")


def _let_go(place: _Place) -> None:
    """Forget a process that has ended; what it did not read of its orders is lost."""
    if place.process is not None and place.process.stdin is not None:
        with suppress(BrokenPipeError):
            place.process.stdin.close()
    place.process = None
