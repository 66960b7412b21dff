"""The stage that makes pyramids: write the levels of each output above level 0."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from typing_extensions import override

from chunkq.errors import ChunkqError, ErrorCode, QueueError
from chunkq.job.job_handle import ItemHandle
from chunkq.job.object_checksums import encode_checksums
from chunkq.job.task_records import Commit
from chunkq.plan.chunk import Index
from chunkq.queue.contract.executor import Attempt
from chunkq.stages.base import Stage, TaskKey
from chunkq.system import buffers
from chunkq.system.memory import peak_bytes

PART_BYTES = 16 << 20
"""Bytes of voxels that are read or written at a time, unless one storage unit has more."""


class DownsampleStage(Stage):
    """The units of the levels above level 0: [output, level, *unit].

    A unit of level 1 waits for the blocks that it is made of, and one of a higher level for units
    of the level below.
    """

    kind: ClassVar[str] = "downsample"
    label: ClassVar[str] = "writing levels"
    is_layered: ClassVar[bool] = True

    @override
    def chunks(self, item: ItemHandle) -> Iterator[Index]:
        for output, pyramid in enumerate(item.pyramids):
            for level in range(1, len(pyramid.levels) + 1):
                for unit in pyramid.units(level):
                    yield (output, level, *unit)

    @override
    def count(self, item: ItemHandle) -> int:
        return sum(costs.tasks for pyramid in item.pyramids for costs in pyramid.costs)

    @override
    def waits_for(self, item: ItemHandle, chunk: Index) -> Sequence[TaskKey]:
        output, level, *rest = chunk
        unit, pyramid = tuple(rest), item.pyramids[output]
        if level == 1:
            keys = (_writer(item, block) for block in pyramid.blocks_below(unit))
            return [key for key in keys if key is not None]
        below = pyramid.units_below(level, unit)
        return [TaskKey(self.kind, (output, level - 1, *index)) for index in below]

    @override
    def awaiting(self, item: ItemHandle, committed: TaskKey) -> Sequence[Index]:
        if not item.pyramids:
            return ()
        if committed.kind == self.kind:
            output, level, *rest = committed.chunk
            above = item.pyramids[output].units_above(level, tuple(rest))
            return [(output, level + 1, *unit) for unit in above]
        if committed != _writer(item, committed.chunk):
            return ()
        return [
            (output, 1, *unit)
            for output, pyramid in enumerate(item.pyramids)
            for unit in pyramid.units_above_block(committed.chunk)
        ]

    @override
    def needs_again(self, item: ItemHandle, chunk: Index) -> Sequence[TaskKey]:
        return ()  # what it reads is part of the output

    @override
    def stored_objects(self, item: ItemHandle, chunk: Index) -> Iterator[str]:
        output, number, *unit = chunk
        level = item.pyramids[output].levels[number - 1]
        yield from item.level_object_names(output, number, level.box(unit))

    @override
    def run(self, item: ItemHandle, chunk: Index, attempt: Attempt) -> bool:
        """Write a unit of a level from the level below, and commit it.

        Raises QueueError if the job has no such unit, ChunkReadError if the level below cannot be
        read, and MissingJobError if the job was replaced.
        """
        if len(chunk) < 3 or not _has_unit(item, chunk):
            raise QueueError(
                f"{self.kind} {item.chunk_name(chunk)} is not a task of the job; use a queue that "
                "only chunkq writes to",
                code=ErrorCode.TASK_INVALID,
            )
        with item.job.check_replaced_on_error():
            try:
                _downsample(item, chunk, attempt)
            except (ChunkqError, OSError):
                # Another worker may have written the unit, and the output may be sealed.
                if not item.ledger.is_committed(self.kind, chunk):
                    raise
        return False


def _has_unit(item: ItemHandle, chunk: Index) -> bool:
    output, level, *unit = chunk
    return output < len(item.pyramids) and item.pyramids[output].has_unit(level, tuple(unit))


def _writer(item: ItemHandle, block: Index) -> TaskKey | None:
    """Return the task after which the voxels of a block are final; None if none writes it."""
    if item.plan.has_band(block) and item.tasks.contributors(block):
        return TaskKey("finalize", block)
    return TaskKey("infer", block) if item.tasks.is_task(block) else None


def _downsample(item: ItemHandle, chunk: Index, attempt: Attempt) -> None:
    # Imported here, because commands that only count tasks do no arithmetic.
    from chunkq.blend.downsampling import downsample

    output, number, *unit = chunk
    level, method = item.pyramids[output].levels[number - 1], item.pyramids[output].method
    started = time.time()
    source, target = item.level(output, number - 1), item.level(output, number)
    seconds = dict.fromkeys(("read", "compute", "write"), 0.0)
    moved = dict.fromkeys(("level_below", "level"), 0)
    is_checked, checksums = False, list[int]()
    for channels in source.channels:
        together = 1 if channels is None else len(channels)
        most = PART_BYTES // (target.dtype.itemsize * together)
        for box in level.writes(unit, most):
            values = buffers.zeros(target.shape_of(box, channels), target.dtype)
            for part in level.parts(box, source.chunk, most):
                read_started = time.time()
                below = source.read(level.source(part), channels)
                read_end = time.time()
                where: Any = (..., *part.slices(box.start))
                values[where] = downsample(below, level.factors, method)
                seconds["read"] += read_end - read_started
                seconds["compute"] += time.time() - read_end
                moved["level_below"] += below.nbytes
            write_started = time.time()
            if not is_checked:
                if item.ledger.is_committed(DownsampleStage.kind, chunk):
                    return  # another worker committed it first; the output may be sealed
                item.job.check_unchanged()
                is_checked = True
            checksums += target.store(box, values, channels)
            seconds["write"] += time.time() - write_started
            moved["level"] += values.nbytes
    item.job.check_unchanged()
    item.ledger.commit(
        Commit(
            kind=DownsampleStage.kind,
            item=item.number,
            chunk=chunk,
            attempt=attempt.number,
            worker=attempt.worker,
            started=started,
            finished=time.time(),
            seconds=seconds,
            moved=moved,
            peak_rss=peak_bytes(),
            stored=encode_checksums(checksums),
        )
    )
