"""What a case found wrong, and the groups of findings with one cause."""

import re
import traceback
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
PARTS = tuple(f"{ROOT}/{part}/" for part in ("chunkq", "producer", "worker"))
LONGEST_DETAIL = 3000


@dataclass(frozen=True)
class Finding:
    """One thing that went wrong: `cause` is what findings with one cause share."""

    cause: str
    detail: str


@dataclass(frozen=True)
class Case:
    """One case that failed: what was done, and how to run it alone."""

    part: str
    seed: int
    what: str
    finding: Finding


def of_error(error: BaseException, reason: str = "") -> Finding:
    """Return a finding named by an exception's class and the product's innermost line."""
    frames = list(traceback.extract_tb(error.__traceback__))
    ours = [frame for frame in frames if frame.filename.startswith(PARTS)]
    last = (ours or frames or [None])[-1]
    where = "" if last is None else f" in {last.filename.removeprefix(ROOT + '/')}:{last.name}"
    detail = "".join(traceback.format_exception(error, limit=-12))
    return Finding(f"{reason or type(error).__name__}{where}", detail[-LONGEST_DETAIL:])


def of_text(reason: str, text: str) -> Finding:
    """Return a finding named by a text's last line that says something, without its numbers."""
    lines = [line for line in text.splitlines() if line.strip()]
    last = re.sub(r"'[^']*'|/\S+|\d+", "#", lines[-1] if lines else "")
    return Finding(f"{reason}: {last[:160]}", text[-LONGEST_DETAIL:])


def by_cause(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Return cases by cause, the most frequent first."""
    groups: defaultdict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.finding.cause].append(case)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))
