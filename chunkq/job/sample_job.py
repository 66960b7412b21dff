"""Copy a job into another folder to run some of its chunks as a sample."""

from __future__ import annotations

from dataclasses import replace

from chunkq.job.job_folder import JobFolder
from chunkq.job.job_handle import ItemHandle, JobHandle, open_job
from chunkq.job.job_path import job_folder_of
from chunkq.job.record import JobRecord
from chunkq.job.stored_images import new_record
from chunkq.storage.images import ImageSource


def largest_item(job: JobHandle) -> ItemHandle:
    """Return the item with the most voxels, which stands for all."""
    return job.items[job.record.largest_item.number]


def copy_job(record: JobRecord, folder: str) -> JobHandle:
    """Create the job with an empty output below a local folder, and return its handle.

    Every chunk of the copy is a task, and no patch is skipped. Its chunks read the inputs
    themselves, also those that the job stages.
    """
    output = f"{folder}/out.zarr"
    images = tuple(
        replace(image, sources=tuple(map(_unstaged, image.sources))) for image in record.images
    )
    changes = {"output": output, "queue": None, "mask": None, "skip_empty": None}
    copy = replace(record, job=record.job.model_copy(update=changes), images=images, mask=None)
    JobFolder(job_folder_of(output)).create_record(new_record(copy, replaces=False))
    job = open_job(job_folder_of(output))
    job.output.prepare(anything_done=False, check_unchanged=job.check_unchanged)
    return job


def _unstaged(source: ImageSource) -> ImageSource:
    """Return a source that is read itself."""
    return replace(source, staged="", storage=()) if source.staged else source
