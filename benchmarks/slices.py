"""Run contestants at the same time in slices, so that all see the same speed of the machine.

While one runs, the others are stopped. The speed of a shared machine changes within seconds, by
more than what is measured: two equal contestants that run one after another differ by 10 %, in
slices by less than 1 %.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import psutil

from benchmarks.turns import Figures, Turn, figures_of, quiet_rounds, turn_line

SLICE = 0.25
"""Length of a slice (s)."""
Start = Callable[[str], subprocess.Popen[str]]
"""Start a contestant by its name, with pipes as output."""


class Contestant:
    """A contestant with all processes below it, of which some may be in sessions of their own."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        """Stop a contestant that has just started."""
        self._name, self._process = name, process
        self._leader = psutil.Process(process.pid)
        self._members = [self._leader]
        self._slices: list[tuple[float, float]] = []
        self._stop()

    def run_slice(self) -> Figures | None:
        """Let it run for one slice; return its figures if it ended."""
        begin = time.monotonic()
        _send(self._members, signal.SIGCONT)
        try:
            output, errors = self._process.communicate(timeout=SLICE)
        except subprocess.TimeoutExpired:
            self._stop()
            self._slices.append((begin, time.monotonic()))
            return None
        self._slices.append((begin, time.monotonic()))
        figures = figures_of(self._name, self._process.returncode, output, errors)
        return figures | {"seconds": self._seconds(*figures["clock"])}

    def kill(self) -> None:
        """End what still runs of it."""
        self._stop()
        _send(self._members, signal.SIGKILL)
        if self._process.returncode is None:
            self._process.communicate()

    def _stop(self) -> None:
        """Stop its processes, until none is left that a running one has started."""
        running = self._members
        while running:
            _send(running, signal.SIGSTOP)
            running = [each for each in self._below() if each not in self._members]
            self._members += running

    def _below(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return self._leader.children(recursive=True)
        return []

    def _seconds(self, started: float, ended: float) -> float:
        """Return for how long (s) slices overlap the time from the start to the end of a clock."""
        return sum(max(0.0, min(end, ended) - max(begin, started)) for begin, end in self._slices)


def _send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def run_in_slices(names: Iterable[str], rounds: int, start: Start) -> list[Turn]:
    """Run all contestants once per round; return the figures of the quiet rounds.

    `seconds` count from a contestant's start of the clock to its end, in its own slices.
    """
    order = list(names)

    def run_all() -> Turn:
        turn = run_round(order, start)
        order.append(order.pop(0))
        return turn

    return quiet_rounds(rounds, run_all, turn_line)


def run_round(names: Iterable[str], start: Start) -> Turn:
    """Run each contestant once, in slices; return their figures.

    Raise SystemExit if one fails. None of them runs on when this function ends.
    """
    contestants: dict[str, Contestant] = {}
    turn: Turn = {}
    try:
        for name in names:
            contestants[name] = Contestant(name, start(name))
        while len(turn) < len(contestants):
            for name in [name for name in contestants if name not in turn]:
                figures = contestants[name].run_slice()
                if figures is not None:
                    turn[name] = figures
    finally:
        for contestant in contestants.values():
            contestant.kill()
    return turn
