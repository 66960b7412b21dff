"""Text form of a report for a terminal or a log."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from chunkq.job.model_config import STOCHASTIC
from chunkq.tables import FittingTable
from chunkq.units import seconds, si
from chunkq_producer.reports.job_report import JobReport
from chunkq_producer.reports.rows import (
    STAGE_LABELS,
    STRAGGLER_COLUMNS,
    Rows,
    fetched,
    headlines,
    memory,
    plan_rows,
    stage_rows,
    straggler_rows,
    worker_rows,
)

MAX_WORKERS, MAX_STRAGGLERS, MAX_CLASSES = 12, 8, 20
BARS = "▁▂▃▄▅▆▇█"


def text(report: JobReport) -> RenderableType:
    """Return the report; long lines are wrapped."""
    timing = report.timing
    parts: list[RenderableType] = [
        Text(report.output, style="bold", overflow="fold"),
        Text(report.state),
        Text(report.conclusion, style="bold"),
    ]
    if report.advice:
        parts.append(Text(report.advice, style="green"))
    parts += [Text(f"warning: {line}", style="yellow") for line in report.warnings]
    parts += _images(report)
    if not timing.chunks:
        return Group(*parts)
    parts += _section("", FittingTable((), headlines(report), wraps=(0,)))
    parts += _section("time of the workers", FittingTable((), _shares(report), wraps=(0,)))
    if timing.timeline.patches_per_second:
        line = Text(_sparkline(timing.timeline.patches_per_second), no_wrap=True, overflow="crop")
        peak = si(max(timing.timeline.patches_per_second), f"{report.unit}/s")
        parts += _section(f"speed over {seconds(timing.work_seconds)}, at most {peak}", line)
    quantiles = timing.durations.quantiles["own"]
    median, most = seconds(quantiles["0.5"]), seconds(quantiles["0.99"])
    heading = f"time per chunk: median {median}, 99% at most {most}"
    stages = FittingTable(("stage", "total", "median", "99%", "maximum"), stage_rows(timing))
    parts += _section(heading, stages)
    workers, omitted = worker_rows(report, MAX_WORKERS)
    headings = ("worker", "chunks", "time", "busy", "losses")
    table = FittingTable(headings, workers, left=(0, 4), wraps=(4,))
    parts += _section("workers, the least busy first", table)
    if omitted:
        parts.append(Text(f"and {omitted} more"))
    parts += _stragglers(report)
    parts += _section(
        "", FittingTable(("", "measured", "planned", ""), plan_rows(report), wraps=(0,))
    )
    parts += _section("", Text(f"memory: {memory(report)}"))
    if text := fetched(timing):
        parts += _section("", Text(f"fetched: {text}"))
    parts += [Text(f"stored: {line}") for line in report.outputs]
    parts.append(Text(f"precision: {report.precision}"))
    if report.is_stochastic:
        parts.append(Text(STOCHASTIC))
    return Group(*parts)


def _images(report: JobReport) -> list[RenderableType]:
    """Return how many images failed, the accuracy and what each class was taken for."""
    if report.images is None:
        return []
    # For such jobs only: they import pyarrow, an extra.
    from chunkq.image_report import image_lines
    from chunkq_producer.reports.image_rows import CLASS_COLUMNS, class_rows, confusion_rows

    parts: list[RenderableType] = [Text(line) for line in image_lines(report.images)]
    if (rows := class_rows(report)) is not None:
        classes = FittingTable(CLASS_COLUMNS, rows[:MAX_CLASSES], left=(0, 5), wraps=(5,))
        parts += _section("classes, the most frequent first", classes)
        if (omitted := len(rows) - MAX_CLASSES) > 0:
            parts.append(Text(f"and {omitted} more"))
    if (table := confusion_rows(report)) is not None:
        parts += _section("true labels (rows) and predictions (columns)", FittingTable(*table))
    return parts


def _shares(report: JobReport) -> Rows:
    """Return rows of (label, share of the time of all workers), the largest first."""
    shares = report.timing.worker_time_shares
    return [
        (STAGE_LABELS[stage], f"{share:.1%}")
        for stage, share in sorted(shares.items(), key=lambda item: -item[1])
        if share >= 0.0005
    ]


def _stragglers(report: JobReport) -> list[RenderableType]:
    stragglers = report.timing.stragglers
    if not stragglers.count:
        return _section("", Text(f"stragglers: none ({stragglers.rule})"))
    table = FittingTable(
        STRAGGLER_COLUMNS,
        straggler_rows(report, MAX_STRAGGLERS),
        left=(0, 1, 6),
        wraps=(6,),
    )
    heading = (
        f"stragglers: {stragglers.count} chunks ({stragglers.rule}), "
        f"{seconds(stragglers.excess_seconds)} longer than expected in total"
    )
    omitted = stragglers.count - MAX_STRAGGLERS
    rest: list[RenderableType] = [Text(f"and {omitted} more")] if omitted > 0 else []
    return [*_section(heading, table), *rest]


def _section(heading: str, content: RenderableType) -> list[RenderableType]:
    title: list[RenderableType] = [Text(heading, style="bold")] if heading else []
    return [Text(""), *title, Padding(content, (0, 0, 0, 2 if heading else 0), expand=False)]


def _sparkline(values: Sequence[float]) -> str:
    """Return one bar per two values, to fit narrow terminals."""
    pairs = [max(values[n : n + 2]) for n in range(0, len(values), 2)]
    highest = max(pairs) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int(v / highest * len(BARS)))] for v in pairs)
