"""Plan of a job whose network sees each image whole: its chunks are runs of rows."""

from __future__ import annotations

from chunkq.geometry.grid_spec import GridSpec
from chunkq.job.job_file import Job
from chunkq.plan.plan import Plan
from chunkq.plan.volume import Volume

CHUNKS = 128
"""Chunks that a list is cut into, if these have a number of rows that is neither small nor large.
"""
SMALLEST, LARGEST = 16, 1024
"""Rows of a chunk, by default."""


def row_plan(job: Job, volume: Volume) -> Plan:
    """Return the plan of the rows (n,) of a list.

    It has one axis, whose patches are single rows, and no outputs: results are tables. Chunks do
    not overlap, so no block is finalized.
    """
    (rows,) = volume.shape
    chunk = job.chunksize or (default_rows(rows, job.model.max_batch_size),)
    grid = GridSpec(
        shape=volume.shape,
        patch=(1,),
        output_patch=(1,),
        margin=(0,),
        strides=(1,),
        pads=(0,),
        offsets=((0,),),
        edge="pad",
        pad_mode="constant",
        chunk=chunk,
        storage=chunk,
    )
    return Plan(volume, grid, ())


def default_rows(rows: int, batch: int) -> int:
    """Return the default number of rows of a chunk: whole batches, if there are several chunks."""
    wanted = min(max(-(-rows // CHUNKS), SMALLEST), LARGEST)
    return min(rows, -(-wanted // batch) * batch)
