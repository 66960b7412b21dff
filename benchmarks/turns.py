"""Run contestants in turns in separate processes; compare them by medians of paired ratios."""

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
"""Folder of other projects' programs, separate from the environment of chunkq."""
THREADS = 2

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


def run_contestant(
    script: Path, name: str, job: Path, output: Path, environment: Mapping[str, str] | None = None
) -> Figures:
    """Run a contestant of a script; return the figures that it prints as JSON in its last line.

    `environment` is added to that of this process. Raise SystemExit with its stderr if it fails.
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), name, str(job), str(output)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(PEERS), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(THREADS),
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise SystemExit(f"{name}: {result.stderr}")
    figures: Figures = json.loads(result.stdout.splitlines()[-1])
    return figures


def take_turns(names: Iterable[str], rounds: int, run: Callable[[str], Figures]) -> list[Turn]:
    """Run every contestant once per round; rotate the order from round to round.

    The rotation cancels slow changes of the machine's speed.
    """
    order, results = list(names), []
    for _ in range(rounds):
        results.append({name: run(name) for name in order})
        order.append(order.pop(0))
    return results


def median_seconds(turns: Sequence[Turn], name: str) -> float:
    """Return the median seconds of a contestant."""
    return float(statistics.median(turn[name]["seconds"] for turn in turns))


def ratios(turns: Sequence[Turn], name: str, other: str, key: str = "seconds") -> list[float]:
    """Return the first contestant's figure divided by the other's, for each round."""
    return [turn[name][key] / turn[other][key] for turn in turns]
