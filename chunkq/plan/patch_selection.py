"""Select the patches of a chunk that the network runs: those that no rule skips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from chunkq.geometry.box import Box
from chunkq.plan.empty_rule import Bools, EmptyRule, occupied_in
from chunkq.plan.plan import Chunk, Patch, Plan

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
class SkipRules:
    """What decides which patches of an item are skipped; None where a job has no such rule.

    inside    returns which voxels of a box of the volume are inside the mask, bool (*box.shape)
    empty     which voxels are empty
    stored    returns whether any storage chunk with a voxel of a box exists
    """

    inside: Callable[[Box], Bools] | None = None
    empty: EmptyRule | None = None
    stored: Callable[[Box], bool] | None = None

    def select(self, plan: Plan, chunk: Chunk, halos: Sequence[npt.NDArray[Any]]) -> PatchSelection:
        """Return the patches of a chunk that run; `halos` are its inputs ([C,] *chunk.halo)."""
        patches = list(plan.patches(chunk))
        inside = None if self.inside is None else self.inside(chunk.region)
        if inside is not None and inside.all():
            inside = None
        is_empty = self._emptiness(plan, chunk, halos)
        run, empty, skipped = [], [], 0
        for patch in patches:
            is_inside = inside is None or bool(
                inside[patch.target.slices(chunk.region.start)].any()
            )
            if is_empty is not None and is_empty(patch):
                empty.append(patch)
                skipped += is_inside and self.empty is not None
            elif is_inside:
                run.append(patch)
        insides = None
        if inside is not None:
            parts = (view.chunk(chunk.index).region for view in plan.views)
            insides = tuple(inside[box.slices(chunk.region.start)] for box in parts)
        return PatchSelection(tuple(run), tuple(empty), insides, skipped)

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
