"""Blend weights of patches, normalized from the geometry of the plan.

The weights of a patch are divided by the sum of the weights of all patches that cover the voxel.
Partial sums of different chunks therefore add up to the weighted average. Built-in weights are
products of 1-D profiles. They are stored as logarithms, because the product can underflow float64
(`weight_bump` at 128³) while the normalized weight does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chunkq.blend.weight_profiles import LOG_PROFILES, Float64
from chunkq.geometry.grids import AxisGeometry
from chunkq.system import buffers

Floats = npt.NDArray[np.floating]


class Neighbors(NamedTuple):
    """The patches that overlap one patch along one axis, itself included.

    A tuple, because it is a key of caches: Python does not run to hash or compare it.

    Positions are relative to the first kept voxel of the patch. `[low, high)` is the part of its
    kept voxels inside the volume; it can be empty. `starts[g]` holds the first kept voxels of the
    patches of grid g whose kept voxels intersect that part. Normalized weights depend on nothing
    else.
    """

    low: int
    high: int
    starts: tuple[tuple[int, ...], ...]


def neighbors(axis: AxisGeometry, grid: int, number: int) -> Neighbors:
    """Return the neighbors of patch `number` of grid `grid` along the axis."""
    own_grid = axis.grids[grid]
    start = own_grid.start(number) + own_grid.lead
    first, end = own_grid.kept_in_volume(number)
    if first == end:
        return Neighbors(0, 0, ((),) * len(axis.grids))
    low, high = first - start, end - start
    starts = tuple(
        tuple(
            other.start(k) + other.lead - start for k in other.touching(start + low, start + high)
        )
        for other in axis.grids
    )
    return Neighbors(low, high, starts)


@dataclass(frozen=True)
class ProductWeights:
    """Weights that are the product of one profile per axis.

    `profiles[a]` holds the natural logarithm of the weights of the kept voxels along axis a,
    shape (kept[a],), float64.
    """

    profiles: tuple[Float64, ...]

    def share(self, axis: int, near: Neighbors, dtype: npt.DTypeLike = np.float32) -> Floats:
        """Return w / Σw along one axis of a patch of the only grid, computed in float64.

        The array has the length of the patch's part inside the volume. The normalized weights of
        the patch are the product of its shares along all axes.
        """
        profile = self.profiles[axis]
        [log_sum] = _log_sums(profile, near)
        return np.exp(profile[near.low : near.high] - log_sum).astype(dtype)

    def normalized(
        self, neighbors: Sequence[Neighbors], dtype: npt.DTypeLike = np.float32
    ) -> Floats:
        """Return w / Σw of a patch; `neighbors` has one entry per axis.

        The array has the shape of the patch's part inside the volume, in C order. It is computed in
        float64.
        """
        pairs = list(zip(self.profiles, neighbors, strict=True))
        logs = [profile[near.low : near.high] for profile, near in pairs]
        sums = [_log_sums(profile, near) for profile, near in pairs]
        totals = np.stack([_outer_sum(terms) for terms in zip(*sums, strict=True)])
        ratio = _outer_sum(logs)
        ratio -= np.logaddexp.reduce(totals, axis=0)
        return _rounded(np.exp(ratio, out=ratio), dtype)


@dataclass(frozen=True)
class ArrayWeights:
    """Weights from a user's function: a positive float64 array of the shape of the kept voxels."""

    array: Float64

    @cached_property
    def scaled(self) -> Float64:
        """The weights divided by the largest one, so that their sums do not overflow."""
        scaled: Float64 = self.array / self.array.max()
        return scaled

    def normalized(
        self, neighbors: Sequence[Neighbors], dtype: npt.DTypeLike = np.float32
    ) -> Floats:
        """Return w / Σw of a patch; `neighbors` has one entry per axis.

        The array has the shape of the patch's part inside the volume, in C order. It is computed in
        float64.
        """
        total = np.zeros([near.high - near.low for near in neighbors])
        for g in range(len(neighbors[0].starts)):
            for offsets in product(*(near.starts[g] for near in neighbors)):
                in_patch, in_neighbor = [], []
                for near, offset, kept in zip(neighbors, offsets, self.scaled.shape, strict=True):
                    low, high = max(near.low, offset), min(near.high, offset + kept)
                    in_patch.append(slice(low - near.low, high - near.low))
                    in_neighbor.append(slice(low - offset, high - offset))
                total[tuple(in_patch)] += self.scaled[tuple(in_neighbor)]
        weights = self.scaled[tuple(slice(near.low, near.high) for near in neighbors)]
        return _rounded(np.divide(weights, total, out=total), dtype)


Weights = ProductWeights | ArrayWeights


def _rounded(weights: Float64, dtype: npt.DTypeLike) -> Floats:
    """Return weights in a dtype."""
    return weights if dtype == np.float64 else buffers.cast(weights, dtype)


def multiply_out(factors: Sequence[Floats], out: Floats) -> None:
    """Write the outer product of one factor per axis to `out`, which has one axis per factor.

    The factors are multiplied from the first to the last, so that other implementations of this
    product can give the same bytes.
    """
    *leading, last = factors
    product = np.ones((), out.dtype)
    for factor in leading:
        product = product[..., np.newaxis] * factor
    np.multiply(product[..., np.newaxis], last, out=out)


def built_in_weights(
    name: str, output_patch: Sequence[int], margin: Sequence[int]
) -> ProductWeights:
    """Return the built-in weights of an output patch, cropped by its margin."""
    profile = LOG_PROFILES[name]
    return ProductWeights(
        tuple(profile(q)[m : q - m] for q, m in zip(output_patch, margin, strict=True))
    )


def _log_sums(profile: Float64, near: Neighbors) -> list[Float64]:
    """Return for each grid log Σ_k w_k along one axis, over the patch's part inside the volume.

    The value is -inf where the grid has no patch.
    """
    sums = []
    for starts in near.starts:
        total = np.full(near.high - near.low, -np.inf)
        for offset in starts:
            low, high = max(near.low, offset), min(near.high, offset + len(profile))
            view = total[low - near.low : high - near.low]
            np.logaddexp(view, profile[low - offset : high - offset], out=view)
        sums.append(total)
    return sums


def _outer_sum(terms: Sequence[Float64]) -> Float64:
    """Return the array t[i, j, …] = Σ_a terms[a][i_a]."""
    total = terms[0]
    for term in terms[1:]:
        total = total[..., np.newaxis] + term
    return total.copy()
