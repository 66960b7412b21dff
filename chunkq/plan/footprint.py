"""Estimate the memory that the arrays of a worker's chunks need, from the plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from math import prod

from chunkq.plan.chunk import Chunk
from chunkq.plan.plan import Plan
from chunkq.plan.sample_chunks import sample_chunks

SHARD_COPIES = 3
"""Copies of a shard in memory while it is written: decoded, compressed, and as one object."""
SLAB_BYTES = 1 << 20
"""Bytes of sums that are added and reduced at a time, while they are in the CPU's cache."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of the arrays of one chunk, by stage.

    waiting      while the chunk waits for the device: its input
    computing    while it is on the device
    writing      while its results are written
    finalizing   while its block is finalized; 0 if the block has no band

    Not counted are the network, its batches, and the few storage chunks that are decoded or
    compressed at a time.
    """

    waiting: int
    computing: int
    writing: int
    finalizing: int

    def peak_bytes(self, depth: int) -> int:
        """Return the peak of `depth` chunks in flight, of which one at a time is on the device."""
        others = max(self.waiting, self.writing, self.finalizing)
        return max(self.computing + (depth - 1) * others, depth * self.finalizing)


@lru_cache(maxsize=8)
def footprint(plan: Plan) -> Footprint:
    """Return the largest value of each stage over the sample chunks of a plan."""
    one_per_shape = {_shapes(plan, chunk): chunk for chunk in sample_chunks(plan)}
    footprints = [chunk_footprint(plan, chunk) for chunk in one_per_shape.values()]
    return Footprint(
        max(chunk.waiting for chunk in footprints),
        max(chunk.computing for chunk in footprints),
        max(chunk.writing for chunk in footprints),
        max(chunk.finalizing for chunk in footprints),
    )


def largest_footprint(plans: Iterable[Plan]) -> Footprint:
    """Return the largest value of each stage over the items of a job."""
    footprints = [footprint(plan) for plan in plans]
    return Footprint(
        *(max(getattr(f, field.name) for f in footprints) for field in fields(Footprint))
    )


def extra_device_bytes(plan: Plan) -> int:
    """Return the bytes on an accelerator of one more chunk in flight: its input and its results."""
    sizes = []
    for chunk in sample_chunks(plan):
        results = sum(
            view.chunk(chunk.index).region.size * view.output.sums_bytes for view in plan.views
        )
        sizes.append(chunk.halo.size * plan.volume.voxel_bytes + results)
    return max(sizes)


def _shapes(plan: Plan, chunk: Chunk) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a chunk's boxes, which determine its footprint."""
    parts = [chunk if view is plan else view.chunk(chunk.index) for view in plan.views]
    boxes = (box for part in parts for box in (part.block, part.interior, part.core, part.region))
    return (chunk.halo.shape, *(box.shape for box in boxes))


def chunk_footprint(plan: Plan, chunk: Chunk) -> Footprint:
    """Return the footprint of one chunk."""
    waiting = chunk.halo.size * plan.volume.voxel_bytes
    parts = [_output_footprint(view, view.chunk(chunk.index)) for view in plan.views]
    kept, written, pieces, largest = zip(*parts, strict=True) if parts else ((),) * 4
    return Footprint(
        waiting,
        waiting + sum(kept),
        sum(written),
        sum(pieces) + max(largest, default=0) if chunk.has_band else 0,
    )


def _output_footprint(plan: Plan, chunk: Chunk) -> tuple[int, int, int, int]:
    """Return the bytes of the arrays of one output, which has this plan.

    These are the arrays of a chunk while it is computed and while its results are written, those of
    a block that stay in memory while it is finalized, and those of one output at a time.
    """
    output = plan.output
    output_voxel, sums_voxel = output.voxel_bytes, output.sums_bytes
    sums = sums_voxel * chunk.region.size
    # A float32 average is stored as it is, so the output is a view of the sums.
    is_view = output.stores_sums
    interior = 0 if is_view else chunk.interior.size * output_voxel
    result = chunk.interior.size * output.result_bytes
    # A chunk without patches stores no sums; its whole block is band.
    bands = sum(box.size for box in chunk.band_boxes) * sums_voxel if chunk.is_active else 0
    outgoing = sum(piece.box.size for piece in plan.outgoing_pieces(chunk)) * sums_voxel
    # The argmax holds the largest value before and after a channel, and two arrays of winners.
    has_argmax = output.has_labels and output.channels > 1
    argmax = chunk.interior.size * (4 + 4 + 1 + 1) if has_argmax else 0
    results = interior + bands + outgoing
    rest = sum(box.size for box in chunk.rest_boxes) * output_voxel
    writing = (sums if is_view else 0) + results + max(chunk.core.size * output_voxel, rest)
    incoming = sum(piece.box.size for piece in plan.incoming_pieces(chunk)) * sums_voxel
    largest_band = max((box.size for box in chunk.band_boxes), default=0)
    adding = min(largest_band * (sums_voxel + output_voxel), 2 * SLAB_BYTES)
    shard = _shard_voxels(plan, chunk) * output.dtype.itemsize * SHARD_COPIES
    return (
        sums + max(argmax, result + results),
        writing + shard,
        bands + rest + incoming,
        max(adding, shard) + chunk.block.size * output_voxel,
    )


def _shard_voxels(plan: Plan, chunk: Chunk) -> int:
    """Return the number of voxels of a shard in a block; 0 without shards."""
    if plan.storage_shards is None:
        return 0
    return prod(map(min, plan.storage_shards, chunk.block.shape))
