"""Blend the predictions of a chunk, and finalize a block from the sums of its contributors.

Functions take and return arrays and do no I/O. Sums are added in the order of `Plan.patches` and
`Plan.incoming_pieces`, so the output is byte-identical for any assignment of chunks to workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import Array, add_weighted, cast_output, copy_into, reduce, to_numpy
from chunkq.blend.empty_patches import EmptyChunks, add_nothing, add_share
from chunkq.blend.patch_weights import PatchWeights
from chunkq.geometry.box import Box
from chunkq.plan.empty_rule import Bools
from chunkq.plan.footprint import SLAB_BYTES
from chunkq.plan.plan import Chunk, Index, Patch, Piece, Plan
from chunkq.system import buffers


@dataclass(frozen=True)
class OwnBlock:
    """What a chunk stores for finalizing its own block.

    `band` holds float32 sums (C, *box.shape) for `Chunk.band_boxes`. `rest` holds output values
    ([C,] *box.shape) in the output's dtype for `Chunk.rest_boxes`.
    """

    band: tuple[npt.NDArray[np.float32], ...]
    rest: tuple[npt.NDArray[Any], ...]


@dataclass(frozen=True)
class Contribution:
    """The result of one chunk.

    core        final output values ([C,] *chunk.core.shape) in the output's dtype
    own_block   sums and values for finalizing the chunk's own block; None if the block has no band
    pieces      float32 sums (C, *piece.box.shape) for the upper neighbors
    """

    core: npt.NDArray[Any]
    own_block: OwnBlock | None
    pieces: tuple[tuple[Piece, npt.NDArray[np.float32]], ...]


class Accumulator:
    """Weighted sums over one chunk's region, float32 (C, *region). Patches are added one by one."""

    def __init__(self, plan: Plan, chunk: Chunk, weights: PatchWeights, zeros: Array) -> None:
        """Use `zeros`, zeros of shape (C, *chunk.region.shape), as storage for the sums."""
        self._plan, self._chunk, self._weights, self._sums = plan, chunk, weights, zeros

    def add(self, batch: Sequence[Patch], predictions: Array) -> None:
        """Add predictions (n, C, *output patch), float32, after activation and voting."""
        for patch, prediction in zip(batch, predictions, strict=True):
            if not patch.target.size:
                continue
            used = prediction[(slice(None), *target_slices(self._plan, patch))]
            sums = self._view(patch.target)
            if self._weights.has_no_overlap(patch):
                copy_into(sums, used)
            else:
                add_weighted(sums, self._weights.weights(patch), used)

    def add_empty(self, patches: Sequence[Patch]) -> None:
        """Add the predictions of patches that are skipped because they are empty."""
        nothing = self._plan.output.nothing
        if patches and nothing.any():
            region = self._chunk.region
            share = buffers.zeros(region.shape, np.float32)
            add_share(share, self._weights, patches, region)
            add_nothing(to_numpy(self._sums), share, nothing)

    def results(self) -> list[Array]:
        """Return the arrays from which `contribution` is made; they can be views of the sums."""
        return chunk_results(self._plan, self._chunk, self._view)

    def contribution(self, inside: Bools | None = None) -> Contribution:
        """Return the result of the chunk as NumPy arrays; `inside` as in `contribution`."""
        parts = [to_numpy(part) for part in self.results()]
        return contribution(self._plan, self._chunk, parts, inside)

    def _view(self, box: Box) -> Array:
        return self._sums[(slice(None), *box.slices(self._chunk.region.start))]


