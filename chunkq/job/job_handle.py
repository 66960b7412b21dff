"""Per-process cache of open jobs: folder, items, plans and arrays."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy.typing as npt

from chunkq.errors import ChunkReadError, ErrorCode, MissingJobError, QueueError, StoreError
from chunkq.geometry.box import Box
from chunkq.job.items import Image, Item
from chunkq.job.job_folder import JobFolder
from chunkq.job.ledger import ItemLedger, Ledger
from chunkq.job.output import Output
from chunkq.job.record import JobRecord
from chunkq.job.task_records import RecentCommits
from chunkq.job.tasks import JobId, Task, chunk_name
from chunkq.paths import without_secret
from chunkq.plan.plan import Chunk, Costs, Index, Plan, total_costs
from chunkq.storage.array import Array
from chunkq.storage.padded_reading import read_padded

JOBS_CACHED = 8


@dataclass(frozen=True)
class JobHandle:
    """The folder, record and items of a job."""

    folder: JobFolder
    record: JobRecord

    @property
    def id(self) -> JobId:
        """Path of the folder, and epoch: what queues know the job by."""
        return JobId(self.folder.path, self.record.epoch)

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger of the job's epoch."""
        return self.folder.ledger(self.record.epoch)

    @cached_property
    def output(self) -> Output:
        """The output store."""
        return Output(self.folder.output, self.record)

    @cached_property
    def items(self) -> tuple[ItemHandle, ...]:
        """The items of the job."""
        return tuple(ItemHandle(self, item) for item in self.record.items)

    @cached_property
    def costs(self) -> Costs:
        """The costs of all items."""
        return total_costs(item.plan for item in self.items)

    def item(self, number: int) -> ItemHandle:
        """Return an item. Raises QueueError if a task names one that the job does not have."""
        if number >= len(self.items):
            raise QueueError(
                f"{without_secret(self.folder.output)}: a task of item {number}, but the job has "
                f"{len(self.items)}; use a queue that only chunkq writes to",
                code=ErrorCode.TASK_INVALID,
            )
        return self.items[number]

    def chunk_name(self, item: int, chunk: Index) -> str:
        """Return the name of a chunk for messages: `0.3.1`, with several items `ITEM/0.3.1`."""
        name = chunk_name(chunk)
        return name if len(self.record.items) == 1 else f"{item}/{name}"

    def recent_commits(self, kind: str, count: int) -> RecentCommits:
        """Count the finished tasks of a kind, and return the newest `count` records of a sample."""
        recent = [item.ledger.recent_commits(kind, count) for item in self.items]
        return RecentCommits.merged(recent, count)

    def check_unchanged(self) -> None:
        """Raise MissingJobError if the job folder was deleted or belongs to another job."""
        record = self.folder.read_record()
        if record is None or record.epoch != self.record.epoch:
            raise MissingJobError(
                f"{without_secret(self.folder.output)}: the job was deleted or replaced while it "
                "ran; its results are discarded",
                code=ErrorCode.JOB_REPLACED,
            )

    @contextmanager
    def check_replaced_on_error(self) -> Iterator[None]:
        """Raise MissingJobError instead of any other error if the job was replaced."""
        try:
            yield
        except Exception:
            self.check_unchanged()
            raise

    @cached_property
    def images(self) -> tuple[ImageHandle, ...]:
        """The images of the job."""
        return tuple(ImageHandle(self, image) for image in self.record.images)

    def check_inputs(self) -> None:
        """Raise ChunkReadError if an input was replaced. See `ImageHandle`."""
        for image in self.images:
            image.check_inputs()


