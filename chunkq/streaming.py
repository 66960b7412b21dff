"""A whole volume in one process: chunks in order, each region of the output once it is final."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend import Contribution, finalize_sums
from chunkq.box import Box
from chunkq.plan import Chunk, Index, Piece, Plan


def regions(
    plan: Plan, computed: Iterable[tuple[Chunk, Contribution | None]]
) -> Iterator[tuple[Box, npt.NDArray[Any]]]:
    """Yield the output's regions as they become final: each voxel exactly once.

    `computed` holds every chunk in the order of `Plan.indices`, with None for one that owns no
    patch. All that contributes to a block lies before it in that order or is its own chunk, so a
    block is final with its chunk: first the voxels that no band touches, then the others. Each
    array is ([C,] *box.shape) in the output's dtype. Pieces are held until their block is final;
    these are the bands along one slice of blocks across the first axis.
    """
    held: dict[Index, dict[Piece, npt.NDArray[np.float32]]] = {}
    for chunk, contribution in computed:
        own = None
        if contribution is not None:
            own = contribution.own
            for piece, sums in contribution.pieces:
                # A view would keep the sums of the whole chunk in memory.
                kept = sums if sums.flags.owndata else sums.copy()
                held.setdefault(piece.target, {})[piece] = kept
            if chunk.core.size:
                yield chunk.core, contribution.core
        if chunk.has_band:
            yield from finalize_sums(plan, chunk, own, held.pop(chunk.index, {}))


def output_slices(plan: Plan, box: Box) -> tuple[slice, ...]:
    """Return what selects a box of voxels in an array of shape `plan.output_shape`."""
    spatial = box.slices((0,) * plan.rank)
    return (slice(0, plan.channels), *spatial) if plan.channel_axis else spatial
