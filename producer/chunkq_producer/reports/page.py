"""HTML form of a report: one self-contained page without external resources."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from html import escape

from chunkq_producer.reports import charts
from chunkq_producer.reports.job_report import JobReport
from chunkq_producer.reports.rows import (
    Rows,
    headlines,
    memory,
    plan_rows,
    stage_rows,
    straggler_rows,
    worker_rows,
)
from chunkq_producer.reports.units import seconds

MAX_WORKERS = 1000
CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0; }
main { max-width: 54rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.75rem 0 .5rem; }
.about { color: #5a5a5a; font-size: .875rem; margin: .25rem 0 1.5rem; }
.lead { font-size: 1.15rem; margin: 0 0 .5rem; }
.advice { border-left: 3px solid #0072B2; padding-left: .75rem; margin: .75rem 0; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem 1.5rem;
     margin: 1.75rem 0 0; padding: 1rem 0; border: solid #dcdcdc; border-width: 1px 0; }
dt { color: #5a5a5a; font-size: .8rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
figure { margin: .5rem 0 0; overflow-x: auto; }
svg { width: 100%; min-width: 34rem; height: auto; display: block; }
.note { color: #5a5a5a; font-size: .875rem; margin: .25rem 0 .75rem; }
.wide { overflow-x: auto; margin-top: .75rem; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
        font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #e6e6e6; }
th { font-weight: 600; color: #5a5a5a; }
th:first-child, td:first-child, .text { text-align: left; }
.text { padding-left: .75rem; }
th:last-child, td:last-child { padding-right: 0; }
summary { cursor: pointer; }
@media print {
  main { max-width: none; padding: 0; }
  body { font-size: 11pt; }
  svg { min-width: 0; }
  figure, tr, dl { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""


def page(report: JobReport) -> str:
    """Return the page as HTML."""
    timing = report.timing
    title = f"{report.output}: performance report"
    start = time.strftime("%Y-%m-%d %H:%M", time.localtime(timing.started))
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>",
        f"<h1>{escape(report.output)}</h1>",
        f'<p class="about">{escape(report.state)} · started {start} · chunkq '
        f"{escape(str(report.values['chunkq_version']))}</p>",
        f'<p class="lead">{escape(report.conclusion)}</p>',
    ]
    if report.advice:
        advice = re.sub("`([^`]*)`", r"<code>\1</code>", escape(report.advice))
        parts.append(f'<p class="advice">{advice}</p>')
    if timing.chunks:
        with charts.style():
            parts += _body(report)
    return "\n".join([*parts, "</main>\n</body>\n</html>\n"])


def _body(report: JobReport) -> list[str]:
    timing = report.timing
    stragglers = timing.stragglers
    figures = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in headlines(timing)
    )
    parts = [f"<dl>{figures}</dl>"]
    if timing.timeline.voxels_per_second:
        parts += ["<h2>Speed over time</h2>", _figure(charts.speed_chart(timing))]
    parts += [
        "<h2>Time of the workers</h2>",
        _note(_time_share_note(report)),
        _figure(charts.time_share_chart(report)),
        "<h2>Time per chunk</h2>",
        _figure(charts.duration_chart(timing)),
        _table(("stage", "total", "median", "99%", "maximum"), stage_rows(timing)),
        "<h2>Stragglers</h2>",
        _note(f"Chunks that took {stragglers.rule}."),
    ]
    if stragglers.count:
        rows = straggler_rows(report, len(stragglers.worst))
        scope = f", the slowest {len(rows)} listed" if stragglers.count > len(rows) else ""
        parts += [
            f"<p>{stragglers.count} chunks{scope}; {seconds(stragglers.excess_seconds)} above the "
            "median in total.</p>",
            _table(("chunk", "worker", "attempt", "time", "cause"), rows, text=(1, 4)),
        ]
    else:
        parts.append("<p>None.</p>")
    workers, omitted = worker_rows(report, MAX_WORKERS)
    scope = f"the {len(workers)} least busy of" if omitted else "all"
    parts += [
        "<h2>Measured and planned</h2>",
        _figure(charts.bytes_chart(timing)),
        _table(("", "measured", "planned", "share"), plan_rows(timing)),
        f"<p>Memory: {escape(memory(timing))}.</p>",
        f"<p>Precision: {escape(report.precision)}.</p>",
        "<h2>Workers</h2>",
        f"<details><summary>List {scope} {len(timing.workers)}, the least busy first</summary>",
        _table(("worker", "chunks", "time", "busy", "losses"), workers, text=(4,)),
        "</details>",
    ]
    return parts


def _time_share_note(report: JobReport) -> str:
    """Return the caption of the chart of time shares."""
    note = (
        "From the start of a worker’s first chunk to the end of its last one. While the device is "
        "idle, the time counts for the stage of the chunks in flight."
    )
    count = len(report.timing.workers)
    if count > charts.MAX_BARS:
        note += f" Shows {charts.MAX_BARS} of {count} workers, evenly spaced by utilization."
    return note


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _table(headings: Sequence[str], rows: Rows, text: Sequence[int] = ()) -> str:
    """Return a table whose columns with a number in `text` are left-aligned."""

    def cells(tag: str, values: Sequence[str]) -> str:
        elements = (
            f"<{tag}{' class=text' if number in text else ''}>{escape(value)}</{tag}>"
            for number, value in enumerate(values)
        )
        return f"<tr>{''.join(elements)}</tr>"

    body = "\n".join(cells("td", row) for row in rows)
    return (
        f'<div class="wide"><table><thead>{cells("th", headings)}</thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )
