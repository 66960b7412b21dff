"""`chunkq produce`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import click

from chunkq.executors import open_shared, queue_url
from chunkq.job import load_job
from chunkq.paths import without_secret
from chunkq.progress import ProgressBar
from chunkq_producer import submit
from chunkq_producer.cluster import queue_of
from chunkq_producer.commands.options import (
    input_option,
    job_argument,
    output_option,
    queue_option,
)
from chunkq_producer.runner import launch_cluster_workers


@click.command()
@job_argument
@input_option
@output_option
@queue_option
@click.option("--resume", is_flag=True, help="Only go on with a job that was produced before.")
@click.option("--overwrite", is_flag=True, help="Delete the output and start again.")
def produce(
    job: Path,
    input_: str | None,
    output: str | None,
    queue: str | None,
    resume: bool,
    overwrite: bool,
) -> None:
    """Check JOB, write its job folder and queue every chunk that is not done yet."""
    checked = load_job(job, input=input_, output=output)
    prepared = submit.prepare(checked)
    submit.check_existing_job(prepared, resume=resume, overwrite=overwrite)
    url = queue_of(checked, queue)
    with closing(open_shared(url)) as executor:
        executor.ready()
        with ProgressBar("queueing chunks") as meter:
            made = submit.produce(
                prepared, executor, resume=resume, overwrite=overwrite, progress=meter
            )
        going = launch_cluster_workers(executor, made)
    shown = without_secret(checked.output)
    click.echo(f"{made.chunks} chunks, {made.done} done, {made.queued} newly queued -> {shown}")
    if going:
        click.echo("the cluster's own workers have begun; they go on without this machine")
        click.echo(f"next: chunkq status {shown} --watch, then chunkq finalize {shown}")
        return
    work = "work" if url == queue_url(None) else f"work --queue {without_secret(url)}"
    following = work if made.done < made.chunks else f"finalize {shown}"
    click.echo(f"next: chunkq {following}")
