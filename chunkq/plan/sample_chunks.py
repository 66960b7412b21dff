"""Select the chunks that stand for all chunks of a plan when memory or time is estimated."""

from __future__ import annotations

from itertools import product
from math import inf

from chunkq.plan.chunk import Chunk, Index
from chunkq.plan.plan import Plan

MAX_CHUNKS = 343
"""Plans with at most so many chunks are represented by all of them."""


def sample_chunks(plan: Plan) -> list[Chunk]:
    """Return chunks that represent a plan; chunks that own no patch are included.

    These are the chunks of all blocks if there are at most MAX_CHUNKS. Else they are the chunks
    whose index along each axis is one of the first two, the middle three or the last two: along an
    axis, the blocks beside the borders of the volume differ from the others.

    The middle chunk is first, followed by the other contributors of its block, by its other
    neighbors, and by all others, the nearest to the middle first.
    """
    bounds, blocks = plan.index_bounds, plan.block_indices
    middle = tuple((low + high) // 2 for low, high in zip(blocks.start, blocks.stop, strict=True))
    if bounds.size <= MAX_CHUNKS:
        indices = plan.indices()
    else:
        indices = product(*map(_positions, map(range, bounds.start, bounds.stop)))
    contributors = set(plan.contributors(middle))

    def rank(index: Index) -> tuple[int, bool, int, Index]:
        steps = [abs(i - m) for i, m in zip(index, middle, strict=True)]
        return max(steps), index not in contributors, sum(steps), index

    return [plan.chunk(index) for index in sorted(indices, key=rank)]


def fullest_chunk(plan: Plan, *, enough: float = inf) -> Chunk:
    """Return the first sample chunk with `enough` patches, else the first with the most."""
    return max(sample_chunks(plan), key=lambda chunk: min(enough, chunk.patches))


def _positions(numbers: range) -> list[int]:
    first, last, middle = numbers[0], numbers[-1], (numbers.start + numbers.stop) // 2
    candidates = {first, first + 1, middle - 1, middle, middle + 1, last - 1, last}
    return sorted(candidates.intersection(numbers))