def target_slices(plan: Plan, patch: Patch) -> tuple[slice, ...]:
    """Return the slices that select a patch's target in its prediction (*output patch)."""
    axes = zip(patch.source.start, plan.input_patch, plan.output_patch, strict=True)
    return patch.target.slices([start + (p - q) // 2 for start, p, q in axes])


def chunk_results(plan: Plan, chunk: Chunk, sums_of: Callable[[Box], Array]) -> list[Array]:
    """Return the arrays from which `contribution` is made, in the memory of the sums.

    The first one is the reduced interior, the others are sums of bands, then of pieces. `sums_of`
    returns the sums (C, *box.shape) of a box of voxels.
    """
    interior = reduce(sums_of(chunk.interior), plan.output.combine)
    return [interior, *map(sums_of, _shared_boxes(plan, chunk))]


def contribution(
    plan: Plan,
    chunk: Chunk,
    parts: Sequence[npt.NDArray[Any]],
    inside: Bools | None = None,
) -> Contribution:
    """Return the result of a chunk from its `chunk_results`, converted to NumPy arrays.

    `inside` says which voxels of the chunk's region are inside the mask, bool; None if all are.
    """
    within = None if inside is None else inside[chunk.interior.slices(chunk.region.start)]
    interior = _to_output(plan, parts[0], within)
    sums = [buffers.contiguous(part) for part in parts[1:]]
    own_block, bands = None, len(chunk.band_boxes) if chunk.has_band else 0
    if chunk.has_band:
        rest = (_cut(plan, interior, chunk.interior, box) for box in chunk.rest_boxes)
        own_block = OwnBlock(tuple(sums[:bands]), tuple(rest))
    return Contribution(
        core=_cut(plan, interior, chunk.interior, chunk.core),
        own_block=own_block,
        pieces=tuple(zip(plan.outgoing_pieces(chunk), sums[bands:], strict=True)),
    )


def _shared_boxes(plan: Plan, chunk: Chunk) -> list[Box]:
    """Return the boxes of which a chunk stores sums: its bands, then its pieces."""
    bands = chunk.band_boxes if chunk.has_band else ()
    return [*bands, *(piece.box for piece in plan.outgoing_pieces(chunk))]


def finalize_sums(
    plan: Plan,
    chunk: Chunk,
    own_block: OwnBlock | None,
    pieces: Mapping[Piece, npt.NDArray[np.float32] | None],
    empty: EmptyChunks | None = None,
    inside: Bools | None = None,
) -> Iterator[tuple[Box, npt.NDArray[Any]]]:
    """Yield the boxes of `chunk.touched_boxes`, each with its final output values.

    The values are ([C,] *box.shape) in the output's dtype. `own_block` is None if the chunk owns no
    patch or is empty. `pieces` holds the sums of all `Plan.incoming_pieces`, None for those of
    empty chunks. `empty` returns the sums of these; None if they contribute nothing. `inside` says
    which voxels of the block are inside the mask, bool (*chunk.block.shape); None if all are.
    """
    combine = plan.output.combine
    channels = (plan.channels,) if plan.channel_axis else ()
    block = buffers.zeros((*channels, *chunk.block.shape), plan.output_dtype)
    for number, box in enumerate(chunk.rest_boxes):
        values = plan.output.fill if own_block is None else own_block.rest[number]
        _cut(plan, block, chunk.block, box)[...] = values
    stored: list[_Stored] = [
        _Stored(piece.source, piece.box, pieces[piece]) for piece in plan.incoming_pieces(chunk)
    ]
    for number, band in enumerate(chunk.band_boxes):
        own = _Stored(chunk.index, band, None if own_block is None else own_block.band[number])
        terms = [own, *stored] if chunk.is_active else stored
        for box in band.slabs(SLAB_BYTES // (plan.channels * 4)):
            total = _total(plan, box, terms, empty)
            within = None if inside is None else inside[box.slices(chunk.block.start)]
            values = _to_output(plan, reduce(total, combine), within)
            _cut(plan, block, chunk.block, box)[...] = values
    for box in chunk.touched_boxes:
        yield box, _cut(plan, block, chunk.block, box)


@dataclass(frozen=True)
class _Stored:
    """Sums (C, *box.shape) of a chunk for a box of a block; None if the chunk is empty."""

    source: Index
    box: Box
    sums: npt.NDArray[np.float32] | None


def _total(
    plan: Plan, box: Box, stored: Sequence[_Stored], empty: EmptyChunks | None
) -> npt.NDArray[np.float32]:
    """Return the sums of a box of voxels (C, *box.shape), added in the order of `stored`.

    Voxels outside of all boxes of `stored` are 0.
    """
    total: npt.NDArray[np.float32] = np.zeros((plan.channels, *box.shape), np.float32)
    for term in stored:
        shared = box & term.box
        if not shared.size or (term.sums is None and empty is None):
            continue
        in_box = total[(slice(None), *shared.slices(box.start))]
        if term.sums is not None:
            in_box += term.sums[(slice(None), *shared.slices(term.box.start))]
        elif empty is not None:
            in_box += empty.sums(term.source, shared)
    return total


def _to_output(
    plan: Plan, reduced: npt.NDArray[Any], inside: Bools | None = None
) -> npt.NDArray[Any]:
    """Return the output values ([C,] *S) of a result of `reduce`, the fill value outside."""
    is_average, outside = plan.output.is_average, None if inside is None else ~inside
    if outside is not None and is_average:
        if not reduced.flags.writeable:
            reduced = reduced.copy()
        reduced[:, outside] = plan.output.fill  # before averages beyond the range are refused
    values = cast_output(reduced, plan.output.combine, plan.output_dtype)
    if outside is not None and not is_average:
        values[outside] = plan.output.fill
    drop_channel = is_average and not plan.channel_axis
    return values[0] if drop_channel else values


def _cut(plan: Plan, values: npt.NDArray[Any], outer: Box, box: Box) -> npt.NDArray[Any]:
    """Return the view of `box` in output values of `outer`, ([C,] *outer.shape)."""
    spatial = box.slices(outer.start)
    return values[(slice(None), *spatial) if plan.channel_axis else spatial]
