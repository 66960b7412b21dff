"""The stage that stages inputs: copy a file that cannot be read by region to Zarr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from chunkq.errors import ChunkReadError, ErrorCode, QueueError, StoreError
from chunkq.job.job_handle import ImageHandle, ItemHandle
from chunkq.job.ledger import STAGED
from chunkq.job.task_records import Commit
from chunkq.job.tasks import Task
from chunkq.plan.chunk import Index
from chunkq.queue.contract.executor import Attempt
from chunkq.stages.base import Stage
from chunkq.storage.array import Array
from chunkq.storage.images import ImageSource
from chunkq.system.memory import peak_bytes

if TYPE_CHECKING:
    from chunkq.storage.staged import StagedCopy

SLAB_SECONDS = 600.0
"""Longest time (s) between two slabs of a task that is not over its time limit."""
_last_slab: dict[Task, float] = {}
"""Task -> when it has written its last slab (s, monotonic)."""


class IngestStage(Stage):
    """One task per file that cannot be read by region.

    The tasks of an image are those of its first item; the chunk is the number of the source.
    """

    kind: ClassVar[str] = STAGED
    is_queued: ClassVar[bool] = True
    is_temporary: ClassVar[bool] = True

    @override
    def chunks(self, item: ItemHandle) -> Iterator[Index]:
        if not any(item.item.point):
            for number, source in enumerate(item.item.image.sources):
                if source.staged:
                    yield (number,)

    @override
    def count(self, item: ItemHandle) -> int:
        return sum(1 for _ in self.chunks(item))

    @override
    def run(self, item: ItemHandle, chunk: Index, attempt: Attempt) -> bool:
        """Copy a source slab by slab, and commit it.

        Slabs that an earlier attempt has written are read again but not written, as far as the file
        can be read from its start only. Raises QueueError if the job has no such task, and
        ChunkReadError if the file is missing, damaged or replaced.
        """
        if chunk not in self.chunks(item):
            raise QueueError(
                f"ingest {item.chunk_name(chunk)} is not a task of the job; use a queue that only "
                "chunkq writes to",
                code=ErrorCode.TASK_INVALID,
            )
        with item.job.check_replaced_on_error():
            _ingest(item, chunk, attempt)
        return False


def _ingest(item: ItemHandle, chunk: Index, attempt: Attempt) -> None:
    started, job, image = time.time(), item.job, item.image
    source, copy = image.image.sources[chunk[0]], image.staged_copy(chunk[0])
    if copy is None:
        return
    bytes_written = 0
    job.check_unchanged()
    item.check_inputs()
    copy.create()
    array, target = _opened(source), copy.open(write=True)
    first = copy.slabs_written()
    boxes = list(copy.slabs.boxes(first))
    for number, voxels in enumerate(array.read_in_order(boxes)):
        job.check_unchanged()
        item.check_inputs()
        target.write(boxes[number], voxels)
        copy.record_slabs(first + number + 1)
        _last_slab[item.task(STAGED, chunk)] = time.monotonic()
        bytes_written += voxels.nbytes
    job.check_unchanged()
    item.check_inputs()
    finished = time.time()
    item.ledger.commit(
        Commit(
            kind=STAGED,
            item=item.number,
            chunk=chunk,
            attempt=attempt.number,
            worker=attempt.worker,
            started=started,
            finished=finished,
            seconds={"copy": finished - started},
            moved={"staged": bytes_written},
            peak_rss=peak_bytes(),
        )
    )


def _opened(source: ImageSource) -> Array:
    """Open a source itself. Raises ChunkReadError."""
    try:
        return source.open()
    except StoreError as error:
        raise ChunkReadError(str(error), code=ErrorCode.INPUT_MISSING) from error


def is_advancing(task: Task) -> bool:
    """Return whether a task of this process has written a slab within `SLAB_SECONDS`.

    A large file takes longer than any other task.
    """
    last = _last_slab.get(task) if task.kind == STAGED else None
    return last is not None and time.monotonic() - last < SLAB_SECONDS


def copies(image: ImageHandle) -> Iterator[tuple[Index, StagedCopy]]:
    """Yield the copies of an image's sources, each with the chunk of its task."""
    for number in range(len(image.image.sources)):
        if (copy := image.staged_copy(number)) is not None:
            yield (number,), copy


def forget_incomplete(item: ItemHandle) -> bool:
    """Make the tasks of the image's incomplete copies run again; return whether there are any."""
    incomplete = [(chunk, copy) for chunk, copy in copies(item.image) if not copy.is_complete()]
    owner = next(other for other in item.job.items if other.item.image == item.item.image)
    for chunk, copy in incomplete:
        copy.forget_slabs()
        owner.ledger.delete_commits(STAGED, [chunk])
    return bool(incomplete)
