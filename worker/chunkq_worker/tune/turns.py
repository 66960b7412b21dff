"""Measure settings in turns with the job's own, so that the machine's speed cancels. No I/O."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from statistics import median

from chunkq_worker.tune.search import Measurement, Setting, Stage

MIN_ROUNDS, MAX_ROUNDS = 3, 9
"""Rounds of a setting, as far as the time permits. Each round gives one ratio."""
TURNS = 2 * 5 + 1
"""A turn lasts for the seconds of a trial divided by this number, and at least one batch."""


class Runner(ABC):
    """A loaded setting that can be measured again and again."""

    loaded: Measurement
    """The result of loading: status `ok` with `load_seconds` and the accuracy, or why it failed."""

    @abstractmethod
    def turn(self, seconds: float, limit: float) -> Measurement:
        """Measure for about `seconds`; status `no time` if that takes longer than `limit`."""

    @abstractmethod
    def release(self) -> None:
        """Release memory that the next turn can allocate again."""

    @abstractmethod
    def close(self) -> None:
        """End the runner."""


Open = Callable[[Setting, Stage, float], Runner]
"""Loads a setting for a stage, for at most that many seconds."""


class Turns:
    """Measure each setting between measurements of the reference, which stays loaded.

    The reference of a stage is the first setting that runs in it, usually the job's own. A round is
    a turn of the reference, one of the setting and one of the reference; the last of a round is the
    first of the next. Its ratio is the setting's speed divided by the geometric mean of the two
    beside it. A speed of the machine that changes by a constant factor per turn cancels exactly.
    The rate of a setting is the reference's first rate times the median of the ratios.
    """

    def __init__(self, load: Open, clock: Callable[[], float], seconds: float) -> None:
        """Each setting is measured for about `seconds`, in addition to loading it."""
        self._load, self._clock, self._seconds = load, clock, seconds
        self._stage: Stage | None = None
        self._reference: Runner | None = None
        self._rate, self._failure = 0.0, Measurement("ok")

    def __call__(self, setting: Setting, stage: Stage, max_seconds: float) -> Measurement:
        """Load and measure a setting for at most `max_seconds`."""
        until = self._clock() + max_seconds
        if stage != self._stage:
            self.close()
            self._stage, self._failure = stage, Measurement("ok")
        if self._failure.status != "ok":
            return self._failure
        if self._reference is not None:
            self._reference.release()
        runner = self._load(setting, stage, max_seconds)
        is_kept = False
        try:
            if runner.loaded.status != "ok":
                return runner.loaded
            if self._reference is not None:
                return self._beside(self._reference, runner, until)
            measurement = self._alone(runner, until)
            if measurement.status == "ok":
                self._reference, self._rate, is_kept = runner, measurement.rate, True
            return measurement
        finally:
            if not is_kept:
                runner.close()

    def close(self) -> None:
        """End the reference."""
        if self._reference is not None:
            self._reference.close()
        self._reference = None

    def _alone(self, runner: Runner, until: float) -> Measurement:
        """Return the median of a few turns."""
        turns: list[Measurement] = []
        while len(turns) < MIN_ROUNDS:
            before = self._clock()
            turns.append(self._turn(runner, until))
            if turns[-1].status != "ok":
                return turns[-1]
            if 2 * self._clock() - before > until:
                break
        return _combined(runner, turns[-1], median(turn.rate for turn in turns), (1.0,))

    def _beside(self, reference: Runner, runner: Runner, until: float) -> Measurement:
        """Return the measurement of a setting whose rate follows from the median ratio."""
        started = self._clock()
        before = self._turn(reference, until)
        ratios: list[float] = []
        last = before
        while before.status == "ok" and len(ratios) < MAX_ROUNDS:
            round_start = self._clock()
            last = self._turn(runner, until)
            if last.status != "ok":
                return last
            after = self._turn(reference, until)
            if after.status != "ok":
                before = after
                break
            ratios.append(last.rate / sqrt(before.rate * after.rate))
            before, now = after, self._clock()
            is_done = len(ratios) >= MIN_ROUNDS and now - started >= self._seconds
            if is_done or 2 * now - round_start > until:
                break
        if before.status != "ok":
            self._failure = replace(before, note=f"the reference: {before.note or before.status}")
        if not ratios:
            return self._failure
        return _combined(runner, last, self._rate * median(ratios), tuple(ratios))

    def _turn(self, runner: Runner, until: float) -> Measurement:
        return runner.turn(self._seconds / TURNS, until - self._clock())


def _combined(
    runner: Runner, last: Measurement, rate: float, ratios: tuple[float, ...]
) -> Measurement:
    """Return the result of several turns: memory of the last, accuracy from loading."""
    loaded = runner.loaded
    return replace(
        last,
        rate=rate,
        ratios=ratios,
        difference=loaded.difference,
        agreement=loaded.agreement,
    )
