"""Per-process cache of open jobs: folder, items, plans and arrays."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chunkq.errors import (
    ChunkReadError,
    ErrorCode,
    JobError,
    MissingJobError,
    PieceError,
    QueueError,
    StoreError,
)
from chunkq.geometry.box import Box
from chunkq.job.allowed_paths import with_allowed_files
from chunkq.job.items import Image, Item
from chunkq.job.job_folder import JobFolder
from chunkq.job.ledger import ItemLedger, Ledger
from chunkq.job.output_handle import OutputHandle
from chunkq.job.pyramids import pyramids_of
from chunkq.job.record import JobRecord
from chunkq.job.task_records import RecentCommits
from chunkq.job.tasks import JobId, Task, chunk_name
from chunkq.paths import without_secret
from chunkq.plan.chunk import Chunk, Index
from chunkq.plan.costs import Costs, total_costs
from chunkq.plan.item_tasks import ItemTasks
from chunkq.plan.plan import Plan
from chunkq.plan.pyramid import Pyramid
from chunkq.storage.array import Array
from chunkq.storage.images import ImageSource

if TYPE_CHECKING:
    from chunkq.blend.weights import Weights
    from chunkq.job.known_empty import KnownEmpty
    from chunkq.job.level_arrays import Channels, LevelArray
    from chunkq.job.output import Output
    from chunkq.job.stored_rows import StoredRows
    from chunkq.plan.patch_selection import SkipRules
    from chunkq.storage.formats.zarr_writing import WritableArray
    from chunkq.storage.mask import Mask
    from chunkq.storage.staged import StagedCopy

JOBS_CACHED = 8
MASKS_KEPT = 2
"""Masks of time points that a process keeps."""


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
        if self.record.job.is_image:
            from chunkq.job.table_output import TableOutput  # for such jobs only

            return TableOutput(self.record, self.ledger)
        if self.record.file_name is not None:
            from chunkq.job.exported_output import ExportedOutput

            return ExportedOutput(self.record, self.ledger)
        from chunkq.job.output import Output  # the status of a running job does without

        return Output(self.folder.output, self.record)

    @cached_property
    def items(self) -> tuple[ItemHandle, ...]:
        """The items of the job."""
        return tuple(ItemHandle(self, item) for item in self.record.items)

    @cached_property
    def costs(self) -> Costs:
        """The costs of all items, without chunks that are known to be empty."""
        return total_costs(item.tasks for item in self.items)

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
            reason = (
                "the job was deleted while it ran, or this machine no longer sees its folder"
                if record is None
                else "the job was replaced while it ran"
            )
            raise MissingJobError(
                f"{without_secret(self.folder.output)}: {reason}; its results are discarded",
                code=ErrorCode.JOB_REPLACED,
            )

    def blend_weights(self, plan: Plan) -> Weights:
        """Return the blend weights of a plan. Raises JobError. See `ItemHandle.empty_chunks`."""
        from chunkq.job.user_code import load_blend_weights  # only where weights are needed

        accepted = with_allowed_files(self.record.job, self.folder.path)
        if "weight_function" in replace(self.record, job=accepted).changed_files():
            raise JobError(
                f"weight_function: {accepted.weight_function[0]} has changed since the job was "
                "produced; restore it, or produce the job again with --overwrite"
            )
        return load_blend_weights(accepted.weight_function, plan)

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

    def sees_inputs(self) -> bool:
        """Return whether at least one input exists, as seen from this machine."""
        return any(
            source.identity() is not None for image in self.images for source in image.image.sources
        )

    @cached_property
    def rows(self) -> StoredRows:
        """The images of a job over images."""
        from chunkq.job.stored_rows import StoredRows  # for such jobs only

        return StoredRows(self.ledger)

    @cached_property
    def mask(self) -> Array:
        """The array of the mask, of a job that has one. Raises ChunkReadError if it changed."""
        source = self.record.mask
        if source is None:
            raise ValueError("the job has no mask")
        self.check_mask()
        try:
            return source.open()
        except StoreError as error:
            raise ChunkReadError(str(error), code=ErrorCode.INPUT_MISSING) from error

    def check_inputs(self) -> None:
        """Raise ChunkReadError if an input or the mask was replaced. See `ImageHandle`."""
        for image in self.images:
            image.check_inputs()

    def check_mask(self) -> None:
        """Raise ChunkReadError if the mask is missing or was replaced, judged by its metadata."""
        if self.record.mask is not None:
            _check_source(self.record.mask, self.record.mask_identity, "mask")


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
            return tuple(
                source.open(cached=is_repeated)
                if (copy := self.staged_copy(number)) is None
                else copy.open(cached=is_repeated)
                for number, source in enumerate(self.image.sources)
            )
        except StoreError as error:
            raise ChunkReadError(str(error), code=ErrorCode.INPUT_MISSING) from error

    def staged_copy(self, number: int) -> StagedCopy | None:
        """Return the copy of a source that is read in its place, or None if it is read itself."""
        source = self.image.sources[number]
        if not source.staged:
            return None
        from chunkq.storage.staged import Slabs, StagedCopy  # for jobs that need copies

        slabs = Slabs.of(source.stored_axes, np.dtype(source.dtype).itemsize)
        # Either an image is alone, or it has one source.
        name = str(self.image.number + number)
        return StagedCopy(self.job.ledger.staged, name, slabs, source.dtype)

    @cached_property
    def targets(self) -> tuple[WritableArray, ...]:
        """The array of each output for writing. Raises MissingJobError if the job was replaced."""
        self.job.check_unchanged()
        return tuple(output.open() for output in self.job.output.images_of(self.image))

    def level(self, output: int, number: int) -> WritableArray:
        """Return the array of a level of an output, to read and write. Raises as `targets`."""
        key = output, number
        if key not in self._levels:
            self.job.check_unchanged()
            image = self.job.output.image(self.image, output)
            self._levels[key] = image.open(number) if number else self.targets[output]
        return self._levels[key]

    @cached_property
    def _levels(self) -> dict[tuple[int, int], WritableArray]:
        return {}

    def check_inputs(self) -> None:
        """Raise ChunkReadError if an input is missing or was replaced since the job was produced.

        Compares metadata (`ImageSource.identity`), so it does not detect changed voxels.
        """
        identities = self.job.record.identities[self.image.number]
        for source, identity in zip(self.image.sources, identities, strict=True):
            _check_source(source, identity, "input")
        self.job.check_mask()

    def mask(self, item: Item) -> Mask:
        """Return the mask of an item; those of the last time points are kept."""
        source, config = self.job.record.mask, self.job.record.job.mask
        if source is None or config is None:
            raise ValueError("the job has no mask")
        from chunkq.job.mask_source import mask_of, mask_time  # for such jobs only

        image, (number, _) = self.image.sources[0], item.series_point
        time, array = mask_time(source, image, number), self.job.mask
        with _lock:
            mask = self._masks.get(time)
            if mask is None:
                mask = self._masks[time] = mask_of(source, array, image, number, config)
            while len(self._masks) > MASKS_KEPT:
                self._masks.popitem(last=False)
        return mask

    @cached_property
    def _masks(self) -> OrderedDict[int, Mask]:
        return OrderedDict()


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
    def tasks(self) -> ItemTasks:
        """The chunks and blocks of the item that are tasks."""
        known = self.known_empty
        return ItemTasks(self.plan, None if known is None else known.counts)

    @cached_property
    def pyramids(self) -> tuple[Pyramid, ...]:
        """The pyramid of each output; empty if the job has none."""
        return pyramids_of(self.job.record.job, self.item.image, self.tasks)

    def level(self, output: int, number: int) -> LevelArray:
        """The array of a level of an output, as the item reads and writes it."""
        from chunkq.job.level_arrays import LevelArray  # where voxels are read or written

        array, view = self.image.level(output, number), self.plan.of_output(output)
        groups = self._channel_groups(output)
        return LevelArray(array, self.item.point, groups, view.storage_chunks)

    def level_object_names(self, output: int, number: int, box: Box) -> Iterator[str]:
        """Yield the names in the output of the objects of a box of a level, group by group."""
        from chunkq.job.level_arrays import level_box

        stored = self.job.output.image(self.item.image, output)
        for channels in self._channel_groups(output):
            for name in stored.grids[number].names(level_box(self.item.point, box, channels)):
                yield f"{stored.array_folder(number)}/{name}"

    def _channel_groups(self, output: int) -> tuple[Channels, ...]:
        """The channels of an output that an object stores together."""
        from chunkq.job.level_arrays import channel_groups

        view = self.plan.of_output(output)
        if not view.channel_axis:
            return channel_groups(None, 1)
        grid = self.job.output.image(self.item.image, output).grids[0]
        return channel_groups(view.channels, grid.chunk[len(self.item.point)])

    @cached_property
    def known_empty(self) -> KnownEmpty | None:
        """What is known of empty chunks since the job was created; None if nothing can be.

        Raises JobError if the record of it is damaged.
        """
        if not self.job.record.job.has_known_empty:
            return None
        from chunkq.job.known_empty import KnownEmpty  # for such jobs only

        try:
            return KnownEmpty.from_arrays(self.ledger.get_skipped(), self.plan)
        except PieceError as error:
            raise JobError(
                f"{error}; restore the file, or run `chunkq produce --overwrite` to start again",
                code=ErrorCode.JOB_RECORD_DAMAGED,
            ) from None

    @cached_property
    def skip_rules(self) -> SkipRules:
        """What decides which patches are skipped."""
        known, job = self.known_empty, self.job.record.job
        stored = () if known is None else known.stored
        from chunkq.plan.patch_selection import SkipRules

        return SkipRules(
            None if job.mask is None else self.image.mask(self.item).inside,
            job.empty_rule,
            (lambda box: any(cells.any(box) for cells in stored)) if stored else None,
        )

    @property
    def can_turn_out_empty(self) -> bool:
        """Whether a chunk that is a task can turn out to be empty."""
        return self.job.record.job.empty_rule is not None

    @cached_property
    def outputs(self) -> tuple[OutputHandle, ...]:
        """The outputs of the item, in the order of the plan."""
        return tuple(OutputHandle(self, number) for number in range(len(self.plan.outputs)))

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
        from chunkq.storage.padded_reading import read_padded  # where voxels are read

        job = self.job.record.job
        return tuple(
            read_padded(source, chunk.halo, job.pad_mode, job.pad_value) for source in self.sources
        )


def _check_source(source: ImageSource, identity: str, key: str) -> None:
    """Raise ChunkReadError if an array is missing or its identity has changed."""
    path, current = without_secret(source.path), source.identity()
    if current is None:
        raise ChunkReadError(f"{key}: {path} is missing; restore it", code=ErrorCode.INPUT_MISSING)
    if current != identity:
        from chunkq.storage.formats.single_file import replaced_text  # for a message only

        raise ChunkReadError(
            f"{key}: {replaced_text(source.path, 'the job was produced', identity, current)}",
            code=ErrorCode.INPUT_CHANGED,
        )


_cache: OrderedDict[str, JobHandle] = OrderedDict()
_lock = threading.Lock()


def _differ(first: JobRecord, second: JobRecord) -> bool:
    """Return whether two records of a folder are of different jobs, or differ in their keys."""
    return first is not second and (first.epoch != second.epoch or first.job != second.job)


def open_job(path: str) -> JobHandle:
    """Return the handle of a job folder; cached per process until the job's record changes.

    Raises MissingJobError if there is no job.
    """
    folder = JobFolder(path)
    record = folder.require_record()
    with _lock:
        handle = _cache.get(path)
        if handle is None or _differ(handle.record, record):
            handle = _cache[path] = JobHandle(folder, record)
        _cache.move_to_end(path)
        while len(_cache) > JOBS_CACHED:
            _cache.popitem(last=False)
        return handle
