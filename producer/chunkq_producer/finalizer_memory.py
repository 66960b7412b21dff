"""Finalizing in small, for the memory that it will need.

A job's largest blocks are given pieces of noise in a folder that is thrown away, and are
completed by `python -m chunkq_producer.finalizer_memory JOB_FOLDER BLOCK ...`, as many at once as
`chunkq finalize` does; that process writes its largest resident memory (bytes) as one line.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import numpy.typing as npt

from chunkq.box import Box
from chunkq.executors.base import Attempt
from chunkq.finalize import OWN_PIECE, blocks_at_once, complete_block
from chunkq.job_handle import JobHandle, open_job
from chunkq.memory import peak_bytes
from chunkq.parent_death_signal import with_parent_death_signal
from chunkq.plan import Chunk, Index, Plan
from chunkq.record import JobRecord
from chunkq.sample_job import recreate_job
from chunkq.scratch import scratch_folder
from chunkq.tasks import chunk_name, parse_chunk

MODULE = "chunkq_producer.finalizer_memory"
BLOCKS = 8


def measure_finalizer_memory(record: JobRecord) -> int | None:
    """Return a finalizer's largest resident memory, tried in a process; None if it failed."""
    with scratch_folder("rehearsal") as folder:
        job = recreate_job(record, str(folder))
        blocks = some_blocks(job.plan)
        for index in blocks:
            _write_noise_pieces(job, job.plan.chunk(index))
        names = map(chunk_name, blocks)
        done = subprocess.run(
            with_parent_death_signal(
                [sys.executable, "-m", MODULE, job.folder.path, *names], signal.SIGKILL
            ),
            capture_output=True,
            check=False,
        )
    found = done.stdout.decode(errors="replace").strip()
    return int(found) if done.returncode == 0 and found.isdecimal() else None


def main() -> None:
    """Answer on standard output."""
    # What the command has loaded besides.
    from chunkq_producer.commands import finalize  # noqa: F401

    path, *names = sys.argv[1:]
    job = open_job(path)
    blocks = [index for index in map(parse_chunk, names) if index is not None]
    with ThreadPoolExecutor(blocks_at_once(job.plan)) as pool:
        for _ in pool.map(lambda i: complete_block(job, i, Attempt(1, "rehearsal")), blocks):
            pass
    sys.stdout.write(f"{peak_bytes()}\n")


def some_blocks(plan: Plan) -> list[Index]:
    """Return up to BLOCKS blocks with a band, those with the most to add up first."""
    places = [sorted({0, min(1, n - 1), n // 2, max(0, n - 2), n - 1}) for n in plan.blocks]
    found = [index for index in product(*places) if plan.has_band(index)]
    return sorted(found, key=lambda i: -_gathered(plan, plan.chunk(i)))[:BLOCKS]


def _gathered(plan: Plan, chunk: Chunk) -> int:
    """Return how many voxels the block's pieces have, of sums and of itself."""
    return chunk.block.size + sum(piece.box.size for piece in plan.incoming_pieces(chunk))


def _write_noise_pieces(job: JobHandle, chunk: Chunk) -> None:
    """Leave all pieces that a block's contributors would; blocks of zeros would not be stored."""
    plan, drawn = job.plan, np.random.default_rng(0)
    stored = (plan.channels,) if plan.channel_axis else ()
    if chunk.is_active:
        own = [_sums(plan, box, drawn) for box in chunk.band_boxes]
        shapes = [(*stored, *box.shape) for box in chunk.rest_boxes]
        rest = [drawn.integers(0, 200, shape, np.uint8) for shape in shapes]
        job.ledger.put_piece(
            chunk.index, OWN_PIECE, [*own, *(r.astype(plan.output_dtype) for r in rest)]
        )
    for piece in plan.incoming_pieces(chunk):
        job.ledger.put_piece(chunk.index, piece.name, [_sums(plan, piece.box, drawn)])


def _sums(plan: Plan, box: Box, drawn: np.random.Generator) -> npt.NDArray[np.float32]:
    return drawn.random((plan.channels, *box.shape), np.float32)


if __name__ == "__main__":
    main()
