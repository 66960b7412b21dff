"""Produce the output of a whole volume in one process, region by region as regions become final."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.empty_patches import EmptyChunks
from chunkq.blend.sums import Contribution, finalize_sums
from chunkq.geometry.box import Box
from chunkq.plan.empty_rule import Bools
from chunkq.plan.plan import Chunk, Index, Piece, Plan
from chunkq.system import buffers


def regions(
    plan: Plan,
    computed: Iterable[tuple[Chunk, Contribution | None]],
    empty: EmptyChunks | None = None,
    inside: Callable[[Box], Bools] | None = None,
) -> Iterator[tuple[Box, npt.NDArray[Any]]]:
    """Yield the boxes of the output as they become final, each voxel exactly once.

    `computed` yields every chunk in the order of `Plan.indices`, with None for a chunk that owns no
    patch or is empty. `empty` returns the sums of empty chunks; None if they contribute nothing.
    `inside` returns which voxels of a box are inside the mask; None if all are.

    In this order a block follows all its contributors, so it is final with its own chunk: first the
    core, then the boxes with band voxels. Each array is ([C,] *box.shape) in the output's dtype.
    Pieces stay in memory until their block is final. At most the pieces of one slice of blocks
    across the first axis are held at a time.
    """
    pending: dict[Index, dict[Piece, npt.NDArray[np.floating]]] = {}
    for chunk, contribution in computed:
        own_block, core = None, None
        if contribution is not None:
            own_block, core = contribution.own_block, contribution.core
            for piece, sums in contribution.pieces:
                # A view would keep the sums of the whole chunk in memory.
                pending.setdefault(piece.target, {})[piece] = buffers.compact(sums)
        if chunk.core.size:
            yield chunk.core, _filled(plan, chunk.core) if core is None else core
        if chunk.has_band:
            stored = pending.pop(chunk.index, {})
            pieces = {piece: stored.get(piece) for piece in plan.incoming_pieces(chunk)}
            within = None if inside is None else inside(chunk.block)
            yield from finalize_sums(plan, chunk, own_block, pieces, empty, within)


def _filled(plan: Plan, box: Box) -> npt.NDArray[Any]:
    values = buffers.zeros(plan.output_box(box).shape, plan.output_dtype)
    values[...] = plan.output.fill
    return values
