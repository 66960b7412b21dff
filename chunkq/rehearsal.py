"""A job made anew elsewhere, to try it in small; both sides do so."""

from __future__ import annotations

from dataclasses import replace

from chunkq.ledger import JobFolder, JobRecord, folder_of
from chunkq.opened import OpenJob, open_job
from chunkq.stores import create_output


def made_anew(record: JobRecord, folder: str) -> OpenJob:
    """Make a job's folder and empty output below a local folder, and open it."""
    output = f"{folder}/out.zarr"
    there = replace(record, job=record.job.model_copy(update={"output": output, "queue": None}))
    plan = there.plan()
    chunks = tuple(min(u, v) for u, v in zip(plan.storage_chunks, plan.volume.shape, strict=True))
    create_output(
        output,
        shape=plan.output_shape,
        chunks=((1,) if plan.channel_axis else ()) + chunks,
        dtype=plan.output_dtype,
        zarr_format=there.job.zarr_format,
        source=there.source,
        attributes={},
    )
    made = JobFolder(folder_of(output))
    made.write_record(there)
    return open_job(made.path)
