"""Format the result of `chunkq tune` as a table, as lines of a comment and as JSON values."""

from __future__ import annotations

import io
from math import inf
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from chunkq.units import duration, si
from chunkq_worker.tune.search import ALLOWED_CHANGE, Row, SearchResult, Setting, Stage

COMMENT_WIDTH = 112
COLUMNS = ("setting", "patches/s", "memory", "job time", "chunks", "pieces", "differs", "")
HIDDEN_WHEN_NARROW = ("chunks", "pieces", "differs")
NARROW_WIDTH = 90
MIN_WIDTH = {"setting": 14, "": 9}
"""Minimum widths of the columns with text."""
STAGES: dict[Stage, str] = {"network": "network only", "pipeline": "entire chunks"}


def describe(setting: Setting, stage: Stage, chunksize: tuple[int, ...]) -> str:
    """Return a short description of a setting, like `batch 8, chunk 64×64×64, depth 3`."""
    parts = [f"batch {setting.batch}"]
    if setting.patch is not None:
        parts.append(f"patch {format_shape(setting.patch)}")
    if setting.precision is not None:
        parts.append(" ".join(setting.precision))
    if setting.compile:
        parts.append("compiled")
    if stage == "pipeline":
        parts += [f"chunk {format_shape(chunksize)}", f"depth {setting.depth}"]
    return ", ".join(parts)


def build_table(result: SearchResult, width: int) -> Table:
    """Return a table of all measured settings in the order of their measurement.

    Below NARROW_WIDTH, the columns HIDDEN_WHEN_NARROW are omitted.
    """
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    hidden = HIDDEN_WHEN_NARROW if width < NARROW_WIDTH else ()
    visible = [n for n, name in enumerate(COLUMNS) if name not in hidden]
    for n in visible:
        name = COLUMNS[n]
        grid.add_column(
            name,
            justify="left" if name in MIN_WIDTH else "right",
            no_wrap=name not in (*MIN_WIDTH, "memory"),
            min_width=MIN_WIDTH.get(name),
        )
    stage = None
    for row in result.rows:
        if row.stage != stage:
            stage = row.stage
            grid.add_row(f"{STAGES[stage]}:")
        cells = _cells(row, result)
        grid.add_row(*(cells[n] for n in visible))
    return grid


def _cells(row: Row, result: SearchResult) -> list[str]:
    measurement, cost = row.measurement, row.cost
    usable = row.seconds < inf
    memory = si(measurement.peak_bytes, "B") if measurement.peak_bytes else ""
    if measurement.device_bytes is not None:
        memory += f" + {si(measurement.device_bytes, 'B')} GPU"
    remarks: list[str] = []
    if measurement.status != "ok":
        note = f": {measurement.note[:200]}" if measurement.note else ""
        remarks.append(measurement.status + note)
    if result.baseline is not None and row.setting == result.baseline.setting:
        remarks.append("current")
    if row == result.best:
        remarks.append("chosen")
    return [
        "  " + describe(row.setting, row.stage, cost.chunksize),
        _format_rate(measurement.rate) if usable else "",
        memory,
        duration(max(1.0, row.seconds)) if usable else "",
        str(cost.chunks),
        si(cost.piece_bytes, "B"),
        "" if measurement.difference is None else f"{measurement.difference:.1g}",
        ", ".join(remarks),
    ]


def comment_lines(result: SearchResult) -> list[str]:
    """Return the table and its legend as plain lines."""
    stream = io.StringIO()
    console = Console(file=stream, width=COMMENT_WIDTH, no_color=True, highlight=False)
    console.print(build_table(result, COMMENT_WIDTH))
    return [*(line.rstrip() for line in stream.getvalue().splitlines()), *legend_lines(result)]


def legend_lines(result: SearchResult) -> list[str]:
    """Return explanations of the table as plain lines."""
    lines = [
        "job time: predicted for one worker on this machine, with loading, without finalizing",
        "pieces: temporary bytes that chunks exchange; every patch is computed once",
        "differs: largest change of an output value, as a fraction of the outputs' range",
    ]
    requested = [row.setting for row in result.rows if row.setting.may_change_results]
    if any(setting.precision is not None for setting in requested):
        lines.append("a precision changes the results: validate them before you use it")
    if any(setting.patch is not None for setting in requested):
        lines.append("a patch size can change the results: validate them before you use it")
    if any(row.measurement.status == "changes results" for row in result.rows):
        lines.append(
            f"changes results: by more than {ALLOWED_CHANGE:g} without --precision or "
            "--patch-sizes; not chosen"
        )
    if result.best is not None and result.best.stage == "network":
        lines.append("chunksize and depth were not compared; use a longer --max-time")
    return lines


def row_as_dict(row: Row) -> dict[str, Any]:
    """Return a row as JSON values; None for values that were not measured."""
    setting, cost, measurement = row.setting, row.cost, row.measurement
    return {
        "stage": row.stage,
        "batch": setting.batch,
        "compile": setting.compile,
        "precision": None if setting.precision is None else dict([setting.precision]),
        "patch": None if setting.patch is None else list(setting.patch),
        "chunksize": list(cost.chunksize),
        "depth": setting.depth if row.stage == "pipeline" else None,
        "status": measurement.status,
        "note": measurement.note or None,
        "patches_per_second": measurement.rate or None,
        "peak_bytes": measurement.peak_bytes or None,
        "device_bytes": measurement.device_bytes,
        "difference": None if measurement.difference in (None, inf) else measurement.difference,
        "load_seconds": measurement.load_seconds or None,
        "job_seconds": row.seconds if row.seconds < inf else None,
        "chunks": cost.chunks,
        "patches": cost.patches,
        "piece_bytes": cost.piece_bytes,
        "array_bytes": cost.footprint.peak_bytes(setting.depth),
    }


def _format_rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def format_shape(shape: tuple[int, ...]) -> str:
    """Return a shape as `64×64×32`."""
    return "×".join(map(str, shape))
