"""Select the patches of a chunk that the network runs: those that no rule skips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from chunkq.geometry.box import Box
from chunkq.geometry.grid_spec import GridSpec, Scale
from chunkq.plan.chunk import Chunk, Patch
from chunkq.plan.empty_rule import Bools, EmptyRule, occupied_in
from chunkq.plan.plan import Plan

Inside = tuple[Bools | None, ...]
"""For each output which voxels of a box are inside the mask; None if all are."""


@dataclass(frozen=True)
class PatchSelection:
    """The patches of a chunk that run, and those that are empty, each in the order of the plan.

    Patches without a voxel inside the mask are in neither, unless they are empty. `inside` says for
    each output which voxels of the chunk's region are inside the mask, bool (*region.shape), None
    if all are; it is None if all are for all outputs. `skipped` counts the patches inside the mask
    that are empty by their voxels.
    """

    run: tuple[Patch, ...]
    empty: tuple[Patch, ...] = ()
    inside: Inside | None = None
    skipped: int = 0

    @classmethod
    def of_all(cls, plan: Plan, chunk: Chunk) -> PatchSelection:
        """Return all patches of a chunk."""
        return cls(tuple(plan.patches(chunk)))


@dataclass(frozen=True)
class _ChunkMask:
    """Which voxels of a chunk's region are inside the mask, in the grid of an output.

    None if all are. `plan` is that of the output.
    """

    plan: Plan
    region: Box
    inside: Bools | None

    def has_inside(self, plan: Plan, patch: Patch) -> bool:
        """Return whether a patch of a plan has a kept voxel inside, of this output."""
        if self.inside is None:
            return True
        [own] = self.plan.own_patches(plan, [patch])
        return bool(self.inside[own.target.slices(self.region.start)].any())


@dataclass(frozen=True)
class SkipRules:
    """What decides which patches of an item are skipped; None where a job has no such rule.

    inside    returns which voxels of a box are inside the mask, bool (*box.shape); the box is in
              voxels of an output with a scale, None for those of the volume
    empty     which voxels are empty
    stored    returns whether any storage chunk with a voxel of a box exists
    """

    inside: Callable[[Box, Scale | None], Bools] | None = None
    empty: EmptyRule | None = None
    stored: Callable[[Box], bool] | None = None

    def inside_of(self, plan: Plan) -> Callable[[Box], Bools] | None:
        """Return which voxels of a box of an output, which has this plan, are inside the mask."""
        inside = self.inside
        return None if inside is None else lambda box: inside(box, plan.grid.scale)

    def select(self, plan: Plan, chunk: Chunk, halos: Sequence[npt.NDArray[Any]]) -> PatchSelection:
        """Return the patches of a chunk that run; `halos` are its inputs ([C,] *chunk.halo)."""
        patches = list(plan.patches(chunk))
        masks = self._masks(plan, chunk)
        is_empty = self._emptiness(plan, chunk, halos)
        run, empty, skipped = [], [], 0
        for patch in patches:
            is_inside = not masks or any(one.has_inside(plan, patch) for one in masks.values())
            if is_empty is not None and is_empty(patch):
                empty.append(patch)
                skipped += is_inside and self.empty is not None
            elif is_inside:
                run.append(patch)
        inside = tuple(masks[view.grid].inside for view in plan.views) if masks else None
        return PatchSelection(tuple(run), tuple(empty), inside, skipped)

    def _masks(self, plan: Plan, chunk: Chunk) -> dict[GridSpec, _ChunkMask]:
        """Return the mask of a chunk in each grid of the outputs; none if all voxels are inside."""
        masks: dict[GridSpec, _ChunkMask] = {}
        for view in plan.views:
            if view.grid not in masks and self.inside is not None:
                region = view.chunk(chunk.index).region
                inside = self.inside(region, view.grid.scale)
                masks[view.grid] = _ChunkMask(view, region, None if inside.all() else inside)
        return masks if any(mask.inside is not None for mask in masks.values()) else {}

    def _emptiness(
        self, plan: Plan, chunk: Chunk, halos: Sequence[npt.NDArray[Any]]
    ) -> Callable[[Patch], bool] | None:
        """Return a function that tells whether a patch is empty; None if none is."""
        volume = Box.of_shape(plan.volume.shape)
        if self.stored is not None:
            stored = self.stored
            return lambda patch: not stored(patch.source & volume)
        if self.empty is None:
            return None
        occupied = occupied_in(self.empty, halos, plan.rank)
        within = volume & chunk.halo
        voxels = occupied[within.slices(chunk.halo.start)]
        if voxels.all():
            return None
        return lambda patch: not voxels[(patch.source & volume).slices(within.start)].any()
