"""`chunkq jobs`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict

import click

from chunkq.errors import ChunkqError
from chunkq.job.job_path import output_of, printable_path
from chunkq.job.tasks import JobId
from chunkq.system.standard_output import print_line, print_text
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
    states = _states(counts_by_job.keys())
    if as_json:
        rows = [
            {
                "output": printable_path(output_of(job.path)),
                "epoch": job.epoch,
                "is_current": states.get(job),
                **asdict(counts),
            }
            for job, counts in counts_by_job.items()
        ]
        print_line(json.dumps(rows, indent=1))
        return
    if not counts_by_job:
        print_text("no job has chunks on this queue")
    for job, counts in sorted(counts_by_job.items()):
        line = (
            f"{printable_path(output_of(job.path))}: {counts.queued} queued, "
            f"{counts.running} running, {counts.failed} failed"
        )
        line += f", {counts.waiting} waiting" if counts.waiting else ""
        print_text(line + _label(job, states))


def _states(jobs: Collection[JobId]) -> dict[JobId, bool]:
    """Return whether a job is the current one of its folder, for jobs that share a folder.

    A folder that cannot be read is left out.
    """
    epochs = Counter(job.path for job in jobs)
    states = {}
    if len(epochs) < len(jobs):
        from chunkq.job.job_folder import JobFolder  # imports NumPy

    for path in [path for path, count in epochs.items() if count > 1]:
        with suppress(ChunkqError, OSError):
            record = JobFolder(path).read_record()
            for job in jobs:
                if job.path == path:
                    states[job] = record is not None and job.epoch == record.epoch
    return states


def _label(job: JobId, states: Mapping[JobId, bool]) -> str:
    """Return the end of a line: which of several jobs with one folder it is."""
    if job not in states:
        return ""
    return f" (epoch {job.epoch}, {'the current job' if states[job] else 'replaced'})"
