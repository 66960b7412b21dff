"""The stage that finalizes blocks: add up the pieces of a block and write its voxels."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from chunkq.errors import PieceError
from chunkq.job.job_handle import ItemHandle
from chunkq.job.object_checksums import encode_checksums
from chunkq.job.task_records import Commit
from chunkq.plan.plan import Chunk, Index, Piece
from chunkq.queue.contract.executor import Attempt
from chunkq.stages.base import Stage, TaskKey
from chunkq.system.memory import peak_bytes

if TYPE_CHECKING:
    from chunkq.blend.sums import OwnBlock

OWN_PIECE = "own"
"""Name of the piece that a chunk stores for its own block."""


class FinalizeStage(Stage):
    """The blocks to which several chunks contribute. Each waits for its contributors."""

    kind: ClassVar[str] = "finalize"

    @override
    def chunks(self, item: ItemHandle) -> Iterator[Index]:
        return item.tasks.blocks()

    @override
    def count(self, item: ItemHandle) -> int:
        return item.tasks.costs.finalized_blocks

    @override
    def waits_for(self, item: ItemHandle, chunk: Index) -> Sequence[TaskKey]:
        return [TaskKey("infer", index) for index in item.tasks.contributors(chunk)]

    @override
    def awaiting(self, item: ItemHandle, committed: TaskKey) -> Sequence[Index]:
        if committed.kind != "infer":
            return ()
        plan, index = item.plan, committed.chunk
        targets = (piece.target for piece in plan.outgoing_pieces(plan.chunk(index)))
        return [block for block in (index, *targets) if plan.has_band(block)]

    @override
    def stored_objects(self, item: ItemHandle, chunk: Index) -> Iterator[str]:
        for box in item.plan.chunk(chunk).touched_boxes:
            yield from item.object_names(box)

    @override
    def run(self, item: ItemHandle, chunk: Index, attempt: Attempt) -> bool:
        """Add up the pieces of a block, write its voxels, commit it and delete the pieces.

        Raises PieceError if pieces are missing or damaged; this deletes the commit records of
        their chunks, which must be computed again. Raises MissingJobError if the job was replaced.
        """
        with item.job.check_replaced_on_error():
            _finalize(item, chunk, attempt)
        return False


def _finalize(item: ItemHandle, index: Index, attempt: Attempt) -> None:
    started = time.time()
    chunk = item.plan.chunk(index)
    try:
        own_block, pieces, bytes_read = _gather(item, chunk)
        read_end = time.time()
        item.job.check_unchanged()
        is_empty = own_block is None and not any(sums is not None for sums in pieces.values())
        bytes_written, checksums = (0, []) if is_empty else _write(item, chunk, own_block, pieces)
        finished = time.time()
        item.job.check_unchanged()
    except (PieceError, OSError):
        # Another finalizer may have completed the block and deleted its pieces.
        if item.ledger.is_committed("finalize", index):
            return
        raise
    item.ledger.commit(
        Commit(
            kind="finalize",
            item=item.number,
            chunk=index,
            attempt=attempt.number,
            worker=attempt.worker,
            started=started,
            finished=finished,
            seconds={"read": read_end - started, "write": finished - read_end},
            moved={"pieces_read": bytes_read, "output": bytes_written},
            peak_rss=peak_bytes(),
            stored=encode_checksums(checksums),
        )
    )
    item.ledger.delete_pieces(index)


def _write(
    item: ItemHandle, chunk: Chunk, own_block: OwnBlock | None, pieces: dict[Piece, Any]
) -> tuple[int, list[int]]:
    """Add up the pieces of a block and write its voxels.

    Return their size (bytes), and the checksums of their objects.
    """
    # Imported here, because commands that only count blocks do no arithmetic.
    from chunkq.blend.sums import finalize_sums

    inside = item.inside(chunk.block)
    finished = finalize_sums(item.plan, chunk, own_block, pieces, item.empty_chunks, inside)
    size, checksums = 0, list[int]()
    for box, values in finished:
        checksums += item.write(box, values)
        size += values.nbytes
    return size, checksums


def _gather(item: ItemHandle, chunk: Chunk) -> tuple[OwnBlock | None, dict[Piece, Any], int]:
    """Read the pieces of a block; return its own piece, the others, and their size (bytes).

    The pieces of empty chunks are None.

    Raises PieceError if some are missing or damaged, after deleting the commit records of the
    chunks that wrote them.
    """
    from chunkq.blend.sums import OwnBlock

    ledger, total, own_block = item.ledger, 0, None
    pieces: dict[Piece, Any] = {}
    problems: dict[Index, PieceError] = {}
    if item.tasks.is_task(chunk.index):
        try:
            arrays, total = ledger.get_piece(chunk.index, OWN_PIECE)
            bands = len(chunk.band_boxes)
            own_block = OwnBlock(tuple(arrays[:bands]), tuple(arrays[bands:]))
        except PieceError as error:
            problems[chunk.index] = error
    for piece in item.plan.incoming_pieces(chunk):
        pieces[piece] = None
        if not item.tasks.is_task(piece.source):
            continue
        try:
            arrays, size = ledger.get_piece(chunk.index, piece.name)
            pieces[piece], total = arrays[0], total + size
        except PieceError as error:
            problems[piece.source] = error
    if problems and item.can_turn_out_empty:
        for commit in ledger.commits("infer", problems):
            if commit.empty:
                del problems[commit.chunk]
    if problems:
        if not ledger.is_committed("finalize", chunk.index):
            ledger.delete_commits("infer", problems)
        names = ", ".join(item.chunk_name(index) for index in problems)
        raise PieceError(
            f"{next(iter(problems.values()))}; chunk {names} must be computed again",
            tuple(problems),
        )
    return own_block, pieces, total
