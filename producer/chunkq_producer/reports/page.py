"""HTML form of a report: one self-contained page without external resources."""

from __future__ import annotations

import re
import time
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from chunkq.units import seconds
from chunkq_producer.reports import charts
from chunkq_producer.reports.job_report import JobReport
from chunkq_producer.reports.rows import (
    STRAGGLER_COLUMNS,
    fetched,
    headlines,
    memory,
    plan_rows,
    stage_rows,
    straggler_rows,
    worker_rows,
)

MAX_WORKERS = 1000


def page(report: JobReport) -> str:
    """Return the page as HTML."""
    timing = report.timing
    workers, omitted = worker_rows(report, MAX_WORKERS)
    with charts.style():
        return (
            _environment()
            .get_template("report.html")
            .render(
                report=report,
                timing=timing,
                started=time.strftime("%Y-%m-%d %H:%M", time.localtime(timing.started)),
                charts=charts,
                headlines=headlines(report),
                stages=stage_rows(timing),
                straggler_columns=STRAGGLER_COLUMNS,
                stragglers=straggler_rows(report, len(timing.stragglers.worst)),
                planned=plan_rows(report),
                memory=memory(report),
                fetched=fetched(timing),
                workers=workers,
                omitted=omitted,
                images=None if report.images is None else _images(report),
            )
        )


def _images(report: JobReport) -> dict[str, Any]:
    """Return what the page shows of a job over images."""
    # For such jobs only: they import pyarrow, an extra.
    from chunkq.image_report import image_lines
    from chunkq_producer.reports.image_rows import CLASS_COLUMNS, accuracy, class_rows

    return {
        "lines": image_lines(report.images or {}),
        "columns": CLASS_COLUMNS,
        "classes": class_rows(report),
        "accuracy": accuracy(report),
    }


@cache
def _environment() -> Environment:
    """Return the environment of the templates, which escapes all values that are not Markup."""
    environment = Environment(
        loader=PackageLoader("chunkq_producer.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": _code, "seconds": seconds}
    return environment


def _code(text: str) -> Markup:
    """Return a text as HTML, with what is in backticks as code."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))
