"""`chunkq run`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click
from rich.console import Console
from rich.live import Live

from chunkq.errors import ChunkqError, IncompleteError, ModelError
from chunkq.executors import QUEUE_VARIABLE, open_executor
from chunkq.job import load_job
from chunkq.opened import open_job
from chunkq.progress import Meter
from chunkq_producer import submit
from chunkq_producer.commands.finalize import complete, tell
from chunkq_producer.commands.options import (
    input_option,
    job_argument,
    output_option,
    queue_option,
)
from chunkq_producer.commands.status import LINE_SECONDS, Look
from chunkq_producer.machine import ENGINES, check_machine, queue_for, unused
from chunkq_producer.probe import probe
from chunkq_producer.watch import one_line, screen

REFRESH_SECONDS = 0.5


class InterruptedRunError(ChunkqError):
    """The user stopped the run; nothing is lost."""

    exit_code = 130


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
    url = queue_for(engine, queue, checked.queue)
    check_machine(checked)
    prepared = submit.prepare(checked)
    submit.check_place(prepared, overwrite=overwrite)
    for line in unused(checked):
        click.echo(f"chunkq: {line}", err=True)
    console = Console(stderr=True)
    with console.status("trying the network on one batch"):
        tried = probe(prepared.record)
    if tried.error is not None:
        raise ModelError(tried.error)
    executor = open_executor(url)
    with Meter("queueing chunks", console) as meter:
        made = submit.produce(prepared, executor, overwrite=overwrite, progress=meter)
    opened = open_job(made.folder.path)
    if made.done < made.chunks:
        command = [sys.executable, "-m", "chunkq", "work", "--burst", "--quiet"]
        on_cpu = checked.model.device == "cpu" or checked.hardware == "cpu_only"
        command += ["--gpus", "none" if on_cpu else gpus, "--lifeline"]
        command += ["--job", opened.folder.output]
        command += ["-w", str(workers)] if workers else []
        command += ["--depth", str(depth)] if depth else []
        look = Look(opened.folder, opened.plan, executor)
        again = "the same command" + (" without --overwrite" if overwrite else "")
        code = _work(command, {**os.environ, QUEUE_VARIABLE: url}, look, console)
        if code is None:
            raise InterruptedRunError(f"stopped; {again} continues where it was")
        if code not in (0, IncompleteError.exit_code):
            raise ChunkqError(f"the worker gave up, for the reason above; {again} continues")
        _explain_failures(look, console)
    executor.close()
    tell(opened, complete(opened))


def _explain_failures(look: Look, console: Console) -> None:
    """Say what went wrong with chunks that did not get done; finalizing then lists them."""
    for group in look().failures:
        chunks = ", ".join(group.chunks[:6]) + (" …" if len(group.chunks) > 6 else "")
        console.print(
            f"failed: chunk {chunks}: {group.message}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _work(
    command: list[str], environment: dict[str, str], look: Look, console: Console
) -> int | None:
    """Run a worker to its end and show how far the job is; signals are passed on to it.

    Returns its exit code, or None if it was told to stop. The queue's address, which may hold a
    password, travels in the environment: a command line can be seen by everyone.
    """
    worker = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    interrupted = threading.Event()

    def pass_on(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        worker.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _view(console) as show:
            reader = threading.Thread(target=_repeat, args=(worker, console), daemon=True)
            reader.start()
            while worker.poll() is None:
                _try_to_show(show, look, console)
                _wait(worker, look.rest(REFRESH_SECONDS))
            reader.join()
            _try_to_show(show, look, console)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        worker.kill()
        worker.wait()
    return None if interrupted.is_set() else worker.returncode


def _try_to_show(show: Callable[[Look], None], look: Look, console: Console) -> None:
    """Show how far the job is; if it cannot be seen just now, the work goes on all the same."""
    try:
        show(look)
    except Exception as error:
        reason = " ".join(str(error).split())
        console.print(f"progress cannot be seen: {reason}", highlight=False, markup=False)


def _wait(worker: subprocess.Popen[str], seconds: float) -> None:
    try:
        worker.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _repeat(worker: subprocess.Popen[str], console: Console) -> None:
    """Print what the worker says above the progress."""
    for line in worker.stderr or ():
        console.print(line.rstrip("\n"), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _view(console: Console) -> Iterator[Callable[[Look], None]]:
    """Yield a function that shows a look: in place on a terminal, else a line now and then."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            yield lambda look: live.update(screen(look(), console.width), refresh=True)
        return
    last = time.monotonic()

    def line(look: Look) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            console.print(one_line(look()), highlight=False, soft_wrap=True)

    yield line
