"""`chunkq retry`."""

from __future__ import annotations

import click

from chunkq.tasks import Task, chunk_count
from chunkq_producer.commands.options import job_at, output_argument, queue_of, queue_option


@click.command()
@output_argument
@queue_option
def retry(output: str, queue: str | None) -> None:
    """Queue the failed chunks of OUTPUT's job again, with all attempts."""
    job = job_at(output)
    with queue_of(queue, job.record.job.queue) as executor:
        count = executor.retry(job.id)
        # A queue that was lost has no failed tasks; the ledger still lists them.
        failures = [f for f in job.ledger.failures() if f.kind == "infer"]
        count += executor.submit(Task("infer", *job.id, 0, f.chunk) for f in failures)
    click.echo(f"{chunk_count(count)} queued again" if count else "no failed chunk")
