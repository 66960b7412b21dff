"""A job's report as one page that stands alone: nothing on it is loaded from elsewhere."""

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

WORKERS_LISTED = 1000
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


def page(account: JobReport) -> str:
    """Return the page as HTML."""
    times = account.times
    title = f"{account.output}: where the time went"
    done = time.strftime("%Y-%m-%d %H:%M", time.localtime(times.started))
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>",
        f"<h1>{escape(account.output)}</h1>",
        f'<p class="about">{escape(account.state)} · begun {done} · chunkq '
        f"{escape(str(account.values['chunkq_version']))}</p>",
        f'<p class="lead">{escape(account.conclusion)}</p>',
    ]
    if account.advice:
        told = re.sub("`([^`]*)`", r"<code>\1</code>", escape(account.advice))
        parts.append(f'<p class="advice">{told}</p>')
    if times.chunks:
        with charts.style():
            parts += _body(account)
    return "\n".join([*parts, "</main>\n</body>\n</html>\n"])


def _body(account: JobReport) -> list[str]:
    times = account.times
    found = times.stragglers
    figures = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in headlines(times)
    )
    parts = [f"<dl>{figures}</dl>"]
    if times.timeline.voxels_per_second:
        parts += ["<h2>Speed over time</h2>", _figure(charts.course(times))]
    parts += [
        "<h2>What the workers’ time went to</h2>",
        _note(_about_shares(account)),
        _figure(charts.shares(account)),
        "<h2>How long chunks took</h2>",
        _figure(charts.durations(times)),
        _table(("stage", "in all", "median", "99%", "longest"), stage_rows(times)),
        "<h2>Stragglers</h2>",
        _note(f"Chunks that took {found.rule}."),
    ]
    if found.count:
        listed = straggler_rows(account, len(found.worst))
        more = f", the worst {len(listed)} here" if found.count > len(listed) else ""
        parts += [
            f"<p>{found.count} chunks{more}; {seconds(found.excess_seconds)} beyond the median "
            "in sum.</p>",
            _table(("chunk", "worker", "attempt", "took", "because of"), listed, text=(1, 4)),
        ]
    else:
        parts.append("<p>None.</p>")
    workers, more_workers = worker_rows(account, WORKERS_LISTED)
    which = f"the {len(workers)} least busy of" if more_workers else "all"
    parts += [
        "<h2>Measured and planned</h2>",
        _figure(charts.moved(times)),
        _table(("", "measured", "planned", "share"), plan_rows(times)),
        f"<p>Memory: {escape(memory(times))}.</p>",
        "<h2>Workers</h2>",
        f"<details><summary>List {which} {len(times.workers)}, the least busy first</summary>",
        _table(("worker", "chunks", "time", "busy", "else"), workers, text=(4,)),
        "</details>",
    ]
    return parts


def _about_shares(account: JobReport) -> str:
    told = (
        "From a worker’s first chunk to the end of its last. A device that does not compute waits "
        "for what is in flight meanwhile."
    )
    count = len(account.times.workers)
    if count > charts.BARS:
        told += f" {charts.BARS} of {count} workers, evenly from the least to the most busy."
    return told


def _figure(drawn: str) -> str:
    return f"<figure>{drawn}</figure>"


def _note(words: str) -> str:
    return f'<p class="note">{escape(words)}</p>'


def _table(headings: Sequence[str], rows: Rows, text: Sequence[int] = ()) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        marked = (
            f"<{tag}{' class=text' if number in text else ''}>{escape(value)}</{tag}>"
            for number, value in enumerate(values)
        )
        return f"<tr>{''.join(marked)}</tr>"

    body = "\n".join(cells("td", row) for row in rows)
    return (
        f'<div class="wide"><table><thead>{cells("th", headings)}</thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )
