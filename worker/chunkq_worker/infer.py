"""Run the infer task of a chunk: read, compute on the device, write, commit."""

from __future__ import annotations

import time

import numpy as np

from chunkq.executors.base import Attempt, Contribution, TaskResult
from chunkq.finalize import OWN_PIECE
from chunkq.job_handle import JobHandle, open_job
from chunkq.ledger import Commit
from chunkq.memory import peak_bytes
from chunkq.plan import Chunk, Index
from chunkq.tasks import Task
from chunkq_worker.frameworks import framework_rule
from chunkq_worker.inference_engine import ComputedChunk, get_device


def infer_chunk(task: Task, attempt: Attempt) -> TaskResult:
    """Compute one chunk unless it is committed, and return its contributions to blocks.

    The commit record is written last. Several calls run in parallel threads: while one chunk is
    computed, others are read and written. The contributions are also returned for a chunk that
    was committed before.
    """
    job = open_job(task.job)
    patches = 0
    if not job.ledger.is_committed("infer", task.chunk):
        framework_rule.check(job.plan.job.model)  # checked again before the network is loaded
        with job.check_replaced_on_error():
            patches = _compute(job, task, attempt)
    return TaskResult(_contributions(job, task.chunk), ran_network=patches > 0)


def _contributions(job: JobHandle, index: Index) -> list[Contribution]:
    chunk = job.plan.chunk(index)
    contributions = []
    for block in [index, *(piece.target for piece in job.plan.outgoing_pieces(chunk))]:
        if not job.plan.has_band(block):
            continue
        contributors = job.plan.contributors(block)
        task = Task("finalize", *job.id, 0, block)
        contributions.append(Contribution(task, contributors.index(index), len(contributors)))
    return contributions


def _compute(job: JobHandle, task: Task, attempt: Attempt) -> int:
    """Compute and commit one chunk; return the number of patches computed."""
    chunk = job.plan.chunk(task.chunk)
    started = time.time()
    seconds: dict[str, float] = {}
    bytes_moved: dict[str, int] = {}
    checksums: dict[str, int] = {}
    patches = 0
    if chunk.is_active:
        halos = job.read_halos(chunk)
        seconds["read"] = time.time() - started
        bytes_moved["input"] = _bytes_read(job, chunk)
        computed = get_device().compute(job, chunk, halos)
        del halos
        seconds |= computed.seconds
        patches = computed.patches
        write_started = time.time()
        if job.ledger.is_committed("infer", task.chunk):
            return patches  # another worker committed it first; the output may be sealed
        job.check_inputs()
        job.check_unchanged()
        _write_results(job, chunk, computed, bytes_moved, checksums)
        seconds["write"] = time.time() - write_started
    if job.ledger.is_committed("infer", task.chunk):
        # Another worker also had this chunk and committed it first; its blocks may be final.
        _delete_late_pieces(job, chunk)
        return patches
    job.check_unchanged()
    job.ledger.commit(
        Commit(
            kind="infer",
            chunk=task.chunk,
            attempt=attempt.number,
            worker=attempt.worker,
            started=started,
            finished=time.time(),
            seconds=seconds,
            moved=bytes_moved,
            checksums=checksums,
            patches=patches,
            peak_rss=peak_bytes(),
        )
    )
    return patches


def _write_results(
    job: JobHandle,
    chunk: Chunk,
    computed: ComputedChunk,
    bytes_moved: dict[str, int],
    checksums: dict[str, int],
) -> None:
    result, pieces = computed.contribution, 0
    bytes_moved["output"] = job.write(chunk.core, result.core)
    if result.own_block is not None:
        arrays = (*result.own_block.band, *result.own_block.rest)
        info = job.ledger.put_piece(chunk.index, OWN_PIECE, arrays)
        pieces += info.size
        checksums[OWN_PIECE] = info.crc32c
    for piece, sums in result.pieces:
        info = job.ledger.put_piece(piece.target, piece.name, [sums])
        pieces += info.size
        checksums[piece.name] = info.crc32c
    bytes_moved["pieces"] = pieces


def _delete_late_pieces(job: JobHandle, chunk: Chunk) -> None:
    """Delete the chunk's pieces for blocks that are final and do not read them."""
    targets = [chunk.index, *(piece.target for piece in job.plan.outgoing_pieces(chunk))]
    for target in targets:
        if job.ledger.is_committed("finalize", target):
            job.ledger.delete_pieces(target)


def _bytes_read(job: JobHandle, chunk: Chunk) -> int:
    """Return the bytes read from storage: those of the halo inside the volume, without padding."""
    voxels = 1
    for axis, number in zip(job.plan.axes, chunk.index, strict=True):
        low, high = axis.read(np.asarray(number, dtype=np.int64))
        voxels *= int(high - low)
    return voxels * job.plan.volume.voxel_bytes