@dataclass(frozen=True)
class ImageHandle:
    """One image of an open job. Its arrays are opened on first use and serve all its items."""

    job: JobHandle
    image: Image

    @cached_property
    def sources(self) -> tuple[Array, ...]:
        """All of each input array. Raises ChunkReadError if one was replaced."""
        self.check_inputs()
        try:
            record = self.job.record
            is_repeated = any(fetches.are_repeated for fetches in record.fetches(self.image))
            return self.image.open(cached=is_repeated)
        except StoreError as error:
            raise ChunkReadError(str(error), code=ErrorCode.INPUT_MISSING) from error

    @cached_property
    def target(self) -> Array:
        """The output array for writing. Raises MissingJobError if the job was replaced."""
        self.job.check_unchanged()
        return self.job.output.image(self.image).open()

    def check_inputs(self) -> None:
        """Raise ChunkReadError if an input is missing or was replaced since the job was produced.

        Compares metadata (`ImageSource.identity`), so it does not detect changed voxels.
        """
        identities = self.job.record.identities[self.image.number]
        for source, identity in zip(self.image.sources, identities, strict=True):
            path = without_secret(source.path)
            current = source.identity()
            if current is None:
                raise ChunkReadError(
                    f"input: {path} is missing; restore it", code=ErrorCode.INPUT_MISSING
                )
            if current != identity:
                raise ChunkReadError(
                    f"input: {path} was replaced since the job was produced; restore it, or use "
                    "--overwrite to start again",
                    code=ErrorCode.INPUT_CHANGED,
                )


@dataclass(frozen=True)
class ItemHandle:
    """One item of an open job. Its plan and its arrays are made on first use."""

    job: JobHandle
    item: Item

    @property
    def number(self) -> int:
        """Number of the item in its job."""
        return self.item.number

    def task(self, kind: str, chunk: Index) -> Task:
        """Return a task of the item."""
        return Task(kind, self.job.folder.path, self.job.record.epoch, self.number, chunk)

    def chunk_name(self, chunk: Index) -> str:
        """Return the name of a chunk for messages."""
        return self.job.chunk_name(self.number, chunk)

    @cached_property
    def plan(self) -> Plan:
        """The geometry of the item."""
        return self.job.record.plan(self.item)

    @cached_property
    def ledger(self) -> ItemLedger:
        """The commit records and pieces of the item."""
        return self.job.ledger.item(self.number)

    @property
    def image(self) -> ImageHandle:
        """The image to which the item belongs."""
        return self.job.images[self.item.image.number]

    @cached_property
    def sources(self) -> tuple[Array, ...]:
        """Views ([C,] *S) of the input arrays. Raises ChunkReadError if one was replaced."""
        return self.item.present(self.image.sources)

    def check_inputs(self) -> None:
        """Raise ChunkReadError if an input of the image was replaced. See `ImageHandle`."""
        self.image.check_inputs()

    def read_halos(self, chunk: Chunk) -> tuple[npt.NDArray[Any], ...]:
        """Read the padded region of each input that a chunk's patches cover.

        Each array has the shape ([C,] *chunk.halo.shape) and the dtype of its input.
        """
        job = self.job.record.job
        return tuple(
            read_padded(source, chunk.halo, job.pad_mode, job.pad_value) for source in self.sources
        )

    def write(self, box: Box, values: npt.NDArray[Any]) -> int:
        """Write the final voxels of whole storage chunks; return their size (bytes).

        `values` has the shape ([C,] *box.shape).
        """
        if not box.size:
            return 0
        point, inner = self.item.point, self.plan.output_box(box)
        outer = Box((*point, *inner.start), (*(n + 1 for n in point), *inner.stop))
        self.image.target.write(outer, values.reshape(outer.shape))
        return values.nbytes


_cache: OrderedDict[str, JobHandle] = OrderedDict()
_lock = threading.Lock()


def open_job(path: str) -> JobHandle:
    """Return the handle of a job folder; cached per process until the job's epoch changes.

    Raises MissingJobError if there is no job.
    """
    folder = JobFolder(path)
    record = folder.require_record()
    with _lock:
        handle = _cache.get(path)
        if handle is None or handle.record.epoch != record.epoch:
            handle = _cache[path] = JobHandle(folder, record)
        _cache.move_to_end(path)
        while len(_cache) > JOBS_CACHED:
            _cache.popitem(last=False)
        return handle
