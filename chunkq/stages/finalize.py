"""The stage that finalizes blocks: add up the pieces of a block and write its voxels."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt
from typing_extensions import override

from chunkq.errors import PieceError
from chunkq.job.job_handle import ItemHandle
from chunkq.job.object_checksums import encode_checksums
from chunkq.job.task_records import Commit
from chunkq.plan.chunk import Chunk, Index, Piece
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
        for output in item.outputs:
            for box in output.plan.chunk(chunk).touched_boxes:
                yield from output.object_names(box)

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
        contents, bytes_read = _gather(item, chunk)
        read_end = time.time()
        item.job.check_unchanged()
        bytes_written, checksums = (0, []) if contents is None else _write(item, index, contents)
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


@dataclass(frozen=True)
class _Contents:
    """What the contributors of a block have stored of one output; see `finalize_sums`."""

    own_block: OwnBlock | None
    pieces: dict[Piece, Any]


def _write(item: ItemHandle, index: Index, contents: Sequence[_Contents]) -> tuple[int, list[int]]:
    """Add up the pieces of a block and write its voxels.

    `contents` has one entry per output. Return the size of the voxels (bytes), and the checksums of
    their objects.
    """
    # Imported here, because commands that only count blocks do no arithmetic.
    from chunkq.blend.sums import finalize_sums

    size, checksums = 0, list[int]()
    for output, stored in zip(item.outputs, contents, strict=True):
        chunk = output.plan.chunk(index)
        inside = output.inside(chunk.block) if chunk.has_band else None
        finished = finalize_sums(
            output.plan, chunk, stored.own_block, stored.pieces, output.empty_chunks, inside
        )
        for box, values in finished:
            checksums += output.write(box, values)
            size += values.nbytes
    return size, checksums


def _gather(item: ItemHandle, chunk: Chunk) -> tuple[list[_Contents] | None, int]:
    """Read the pieces of a block; return the contents of each output, and their size (bytes).

    The contents are None if all contributors are empty. The pieces of empty chunks are None.

    Raises PieceError if some are missing or damaged, after deleting the commit records of the
    chunks that wrote them.
    """
    ledger, total = item.ledger, 0
    stored: dict[Index, list[npt.NDArray[Any]]] = {}
    problems: dict[Index, PieceError] = {}
    names = {chunk.index: OWN_PIECE}
    names |= {piece.source: piece.name for piece in item.plan.incoming_pieces(chunk)}
    for source, name in names.items():
        if not item.tasks.is_task(source):
            continue
        try:
            stored[source], size = ledger.get_piece(chunk.index, name)
            total += size
        except PieceError as error:
            problems[source] = error
    if problems and item.can_turn_out_empty:
        for commit in ledger.commits("infer", problems):
            if commit.empty:
                del problems[commit.chunk]
    if problems:
        if not ledger.is_committed("finalize", chunk.index):
            ledger.delete_commits("infer", problems)
        lost = ", ".join(item.chunk_name(index) for index in problems)
        raise PieceError(
            f"{next(iter(problems.values()))}; chunk {lost} must be computed again",
            tuple(problems),
        )
    return (_contents(item, chunk.index, stored) if stored else None), total


def _contents(
    item: ItemHandle, index: Index, stored: dict[Index, list[npt.NDArray[Any]]]
) -> list[_Contents]:
    """Return the contents of each output; `stored` has the arrays of each contributor."""
    from chunkq.blend.sums import OwnBlock

    arrays = {source: iter(parts) for source, parts in stored.items()}
    contents = []
    for output in item.outputs:
        plan = output.plan
        chunk, own_block = plan.chunk(index), None
        if index in arrays and chunk.has_band:
            bands = tuple(islice(arrays[index], len(chunk.band_boxes)))
            own_block = OwnBlock(bands, tuple(islice(arrays[index], len(chunk.rest_boxes))))
        pieces = {
            piece: next(arrays[piece.source]) if piece.source in arrays else None
            for piece in plan.incoming_pieces(chunk)
        }
        contents.append(_Contents(own_block, pieces))
    return contents
