"""`chunkq status`."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack

import click
from rich.console import Console

from chunkq import json_values
from chunkq.errors import QueueError
from chunkq.progress_bar import is_live
from chunkq.queue.contract.executor import Executor
from chunkq.system.standard_output import print_line, print_text, result_stream
from chunkq_producer.commands.jobs import list_jobs
from chunkq_producer.commands.options import (
    complete_folders,
    job_at,
    json_option,
    queue_of,
    queue_option,
)
from chunkq_producer.job_status import StatusPoller, status_line, status_screen

REFRESH_SECONDS = 1.0
LINE_SECONDS = 10.0


@click.command()
@click.argument("output", required=False, shell_complete=complete_folders)
@queue_option
@click.option("--watch", is_flag=True, help="Update the status until the output is complete.")
@json_option
def status(output: str | None, queue: str | None, watch: bool, as_json: bool) -> None:
    """Show the progress and failures of the job of OUTPUT, such as labels.zarr.

    Without OUTPUT, list all jobs on the queue.
    """
    if output is None:
        list_jobs(queue, as_json=as_json)
        return
    job = job_at(output)
    with ExitStack() as stack:
        executor, problem = _queue(stack, queue, job.record.job.queue)
        poller = StatusPoller(job, executor, problem)
        if as_json:
            print_json(poller, watch)
        elif watch:
            watch_status(poller, Console(file=result_stream()))
        else:
            console = Console(file=result_stream())
            console.print(status_screen(poller(), console.width))


def print_json(poller: StatusPoller, watch: bool) -> None:
    """Print the status as JSON. With `watch`, print one object per line until it is sealed."""
    while True:
        job_status = poller()
        print_line(json.dumps(json_values.to_values(job_status), indent=None if watch else 1))
        if not watch or job_status.sealed:
            return
        time.sleep(max(REFRESH_SECONDS, poller.min_pause))


def watch_status(poller: StatusPoller, console: Console) -> None:
    """Show the status until the output is sealed: live on a terminal, otherwise line by line."""
    job_status = poller()
    if not is_live(console):
        while True:
            print_text(f"{time.strftime('%H:%M:%S')} {status_line(job_status)}")
            if job_status.sealed:
                return
            time.sleep(max(LINE_SECONDS, poller.min_pause))
            job_status = poller()
    from rich.live import Live

    screen = status_screen(job_status, console.width)
    with Live(screen, console=console, auto_refresh=False) as live:
        while not job_status.sealed:
            time.sleep(max(REFRESH_SECONDS, poller.min_pause))
            job_status = poller()
            live.update(status_screen(job_status, console.width), refresh=True)


def _queue(
    stack: ExitStack, queue: str | None, job_queue: str | None
) -> tuple[Executor | None, str | None]:
    """Connect to the queue, or return the reason why it cannot be reached.

    The ledger alone has most of the status.
    """
    try:
        return stack.enter_context(queue_of(queue, job_queue)), None
    except QueueError as error:
        return None, str(error)
