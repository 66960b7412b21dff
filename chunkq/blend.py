"""Blend the predictions of a chunk, and finalize a block from the sums of its contributors.

Functions take and return arrays and do no I/O. Sums are added in the order of `Plan.patches` and
`Plan.incoming_pieces`, so the output is byte-identical for any assignment of chunks to workers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq import buffers
from chunkq.box import Box
from chunkq.combine import Array, add_weighted, cast_output, copy_into, reduce, to_numpy
from chunkq.plan import Chunk, Patch, Piece, Plan
from chunkq.weights import Neighbors, Weights, neighbors

WEIGHT_CACHE_BYTES = 256 << 20
NeighborsPerAxis = tuple[Neighbors, ...]
"""The neighbors of one patch, one entry per axis."""


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


class WeightCache:
    """LRU cache of normalized patch weights; most patches of a grid share the same weights.

    Holds at most `WEIGHT_CACHE_BYTES`. Not thread-safe: use it only in the thread that holds the
    device.
    """

    def __init__(self, plan: Plan, weights: Weights, to_device: Callable[[Any], Array]) -> None:
        self._plan, self._weights, self._to_device = plan, weights, to_device
        self._cache: OrderedDict[tuple[int, NeighborsPerAxis], Array] = OrderedDict()
        self._bytes = 0

    def prepare(self, patches: Iterable[Patch]) -> None:
        """Compute the weights of the first of these patches, as many as fit in the cache.

        Allocated during inference, these small, long-lived arrays would fragment the heap.
        """
        prepared, free_bytes = set(), WEIGHT_CACHE_BYTES
        for patch in patches:
            key = patch.grid, self._neighbors(patch)
            if key in prepared or _has_no_overlap(key[1]):
                continue
            prepared.add(key)
            free_bytes -= patch.target.size * 4
            if free_bytes < 0:
                return
            self._get(key)

    def weights(self, patch: Patch) -> Array:
        """Return w / Σw over the patch's target: shape `patch.target.shape`, float32."""
        return self._get((patch.grid, self._neighbors(patch)))

    def has_no_overlap(self, patch: Patch) -> bool:
        """Return whether no other patch covers the patch's target; its weights are then all 1."""
        return _has_no_overlap(self._neighbors(patch))

    def _get(self, key: tuple[int, NeighborsPerAxis]) -> Array:
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        weights = self._to_device(self._weights.normalized(*key))
        self._cache[key] = weights
        self._bytes += prod(weights.shape) * 4
        while self._bytes > WEIGHT_CACHE_BYTES and len(self._cache) > 1:
            _, evicted = self._cache.popitem(last=False)
            self._bytes -= prod(evicted.shape) * 4
        return weights

    def _neighbors(self, patch: Patch) -> NeighborsPerAxis:
        return tuple(
            neighbors(axis, patch.grid, number)
            for axis, number in zip(self._plan.axes, patch.numbers, strict=True)
        )


def _has_no_overlap(neighbors: NeighborsPerAxis) -> bool:
    """Return whether a patch has no neighbor except itself."""
    starts_per_grid = zip(*(near.starts for near in neighbors), strict=True)
    return sum(prod(map(len, starts)) for starts in starts_per_grid) == 1


class Accumulator:
    """Weighted sums over one chunk's region, float32 (C, *region)."""

    def __init__(self, plan: Plan, chunk: Chunk, weights: WeightCache, zeros: Array) -> None:
        """Use `zeros`, zeros of shape (C, *chunk.region.shape), as storage for the sums."""
        self._plan, self._chunk, self._weights, self._sums = plan, chunk, weights, zeros

    def add(self, patch: Patch, prediction: Array) -> None:
        """Add one prediction (C, *output patch), float32, after activation and voting."""
        offset = [
            (p - q) // 2
            for p, q in zip(self._plan.input_patch, self._plan.output_patch, strict=True)
        ]
        origin = [s + o for s, o in zip(patch.source.start, offset, strict=True)]
        used = prediction[(slice(None), *patch.target.slices(origin))]
        sums = self._view(patch.target)
        if self._weights.has_no_overlap(patch):
            copy_into(sums, used)
        else:
            add_weighted(sums, self._weights.weights(patch), used)

    def sums(self) -> list[Array]:
        """Return the arrays from which `contribution` is made, on the device.

        The first one is the reduced interior, the others are sums of bands, then of pieces. They
        can be views of the accumulator.
        """
        plan, chunk = self._plan, self._chunk
        interior = reduce(self._view(chunk.interior), plan.job.combine)
        return [interior, *map(self._view, _shared_boxes(plan, chunk))]

    def contribution(self) -> Contribution:
        """Return the result of the chunk as NumPy arrays."""
        return contribution(self._plan, self._chunk, [to_numpy(part) for part in self.sums()])

    def _view(self, box: Box) -> Array:
        return self._sums[(slice(None), *box.slices(self._chunk.region.start))]


def contribution(plan: Plan, chunk: Chunk, parts: Sequence[npt.NDArray[Any]]) -> Contribution:
    """Return the result of a chunk from its `Accumulator.sums`, converted to NumPy arrays."""
    interior = _to_output(plan, parts[0])
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
    pieces: Mapping[Piece, npt.NDArray[np.float32]],
) -> Iterator[tuple[Box, npt.NDArray[Any]]]:
    """Yield the boxes of `chunk.touched_boxes`, each with its final output values.

    The values are ([C,] *box.shape) in the output's dtype. `own_block` is None if the chunk owns no
    patch. `pieces` holds the sums of all `Plan.incoming_pieces`.
    """
    combine = plan.job.combine
    channels = (plan.channels,) if plan.channel_axis else ()
    block = buffers.zeros((*channels, *chunk.block.shape), plan.output_dtype)
    if own_block is not None:
        for box, values in zip(chunk.rest_boxes, own_block.rest, strict=True):
            _cut(plan, block, chunk.block, box)[...] = values
    for number, box in enumerate(chunk.band_boxes):
        total = buffers.zeros((plan.channels, *box.shape), np.float32)
        if own_block is not None:
            total += own_block.band[number]
        for piece in plan.incoming_pieces(chunk):
            shared = box & piece.box
            if shared.size:
                in_band = (slice(None), *shared.slices(box.start))
                in_piece = (slice(None), *shared.slices(piece.box.start))
                total[in_band] += pieces[piece][in_piece]
        _cut(plan, block, chunk.block, box)[...] = _to_output(plan, reduce(total, combine))
    for box in chunk.touched_boxes:
        yield box, _cut(plan, block, chunk.block, box)


def _to_output(plan: Plan, reduced: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the output values ([C,] *S) of a result of `reduce`."""
    values = cast_output(reduced, plan.job.combine, plan.output_dtype)
    drop_channel = plan.job.combine == "weighted_avg" and not plan.channel_axis
    return values[0] if drop_channel else values


def _cut(plan: Plan, values: npt.NDArray[Any], outer: Box, box: Box) -> npt.NDArray[Any]:
    """Return the view of `box` in output values of `outer`, ([C,] *outer.shape)."""
    spatial = box.slices(outer.start)
    return values[(slice(None), *spatial) if plan.channel_axis else spatial]
