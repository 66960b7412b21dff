"""`chunkq retry`."""

from __future__ import annotations

import click

from chunkq.job.tasks import chunk_count
from chunkq.stages.completion import failures
from chunkq.stages.registry import stage_of
from chunkq.system.standard_output import print_text
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
        count += executor.submit(
            job.item(failure.item).task(failure.kind, failure.chunk)
            for failure in failures(job)
            if stage_of(failure.kind).is_queued
        )
    print_text(f"{chunk_count(count)} queued again" if count else "no failed chunk")
