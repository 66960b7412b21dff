"""`chunkq report`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from chunkq.errors import ChunkqError, ErrorCode
from chunkq.install_hint import install_command
from chunkq.system.standard_output import print_line, print_text, result_stream
from chunkq_producer.commands.options import job_at, json_option, output_argument
from chunkq_producer.reports.job_report import JobReport, load_job_report
from chunkq_producer.reports.text import text


@click.command()
@output_argument
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write an HTML page with plots to this file; requires the extra plot (matplotlib).",
)
@json_option
def report(output: str, html: Path | None, as_json: bool) -> None:
    """Show how the workers of OUTPUT's job spent their time, compared with the plan.

    For a complete output the figures are those of report.json, else those of the chunks so far.
    """
    page_writer = None if html is None else _page_writer()
    job_report = load_job_report(job_at(output))
    if html is not None and page_writer is not None:
        html.write_text(page_writer(job_report), encoding="utf-8")
    if as_json:
        print_line(json.dumps(job_report.as_dict(), indent=1))
    elif html is not None:
        print_text(f"{job_report.conclusion}\nwrote {html}")
    else:
        Console(file=result_stream(), highlight=False).print(text(job_report))


def _page_writer() -> Callable[[JobReport], str]:
    """Return the function that renders the page. Raises ChunkqError without matplotlib."""
    try:
        from chunkq_producer.reports.page import page
    except ImportError as error:
        raise ChunkqError(
            f"--html: matplotlib is missing ({error}); run `{install_command('plot')}`",
            code=ErrorCode.PACKAGE_MISSING,
        ) from None
    return page
