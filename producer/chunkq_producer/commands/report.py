"""`chunkq report`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from chunkq.errors import ChunkqError
from chunkq_producer.commands.options import job_at, json_option, output_argument
from chunkq_producer.reports.job_report import JobReport, load_job_report
from chunkq_producer.reports.text import text


@click.command()
@output_argument
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write one page with plots to this file; needs the extra `plot`.",
)
@json_option
def report(output: str, html: Path | None, as_json: bool) -> None:
    """Say where the time of OUTPUT's job went, and how it compares with the plan.

    The figures are those of report.json; of a job that is not sealed, those so far.
    """
    write = None if html is None else _page_writer()
    account = load_job_report(job_at(output))
    if html is not None and write is not None:
        html.write_text(write(account), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(account.as_dict(), indent=1))
    elif html is not None:
        click.echo(f"{account.conclusion}\nwritten: {html}")
    else:
        Console(highlight=False).print(text(account))


def _page_writer() -> Callable[[JobReport], str]:
    """Return what makes the page; raises ChunkqError where matplotlib is not installed."""
    try:
        from chunkq_producer.reports.page import page
    except ImportError as error:
        raise ChunkqError(
            f"report --html: matplotlib is not installed here ({error}); pip install 'chunkq[plot]'"
        ) from None
    return page
