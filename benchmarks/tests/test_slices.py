"""Contestants that run in slices do not run at the same time, and none outlives its round."""

import signal
import subprocess
import sys
from itertools import pairwise

import pytest

from benchmarks.slices import SLICE, run_round
from benchmarks.turns import Figures

WORKS = f"""
import json, sys, time
from pathlib import Path
started = time.monotonic()
moments = []
for _ in range({int(300 * SLICE)}):
    until = time.process_time() + 0.01
    while time.process_time() < until:
        moments.append(time.monotonic())
ended = time.monotonic()
clock = [started, ended]
print(json.dumps({{"clock": clock, "seconds": ended - started, "moments": moments[::50]}}))
"""


def start(script: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def alternations(first: Figures, second: Figures) -> int:
    """Return how often the other one runs next, in the order of the moments of both."""
    moments = [(moment, 0) for moment in first["moments"]]
    moments += [(moment, 1) for moment in second["moments"]]
    who = [which for _, which in sorted(moments)]
    return sum(a != b for a, b in pairwise(who))


def test_contestants_alternate_and_the_others_time_does_not_count() -> None:
    turn = run_round(["a", "b"], lambda _: start(WORKS))
    # Both at once would alternate thousands of times.
    assert 2 <= alternations(turn["a"], turn["b"]) <= 200
    for figures in turn.values():
        begin, end = figures["clock"]
        assert 2.9 * SLICE <= figures["seconds"] <= end - begin - SLICE


def test_a_failed_contestant_ends_the_others() -> None:
    scripts = {"other": "import time; time.sleep(600)", "bad": "raise SystemExit('broken')"}
    processes = []

    def begin(name: str) -> "subprocess.Popen[str]":
        processes.append(start(scripts[name]))
        return processes[-1]

    with pytest.raises(SystemExit, match="bad: broken"):
        run_round(scripts, begin)
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 1]
