"""`chunkq cancel`."""

from __future__ import annotations

import click

from chunkq.errors import JobError, StoreError
from chunkq.ledger import JobFolder, folder_of
from chunkq.paths import without_secret
from chunkq_producer.commands.options import folder_at, output_argument, queue_of, queue_option


def _queue_of_job(folder: JobFolder) -> str | None:
    """Return the queue that the job remembers; None also where its record is damaged."""
    try:
        record = folder.read_record()
    except JobError:
        return None
    return None if record is None else record.job.queue


@click.command()
@output_argument
@queue_option
def cancel(output: str, queue: str | None) -> None:
    """Take the job of OUTPUT off the queue; what is done stays, what is running may finish."""
    written = folder_of(output)
    try:
        folder = folder_at(output)
    except (JobError, StoreError):  # no canonical form, or no such kind of file system
        jobs, of_job = {written}, None
    else:
        # Workers refuse a task that names its job in another form; it is cancelled as well.
        jobs, of_job = {folder.path, written}, _queue_of_job(folder)
    with queue_of(queue, of_job) as executor:
        count = sum(executor.cancel(job) for job in jobs)
    if count:
        click.echo(f"{count} chunks taken off the queue; `chunkq produce --resume` puts them back")
    else:
        click.echo(f"no chunk of this job is on the queue {without_secret(executor.url)}")
