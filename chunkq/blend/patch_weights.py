"""Normalized blend weights of the patches of a plan.

Built-in weights over one grid are an outer product of one profile per axis, so the profiles are
stored and multiplied when they are used. Other weights are stored as maps in a cache of limited
size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import Array
from chunkq.blend.weights import Neighbors, ProductWeights, Weights, multiply_out, neighbors
from chunkq.plan.chunk import Patch
from chunkq.plan.plan import Plan
from chunkq.system import buffers

MAP_CACHE_BYTES = 256 << 20
NEIGHBORS_CACHED = 1 << 14
"""Neighbors along one axis in the cache; adjacent patches share them along all but one axis."""
SHARES_CACHED = 1 << 10
"""Profiles of neighborhoods in the cache; an axis has about as many as patches overlap."""
NeighborsPerAxis = tuple[Neighbors, ...]
"""The neighbors of one patch, one entry per axis."""


class PatchWeights:
    """The weights of a plan's patches, divided by their sum over all patches of a voxel.

    They have the dtype of the sums of the plan's output. `to_device` copies an array to the memory
    of the predictions. It can return an array that shares memory with its argument. Maps in the
    cache have at most `map_bytes` in all. Not thread-safe: use it in one thread.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Weights,
        to_device: Callable[[Any], Array],
        map_bytes: int | None = None,
    ) -> None:
        self._plan, self._weights, self._to_device = plan, weights, to_device
        self._map_bytes = MAP_CACHE_BYTES if map_bytes is None else map_bytes
        self._neighbors = [
            lru_cache(NEIGHBORS_CACHED)(partial(neighbors, axis)) for axis in plan.axes
        ]
        self._maps: dict[NeighborsPerAxis, Array] = {}
        self._stored_bytes = 0
        self._dtype = plan.output.sums_dtype
        self._product: tuple[NeighborsPerAxis, Array] | None = None
        self._scratch: npt.NDArray[np.floating] | None = None
        if isinstance(weights, ProductWeights) and len(plan.axes[0].grids) == 1:
            self._share = lru_cache(SHARES_CACHED)(partial(weights.share, dtype=self._dtype))
            self.is_product = True
        else:
            self.is_product = False

    def neighbors(self, patch: Patch) -> NeighborsPerAxis:
        """Return the neighbors of a patch along each axis."""
        along = zip(self._neighbors, patch.numbers, strict=True)
        return tuple([find(patch.grid, number) for find, number in along])

    def neighbors_along(self, axis: int, grid: int, number: int) -> Neighbors:
        """Return the neighbors of a patch of a grid along one axis."""
        return self._neighbors[axis](grid, number)

    def has_no_overlap(self, patch: Patch) -> bool:
        """Return whether no other patch covers the patch's target; its weights are then all 1."""
        return _has_no_overlap(self.neighbors(patch))

    def profile(self, axis: int, near: Neighbors) -> npt.NDArray[np.floating]:
        """Return w / Σw of the kept voxels along one axis, 0 outside the volume.

        The weights of a patch are the product of its profiles along all axes if `is_product`.
        """
        profile = np.zeros(self._plan.axes[axis].grids[0].kept, self._dtype)
        profile[near.low : near.high] = self._share(axis, near)
        return profile

    def weights(self, patch: Patch) -> Array:
        """Return w / Σw over the patch's target: shape `patch.target.shape`.

        If `is_product`, the array is valid until the next call.
        """
        return self._normalized(self.neighbors(patch))

    def weights_if_shared(self, patch: Patch) -> Array | None:
        """Return the `weights` of a patch; None if it has no overlap, so that they are all 1."""
        near = self.neighbors(patch)
        return None if _has_no_overlap(near) else self._normalized(near)

    def prepare(self, patches: Iterable[Patch]) -> None:
        """Compute the maps of the first of these patches, as many as fit in the cache.

        Allocated during inference, these small, long-lived arrays would fragment the heap.
        """
        if self.is_product:
            return
        prepared, free_bytes = set(), self._map_bytes
        for patch in patches:
            near = self.neighbors(patch)
            if near in prepared or _has_no_overlap(near):
                continue
            prepared.add(near)
            free_bytes -= patch.target.size * self._dtype.itemsize
            if free_bytes < 0:
                return
            self._map(near)

    def _normalized(self, near: NeighborsPerAxis) -> Array:
        return self._multiplied(near) if self.is_product else self._map(near)

    def _multiplied(self, near: NeighborsPerAxis) -> Array:
        if self._product is None or self._product[0] != near:
            shares = [self._share(axis, n) for axis, n in enumerate(near)]
            shape = [len(share) for share in shares]
            if self._scratch is None:
                kept = prod(axis.grids[0].kept for axis in self._plan.axes)
                self._scratch = buffers.zeros((kept,), self._dtype)
            product = self._scratch[: prod(shape)].reshape(shape)
            multiply_out(shares, product)
            self._product = near, self._to_device(product)
        return self._product[1]

    def _map(self, near: NeighborsPerAxis) -> Array:
        if near in self._maps:
            return self._maps[near]
        weights = self._to_device(self._weights.normalized(near, self._dtype))
        size = prod(weights.shape) * self._dtype.itemsize
        # Chunks use the maps in turns. Without the oldest, each would be evicted before its use.
        while self._maps and self._stored_bytes + size > self._map_bytes:
            _, newest = self._maps.popitem()
            self._stored_bytes -= prod(newest.shape) * 4
        self._maps[near] = weights
        self._stored_bytes += size
        return weights


@lru_cache(SHARES_CACHED)
def _has_no_overlap(neighbors: NeighborsPerAxis) -> bool:
    """Return whether a patch has no neighbor except itself."""
    starts_per_grid = zip(*(near.starts for near in neighbors), strict=True)
    return sum(prod(map(len, starts)) for starts in starts_per_grid) == 1
