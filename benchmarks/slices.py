"""Run contestants at the same time in slices, so that all see the same speed of the machine.

While one runs, the others are stopped. The speed of a shared machine changes within seconds, by
more than what is measured: two equal contestants that run one after another differ by 10 %, in
slices by less than 1 %.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable

from benchmarks.turns import Figures, Turn, figures_of, quiet_rounds, turn_line

SLICE = 0.25
"""Length of a slice (s)."""
Start = Callable[[str], subprocess.Popen[str]]
"""Start a contestant by its name, as the leader of a process group."""


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
    processes: dict[str, subprocess.Popen[str]] = {}
    slices: dict[str, list[tuple[float, float]]] = {}
    turn: Turn = {}
    try:
        for name in names:
            processes[name] = start(name)
            os.killpg(processes[name].pid, signal.SIGSTOP)
            slices[name] = []
        while len(turn) < len(processes):
            for name in [name for name in processes if name not in turn]:
                figures = _run_slice(name, processes[name], slices[name])
                if figures is not None:
                    turn[name] = figures | {"seconds": _seconds(figures, slices[name])}
    finally:
        for process in processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return turn


def _run_slice(
    name: str, process: subprocess.Popen[str], slices: list[tuple[float, float]]
) -> Figures | None:
    """Let a contestant run for one slice and add it to `slices`; return its figures if it ended."""
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGCONT)
    try:
        output, errors = process.communicate(timeout=SLICE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGSTOP)
        slices.append((begin, time.monotonic()))
        return None
    slices.append((begin, time.monotonic()))
    return figures_of(name, process.returncode, output, errors)


def _seconds(figures: Figures, slices: Iterable[tuple[float, float]]) -> float:
    """Return for how long (s) slices overlap the time in which a contestant's clock ran."""
    started, ended = figures["clock"]
    return sum(max(0.0, min(end, ended) - max(begin, started)) for begin, end in slices)
