"""The stage that runs the network, in a worker: read, compute on the device, write, commit."""

from __future__ import annotations

import time
from math import prod
from typing import Any

import numpy.typing as npt
from typing_extensions import override

from chunkq.errors import ChunkReadError, ErrorCode, GateClosedError, QueueError
from chunkq.job.job_handle import ItemHandle
from chunkq.job.object_checksums import encode_checksums
from chunkq.job.task_records import Commit
from chunkq.paths import without_secret
from chunkq.plan.chunk import Chunk, Index
from chunkq.queue.contract.executor import Attempt
from chunkq.stages.finalize import OWN_PIECE
from chunkq.stages.infer import InferStage
from chunkq.stages.ingest import forget_incomplete
from chunkq.storage.chunk_cache import FetchCounter
from chunkq.system.memory import peak_bytes
from chunkq_worker.device import ComputedChunk, get_device
from chunkq_worker.frameworks import framework_rule

FETCHES = FetchCounter()
"""What this process fetches. Each commit record has what was fetched since the one before."""


class ComputingStage(InferStage):
    """The chunks that are tasks, computed on the device of this process."""

    @override
    def run(self, item: ItemHandle, chunk: Index, attempt: Attempt) -> bool:
        """Read one chunk, run the network on its patches, write its voxels and pieces, commit it.

        Several calls run in parallel threads: while one chunk is computed, others are read and
        written. Raises QueueError if the job has no such chunk.
        """
        if not item.tasks.is_task(chunk):
            raise QueueError(
                f"chunk {item.chunk_name(chunk)} is not a task of the job; use a queue that only "
                "chunkq writes to",
                code=ErrorCode.TASK_INVALID,
            )
        framework_rule.check(item.job.record.job.model)  # again before the network is loaded
        with item.job.check_replaced_on_error():
            try:
                if item.job.record.job.is_image:
                    from chunkq_worker.images.compute import compute_rows  # for such jobs only

                    return compute_rows(item, chunk, attempt)
                return _compute(item, item.plan.chunk(chunk), attempt)
            except ChunkReadError as error:
                if not forget_incomplete(item):
                    raise
                raise GateClosedError(
                    f"{without_secret(item.job.folder.output)}: the staged copy of an input is "
                    f"incomplete, so chunk {item.chunk_name(chunk)} waits until the input is "
                    "staged again; run `chunkq produce --resume` with the job"
                ) from error


def _compute(item: ItemHandle, chunk: Chunk, attempt: Attempt) -> bool:
    """Compute and commit one chunk; return whether the network ran."""
    job, ledger = item.job, item.ledger
    started = time.time()
    bytes_moved: dict[str, int] = {}
    checksums: dict[str, int] = {}
    halos = item.read_halos(chunk)
    selection = item.skip_rules.select(item.plan, chunk, halos)
    seconds = {"read": time.time() - started}
    bytes_moved["input"] = _bytes_read(item, chunk)
    computed = None
    if selection.run:
        computed = get_device().compute(item, chunk, halos, selection)
        seconds |= computed.seconds
    del halos
    write_started = time.time()
    if ledger.is_committed("infer", chunk.index):
        return True  # another worker committed it first; the output may be sealed
    item.check_inputs()
    job.check_unchanged()
    stored = _write_results(item, chunk, computed, bytes_moved, checksums)
    seconds["write"] = time.time() - write_started
    if ledger.is_committed("infer", chunk.index):
        # Another worker also had this chunk and committed it first; its blocks may be final.
        _delete_late_pieces(item, chunk)
        return True
    job.check_unchanged()
    fetched = FETCHES.take(has_storage_chunks=any(s.storage for s in job.record.sources))
    bytes_moved["fetched"] = fetched.bytes
    ledger.commit(
        Commit(
            kind="infer",
            item=item.number,
            chunk=chunk.index,
            attempt=attempt.number,
            worker=attempt.worker,
            started=started,
            finished=time.time(),
            seconds=seconds,
            moved=bytes_moved,
            checksums=checksums,
            patches=len(selection.run),
            requests=fetched.requests,
            peak_rss=peak_bytes(),
            skipped=selection.skipped,
            empty=computed is None,
            stored=encode_checksums(stored),
        )
    )
    return computed is not None


def _write_results(
    item: ItemHandle,
    chunk: Chunk,
    computed: ComputedChunk | None,
    bytes_moved: dict[str, int],
    checksums: dict[str, int],
) -> list[int]:
    """Write the voxels and pieces of a chunk; an empty one, None, has neither.

    Return the checksums of the objects with its voxels.
    """
    if computed is None:
        bytes_moved |= {"output": 0, "pieces": 0}
        return []
    arrays: dict[tuple[Index, str], list[npt.NDArray[Any]]] = {}
    if chunk.has_band:
        arrays[chunk.index, OWN_PIECE] = []
    for piece in item.plan.outgoing_pieces(chunk):
        arrays[piece.target, piece.name] = []
    bytes_moved["output"], stored = 0, list[int]()
    for output, result in zip(item.outputs, computed.contributions, strict=True):
        stored += output.write(output.plan.chunk(chunk.index).core, result.core)
        bytes_moved["output"] += result.core.nbytes
        if (own := result.own_block) is not None:
            arrays[chunk.index, OWN_PIECE] += [*own.band, *own.rest]
        for piece, sums in result.pieces:
            arrays[piece.target, piece.name].append(sums)
    bytes_moved["pieces"] = 0
    for (target, name), parts in arrays.items():
        info = item.ledger.put_piece(target, name, parts)
        bytes_moved["pieces"] += info.size
        checksums[name] = info.crc32
    return stored


def _delete_late_pieces(item: ItemHandle, chunk: Chunk) -> None:
    """Delete the chunk's pieces for blocks that are final and do not read them."""
    targets = [chunk.index, *(piece.target for piece in item.plan.outgoing_pieces(chunk))]
    for target in targets:
        if item.ledger.is_committed("finalize", target):
            item.ledger.delete_pieces(target)


def _bytes_read(item: ItemHandle, chunk: Chunk) -> int:
    """Return the bytes read from storage: those of the halo inside the volume, without padding."""
    windows = zip(item.plan.axes, chunk.halo.start, chunk.halo.stop, strict=True)
    voxels = prod(axis.voxels_read(start, stop) for axis, start, stop in windows)
    return voxels * item.plan.volume.voxel_bytes
