"""A job's report on a terminal or in a log."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from chunkq_producer.reports.job_report import JobReport
from chunkq_producer.reports.rows import (
    IN_FLIGHT_NOTE,
    Rows,
    headlines,
    memory,
    plan_rows,
    stage_rows,
    straggler_rows,
    worker_rows,
)
from chunkq_producer.reports.units import seconds, si

WORKERS_SHOWN, STRAGGLERS_SHOWN = 12, 8
BARS = "▁▂▃▄▅▆▇█"


def text(account: JobReport) -> RenderableType:
    """Return the report; what does not fit a line is folded."""
    times = account.times
    parts: list[RenderableType] = [
        Text(account.output, style="bold", overflow="fold"),
        Text(account.state),
        Text(account.conclusion, style="bold"),
    ]
    if account.advice:
        parts.append(Text(account.advice, style="green"))
    if not times.chunks:
        return Group(*parts)
    parts += _section("", _table((), headlines(times)))
    parts += _section("where the workers' time went", _table((), _shares(account)))
    if times.timeline.voxels_per_second:
        line = Text(_sparkline(times.timeline.voxels_per_second), no_wrap=True, overflow="crop")
        peak = si(max(times.timeline.voxels_per_second), "voxels/s")
        parts += _section(f"speed over {seconds(times.work_seconds)}, at most {peak}", line)
    own = times.durations.quantiles["own"]
    heading = f"chunks: half took {seconds(own['0.5'])}, 99% at most {seconds(own['0.99'])}"
    stages = _table(("stage", "in all", "median", "99%", "longest"), stage_rows(times))
    parts += _section(heading, stages)
    workers, more = worker_rows(account, WORKERS_SHOWN)
    table = _table(("worker", "chunks", "time", "busy", "else"), workers, wide=(0, 4))
    parts += _section("workers, the least busy first", table)
    if more:
        parts.append(Text(f"and {more} more"))
    parts += _stragglers(account)
    parts += _section("", _table(("", "measured", "planned", ""), plan_rows(times)))
    parts += _section("", Text(f"memory: {memory(times)}"))
    return Group(*parts)


def _shares(account: JobReport) -> Rows:
    shares = account.times.worker_time_shares
    return [
        (IN_FLIGHT_NOTE[holder], f"{share:.1%}")
        for holder, share in sorted(shares.items(), key=lambda item: -item[1])
        if share >= 0.0005
    ]


def _stragglers(account: JobReport) -> list[RenderableType]:
    found = account.times.stragglers
    if not found.count:
        return _section("", Text(f"stragglers: none ({found.rule})"))
    table = _table(
        ("chunk", "worker", "attempt", "took", "because of"),
        straggler_rows(account, STRAGGLERS_SHOWN),
        wide=(0, 1, 4),
    )
    told = (
        f"stragglers: {found.count} chunks ({found.rule}), "
        f"{seconds(found.excess_seconds)} beyond the median in sum"
    )
    more = found.count - STRAGGLERS_SHOWN
    rest: list[RenderableType] = [Text(f"and {more} more")] if more > 0 else []
    return [*_section(told, table), *rest]


def _section(heading: str, content: RenderableType) -> list[RenderableType]:
    above: list[RenderableType] = [Text(heading, style="bold")] if heading else []
    return [Text(""), *above, Padding(content, (0, 0, 0, 2 if heading else 0), expand=False)]


def _table(headings: Sequence[str], rows: Rows, wide: tuple[int, ...] = (0,)) -> Table:
    """Return a table whose `wide` columns fold; the others hold figures, to the right."""
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(headings), expand=False
    )
    for number in range(len(rows[0]) if rows else len(headings)):
        folds = number in wide
        table.add_column(
            headings[number] if headings else "",
            justify="left" if folds else "right",
            overflow="fold",
            no_wrap=not folds,
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _sparkline(values: Sequence[float]) -> str:
    """Return a bar for every two values, so that it fits narrow terminals."""
    pairs = [max(values[n : n + 2]) for n in range(0, len(values), 2)]
    highest = max(pairs) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int(v / highest * len(BARS)))] for v in pairs)
