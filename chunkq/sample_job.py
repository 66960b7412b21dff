"""A job created again elsewhere, to try it on some chunks; both sides do so."""

from __future__ import annotations

from dataclasses import replace

from chunkq.job_handle import JobHandle, open_job
from chunkq.ledger import JobFolder, folder_of
from chunkq.output import new_record
from chunkq.record import JobRecord


def recreate_job(record: JobRecord, folder: str) -> JobHandle:
    """Create a job's folder and empty output below a local folder, and open it."""
    output = f"{folder}/out.zarr"
    there = replace(record, job=record.job.model_copy(update={"output": output, "queue": None}))
    new = new_record(there, there.plan(), replaces=False)
    JobFolder(folder_of(output)).create_record(new)
    job = open_job(folder_of(output))
    job.output.prepare(anything_done=False, allowed=job.check_unchanged)
    return job
