"""`chunkq status`."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack

import click
from rich.console import Console
from rich.live import Live

from chunkq.errors import QueueError
from chunkq.executors.base import Executor
from chunkq_producer.commands.jobs import list_jobs
from chunkq_producer.commands.options import job_at, json_option, queue_of, queue_option
from chunkq_producer.job_status import StatusPoller, status_line, status_screen

REFRESH_SECONDS = 1.0
LINE_SECONDS = 10.0


@click.command()
@click.argument("output", required=False)
@queue_option
@click.option("--watch", is_flag=True, help="Keep showing it until the job is sealed.")
@json_option
def status(output: str | None, queue: str | None, watch: bool, as_json: bool) -> None:
    """Show how far the job of OUTPUT is; without OUTPUT, all jobs on the queue."""
    if output is None:
        list_jobs(queue, as_json=as_json)
        return
    job = job_at(output)
    with ExitStack() as stack:
        executor, problem = _queue(stack, queue, job.record.job.queue)
        look = StatusPoller(job, executor, problem)
        if as_json:
            show_json(look, watch)
        elif watch:
            show_watching(look, Console())
        else:
            console = Console()
            console.print(status_screen(look(), console.width))


def show_json(look: StatusPoller, watch: bool) -> None:
    """Print the status as JSON; watching, one object a line."""
    while True:
        found = look()
        click.echo(json.dumps(found.as_dict(), indent=None if watch else 1))
        if not watch or found.sealed:
            return
        time.sleep(look.pause(REFRESH_SECONDS))


def show_watching(look: StatusPoller, console: Console) -> None:
    """Keep the status on the screen until the job is sealed; in a log, a line now and then."""
    found = look()
    if not console.is_terminal:
        while True:
            click.echo(f"{time.strftime('%H:%M:%S')} {status_line(found)}")
            if found.sealed:
                return
            time.sleep(look.pause(LINE_SECONDS))
            found = look()
    with Live(status_screen(found, console.width), console=console, auto_refresh=False) as live:
        while not found.sealed:
            time.sleep(look.pause(REFRESH_SECONDS))
            found = look()
            live.update(status_screen(found, console.width), refresh=True)


def _queue(
    stack: ExitStack, given: str | None, of_job: str | None
) -> tuple[Executor | None, str | None]:
    """Connect to the queue, or return why not: the ledger alone has most of the status."""
    try:
        return stack.enter_context(queue_of(given, of_job)), None
    except QueueError as error:
        return None, str(error)
