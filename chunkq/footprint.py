"""Estimate the memory that the arrays of a worker's chunks need, from the plan."""

from __future__ import annotations

from dataclasses import dataclass

from chunkq.blend import SLAB_BYTES
from chunkq.plan import Chunk, Index, Plan


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


def footprint(plan: Plan) -> Footprint:
    """Return the largest value of each stage over the chunks of a plan."""
    footprints = [chunk_footprint(plan, plan.chunk(index)) for index in _largest_chunks(plan)]
    return Footprint(
        max(chunk.waiting for chunk in footprints),
        max(chunk.computing for chunk in footprints),
        max(chunk.writing for chunk in footprints),
        max(chunk.finalizing for chunk in footprints),
    )


def extra_device_bytes(plan: Plan) -> int:
    """Return the bytes on an accelerator of one more chunk in flight: its input and its results."""
    results_voxel = 4 * plan.channels
    chunks = [plan.chunk(index) for index in _largest_chunks(plan)]
    return max(
        chunk.halo.size * plan.volume.voxel_bytes + chunk.region.size * results_voxel
        for chunk in chunks
    )


def _largest_chunks(plan: Plan) -> set[Index]:
    """Return the indices at which a chunk can be largest: middle, next to the first, first."""
    middle = tuple(blocks // 2 for blocks in plan.blocks)
    low = tuple(min(1, blocks - 1) for blocks in plan.blocks)
    return {middle, low, (0,) * plan.rank}


def chunk_footprint(plan: Plan, chunk: Chunk) -> Footprint:
    """Return the footprint of one chunk."""
    output_voxel = plan.stored_channels * plan.output_dtype.itemsize
    sums_voxel = 4 * plan.channels
    sums = sums_voxel * chunk.region.size
    labels = plan.job.combine != "weighted_avg"
    # A float32 average is stored as it is, so the output is a view of the sums.
    is_view = not labels and plan.output_dtype == "float32"
    interior = 0 if is_view else chunk.interior.size * output_voxel
    bands = sum(box.size for box in chunk.band_boxes) * sums_voxel
    outgoing = sum(piece.box.size for piece in plan.outgoing_pieces(chunk)) * sums_voxel
    waiting = chunk.halo.size * plan.volume.voxel_bytes
    # The argmax holds the largest value before and after a channel, and two arrays of winners.
    argmax = chunk.interior.size * (4 + 4 + 1 + 1) if labels and plan.channels > 1 else 0
    results = interior + bands + outgoing
    computing = waiting + sums + max(argmax, results)
    rest = sum(box.size for box in chunk.rest_boxes) * output_voxel
    writing = (sums if is_view else 0) + results + max(chunk.core.size * output_voxel, rest)
    incoming = sum(piece.box.size for piece in plan.incoming_pieces(chunk)) * sums_voxel
    largest_band = max((box.size for box in chunk.band_boxes), default=0)
    adding = min(largest_band * (sums_voxel + output_voxel), 2 * SLAB_BYTES)
    completing = bands + rest + incoming + adding + chunk.block.size * output_voxel
    return Footprint(waiting, computing, writing, completing if chunk.has_band else 0)
