"""What is known of empty chunks before a chunk is read: by the mask, by missing storage chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.errors import ErrorCode, StoreError
from chunkq.job.items import Item
from chunkq.job.mask_source import mask_of, mask_time
from chunkq.job.record import JobRecord
from chunkq.paths import without_secret
from chunkq.plan.item_tasks import ItemTasks
from chunkq.plan.patch_counts import Condition, Counts, count_patches
from chunkq.plan.plan import Plan
from chunkq.storage.array import Array
from chunkq.storage.images import ImageSource
from chunkq.storage.mask import Mask
from chunkq.storage.stored_chunks import StoredCells, StoredChunks

MISSING = "missing"
"""Value of `skip_empty` that skips patches whose storage chunks are absent."""


@dataclass(frozen=True)
class KnownEmpty:
    """How many patches of each chunk of an item can run, and which storage chunks exist.

    `counts` is uint32 of the shape of `plan.index_bounds`. `stored` has one entry per input with
    `skip_empty: missing`, else none.
    """

    counts: Counts
    stored: tuple[StoredCells, ...] = ()

    def to_arrays(self) -> list[npt.NDArray[Any]]:
        """Return arrays that can be stored: a bit for each chunk that is skipped, and the rest."""
        skipped = self.counts.ravel() == 0
        arrays: list[npt.NDArray[Any]] = [np.packbits(skipped), self.counts.ravel()[~skipped]]
        for stored in self.stored:
            shapes = np.array([stored.chunk, stored.occupied.shape], np.int64)
            arrays += [shapes, np.packbits(stored.occupied.ravel())]
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Sequence[npt.NDArray[Any]], plan: Plan) -> KnownEmpty:
        """Return what `to_arrays` was called for. `plan` is that of the item."""
        counts: Counts = np.zeros(plan.index_bounds.shape, np.uint32)
        bits, numbers, *rest = arrays
        counts.ravel()[~_bits(bits, counts.size)] = numbers
        stored = []
        for shapes, occupied in zip(rest[::2], rest[1::2], strict=True):
            chunk, shape = (tuple(map(int, row)) for row in shapes)
            size = int(np.prod(shape, dtype=np.int64))
            stored.append(StoredCells(chunk, _bits(occupied, size).reshape(shape)))
        return cls(counts, tuple(stored))


def mask_counts(plan: Plan, mask: Mask) -> Counts:
    """Return how many patches of each chunk have a kept voxel, of any output, inside a mask."""
    return count_patches(plan, [_inside_any(plan, mask)])


def _inside_any(plan: Plan, mask: Mask) -> list[Condition]:
    """Return the conditions of which a patch meets one if it has a kept voxel inside a mask."""
    views = {view.grid: view for view in plan.views}
    return [
        Condition(mask.of_scale(view.grid.scale), mask.read, plan=view) for view in views.values()
    ]


class EmptyFinder:
    """Finds what is known of empty chunks of the items of a job.

    Each input is listed once, and each mask is read once for all items that share it.
    """

    def __init__(self, record: JobRecord) -> None:
        self._record = record
        self._mask_array: Array | None = None
        self._listings: dict[ImageSource, StoredChunks] = {}
        self._by_mask: dict[tuple[int, int], KnownEmpty] = {}

    def tasks(self, item: Item) -> ItemTasks:
        """Return the tasks of an item."""
        known = self.find(item)
        return ItemTasks(self._record.plan(item), None if known is None else known.counts)

    def find(self, item: Item) -> KnownEmpty | None:
        """Return what is known of an item; None if nothing can be known.

        Raises StoreError if the storage chunks of an input cannot be listed, and ChunkReadError if
        the mask cannot be read.
        """
        record, job = self._record, self._record.job
        if not job.has_known_empty:
            return None
        plan = record.plan(item)
        if job.skip_empty == MISSING:
            stored = tuple(self._stored(source, item) for source in item.image.sources)
            condition = [Condition(s.axes, s.read, of_input=True) for s in stored]
            mask = self._mask(item)
            masks = [] if mask is None else [_inside_any(plan, mask)]
            return KnownEmpty(count_patches(plan, [*masks, condition]), stored)
        image, (number, _) = item.image.sources[0], item.series_point
        time = 0 if record.mask is None else mask_time(record.mask, image, number)
        key = item.image.number, time
        if key not in self._by_mask and (mask := self._mask(item)) is not None:
            self._by_mask[key] = KnownEmpty(mask_counts(plan, mask))
        return self._by_mask[key]

    def _mask(self, item: Item) -> Mask | None:
        source, config = self._record.mask, self._record.job.mask
        if source is None or config is None:
            return None
        if self._mask_array is None:
            self._mask_array = source.open()
        image, (time, _) = item.image.sources[0], item.series_point
        return mask_of(source, self._mask_array, image, time, config)

    def _stored(self, source: ImageSource, item: Item) -> StoredCells:
        if source not in self._listings:
            stored = source.stored_chunks()
            if stored is None:
                raise StoreError(
                    f"skip_empty: missing, but the storage chunks of input "
                    f"{without_secret(source.path)} cannot be listed; use a local Zarr array or "
                    "one in a bucket that may be listed, or another skip_empty",
                    code=ErrorCode.STORE_UNSUPPORTED,
                )
            self._listings[source] = stored
        time, channel = item.series_point
        return source.stored_cells(self._listings[source], time, channel)


def _bits(packed: npt.NDArray[Any], count: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(packed, count=count).astype(np.bool_)
