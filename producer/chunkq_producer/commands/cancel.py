"""`chunkq cancel`."""

from __future__ import annotations

import click

from chunkq.errors import JobError, StoreError
from chunkq.job.job_folder import JobFolder
from chunkq.job.job_path import job_folder_of
from chunkq.job.tasks import chunk_count
from chunkq.paths import without_secret
from chunkq.queue.contract.executor import jobs_at
from chunkq.system.standard_output import print_text
from chunkq_producer.commands.options import folder_at, output_argument, queue_of, queue_option


@click.command()
@output_argument
@queue_option
def cancel(output: str, queue: str | None) -> None:
    """Remove the job of OUTPUT, and jobs that it replaced, from the queue.

    Computed chunks are kept. Chunks that are running may finish.
    """
    unchecked_path = job_folder_of(output)
    try:
        folder = folder_at(output)
    except (JobError, StoreError):  # the path has no canonical form or an unsupported protocol
        job_paths, job_queue = {unchecked_path}, None
    else:
        # Tasks may contain the path in the form that the user wrote; workers refuse such tasks.
        job_paths, job_queue = {folder.path, unchecked_path}, _queue_of_job(folder)
    with queue_of(queue, job_queue) as executor:
        executor.check_ready()  # else a replica may report that it has no tasks of the job
        jobs = [job for path in sorted(job_paths) for job in jobs_at(executor, path)]
        count = sum(executor.cancel(job) for job in jobs)
    if count:
        print_text(
            f"{chunk_count(count)} taken off the queue; run `chunkq produce --resume` with the job "
            "file to queue them again"
        )
    else:
        print_text(f"no chunk of this job is on the queue {without_secret(executor.url)}")


def _queue_of_job(folder: JobFolder) -> str | None:
    """Return the queue URL in the job's record; None if the record is damaged or missing."""
    try:
        record = folder.read_record()
    except JobError:
        return None
    return None if record is None else record.job.queue
