"""Report how long each part of the test suite took, against its budget in tests/budget.toml."""

from __future__ import annotations

import json
import math
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.harness.groups import read_groups

BUDGET = Path(__file__).parents[1] / "budget.toml"
SLOWEST = 40


class DurationsReport:
    """Sums the seconds of setup, call and teardown of every test and writes them to a file.

    With several processes the sum is larger than the elapsed time.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add one phase of one test."""
        self._seconds[report.nodeid] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the parts that exceeded their budget; write the file."""
        parts: defaultdict[str, float] = defaultdict(float)
        budgets = tomllib.loads(BUDGET.read_text())["seconds"]
        for name, seconds in self._seconds.items():
            parts[_part(name, list(budgets))] += seconds
        for part, seconds in sorted(parts.items()):
            if seconds > budgets.get(part, math.inf):
                terminalreporter.write_line(
                    f"{part} took {seconds:.0f} s; its budget is {budgets[part]} s"
                )
        if self._file is not None:
            slowest = sorted(self._seconds, key=lambda name: -self._seconds[name])[:SLOWEST]
            summary = {
                "tests": len(self._seconds),
                "parts": {part: round(seconds, 1) for part, seconds in sorted(parts.items())},
                "groups": self._groups(),
                "files": _sums(self._seconds),
                "slowest": {name: round(self._seconds[name], 2) for name in slowest},
            }
            self._file.write_text(json.dumps(summary, indent=1) + "\n")

    def _groups(self) -> dict[str, float]:
        """Return the seconds of each group of tests/harness/groups.py, longest first."""
        groups: defaultdict[str, float] = defaultdict(float)
        group_of = read_groups()
        for name, seconds in self._seconds.items():
            groups[group_of.get(name, "")] += seconds
        order = sorted(groups, key=lambda group: -groups[group])
        return {group: round(groups[group], 1) for group in order if group}


def _sums(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each test file, longest first."""
    files: defaultdict[str, float] = defaultdict(float)
    for name, duration in seconds.items():
        files[name.partition("::")[0]] += duration
    return {file: round(files[file], 1) for file in sorted(files, key=lambda file: -files[file])}


def _part(name: str, parts: list[str]) -> str:
    """Return the longest budgeted path that contains a test; `other` if there is none."""
    path = name.partition("::")[0]
    matching = [part for part in parts if path == part or path.startswith(part.rstrip("/") + "/")]
    return max(matching, key=len, default="other")
