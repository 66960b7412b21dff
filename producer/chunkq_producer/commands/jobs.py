"""`chunkq jobs`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from chunkq.job_path import output_of, printable_path
from chunkq_producer.commands.options import json_option, queue_of, queue_option


@click.command()
@queue_option
@json_option
def jobs(queue: str | None, as_json: bool) -> None:
    """List the jobs that have chunks on the queue."""
    list_jobs(queue, as_json=as_json)


def list_jobs(queue: str | None, *, as_json: bool) -> None:
    """Print each job on the queue with the numbers of its chunks by state."""
    with queue_of(queue) as executor:
        counts_by_job = executor.jobs()
    if as_json:
        rows = [
            {"output": printable_path(output_of(job)), **asdict(counts)}
            for job, counts in counts_by_job.items()
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    if not counts_by_job:
        click.echo("no job has chunks on this queue")
    for job, counts in sorted(counts_by_job.items()):
        click.echo(
            f"{printable_path(output_of(job))}: {counts.queued} queued, "
            f"{counts.running} running, {counts.failed} failed"
        )
