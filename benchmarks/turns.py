"""Run contestants in turns in separate processes; compare them by medians of paired ratios.

A round in which other processes used the CPUs is refused and run again.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

# Otherwise each process would compile chunkq again, which no process of a user does.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

PEERS = Path(tempfile.gettempdir()) / "chunkq-peers"
"""Folder of other projects' programs, separate from the environment of chunkq."""
THREADS = 2
KEPT_OUTPUT = "kept.zarr"
"""Name of an output of chunkq that stays while its contestant writes again."""
MOST_OTHERS = 0.05
"""Share of the CPUs that other processes, or other machines of the host, may use in a round."""
BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
"""The times of the CPUs in which they do something; some systems do not have all of them."""
T = TypeVar("T")

Figures = dict[str, Any]
Turn = dict[str, Figures]
"""Figures of each contestant in one round."""


def fetch(package: str, *requirements: str) -> None:
    """Install a package into PEERS unless it is installed; `requirements` are pip's arguments."""
    if (PEERS / package).exists():
        return
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command = [*install, "--target", str(PEERS), *requirements]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"{package}: pip failed; see its message above and run again")


def start_contestant(
    script: Path, name: str, job: Path, output: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a contestant of a script as the leader of a process group, with pipes as output.

    `environment` is added to that of this process.
    """
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), name, str(job), str(output)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(PEERS), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(THREADS),
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def figures_of(name: str, status: int, output: str, errors: str) -> Figures:
    """Return the figures that a contestant printed as JSON in its last line.

    Raise SystemExit with `errors` if its exit status is not 0.
    """
    if status:
        raise SystemExit(f"{name}: {errors}")
    figures: Figures = json.loads(output.splitlines()[-1])
    return figures


def run_contestant(
    script: Path, name: str, job: Path, output: Path, environment: Mapping[str, str] | None = None
) -> Figures:
    """Run a contestant of a script, see `start_contestant`; return its figures."""
    return finish(name, start_contestant(script, name, job, output, environment))


def finish(name: str, process: subprocess.Popen[str]) -> Figures:
    """Wait for a contestant and return its figures; Ctrl-C kills it."""
    try:
        output, errors = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return figures_of(name, process.returncode, output, errors)


def take_turns(names: Iterable[str], rounds: int, run: Callable[[str], Figures]) -> list[Turn]:
    """Run every contestant once per round; rotate the order from round to round.

    The rotation cancels slow changes of the machine's speed. Return the quiet rounds, see
    `quiet_rounds`.
    """
    order = list(names)

    def run_all() -> Turn:
        turn = {name: run(name) for name in order}
        order.append(order.pop(0))
        return turn

    return quiet_rounds(rounds, run_all, turn_line)


def quiet_rounds(
    rounds: int, run: Callable[[], T], describe: Callable[[T], str] = lambda _: ""
) -> list[T]:
    """Return the results of rounds in which other processes used at most MOST_OTHERS of the CPUs.

    Print a line per round. Half as many rounds, at least one, are run in place of refused ones.
    Raise SystemExit if more than half of `rounds` are lacking then.
    """
    results: list[T] = []
    tried, most = 0, rounds + max(1, rounds // 2)
    while len(results) < rounds and tried < most:
        tried += 1
        result, share = watched(run)
        refused = "" if share <= MOST_OTHERS else ", refused"
        print(f"round {tried}: {describe(result)}others used {share:.1%} of the CPUs{refused}")
        sys.stdout.flush()
        if not refused:
            results.append(result)
    if len(results) < rounds / 2:
        raise SystemExit(
            f"{tried - len(results)} of {tried} rounds were refused, because other processes used "
            f"more than {MOST_OTHERS:.0%} of the CPUs; end them and run again"
        )
    return results


def watched(run: Callable[[], T]) -> tuple[T, float]:
    """Return the result of a function, and what others used of the CPUs while it ran."""
    used, own, begun = busy_seconds(), own_seconds(), time.monotonic()
    result = run()
    others = busy_seconds() - used - (own_seconds() - own)
    return result, others / (time.monotonic() - begun) / (os.cpu_count() or 1)


def turn_line(turn: Turn) -> str:
    """Return the seconds and the CPU seconds of each contestant of a round."""
    return "".join(
        f"{name} {figures['seconds']:.2f} s"
        + (f" (CPU {figures['cpu']:.2f} s), " if "cpu" in figures else ", ")
        for name, figures in sorted(turn.items())
    )


def busy_seconds() -> float:
    """Return for how long (s) the CPUs were busy since the start, with what the host took away."""
    times = psutil.cpu_times()
    return float(sum(getattr(times, kind, 0.0) for kind in BUSY))


def own_seconds() -> float:
    """Return the CPU time (s) of this process and of all that have ended below it."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(each) for each in whose]
    return sum(each.ru_utime + each.ru_stime for each in used)


def print_ratios(label: str, **lists: Sequence[float]) -> None:
    """Print the median of some lists of ratios, and the ratio of each round."""
    for name, each in lists.items():
        rounds = " ".join(f"{ratio:.3f}" for ratio in each)
        print(f"{label}, {name}: {statistics.median(each):.3f} ({rounds})", flush=True)


def median_seconds(turns: Sequence[Turn], name: str) -> float:
    """Return the median seconds of a contestant."""
    return float(statistics.median(turn[name]["seconds"] for turn in turns))


def ratios(turns: Sequence[Turn], name: str, other: str, key: str = "seconds") -> list[float]:
    """Return the first contestant's figure divided by the other's, for each round."""
    return [turn[name][key] / turn[other][key] for turn in turns]
