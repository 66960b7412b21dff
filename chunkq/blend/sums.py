"""Blend the predictions of a chunk, and finalize a block from the sums of its contributors.

Functions take and return arrays and do no I/O. Sums are added in the order of `Plan.patches` and
`Plan.incoming_pieces`, so the output is byte-identical for any assignment of chunks to workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import Array, to_numpy
from chunkq.blend.empty_patches import EmptyChunks, add_share
from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.rules import rule_of
from chunkq.geometry.box import Box
from chunkq.plan.chunk import Chunk, Index, Patch, Piece
from chunkq.plan.empty_rule import Bools
from chunkq.plan.footprint import SLAB_BYTES
from chunkq.plan.plan import Plan
from chunkq.system import buffers


@dataclass(frozen=True)
class OwnBlock:
    """What a chunk stores for finalizing its own block.

    `band` holds sums (K, *box.shape) for `Chunk.band_boxes`. `rest` holds output values
    ([C,] *box.shape) in the output's dtype for `Chunk.rest_boxes`.
    """

    band: tuple[npt.NDArray[np.floating], ...]
    rest: tuple[npt.NDArray[Any], ...]


@dataclass(frozen=True)
class Contribution:
    """The result of one chunk.

    core        final output values ([C,] *chunk.core.shape) in the output's dtype
    own_block   sums and values for finalizing the chunk's own block; None if the block has no band
    pieces      sums (K, *piece.box.shape) for the upper neighbors

    K and the dtype of sums are `OutputSpec.sums_channels` and `sums_dtype`.
    """

    core: npt.NDArray[Any]
    own_block: OwnBlock | None
    pieces: tuple[tuple[Piece, npt.NDArray[np.floating]], ...]


class Accumulator:
    """Weighted sums over one chunk's region (K, *region). Patches are added one by one."""

    def __init__(self, plan: Plan, chunk: Chunk, weights: PatchWeights, zeros: Array) -> None:
        """Use `zeros` of shape (K, *chunk.region.shape), in their dtype, as storage of the sums."""
        self._plan, self._chunk, self._weights, self._sums = plan, chunk, weights, zeros
        self._rule, self._crop = rule_of(plan.output), output_crop(plan)

    def add(self, batch: Sequence[Patch], predictions: Array) -> None:
        """Add predictions (n, C, *output patch), float32, after activation and voting."""
        for patch, prediction in zip(batch, predictions, strict=True):
            if not patch.target.size:
                continue
            used = prediction[(slice(None), *target_slices(patch, self._crop))]
            sums = self._view(patch.target)
            weights = self._weights.weights_if_shared(patch)
            if weights is None:
                self._rule.put(sums, used)
            else:
                self._rule.add(sums, weights, used)

    def add_empty(self, patches: Sequence[Patch]) -> None:
        """Add the predictions of patches that are skipped because they are empty."""
        output, region = self._plan.output, self._chunk.region
        if patches and output.nothing_counts:
            share = buffers.zeros(region.shape, output.sums_dtype)
            add_share(share, self._weights, patches, region)
            self._rule.add_nothing(to_numpy(self._sums), share)

    def results(self) -> list[Array]:
        """Return the arrays from which `contribution` is made; they can be views of the sums."""
        return chunk_results(self._plan, self._chunk, self._view)

    def contribution(self, inside: Bools | None = None) -> Contribution:
        """Return the result of the chunk as NumPy arrays; `inside` as in `contribution`."""
        parts = [to_numpy(part) for part in self.results()]
        return contribution(self._plan, self._chunk, parts, inside)

    def _view(self, box: Box) -> Array:
        return self._sums[(slice(None), *box.slices(self._chunk.region.start))]


