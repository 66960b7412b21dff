"""One output of an item of an open job: its plan, and the array that stores it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chunkq.geometry.box import Box
from chunkq.plan.plan import Plan

if TYPE_CHECKING:
    from chunkq.blend.empty_patches import EmptyChunks
    from chunkq.job.image_output import ImageOutput
    from chunkq.job.job_handle import ItemHandle
    from chunkq.storage.array import Array
    from chunkq.storage.formats.zarr_writing import WritableArray


@dataclass(frozen=True)
class OutputHandle:
    """One output of an item, by its number among the outputs of the job."""

    item: ItemHandle
    number: int

    @cached_property
    def plan(self) -> Plan:
        """The plan of the output, in its own voxels."""
        return self.item.plan.of_output(self.number)

    @property
    def image(self) -> ImageOutput:
        """The stored image of the output, to which all items of an image belong."""
        return self.item.job.output.image(self.item.item.image, self.number)

    @property
    def target(self) -> WritableArray:
        """The output array for writing. Raises MissingJobError if the job was replaced."""
        return self.item.image.targets[self.number]

    @cached_property
    def empty_chunks(self) -> EmptyChunks | None:
        """The sums of empty chunks; None if the job has none that contribute.

        Raises JobError if the user's weight function must be loaded, and this process does not
        accept it or it has changed.
        """
        job = self.item.job
        if job.record.job.skip_empty is None or not self.plan.output.nothing_counts:
            return None
        from chunkq.blend.empty_patches import EmptyChunks  # array libraries

        return EmptyChunks(self.plan, job.blend_weights(self.plan))

    def inside(self, box: Box) -> npt.NDArray[np.bool_] | None:
        """Return which voxels of a box are inside the mask, None if all are."""
        inside = self.item.skip_rules.inside_of(self.plan)
        return None if inside is None else inside(box)

    def write(self, box: Box, values: npt.NDArray[Any]) -> list[int]:
        """Write the final voxels of whole storage chunks; return the checksums of their objects.

        `values` has the shape ([C,] *box.shape). The checksums are in the order of `object_names`.
        """
        if not box.size:
            return []
        outer = self._stored_box(box)
        return self.target.store(outer, values.reshape(outer.shape))

    def read(self, array: Array, boxes: Sequence[Box]) -> list[npt.NDArray[Any]]:
        """Read the final voxels ([C,] *box.shape) of boxes from the open array of the output.

        No box is empty. What several have in common is read once. Raises ChunkReadError.
        """
        parts = array.read_together([self._stored_box(box) for box in boxes])
        shapes = (self.plan.output_box(box).shape for box in boxes)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def object_names(self, box: Box) -> Iterator[str]:
        """Yield the names in the output of the objects that hold a box of voxels, in a fixed order.

        The array has the name that it has while the job runs.
        """
        if not box.size:
            return
        image = self.image
        for name in image.grids[0].names(self._stored_box(box)):
            yield f"{image.array_folder()}/{name}"

    def _stored_box(self, box: Box) -> Box:
        """Return the box of the stored array that has a box of voxels of the item."""
        point, inner = self.item.item.point, self.plan.output_box(box)
        return Box((*point, *inner.start), (*(n + 1 for n in point), *inner.stop))
