"""Contributions of patches that are skipped because they are empty, from the geometry alone.

Such a patch predicts `OutputSpec.nothing`, with its weights. The sum of the normalized weights of
several patches is their *share*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import Array, to_numpy
from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.rules import rule_of
from chunkq.blend.weights import Weights, multiply_out
from chunkq.geometry.box import Box
from chunkq.plan.chunk import Chunk, Index, Patch
from chunkq.plan.plan import Plan
from chunkq.system import buffers

Floats = npt.NDArray[np.floating]


def add_share(total: Array, weights: PatchWeights, patches: Sequence[Patch], box: Box) -> None:
    """Add the normalized weights of patches to `total` (*box.shape), in order and in place.

    `total` is a NumPy array, or in the memory of `weights`. Voxels outside the box are left out.
    """
    for patch in patches:
        shared = patch.target & box
        if not shared.size:
            continue
        view = total[shared.slices(box.start)]
        if weights.has_no_overlap(patch):
            view += 1
        else:
            part = weights.weights(patch)[shared.slices(patch.target.start)]
            view += to_numpy(part) if isinstance(total, np.ndarray) else part


class EmptyChunks:
    """The sums that the empty chunks of a plan contribute to blocks. Thread-safe."""

    def __init__(self, plan: Plan, weights: Weights) -> None:
        self._plan, self._lock = plan, Lock()
        self._weights = PatchWeights(plan, weights, _unchanged)

    def sums(self, index: Index, box: Box) -> Floats:
        """Return the sums (K, *box.shape) of all patches of a chunk, which are empty."""
        output = self._plan.output
        sums: Floats = buffers.zeros((output.sums_channels, *box.shape), output.sums_dtype)
        if output.nothing_counts:
            with self._lock:
                share = self._share(self._plan.chunk(index), box)
            rule_of(output).add_nothing(sums, share)
        return sums

    def _share(self, chunk: Chunk, box: Box) -> Floats:
        share: Floats = buffers.zeros(box.shape, self._plan.output.sums_dtype)
        if self._weights.is_product:
            ranges = zip(chunk.owned[0], box.start, box.stop, strict=True)
            multiply_out([self._profile(a, *along) for a, along in enumerate(ranges)], share)
        else:
            add_share(share, self._weights, list(_touching(self._plan, chunk, box)), box)
        return share

    def _profile(self, axis: int, numbers: range, low: int, high: int) -> Floats:
        """Return the sum of the profiles of patches along one axis over `[low, high)`."""
        total = np.zeros(high - low, self._plan.output.sums_dtype)
        along = self._plan.axes[axis]
        grid = along.grids[0]
        for number in numbers:
            start = grid.start(number) + grid.lead
            first, last = max(start, low), min(start + grid.kept, high)
            if first < last:
                near = self._weights.neighbors_along(axis, 0, number)
                profile = self._weights.profile(axis, near)
                total[first - low : last - low] += profile[first - start : last - start]
        return total


def _touching(plan: Plan, chunk: Chunk, box: Box) -> Iterator[Patch]:
    """Yield the patches of a chunk that predict a voxel of a box, in the order of the plan."""
    for g, owned in enumerate(chunk.owned):
        ranges = []
        for axis, numbers, low, high in zip(plan.axes, owned, box.start, box.stop, strict=True):
            near = axis.grids[g].touching(low, high)
            ranges.append(range(max(numbers.start, near.start), min(numbers.stop, near.stop)))
        for chosen in product(*ranges):
            yield plan.patch(g, chosen)


def _unchanged(array: Any) -> Any:
    return array
