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
@click.option(
    "-e", "--executor", "engine", type=click.Choice(list(ENGINES)),
    help="Kind of queue (default: sqlite, a local file). dask and ray start a local cluster.",
)  # fmt: skip
@queue_option
@input_option
@output_option
@click.option(
    "-w", "--workers", type=click.IntRange(1),
    help="Worker processes per GPU; without a GPU, in total (default: 1).",
)  # fmt: skip
@click.option("--gpus", default="all", show_default=True, help="GPUs to use: all, none, or 0,1.")
@click.option(
    "--depth", type=click.IntRange(1),
    help="Chunks per process that are read, computed or written at the same time.",
)  # fmt: skip
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
    """Run JOB, a YAML or JSON job file, on this machine: produce, work and finalize.

    To continue an interrupted run, use the same command again.
    """
    result = run_job(
        load_job(job, input=input_, output=output),
        engine=engine,
        queue=queue,
        options=RunOptions(workers, gpus, depth),
        overwrite=overwrite,
        reporter=_TerminalReporter(),
    )
    if result.is_leader:
        print_result(result.job, result.report)


class _TerminalReporter(ProgressReporter):
    """Show progress live on a terminal, otherwise one line every LINE_SECONDS."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    @override
    def message(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    @override
    def check_model(self, record: JobRecord) -> ModelCheck:
        with self._console.status("checking the network on one batch"):
            return check_model(record)

    @override
    def progress(self, label: str) -> ProgressBar:
        return ProgressBar(label, self._console)

    @override
    @contextmanager
    def watch(self) -> Iterator[Callable[[StatusPoller], None]]:
        console = self._console
        if console.is_terminal:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                yield lambda poller: live.update(
                    status_screen(poller(), console.width), refresh=True
                )
            return
        last_line = time.monotonic()

        def print_line(poller: StatusPoller) -> None:
            nonlocal last_line
            if time.monotonic() - last_line >= LINE_SECONDS:
                last_line = time.monotonic()
                self.message(status_line(poller()))

        yield print_line
