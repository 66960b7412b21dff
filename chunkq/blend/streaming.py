"""Produce the output of a whole volume in one process, region by region as regions become final."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy.typing as npt

from chunkq.blend.empty_patches import EmptyChunks
from chunkq.blend.sums import Contribution, finalize_sums
from chunkq.geometry.box import Box
from chunkq.plan.chunk import Chunk, Index, Piece
from chunkq.plan.empty_rule import Bools
from chunkq.plan.plan import Plan
from chunkq.system import buffers

Values = npt.NDArray[Any]
Inside = Callable[[Box], Bools]


class OutputStream:
    """The values of one output of a volume, as they become final.

    `plan` is the plan of the output (`Plan.of_output`). `empty` returns the sums of empty chunks;
    None if they contribute nothing. `inside` returns which voxels of a box are inside the mask;
    None if all are.

    Pieces stay in memory until their block is final. At most the pieces of one slice of blocks
    across the first axis are held at a time.
    """

    def __init__(
        self, plan: Plan, empty: EmptyChunks | None = None, inside: Inside | None = None
    ) -> None:
        self._plan, self._empty, self._inside = plan, empty, inside
        self._pending: dict[Index, dict[Piece, Values]] = {}

    def add(self, index: Index, contribution: Contribution | None) -> Iterator[tuple[Box, Values]]:
        """Yield the boxes that are final with a chunk: its core, then those with band voxels.

        Chunks follow each other in the order of `Plan.indices`. The contribution of a chunk that
        owns no patch or is empty is None. Each array is ([C,] *box.shape) in the output's dtype.
        """
        plan, chunk = self._plan, self._plan.chunk(index)
        own_block, core = None, None
        if contribution is not None:
            own_block, core = contribution.own_block, contribution.core
            for piece, sums in contribution.pieces:
                # A view would keep the sums of the whole chunk in memory.
                self._pending.setdefault(piece.target, {})[piece] = buffers.compact(sums)
        if chunk.core.size:
            yield chunk.core, self._filled(chunk.core) if core is None else core
        if chunk.has_band:
            stored = self._pending.pop(index, {})
            pieces = {piece: stored.get(piece) for piece in plan.incoming_pieces(chunk)}
            within = None if self._inside is None else self._inside(chunk.block)
            yield from finalize_sums(plan, chunk, own_block, pieces, self._empty, within)

    def _filled(self, box: Box) -> Values:
        output = self._plan.output
        values = buffers.zeros(self._plan.output_box(box).shape, output.dtype)
        values[...] = output.fill
        return values


def regions(
    streams: Sequence[OutputStream],
    computed: Iterable[tuple[Chunk, Sequence[Contribution] | None]],
) -> Iterator[tuple[int, Box, Values]]:
    """Yield the number of an output and a box of it, as boxes become final.

    There is one stream per output. `computed` yields every chunk in the order of `Plan.indices`,
    with one contribution per output, or None for a chunk that owns no patch or is empty. Each voxel
    of each output is yielded exactly once. In this order a block follows all its contributors, so
    it is final with its own chunk.
    """
    for chunk, contributions in computed:
        for number, stream in enumerate(streams):
            contribution = None if contributions is None else contributions[number]
            for box, values in stream.add(chunk.index, contribution):
                yield number, box, values
