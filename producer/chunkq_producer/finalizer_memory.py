"""Measure the memory of `chunkq finalize` on sample blocks with random pieces.

The samples are the blocks with the largest pieces. They are written to a temporary job folder and
completed by `python -m chunkq_producer.finalizer_memory JOB_FOLDER BLOCK ...`, as many in parallel
as `chunkq finalize` completes. That process prints its peak resident memory (bytes) on one line.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.finalize import max_concurrent_blocks
from chunkq.geometry.box import Box
from chunkq.job.job_handle import ItemHandle, open_job
from chunkq.job.record import JobRecord
from chunkq.job.sample_job import copy_job, largest_item
from chunkq.job.tasks import chunk_name, parse_chunk
from chunkq.plan.chunk import Chunk, Index
from chunkq.plan.plan import Plan
from chunkq.plan.sample_chunks import sample_chunks
from chunkq.queue.contract.executor import Attempt
from chunkq.stages.finalize import OWN_PIECE
from chunkq.stages.registry import stage_of
from chunkq.system.memory import peak_bytes
from chunkq.system.parent_process import with_parent_death_signal
from chunkq.system.python_process import python_module
from chunkq.system.scratch import scratch_folder

MODULE = "chunkq_producer.finalizer_memory"
MAX_BLOCKS = 8
"""Sample blocks."""


def measure_finalizer_memory(record: JobRecord) -> int | None:
    """Return the peak resident memory (bytes) of a finalizer process; None if it failed."""
    with scratch_folder("finalizer") as folder:
        job = copy_job(record, str(folder))
        item = largest_item(job)
        blocks = sample_blocks(item.plan)
        for chunk in blocks:
            _write_noise_pieces(item, chunk)
        names = [chunk_name(chunk.index) for chunk in blocks]
        completed = subprocess.run(
            with_parent_death_signal(
                python_module(MODULE, job.folder.path, *names), signal.SIGKILL
            ),
            capture_output=True,
            check=False,
        )
    output = completed.stdout.decode(errors="replace").strip()
    return int(output) if completed.returncode == 0 and output.isdecimal() else None


def main() -> None:
    """Complete the blocks named on the command line and print the peak memory."""
    # Count the modules that the finalize command imports.
    from chunkq_producer.commands import finalize  # noqa: F401

    path, *names = sys.argv[1:]
    job = open_job(path)
    blocks = [index for index in map(parse_chunk, names) if index is not None]
    stage, item = stage_of("finalize"), largest_item(job)
    with ThreadPoolExecutor(max_concurrent_blocks(job)) as pool:
        for _ in pool.map(lambda i: stage.run(item, i, Attempt(1, "finalizer")), blocks):
            pass
    sys.stdout.write(f"{peak_bytes()}\n")


def sample_blocks(plan: Plan) -> list[Chunk]:
    """Return up to MAX_BLOCKS sample chunks with a band, those with the largest pieces first."""
    blocks = [chunk for chunk in sample_chunks(plan) if chunk.has_band]
    return sorted(blocks, key=lambda chunk: -_voxels_to_read(plan, chunk))[:MAX_BLOCKS]


def _voxels_to_read(plan: Plan, chunk: Chunk) -> int:
    """Return the number of voxels of a block and its incoming pieces."""
    return chunk.block.size + sum(piece.box.size for piece in plan.incoming_pieces(chunk))


def _write_noise_pieces(item: ItemHandle, chunk: Chunk) -> None:
    """Write all pieces that a block's contributors write, with random values.

    The values are not zero because blocks of zeros are not stored.
    """
    rng, index = np.random.default_rng(0), chunk.index
    own: list[npt.NDArray[Any]] = []
    incoming: dict[Index, list[npt.NDArray[Any]]] = {}
    for view in item.plan.views:
        part = view.chunk(index)
        if part.is_active and part.has_band:
            own += [_sums(view, box, rng) for box in part.band_boxes]
            shapes = [view.output_box(box).shape for box in part.rest_boxes]
            values = [rng.integers(0, 200, shape, np.uint8) for shape in shapes]
            own += [rest.astype(view.output_dtype) for rest in values]
        for piece in view.incoming_pieces(part):
            incoming.setdefault(piece.source, []).append(_sums(view, piece.box, rng))
    if chunk.is_active:
        item.ledger.put_piece(index, OWN_PIECE, own)
    for piece in item.plan.incoming_pieces(chunk):
        item.ledger.put_piece(index, piece.name, incoming.get(piece.source, []))


def _sums(plan: Plan, box: Box, rng: np.random.Generator) -> npt.NDArray[Any]:
    shape = (plan.output.sums_channels, *box.shape)
    return rng.random(shape, np.float32).astype(plan.output.sums_dtype, copy=False)


if __name__ == "__main__":
    main()
