"""The infer task: read, compute on the device, write, commit."""

from __future__ import annotations

import time

import numpy as np

from chunkq.executors.base import Attempt, BlockContribution, TaskResult
from chunkq.finalize import OWN_PIECE
from chunkq.job_handle import JobHandle, open_job
from chunkq.ledger import Commit
from chunkq.memory import peak_bytes
from chunkq.plan import Chunk, Index
from chunkq.tasks import Task
from chunkq_worker.frameworks import this_process
from chunkq_worker.inference_engine import ComputedChunk, get_device


def infer_chunk(task: Task, attempt: Attempt) -> TaskResult:
    """Compute one chunk unless it is committed; the commit record comes last.

    Several run at once in threads: while one computes, others read and write. It contributes to
    the same blocks also if it was committed before.
    """
    job = open_job(task.job)
    patches = 0
    if not job.ledger.is_committed("infer", task.chunk):
        this_process.check(job.plan.job.model)  # the device checks again, when the job has its turn
        with job.unless_replaced():
            patches = _compute(job, task, attempt)
    return TaskResult(_contributions(job, task.chunk), ran=patches > 0)


def _contributions(job: JobHandle, index: Index) -> list[BlockContribution]:
    chunk = job.plan.chunk(index)
    found = []
    for block in [index, *(piece.target for piece in job.plan.outgoing_pieces(chunk))]:
        if not job.plan.has_band(block):
            continue
        members = job.plan.contributors(block)
        found.append(BlockContribution(block, members.index(index), len(members)))
    return found


def _compute(job: JobHandle, task: Task, attempt: Attempt) -> int:
    """Compute and commit one chunk; returns the patches run."""
    chunk = job.plan.chunk(task.chunk)
    started = time.time()
    seconds: dict[str, float] = {}
    moved: dict[str, int] = {}
    checksums: dict[str, int] = {}
    patches = 0
    if chunk.is_active:
        halos = job.read_halos(chunk)
        seconds["read"] = time.time() - started
        moved["input"] = _bytes_read(job, chunk)
        computed = get_device().compute(job, chunk, halos)
        del halos
        seconds |= computed.seconds
        patches = computed.patches
        before = time.time()
        if job.ledger.is_committed("infer", task.chunk):
            return patches  # another worker was faster; the output may be sealed by now
        job.check_inputs()
        job.check_unchanged()
        _write(job, chunk, computed, moved, checksums)
        seconds["write"] = time.time() - before
    if job.ledger.is_committed("infer", task.chunk):
        # Another worker was given this chunk and was faster; its blocks may be sealed by now.
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
            moved=moved,
            checksums=checksums,
            patches=patches,
            peak_rss=peak_bytes(),
        )
    )
    return patches


def _write(
    job: JobHandle,
    chunk: Chunk,
    computed: ComputedChunk,
    moved: dict[str, int],
    checksums: dict[str, int],
) -> None:
    result, pieces = computed.contribution, 0
    moved["output"] = job.write(chunk.core, result.core)
    if result.own is not None:
        arrays = (*result.own.band, *result.own.rest)
        written = job.ledger.put_piece(chunk.index, OWN_PIECE, arrays)
        pieces += written.size
        checksums[OWN_PIECE] = written.crc32c
    for piece, sums in result.pieces:
        written = job.ledger.put_piece(piece.target, piece.name, [sums])
        pieces += written.size
        checksums[piece.name] = written.crc32c
    moved["pieces"] = pieces


def _delete_late_pieces(job: JobHandle, chunk: Chunk) -> None:
    targets = [chunk.index, *(piece.target for piece in job.plan.outgoing_pieces(chunk))]
    for target in targets:
        if job.ledger.is_committed("finalize", target):
            job.ledger.delete_pieces(target)


def _bytes_read(job: JobHandle, chunk: Chunk) -> int:
    """Return the bytes of the real voxels behind the halo."""
    voxels = 1
    for axis, number in zip(job.plan.axes, chunk.index, strict=True):
        low, high = axis.read(np.asarray(number, dtype=np.int64))
        voxels *= int(high - low)
    return voxels * job.plan.volume.voxel_bytes
