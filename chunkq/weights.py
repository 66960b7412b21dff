"""Patch weights, and their normalisation from geometry alone.

Each patch is blended with weights that are already divided by the sum over every patch that
covers the voxel, so partial sums from different chunks simply add up to the average. The
built-in weights are products of 1-D profiles; these are kept as logarithms, so that profiles
whose product underflows any float (`weight_bump` at 128³) still divide exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from chunkq import buffers
from chunkq.grids import Axis

NEIGHBORS_CACHED = 1 << 14
"""The patches of a chunk share their surroundings row by row."""
Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]


def _uniform(n: int) -> Float64:
    return np.zeros(n)


def _gaussian(n: int) -> Float64:
    sigma = n / 8
    distance = np.arange(n, dtype=np.float64) - (n - 1) / 2
    return -np.square(distance) / (2 * sigma**2)


def _linear(n: int) -> Float64:
    i = np.arange(n)
    return np.log(np.minimum(i + 1, n - i))


def _hann(n: int) -> Float64:
    return 2 * np.log(np.sin(np.pi * (np.arange(n) + 1) / (n + 1)))


def _bump(n: int) -> Float64:
    t = (2 * np.arange(n) + 1) / n - 1
    return -1 / (1 - t**2)


LOG_PROFILES: MappingProxyType[str, Callable[[int], Float64]] = MappingProxyType(
    {
        "weight_uniform": _uniform,
        "weight_gaussian": _gaussian,
        "weight_linear": _linear,
        "weight_hann": _hann,
        "weight_bump": _bump,
    }
)


@dataclass(frozen=True, slots=True)
class Neighbors:
    """One patch along one axis, seen from its own start: all that its weights depend on.

    `[low, high)` is the part of the kept voxels inside the volume; `starts[g]` are the starts,
    relative to this patch's, of the patches of grid g whose kept voxels meet that part.
    """

    low: int
    high: int
    starts: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=NEIGHBORS_CACHED)
def neighbors(axis: Axis, grid: int, number: int) -> Neighbors:
    """Return what surrounds patch `number` of grid `grid` along this axis."""
    own = axis.grids[grid]
    start = own.start(number) + own.lead
    low, high = max(0, -start), min(own.kept, axis.volume - start)
    starts = tuple(
        tuple(
            other.start(k) + other.lead - start for k in other.touching(start + low, start + high)
        )
        for other in axis.grids
    )
    return Neighbors(low, high, starts)


@dataclass(frozen=True)
class ProductWeights:
    """Weights that are a product of one profile per axis.

    `profiles[a]` holds the natural logarithm of the kept voxels' weights along axis a.
    """

    profiles: tuple[Float64, ...]

    def normalized(self, grid: int, around: Sequence[Neighbors]) -> Float32:
        """Return w / Σw for one patch: shape of the patch's part inside the volume, float32."""
        own = [p[s.low : s.high] for p, s in zip(self.profiles, around, strict=True)]
        sums = [_log_sums(p, s) for p, s in zip(self.profiles, around, strict=True)]
        ratio = _outer_sum([p - s[grid] for p, s in zip(own, sums, strict=True)])
        grids = len(around[0].starts)
        if grids > 1:
            totals = np.stack([_outer_sum([s[g] for s in sums]) for g in range(grids)])
            ratio += totals[grid] - np.logaddexp.reduce(totals, axis=0)
        return buffers.cast(np.exp(ratio, out=ratio), np.float32)


@dataclass(frozen=True)
class ArrayWeights:
    """A user's weights: any positive float64 array of the kept voxels' shape."""

    array: Float64

    @cached_property
    def shares(self) -> Float64:
        """The weights over the largest of them: only ratios matter, and huge sums overflow."""
        shares: Float64 = self.array / self.array.max()
        return shares

    def normalized(self, grid: int, around: Sequence[Neighbors]) -> Float32:
        """Return w / Σw for one patch: shape of the patch's part inside the volume, float32."""
        total = np.zeros([s.high - s.low for s in around])
        for g in range(len(around[0].starts)):
            for offsets in product(*(s.starts[g] for s in around)):
                here, there = [], []
                for s, offset, kept in zip(around, offsets, self.shares.shape, strict=True):
                    low, high = max(s.low, offset), min(s.high, offset + kept)
                    here.append(slice(low - s.low, high - s.low))
                    there.append(slice(low - offset, high - offset))
                total[tuple(here)] += self.shares[tuple(there)]
        own = self.shares[tuple(slice(s.low, s.high) for s in around)]
        return buffers.cast(np.divide(own, total, out=total), np.float32)


Weights = ProductWeights | ArrayWeights


def built_in(name: str, output_patch: Sequence[int], margin: Sequence[int]) -> ProductWeights:
    """Return the built-in weights of an output patch, less its margin."""
    profile = LOG_PROFILES[name]
    return ProductWeights(
        tuple(profile(q)[m : q - m] for q, m in zip(output_patch, margin, strict=True))
    )


def _log_sums(profile: Float64, around: Neighbors) -> list[Float64]:
    """Return per grid log Σ_k w_k along one axis, over the patch's part inside the volume.

    Where a grid has no patch the sum is 0 and its logarithm -inf.
    """
    sums = []
    for starts in around.starts:
        total = np.full(around.high - around.low, -np.inf)
        for offset in starts:
            low, high = max(around.low, offset), min(around.high, offset + len(profile))
            view = total[low - around.low : high - around.low]
            np.logaddexp(view, profile[low - offset : high - offset], out=view)
        sums.append(total)
    return sums


def _outer_sum(terms: Sequence[Float64]) -> Float64:
    """Return the array t[i, j, …] = Σ_a terms[a][i_a]."""
    total = terms[0]
    for term in terms[1:]:
        total = total[..., np.newaxis] + term
    return total.copy()
