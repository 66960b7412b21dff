"""Which arrays of a worker's chunks coexist, stage by stage; the plan alone tells."""

from __future__ import annotations

from dataclasses import dataclass

from chunkq.plan import Chunk, Plan


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one chunk's arrays: while it waits for the device, is computed, is written.

    `completing` is for its block, which a worker completes once all contributors are committed.

    What storage decodes and compresses at a time, a few storage chunks, is not counted, nor are
    the network and its batches.
    """

    waiting: int
    computing: int
    writing: int
    completing: int

    def peak_bytes(self, depth: int) -> int:
        """Return the most that `depth` chunks hold: one on the device, the others at worst."""
        others = max(self.waiting, self.writing, self.completing)
        return max(self.computing + (depth - 1) * others, depth * self.completing)


def footprint(plan: Plan) -> Footprint:
    """Return the footprint of the largest chunks of a plan."""
    found = [chunk_footprint(plan, plan.chunk(index)) for index in _kinds(plan)]
    return Footprint(
        max(one.waiting for one in found),
        max(one.computing for one in found),
        max(one.writing for one in found),
        max(one.completing for one in found),
    )


def _kinds(plan: Plan) -> set[tuple[int, ...]]:
    """Return the chunks at whose places along the axes a chunk can be largest."""
    middle = tuple(blocks // 2 for blocks in plan.blocks)
    low = tuple(min(1, blocks - 1) for blocks in plan.blocks)
    return {middle, low, (0,) * plan.rank}


def chunk_footprint(plan: Plan, chunk: Chunk) -> Footprint:
    """Return the footprint of one chunk."""
    stored = plan.stored_channels * plan.output_dtype.itemsize
    sums = 4 * plan.channels * chunk.region.size
    labels = plan.job.combine != "weighted_avg"
    # The stored form is the sums themselves where they are stored as float32.
    is_view = not labels and plan.output_dtype == "float32"
    final = 0 if is_view else chunk.interior.size * stored
    own = sum(box.size for box in chunk.band_boxes) * 4 * plan.channels
    pieces = sum(piece.box.size for piece in plan.outgoing_pieces(chunk)) * 4 * plan.channels
    waiting = chunk.halo.size * plan.volume.voxel_bytes
    # Deciding holds the largest values so far, before and after a channel, and two winners.
    deciding = chunk.interior.size * (4 + 4 + 1 + 1) if labels and plan.channels > 1 else 0
    leaving = final + own + pieces
    computing = waiting + sums + max(deciding, leaving)
    rest = sum(box.size for box in chunk.rest_boxes) * stored
    writing = (sums if is_view else 0) + leaving + max(chunk.core.size * stored, rest)
    awaited = sum(piece.box.size for piece in plan.incoming_pieces(chunk)) * 4 * plan.channels
    adding = max((box.size for box in chunk.band_boxes), default=0) * (4 * plan.channels + stored)
    completing = own + rest + awaited + adding + chunk.block.size * stored
    return Footprint(waiting, computing, writing, completing if chunk.has_band else 0)
