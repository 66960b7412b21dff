"""Contestants that run in slices do not run at the same time, and none outlives its round."""

import os
import signal
import subprocess
import sys
from itertools import pairwise

import pytest

from benchmarks.slices import SLICE, run_round
from benchmarks.turns import Figures

ARGUMENT = "# argument"
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

BELOW = """
import subprocess, sys
command = [sys.executable, "-c", sys.argv[1]]
sys.exit(subprocess.Popen(command, start_new_session=True, close_fds=False).wait())
"""
"""Runs a script in a process in a session of its own, as chunkq runs its workers."""


def start(script: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", *script.split(ARGUMENT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        close_fds=False,
    )


def alternations(first: Figures, second: Figures) -> int:
    """Return how often the other one runs next, in the order of the moments of both."""
    moments = [(moment, 0) for moment in first["moments"]]
    moments += [(moment, 1) for moment in second["moments"]]
    who = [which for _, which in sorted(moments)]
    return sum(a != b for a, b in pairwise(who))


@pytest.mark.parametrize("script", [WORKS, f"{BELOW}{ARGUMENT}{WORKS}"], ids=["leader", "below"])
def test_contestants_alternate_and_the_others_time_does_not_count(script: str) -> None:
    turn = run_round(["a", "b"], lambda _: start(script))
    # Both at once would alternate thousands of times.
    assert 2 <= alternations(turn["a"], turn["b"]) <= 200
    for figures in turn.values():
        begin, end = figures["clock"]
        assert 2.9 * SLICE <= figures["seconds"] <= end - begin - SLICE


def test_a_failed_contestant_ends_the_others_and_what_they_started() -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    sleeps = f"import os, time; os.write({write}, b'started'); time.sleep(600)"
    scripts = {
        "other": f"{BELOW}{ARGUMENT}{sleeps}",
        "bad": "import time; time.sleep(1); raise SystemExit('broken')",
    }
    processes = []

    def begin(name: str) -> "subprocess.Popen[str]":
        processes.append(start(scripts[name]))
        return processes[-1]

    with pytest.raises(SystemExit, match="bad: broken"):
        run_round(scripts, begin)
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 1]
    os.close(write)
    with open(read, "rb") as pipe:  # ends when no process has the other end
        assert pipe.read() == b"started"
