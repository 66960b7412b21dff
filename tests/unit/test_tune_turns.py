"""Measurements in turns on a machine whose speed drifts, with a simulated clock."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from chunkq_worker.tune.search import (
    Limits,
    Measurement,
    Options,
    Search,
    SearchResult,
    Setting,
    Stage,
)
from chunkq_worker.tune.turns import MAX_ROUNDS, MIN_ROUNDS, Runner, Turns
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_tune_search import CHUNKS, START, SimulatedMachine

LOAD_SECONDS = 2.0


@dataclass
class DriftingMachine(SimulatedMachine):
    """A machine whose rates are multiplied by `speed` of the time in seconds.

    `failures` are the requests that fail, counted over all turns.
    """

    speed: Callable[[float], float] = lambda now: 1.0
    failures: dict[int, Measurement] = field(default_factory=dict)
    turns: list[Setting] = field(default_factory=list)
    open_runners: list["SimulatedRunner"] = field(default_factory=list)

    def load(self, setting: Setting, stage: Stage, max_seconds: float) -> "SimulatedRunner":
        return SimulatedRunner(self, setting, stage)

    def turn(self, setting: Setting, stage: Stage, seconds: float, limit: float) -> Measurement:
        self.turns.append(setting)
        if failure := self.failures.get(len(self.turns)):
            return failure
        if seconds > limit:
            self.now += limit
            return Measurement("no time")
        middle = self.now + seconds / 2
        before = self.now
        measurement = self.measure(setting, stage, 1e9)
        self.now = before + seconds
        return replace(measurement, rate=measurement.rate * self.speed(middle))

    def tune(self, options: Options, seconds: float = 1000.0) -> SearchResult:
        turns = Turns(self.load, self.clock, 5.0)
        limits = Limits(None, None, seconds)
        result = Search(START, options, self.cost, turns, limits, self.clock).run()
        turns.close()
        assert not self.open_runners
        return result


class SimulatedRunner(Runner):
    def __init__(self, machine: DriftingMachine, setting: Setting, stage: Stage) -> None:
        self._machine, self._setting, self._stage = machine, setting, stage
        machine.now += LOAD_SECONDS
        machine.open_runners.append(self)
        difference = machine.difference.get(setting.batch)
        status = machine.statuses.get(setting.batch, "ok")
        self.loaded = Measurement(status, difference=difference, agreement=0.5)

    def turn(self, seconds: float, limit: float) -> Measurement:
        return self._machine.turn(self._setting, self._stage, seconds, limit)

    def release(self) -> None:
        pass

    def close(self) -> None:
        self._machine.open_runners.remove(self)


OPTIONS = Options(switches=["channels_last", "compile"], chunks=CHUNKS)


def machine(speed: Callable[[float], float]) -> DriftingMachine:
    """Return a machine on which the best is batch 8, compiled, depth 3 and large chunks."""
    return DriftingMachine(
        rate={1: 2, 2: 5, 4: 10, 8: 13, 16: 12, 32: 11, 64: 11},
        compiled=1.2,
        by_depth={3: 1.1, 4: 1.05},
        by_chunk={(32,): 1.1},
        speed=speed,
    )


BEST = Setting(8, 3, compile=True, chunk=(32,))


@pytest.mark.parametrize(
    "speed",
    [
        lambda now: 1.0,
        lambda now: 3.0 ** (now / 150),  # three times faster within the search, and on
        lambda now: 3.0 ** (-now / 150),
        lambda now: 1 + 2 * min(now / 100, 1),
        lambda now: 1.0 if now < 47 else 3.0,  # once, in the middle of a measurement
        lambda now: 3.0 if 30 < now < 34 else 1.0,  # a burst
        lambda now: 1.0 if now % 40 < 20 else 3.0,
    ],
    ids=["steady", "faster", "slower", "linear", "step", "burst", "waves"],
)
def test_the_choice_does_not_depend_on_the_drift_of_the_machine(
    speed: Callable[[float], float],
) -> None:
    result = machine(speed).tune(OPTIONS)
    assert result.best is not None
    assert result.best.setting == BEST
    assert result.rows[0].setting == START


@given(st.floats(-0.2, 0.2), st.floats(0.1, 10))
def test_an_exponential_drift_cancels(drift: float, factor: float) -> None:
    """The ratio is the same, whatever the speed is multiplied by per second."""
    drifting = DriftingMachine(rate={4: 10, 8: 10 * factor}, speed=lambda now: 3.0 ** (drift * now))
    turns = Turns(drifting.load, drifting.clock, 5.0)
    reference = turns(START, "network", 100.0)
    other = turns(replace(START, batch=8), "network", 100.0)
    assert reference.ratios == (1.0,)
    assert other.ratios == pytest.approx([factor] * len(other.ratios))
    assert other.rate == pytest.approx(factor * reference.rate)


def test_a_setting_runs_between_two_turns_of_the_reference() -> None:
    steady = machine(lambda now: 1.0)
    turns, other = Turns(steady.load, steady.clock, 5.0), replace(START, batch=8)
    turns(START, "network", 100.0)
    steady.turns.clear()
    measured = turns(other, "network", 100.0)
    assert steady.turns[0] == START
    assert steady.turns[1:] == [other, START] * len(measured.ratios)
    assert MIN_ROUNDS <= len(measured.ratios) <= MAX_ROUNDS
    assert len(steady.open_runners) == 1  # the reference stays loaded


def test_one_round_that_is_disturbed_does_not_decide() -> None:
    """The other process of the machine slows one turn down to a third."""
    disturbed = machine(lambda now: 1.0)
    turns = Turns(disturbed.load, disturbed.clock, 5.0)
    turns(START, "network", 100.0)
    start = disturbed.now + LOAD_SECONDS
    disturbed.speed = lambda now: 1 / 3 if start + 0.5 < now < start + 0.9 else 1.0
    other = turns(replace(START, batch=8), "network", 100.0)
    assert min(other.ratios) < 0.6
    assert other.rate == pytest.approx(13)


def test_with_little_time_one_round_is_enough() -> None:
    hurried = machine(lambda now: 1.0)
    turns = Turns(hurried.load, hurried.clock, 5.0)
    turns(START, "network", 100.0)
    turn = 5.0 / 11
    other = turns(replace(START, batch=8), "network", LOAD_SECONDS + 3.5 * turn)
    assert (other.status, len(other.ratios)) == ("ok", 1)
    assert turns(START, "network", LOAD_SECONDS + 1.5 * turn).status == "no time"


def test_without_the_reference_nothing_more_is_measured_in_the_stage() -> None:
    broken = machine(lambda now: 1.0)
    turns = Turns(broken.load, broken.clock, 5.0)
    turns(START, "network", 100.0)
    broken.failures = {len(broken.turns) + 1: Measurement("failed", note="it ended")}
    first = turns(replace(START, batch=8), "network", 100.0)
    count = len(broken.turns)
    second = turns(replace(START, batch=2), "network", 100.0)
    assert first.status == second.status == "failed"
    assert "it ended" in second.note
    assert len(broken.turns) == count
    assert turns(START, "pipeline", 100.0).status == "ok"


def test_the_accuracy_of_a_setting_is_known_from_loading_it() -> None:
    exact = machine(lambda now: 1.0)
    exact.difference = {8: 0.25}
    turns = Turns(exact.load, exact.clock, 5.0)
    assert turns(START, "network", 100.0).difference is None
    other = turns(replace(START, batch=8), "network", 100.0)
    assert (other.difference, other.agreement) == (0.25, 0.5)


def test_the_first_setting_that_runs_is_the_reference() -> None:
    small = machine(lambda now: 1.0)
    small.statuses = {4: "too large"}
    turns = Turns(small.load, small.clock, 5.0)
    assert turns(START, "network", 100.0).status == "too large"
    assert turns(replace(START, batch=2), "network", 100.0).rate == 5
    assert turns(replace(START, batch=1), "network", 100.0).rate == pytest.approx(2)
