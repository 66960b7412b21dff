"""`chunkq run`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live
from typing_extensions import override

from chunkq.job import load_job
from chunkq.progress import ProgressBar
from chunkq.record import JobRecord
from chunkq_producer.cluster import ENGINES
from chunkq_producer.commands.finalize import print_result
from chunkq_producer.commands.options import (
    input_option,
    job_argument,
    output_option,
    queue_option,
)
from chunkq_producer.commands.status import LINE_SECONDS
from chunkq_producer.job_status import StatusPoller, status_line, status_screen
from chunkq_producer.model_check import ModelCheck, check_model
from chunkq_producer.runner import ProgressReporter, RunOptions, run_job


@click.command()
@job_argument
@click.option("-e", "--executor", "engine", type=click.Choice(list(ENGINES)), help="Kind of queue.")
@queue_option
@input_option
@output_option
@click.option("-w", "--workers", type=click.IntRange(1), help="Processes per device.")
@click.option("--gpus", default="all", show_default=True, help="all, none, or e.g. 0,1.")
@click.option("--depth", type=click.IntRange(1), help="Chunks in flight per process.")
@click.option("--overwrite", is_flag=True, help="Delete the output and start again.")
def run(
    job: Path,
    engine: str | None,
    queue: str | None,
    input_: str | None,
    output: str | None,
    workers: int | None,
    gpus: str,
    depth: int | None,
    overwrite: bool,
) -> None:
    """Produce, work and finalize JOB on this machine. The same command again continues."""
    checked = load_job(job, input=input_, output=output)
    done = run_job(
        checked,
        engine=engine,
        queue=queue,
        wishes=RunOptions(workers, gpus, depth),
        overwrite=overwrite,
        teller=_Screen(),
    )
    if done.led:
        print_result(done.job, done.report)


class _Screen(ProgressReporter):
    """Shows a run in place on a terminal, else in a line now and then."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    @override
    def message(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    @override
    def checking_model(self, record: JobRecord) -> ModelCheck:
        with self._console.status("trying the network on one batch"):
            return check_model(record)

    @override
    def progress(self, label: str) -> ProgressBar:
        return ProgressBar(label, self._console)

    @override
    @contextmanager
    def watching(self) -> Iterator[Callable[[StatusPoller], None]]:
        console = self._console
        if console.is_terminal:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                yield lambda look: live.update(status_screen(look(), console.width), refresh=True)
            return
        last = time.monotonic()

        def line(look: StatusPoller) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                self.message(status_line(look()))

        yield line
