"""`chunkq produce`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import click

from chunkq.create import check_job, check_output
from chunkq.job.job_reading import load_job, select_job_file
from chunkq.job.tasks import chunk_count
from chunkq.paths import without_secret
from chunkq.progress_bar import ProgressDisplay
from chunkq.queue.registry import open_shared, queue_url
from chunkq.system.standard_output import print_text, reserve
from chunkq.terminal import argument
from chunkq_producer.check_model import complete_job
from chunkq_producer.commands.options import (
    config_option,
    input_option,
    job_argument,
    output_option,
    queue_option,
)
from chunkq_producer.engine import queue_of
from chunkq_producer.produce import launch_cluster_workers, produce_job


@click.command()
@job_argument
@config_option
@input_option
@output_option
@queue_option
@click.option("--resume", is_flag=True, help="Continue an existing job; fail if there is none.")
@click.option("--overwrite", is_flag=True, help="Delete the output and start again.")
def produce(
    job: Path | None,
    config: Path | None,
    input_: str | None,
    output: str | None,
    queue: str | None,
    resume: bool,
    overwrite: bool,
) -> None:
    """Check JOB, write its job folder and queue every chunk that is not computed.

    JOB is a YAML or JSON job file. Next, start `chunkq work` on each machine.
    """
    reserve()
    written_job = load_job(select_job_file(job, config), input=input_, output=output)
    with ProgressDisplay() as display:
        loaded_job = complete_job(written_job, display)
    checked = check_job(loaded_job)
    check_output(checked, resume=resume, overwrite=overwrite)
    for line in checked.warnings:
        click.echo(f"chunkq: warning: {line}", err=True)
    url = queue_of(loaded_job, queue)
    with closing(open_shared(url)) as executor:
        executor.check_ready()
        for line in executor.risks():
            click.echo(f"chunkq: warning: {line}", err=True)
        with ProgressDisplay() as display:
            result = produce_job(
                checked, executor, resume=resume, overwrite=overwrite, emit=display
            )
        workers_started = launch_cluster_workers(executor, result)
    output_name = without_secret(loaded_job.output)
    quoted = argument(output_name)
    print_text(
        f"{chunk_count(result.chunks)}, {result.done} done, {result.queued} newly queued -> "
        f"{output_name}"
    )
    if result.staging:
        inputs = "1 input" if result.staging == 1 else f"{result.staging} inputs"
        print_text(f"the chunks wait until workers have staged {inputs} (see `chunkq plan`)")
    if workers_started:
        print_text("workers are running in the cluster; they do not need this machine")
        print_text(f"next: chunkq status {quoted} --watch, then chunkq finalize {quoted}")
        return
    work = "work" if url == queue_url(None) else f"work --queue {argument(without_secret(url))}"
    next_command = work if result.done < result.chunks else f"finalize {quoted}"
    print_text(f"next: chunkq {next_command}")