def output_crop(plan: Plan) -> tuple[int, ...]:
    """Return where the output patch starts in the input patch of a plan."""
    return tuple((p - q) // 2 for p, q in zip(plan.input_patch, plan.output_patch, strict=True))


def target_slices(patch: Patch, crop: Sequence[int]) -> tuple[slice, ...]:
    """Return the slices that select a patch's target in its prediction (*output patch).

    `crop` is the `output_crop` of its plan.
    """
    return patch.target.slices(list(map(add, patch.source.start, crop)))


def chunk_results(plan: Plan, chunk: Chunk, sums_of: Callable[[Box], Array]) -> list[Array]:
    """Return the arrays from which `contribution` is made, in the memory of the sums.

    The first one is the reduced interior, the others are sums of bands, then of pieces. `sums_of`
    returns the sums (K, *box.shape) of a box of voxels.
    """
    interior = rule_of(plan.output).reduce(sums_of(chunk.interior))
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
    interior = rule_of(plan.output).store(parts[0], within)
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
    pieces: Mapping[Piece, npt.NDArray[np.floating] | None],
    empty: EmptyChunks | None = None,
    inside: Bools | None = None,
) -> Iterator[tuple[Box, npt.NDArray[Any]]]:
    """Yield the boxes of `chunk.touched_boxes`, each with its final output values.

    The values are ([C,] *box.shape) in the output's dtype. `own_block` is None if the chunk owns no
    patch or is empty. `pieces` holds the sums of all `Plan.incoming_pieces`, None for those of
    empty chunks. `empty` returns the sums of these; None if they contribute nothing. `inside` says
    which voxels of the block are inside the mask, bool (*chunk.block.shape); None if all are.
    """
    output, rule = plan.output, rule_of(plan.output)
    channels = (plan.channels,) if plan.channel_axis else ()
    block = buffers.zeros((*channels, *chunk.block.shape), plan.output_dtype)
    for number, box in enumerate(chunk.rest_boxes):
        values = output.fill if own_block is None else own_block.rest[number]
        _cut(plan, block, chunk.block, box)[...] = values
    stored: list[_Stored] = [
        _Stored(piece.source, piece.box, pieces[piece]) for piece in plan.incoming_pieces(chunk)
    ]
    for number, band in enumerate(chunk.band_boxes):
        own = _Stored(chunk.index, band, None if own_block is None else own_block.band[number])
        terms = [own, *stored] if chunk.is_active else stored
        for box in band.slabs(SLAB_BYTES // output.sums_bytes):
            total = _total(plan, box, terms, empty)
            within = None if inside is None else inside[box.slices(chunk.block.start)]
            values = rule.store(to_numpy(rule.reduce(total)), within)
            _cut(plan, block, chunk.block, box)[...] = values
    for box in chunk.touched_boxes:
        yield box, _cut(plan, block, chunk.block, box)


@dataclass(frozen=True)
class _Stored:
    """Sums (K, *box.shape) of a chunk for a box of a block; None if the chunk is empty."""

    source: Index
    box: Box
    sums: npt.NDArray[np.floating] | None


def _total(
    plan: Plan, box: Box, stored: Sequence[_Stored], empty: EmptyChunks | None
) -> npt.NDArray[np.floating]:
    """Return the sums of a box of voxels (K, *box.shape), merged in the order of `stored`.

    Voxels outside of all boxes of `stored` are 0.
    """
    output, rule = plan.output, rule_of(plan.output)
    total: npt.NDArray[np.floating] = np.zeros(
        (output.sums_channels, *box.shape), output.sums_dtype
    )
    for term in stored:
        shared = box & term.box
        if not shared.size or (term.sums is None and empty is None):
            continue
        in_box = total[(slice(None), *shared.slices(box.start))]
        if term.sums is not None:
            rule.merge(in_box, term.sums[(slice(None), *shared.slices(term.box.start))])
        elif empty is not None:
            rule.merge(in_box, empty.sums(term.source, shared))
    return total


def _cut(plan: Plan, values: npt.NDArray[Any], outer: Box, box: Box) -> npt.NDArray[Any]:
    """Return the view of `box` in output values of `outer`, ([C,] *outer.shape)."""
    spatial = box.slices(outer.start)
    return values[(slice(None), *spatial) if plan.channel_axis else spatial]
