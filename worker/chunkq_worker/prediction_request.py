"""One call of a predictor: its opened inputs, their mask, and the plan of each of their items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.empty_patches import EmptyChunks
from chunkq.blend.image_objects import ImageGeometry
from chunkq.job.items import Image, Item, items_of
from chunkq.job.job_file import Job
from chunkq.job.known_empty import mask_counts
from chunkq.job.user_code import load_blend_weights
from chunkq.plan.chunk import Chunk
from chunkq.plan.item_tasks import ItemTasks
from chunkq.plan.patch_selection import PatchSelection, SkipRules
from chunkq.plan.plan import Plan
from chunkq.storage.array import Array
from chunkq.storage.mask import Mask
from chunkq.storage.padded_reading import read_padded
from chunkq_worker.inputs import OpenedInput, read_region
from chunkq_worker.mask_input import MaskInput


@dataclass(frozen=True)
class OpenItem:
    """A volume of a request: its arrays ([C,] *S), its tasks, and which patches are skipped."""

    item: Item
    arrays: tuple[Array, ...]
    tasks: ItemTasks
    rules: SkipRules

    def read(self, chunk: Chunk, job: Job) -> tuple[list[npt.NDArray[Any]], PatchSelection]:
        """Return the inputs of a chunk and the patches of it that run."""
        mode, value = job.pad_mode, job.pad_value
        halos = [read_padded(array, chunk.halo, mode, value) for array in self.arrays]
        return halos, self.rules.select(self.tasks.plan, chunk, halos)


@dataclass(frozen=True)
class PredictionRequest:
    """What one call predicts: an image with a mask, and the plan of each of its items."""

    inputs: tuple[OpenedInput, ...]
    mask: MaskInput | None
    job: Job
    image: Image
    plan: Plan

    @property
    def series(self) -> tuple[int, ...]:
        """Lengths of the axes along which volumes are predicted one by one."""
        return tuple(axis.size for axis in self.image.series_axes)

    @property
    def can_skip(self) -> bool:
        """Whether there are rules that skip patches."""
        return self.mask is not None or self.job.skip_empty is not None

    def geometry(self, number: int) -> ImageGeometry:
        """Return what is known of the axes of the result for an output."""
        geometry, plan = self.inputs[0].geometry(self.image), self.plan.of_output(number)
        if plan.grid.scale is not None:
            geometry = geometry.scaled(plan.grid.scale)
        return geometry if plan.grid.region is None else geometry.cropped(plan.region)

    @cached_property
    def items(self) -> tuple[OpenItem, ...]:
        """The volumes that are predicted one by one. Items with one mask share its counts."""
        rule, arrays = self.job.empty_rule, [one.array for one in self.inputs]
        masks: dict[int, tuple[Mask, ItemTasks]] = {}
        items = []
        for item in items_of((self.image,)):
            tasks, rules = ItemTasks(self.plan), SkipRules(None, rule)
            if self.mask is not None:
                point, volume = item.series_point[0], self.inputs[0]
                time = self.mask.time(volume, point)
                if time not in masks:
                    mask = self.mask.on(volume, point)
                    masks[time] = mask, ItemTasks(self.plan, mask_counts(self.plan, mask))
                mask, tasks = masks[time]
                rules = SkipRules(mask.inside, rule)
            items.append(OpenItem(item, item.present(arrays), tasks, rules))
        return tuple(items)

    @property
    def chunks(self) -> int:
        """Number of chunks of all items that are tasks."""
        return sum(item.tasks.costs.chunks for item in self.items)

    def empty_chunks(self) -> list[EmptyChunks | None]:
        """Return the sums of empty chunks of each output, None if they contribute nothing."""
        return [
            EmptyChunks(view, load_blend_weights(self.job.weight_function, view))
            if self.job.empty_rule is not None and view.output.nothing_counts
            else None
            for view in self.plan.views
        ]

    def read(self) -> Any:
        """Return the region of the input, (*series, [C,] *S); a tuple for several inputs."""
        arrays = [one.array for one in self.inputs]
        views = [item.present(arrays) for item in items_of((self.image,))]
        return _one_or_all([self._read(views_of_one) for views_of_one in zip(*views, strict=True)])

    def _read(self, views: Sequence[Array]) -> npt.NDArray[Any]:
        parts = [read_region(view, self.plan.region) for view in views]
        stacked = np.stack(parts) if self.series else parts[0]
        return stacked.reshape(*self.series, *parts[0].shape)


def _one_or_all(volumes: Sequence[npt.NDArray[Any]]) -> Any:
    return tuple(volumes) if len(volumes) > 1 else volumes[0]
