"""`chunkq plan`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from chunkq import terminal
from chunkq.create import CheckedJob
from chunkq.errors import ChunkqError, ErrorCode, JobError
from chunkq.install_hint import install_command
from chunkq.job.job_reading import load_job, select_job_file
from chunkq.progress_bar import ProgressDisplay
from chunkq.queue.contract.executor import DEFAULT_DEPTH_CPU, DEFAULT_DEPTH_GPU
from chunkq.system.standard_output import print_line, reserve, result_stream
from chunkq_producer.commands.options import (
    config_option,
    input_option,
    job_argument,
    json_option,
    output_option,
)
from chunkq_producer.job_plan import plan_job, with_model_check

LABEL_COLUMNS, NARROW_LABEL_COLUMNS, WIDE = 20, 14, 60
"""Columns of the labels, on terminals of at least `WIDE` columns and on narrower ones."""
TASKS_COLOR = "tab:orange"
"""Color of chunks to run, beside others that are known to be empty."""


@click.command()
@job_argument
@config_option
@input_option
@output_option
@click.option(
    "--check-model",
    is_flag=True,
    help="Load the network, run it on a few patches and chunks, and measure time and memory.",
)
@click.option(
    "--depth", type=click.IntRange(1),
    help="Chunks per process that are read, computed or written at the same time "
    f"(default: {DEFAULT_DEPTH_GPU} on a GPU, else {DEFAULT_DEPTH_CPU}).",
)  # fmt: skip
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Draw the blocks, the chunks and the region of the largest volume to FILE, such as "
    "plan.png. Needs matplotlib.",
)  # fmt: skip
@json_option
def plan(
    job: Path | None,
    config: Path | None,
    input_: str | None,
    output: str | None,
    check_model: bool,
    depth: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Check JOB, a YAML or JSON job file, and print its cost. Only --plot writes a file.

    Without --check-model the network is not loaded.
    """
    reserve()
    loaded_job = load_job(select_job_file(job, config), input=input_, output=output)
    if plot is not None and loaded_job.is_image:
        raise JobError("--plot: draws patches, which a job over images does not have; leave it")
    with ProgressDisplay() as display:
        planned = plan_job(loaded_job, depth=depth, emit=display)
        if plot is not None:
            _save_plot(planned.job, plot)
        if check_model:
            planned = with_model_check(planned, display)
    if as_json:
        print_line(json.dumps(planned.as_dict(), indent=1))
    else:
        _print_rows(planned.rows())


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = terminal.columns(result_stream())
    label = LABEL_COLUMNS if width is None or width >= WIDE else NARROW_LABEL_COLUMNS
    print_line("\n".join(terminal.rows(rows, width, label=label)))


def _save_plot(job: CheckedJob, path: Path) -> None:
    """Draw the plan of the largest item. Raises ChunkqError if that is impossible."""
    try:
        from chunkq_producer.plan_plot import Layer, draw_plan
    except ImportError as error:
        raise ChunkqError(
            f"--plot: matplotlib is not installed ({error}); run `{install_command('plot')}`",
            code=ErrorCode.PACKAGE_MISSING,
        ) from None
    names = [axis.name for axis in job.record.largest_item.image.spatial_axes]
    tasks = job.tasks[job.record.largest_item.number]
    count = len(job.plans)
    which = f" of one of {count} volumes or time points" if count > 1 else ""
    layers, chunks = [], f"{tasks.costs.chunks} chunks to run{which}"
    skipped = tasks.plan.costs.chunks - tasks.costs.chunks
    if tasks.counts is not None and skipped:
        layers.append(Layer(chunks, TASKS_COLOR, tasks.counts > 0))
        chunks = f"{skipped} chunks known to be empty, seen where none to run hides them"
    figure = draw_plan(tasks.plan, names, layers, chunks)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix of no format
        reason = " ".join(str(error).split())
        raise JobError(f"--plot: cannot write {path}: {reason}") from error
