"""What `chunkq tune` found, as a table on a screen, as lines of a comment and as JSON values."""

from __future__ import annotations

import io
from math import inf
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from chunkq_worker.tune.search import HARMLESS, Row, SearchResult, Setting, Stage

COMMENT_WIDTH = 112
COLUMNS = ("tried", "patches/s", "memory", "whole job", "chunks", "pieces", "differs", "")
LEFT_OUT = ("chunks", "pieces", "differs")
NARROW = 90
LEAST_WIDTH = {"tried": 14, "": 9}
"""Columns of words."""
STAGES: dict[Stage, str] = {"network": "the network alone", "pipeline": "whole chunks"}


def label(setting: Setting, stage: Stage, chunksize: tuple[int, ...]) -> str:
    """Return a setting in a few words."""
    words = [f"batch {setting.batch}"]
    if setting.patch is not None:
        words.append(f"patch {cross(setting.patch)}")
    if setting.precision is not None:
        words.append(" ".join(setting.precision))
    if setting.compile:
        words.append("compiled")
    if stage == "pipeline":
        words += [f"chunk {cross(chunksize)}", f"depth {setting.depth}"]
    return ", ".join(words)


def table(outcome: SearchResult, width: int) -> Table:
    """Return every setting that was tried, in the order in which they were.

    Where there is little room, what each setting costs is left out.
    """
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    narrow = width < NARROW
    shown = [n for n, name in enumerate(COLUMNS) if not (narrow and name in LEFT_OUT)]
    for n in shown:
        name = COLUMNS[n]
        made.add_column(
            name,
            justify="left" if name in LEAST_WIDTH else "right",
            no_wrap=name not in (*LEAST_WIDTH, "memory"),
            min_width=LEAST_WIDTH.get(name),
        )
    stage = None
    for row in outcome.rows:
        if row.stage != stage:
            stage = row.stage
            made.add_row(f"{STAGES[stage]}:")
        cells = _cells(row, outcome)
        made.add_row(*(cells[n] for n in shown))
    return made


def _cells(row: Row, outcome: SearchResult) -> list[str]:
    found, cost = row.measured, row.cost
    usable = row.seconds < inf
    memory = decimal(found.peak_bytes) if found.peak_bytes else ""
    if found.device_bytes is not None:
        memory += f" + {decimal(found.device_bytes)} GPU"
    remarks: list[str] = []
    if found.verdict != "ok":
        remarks.append(f"{found.verdict}: {found.note[:200]}" if found.note else found.verdict)
    if outcome.before is not None and row.setting == outcome.before.setting:
        remarks.append("now")
    if row == outcome.best:
        remarks.append("chosen")
    return [
        "  " + label(row.setting, row.stage, cost.chunksize),
        _rate(found.rate) if usable else "",
        memory,
        duration(row.seconds) if usable else "",
        str(cost.chunks),
        decimal(cost.piece_bytes),
        "" if found.difference is None else f"{found.difference:.1g}",
        ", ".join(remarks),
    ]


def comment(outcome: SearchResult) -> list[str]:
    """Return the table as plain lines, and what they mean."""
    stream = io.StringIO()
    console = Console(file=stream, width=COMMENT_WIDTH, no_color=True, highlight=False)
    console.print(table(outcome, COMMENT_WIDTH))
    return [*(line.rstrip() for line in stream.getvalue().splitlines()), *legend(outcome)]


def legend(outcome: SearchResult) -> list[str]:
    """Return what a reader of the table should know, in plain lines."""
    lines = [
        "whole job: by one worker like this one, loading included, finalizing not",
        "pieces: bytes that chunks leave for each other; none of these computes a patch twice",
        "differs: largest change of an output value, as a share of the outputs' range",
    ]
    asked = [row.setting for row in outcome.rows if row.setting.may_change_results]
    if any(setting.precision is not None for setting in asked):
        lines.append("a precision changes results: hold them against the truth before using it")
    if any(setting.patch is not None for setting in asked):
        lines.append(
            "patch size can change what a network says: hold it against the truth before using it"
        )
    if any(row.measured.verdict == "changes results" for row in outcome.rows):
        lines.append(f"not chosen: what was not asked for and changes results by over {HARMLESS:g}")
    if outcome.best is not None and outcome.best.stage == "network":
        lines.append("too little time for whole chunks: chunksize and depth were not compared")
    return lines


def values(row: Row) -> dict[str, Any]:
    """Return a row as JSON values; None for what is not known."""
    setting, cost, found = row.setting, row.cost, row.measured
    return {
        "stage": row.stage,
        "batch": setting.batch,
        "compile": setting.compile,
        "precision": None if setting.precision is None else dict([setting.precision]),
        "patch": None if setting.patch is None else list(setting.patch),
        "chunksize": list(cost.chunksize),
        "depth": setting.depth if row.stage == "pipeline" else None,
        "verdict": found.verdict,
        "note": found.note or None,
        "patches_per_second": found.rate or None,
        "peak_bytes": found.peak_bytes or None,
        "device_bytes": found.device_bytes,
        "difference": None if found.difference in (None, inf) else found.difference,
        "load_seconds": found.load_seconds or None,
        "job_seconds": row.seconds if row.seconds < inf else None,
        "chunks": cost.chunks,
        "patches": cost.patches,
        "piece_bytes": cost.piece_bytes,
        "array_bytes": cost.footprint.peak_bytes(setting.depth),
    }


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def cross(shape: tuple[int, ...]) -> str:
    """Return a shape as `64×64×32`."""
    return "×".join(map(str, shape))


def duration(seconds: float) -> str:
    """Return seconds as `1 h 02 min`, `3 min 05 s` or `12 s`."""
    whole = max(1, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
