"""Findings of failed cases, grouped by cause."""

import re
import traceback
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
PARTS = tuple(f"{ROOT}/{part}/" for part in ("chunkq", "producer", "worker"))
MAX_DETAIL = 3000
"""Characters of a finding's detail."""


@dataclass(frozen=True)
class Finding:
    """An error that a case revealed; findings with the same `cause` form a group."""

    cause: str
    detail: str


@dataclass(frozen=True)
class Case:
    """A failed case: its text, and the part and seed that reproduce it."""

    part: str
    seed: int
    text: str
    finding: Finding


def of_error(error: BaseException, reason: str = "") -> Finding:
    """Return a finding named after the exception class and the innermost frame of the product."""
    frames = list(traceback.extract_tb(error.__traceback__))
    product_frames = [frame for frame in frames if frame.filename.startswith(PARTS)]
    last = (product_frames or frames or [None])[-1]
    location = "" if last is None else f" in {last.filename.removeprefix(ROOT + '/')}:{last.name}"
    detail = "".join(traceback.format_exception(error, limit=-12))
    return Finding(f"{reason or type(error).__name__}{location}", detail[-MAX_DETAIL:])


def of_text(reason: str, text: str) -> Finding:
    """Return a finding named after the last non-empty line of a text, with numbers masked."""
    lines = [line for line in text.splitlines() if line.strip()]
    last = re.sub(r"'[^']*'|/\S+|\d+", "#", lines[-1] if lines else "")
    return Finding(f"{reason}: {last[:160]}", text[-MAX_DETAIL:])


def by_cause(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Return the cases grouped by cause, the most frequent cause first."""
    groups: defaultdict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.finding.cause].append(case)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))
