"""Format the result of `chunkq tune` as a table, as lines of a comment and as JSON values."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import floor, inf
from statistics import median
from typing import Any

from rich.console import Console

from chunkq.tables import FittingTable
from chunkq.units import duration, si
from chunkq_worker.tune.search import (
    ALLOWED_CHANGE,
    ALLOWED_FACTOR,
    Row,
    SearchResult,
    Setting,
    Stage,
)

COMMENT_WIDTH = 112
COLUMNS = ("setting", "patches/s", "speed", "memory", "job time", "differs", "labels", "remark")
HIDDEN_WHEN_NARROW = ("job time", "differs", "labels")
SPARE_WIDTH = 20
"""Columns of the terminal that the whole table leaves to texts, which otherwise become narrow."""
TEXTS = ("setting", "memory", "remark")
"""Columns whose cells can break between words."""
STAGES: dict[Stage, str] = {"network": "network only", "pipeline": "entire chunks"}


def describe(setting: Setting, stage: Stage, chunksize: tuple[int, ...]) -> str:
    """Return a short description of a setting, like `batch 8, chunk 64×64×64, depth 3`."""
    parts = [f"batch {setting.batch}"]
    if setting.patch is not None:
        parts.append(f"patch {format_shape(setting.patch)}")
    if setting.precision is not None:
        parts.append(" ".join(setting.precision))
    switches = {
        "channels last": setting.channels_last,
        "CUDA graph": setting.cuda_graph,
        "compiled": setting.compile,
    }
    parts += [name for name, is_set in switches.items() if is_set]
    if stage == "pipeline":
        parts += [f"chunk {format_shape(chunksize)}", f"depth {setting.depth}"]
    return ", ".join(parts)


def build_table(result: SearchResult, width: int) -> FittingTable:
    """Return a table of all measured settings in the order of their measurement.

    The columns HIDDEN_WHEN_NARROW are omitted if the table then fits the width, and otherwise not.
    """
    full = _table(result, ())
    narrow = _table(result, HIDDEN_WHEN_NARROW)
    return narrow if narrow.fits(width) and not full.fits(width - SPARE_WIDTH) else full


def _table(result: SearchResult, hidden: Sequence[str]) -> FittingTable:
    """Return the table without some columns. A line in front of each stage has its name."""
    visible = [n for n, name in enumerate(COLUMNS) if name not in hidden]
    lines: list[list[str]] = []
    stage = None
    for row in result.rows:
        if row.stage != stage:
            stage = row.stage
            lines.append([f"{STAGES[stage]}:", *[""] * (len(visible) - 1)])
        cells = _cells(row, result)
        lines.append([cells[n] for n in visible])
    texts = [n for n, column in enumerate(visible) if COLUMNS[column] in TEXTS]
    left = [n for n in texts if COLUMNS[visible[n]] != "memory"]
    least = {0: max(len(name) + 1 for name in STAGES.values())}
    return FittingTable([COLUMNS[n] for n in visible], lines, left=left, wraps=texts, least=least)


def _cells(row: Row, result: SearchResult) -> list[str]:
    measurement, cost = row.measurement, row.cost
    usable = measurement.rate > 0
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
        describe(row.setting, row.stage, cost.chunksize),
        _format_rate(measurement.rate) if usable else "",
        _format_speeds(relative_speeds(row, result)) if usable else "",
        memory,
        duration(max(1.0, row.seconds)) if row.seconds < inf else "",
        "" if measurement.difference is None else f"{measurement.difference:.1g}",
        "" if measurement.agreement is None else format_share(measurement.agreement),
        ", ".join(remarks),
    ]


def relative_speeds(row: Row, result: SearchResult) -> tuple[float, ...]:
    """Return how many times faster the job is than with the reference of the stage, per round.

    The rounds give patches per second; other patches need another number of them.
    """
    reference = next((r for r in result.rows if r.stage == row.stage and r.work_seconds < inf), row)
    return tuple(
        ratio * reference.cost.patches / row.cost.patches for ratio in row.measurement.ratios
    )


def _format_speeds(speeds: tuple[float, ...]) -> str:
    """Return the median and, of several, the smallest and the largest."""
    if not speeds:
        return ""
    spread = f" ({min(speeds):.2f}-{max(speeds):.2f})" if len(speeds) > 1 else ""
    return f"{median(speeds):.2f}{spread}"


def format_share(share: float) -> str:
    """Return a share as percent, 100 % only if it is all: `99.987 %`."""
    return f"{min(floor(share * 1e5) / 1e3, 100):g} %"


def comment_lines(result: SearchResult) -> list[str]:
    """Return the table and its legend as plain lines."""
    stream = io.StringIO()
    console = Console(file=stream, width=COMMENT_WIDTH, no_color=True, highlight=False)
    console.print(_table(result, ()))
    return [*(line.rstrip() for line in stream.getvalue().splitlines()), *legend_lines(result)]


def legend_lines(result: SearchResult) -> list[str]:
    """Return explanations of the table as plain lines."""
    lines = [
        "speed: of the job relative to the first line of the stage, measured in turns with it; "
        "median (range)",
        "job time: predicted for one worker on this machine, with loading, without finalizing",
        "differs: largest difference of an output value to the network in float32, as a fraction "
        "of the outputs' range",
        "labels: share of voxels with the same label as the network in float32",
    ]
    settings = [row.setting for row in result.rows]
    if any(setting.precision is not None for setting in settings):
        lines.append("a precision changes the results: validate them before you use it")
    if any(setting.patch is not None for setting in settings):
        lines.append("a patch size can change the results: validate them before you use it")
    if any(row.measurement.status == "changes results" for row in result.rows):
        lines.append(
            f"changes results: by more than {ALLOWED_CHANGE:g} and {ALLOWED_FACTOR} times the "
            "current settings; not chosen without --precision or --patch-sizes"
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
        "channels_last": setting.channels_last,
        "cuda_graph": setting.cuda_graph,
        "precision": None if setting.precision is None else dict([setting.precision]),
        "patch": None if setting.patch is None else list(setting.patch),
        "chunksize": list(cost.chunksize),
        "depth": setting.depth if row.stage == "pipeline" else None,
        "status": measurement.status,
        "note": measurement.note or None,
        "patches_per_second": measurement.rate or None,
        "ratios": list(measurement.ratios) or None,
        "peak_bytes": measurement.peak_bytes or None,
        "device_bytes": measurement.device_bytes,
        "difference": None if measurement.difference in (None, inf) else measurement.difference,
        "label_agreement": measurement.agreement,
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
