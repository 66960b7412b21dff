"""Contestants take turns in processes of their own; a figure is the median of paired ratios."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PEERS = Path(tempfile.gettempdir()) / "chunkq-peers"
"""Where other people's programs are installed, away from the project's environment."""
THREADS = 2

Figures = dict[str, Any]
Turn = dict[str, Figures]
"""What each contestant said in one round."""


def fetch(package: str, *wanted: str) -> None:
    """Install a peer into PEERS unless it is there; `wanted` names all it needs, for pip."""
    if (PEERS / package).exists():
        return
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    if subprocess.run([*install, "--target", str(PEERS), *wanted], check=False).returncode:
        raise SystemExit(f"{package}: pip cannot fetch it; see above, and try again")


def ask(
    script: Path, name: str, job: Path, output: Path, settings: Mapping[str, str] | None = None
) -> Figures:
    """Run one contestant of a script; returns what it prints last, a line of JSON.

    `settings` are added to its environment. Raises SystemExit with its complaint if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), name, str(job), str(output)],
        env={
            **os.environ,
            "PYTHONPATH": str(PEERS),
            "OMP_NUM_THREADS": str(THREADS),
            **(settings or {}),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


def take_turns(names: Iterable[str], rounds: int, run: Callable[[str], Figures]) -> list[Turn]:
    """Have everybody run once in each round, one after the other; each round another begins.

    Where the machine grows slower or faster meanwhile, nobody is always the first to see it.
    """
    order, taken = list(names), []
    for _ in range(rounds):
        taken.append({name: run(name) for name in order})
        order.append(order.pop(0))
    return taken


def median_seconds(turns: Sequence[Turn], name: str) -> float:
    return float(statistics.median(turn[name]["seconds"] for turn in turns))


def ratios(turns: Sequence[Turn], name: str, other: str, of: str = "seconds") -> list[float]:
    """The first's figure by the other's, round by round; take their median."""
    return [turn[name][of] / turn[other][of] for turn in turns]
