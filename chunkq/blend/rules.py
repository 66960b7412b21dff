"""`CombineRule`: how the predictions of an output are summed, merged and reduced.

A rule is the only place that knows what the sums of its output mean. Sums are arrays (K, *S) of
`OutputSpec.sums_channels` entries in `OutputSpec.sums_dtype`. Predictions are (C, *S), weights
(*S), normalized. The functions change sums in place, and accept NumPy arrays and torch tensors, on
the host and on a device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from math import log
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq.blend import moments
from chunkq.blend.combine import (
    Array,
    activate,
    add_weighted,
    as_float32,
    copy_into,
    is_host_array,
    labels_of,
    namespace,
    row_slabs,
    to_numpy,
)
from chunkq.errors import PredictionError
from chunkq.plan.empty_rule import Bools
from chunkq.plan.footprint import SLAB_BYTES
from chunkq.plan.outputs import OutputSpec
from chunkq.system import buffers

Voxels = npt.NDArray[Any]


class CombineRule(ABC):
    """The rule of one output: `weighted_avg`, `soft`, `hard`, `std` or `entropy`."""

    def __init__(self, output: OutputSpec) -> None:
        self.output = output

    def put(self, sums: Array, values: Array) -> None:
        """Set the sums of voxels that only this prediction covers."""
        copy_into(sums, values)

    def add(self, sums: Array, weights: Array, values: Array) -> None:
        """Add a prediction with its weights."""
        add_weighted(sums, weights, values)

    def merge(self, sums: Array, others: Array) -> None:
        """Add sums of other patches."""
        sums += others

    def add_nothing(self, sums: Array, share: Array) -> None:
        """Add the prediction of empty patches, whose weights add up to `share` (*S)."""
        for channel, value in enumerate(self.output.nothing.tolist()):
            if value:
                sums[channel] += share * value

    @abstractmethod
    def reduce(self, sums: Array) -> Array:
        """Return the result of complete sums, in the memory of the sums: see `store`."""

    def store(self, result: Voxels, inside: Bools | None = None) -> Voxels:
        """Return output values ([C,] *S) in the output's dtype from a result of `reduce`.

        The result is (C, *S) here, of as many channels as are stored, and labels (*S) for `soft`
        and `hard`. A device may have converted it to the integers of a range. Voxels that are not
        `inside` (*S) have the fill value. Raises PredictionError if float16 cannot hold a value.
        """
        outside: Any = self.output.outside
        if self.output.value_range is not None and result.dtype.kind in "iu":
            result = result.view(self.output.dtype)  # a device sends uint16 as int16
            outside = self.output.fill
        if inside is not None:
            result = result if result.flags.writeable else result.copy()
            result[:, ~inside] = outside  # before values beyond the range are refused
        values = self._cast(result)
        return values if self.output.channel_axis else values[0]

    def _cast(self, result: Voxels) -> Voxels:
        dtype = self.output.dtype
        if self.output.value_range is not None and result.dtype != dtype:
            return self.output.value_range.stored(result)
        with np.errstate(over="ignore"):
            values = result if result.dtype == dtype else buffers.cast(result, dtype)
        if dtype == np.float16 and not np.isfinite(values).all():
            raise PredictionError(
                "output_dtype: float16 cannot hold an average of this chunk; use float32"
            )
        return values


class AverageRule(CombineRule):
    """`weighted_avg`: the average of each channel (C, *S), then `activation_after`."""

    @override
    def reduce(self, sums: Array) -> Array:
        after = self.output.activation_after
        if after == "none":
            return sums

        def activated(part: Array) -> Array:
            return activate(part[np.newaxis], after)[0]

        return _by_slabs(activated, sums, len(sums))


class LabelRule(CombineRule):
    """`soft` and `hard`: the label with the largest average, or share of votes (*S)."""

    @override
    def reduce(self, sums: Array) -> Array:
        return labels_of(sums)

    @override
    def store(self, result: Voxels, inside: Bools | None = None) -> Voxels:
        labels = self._cast(result)
        if inside is not None:
            labels[~inside] = self.output.outside
        return labels


class EntropyRule(CombineRule):
    """`entropy`: that of the average of all channels (1, *S), in nats."""

    @override
    def reduce(self, sums: Array) -> Array:
        return _by_slabs(entropy, sums, 1)


class DeviationRule(CombineRule):
    """`std`: the weighted standard deviation of each channel (C, *S), float32.

    Its sums are moments.
    """

    @override
    def put(self, sums: Array, values: Array) -> None:
        moments.put_values(sums, values)

    @override
    def add(self, sums: Array, weights: Array, values: Array) -> None:
        if not is_host_array(sums):
            moments.add_values(sums, weights, values)
            return
        sums, weights, values = to_numpy(sums), to_numpy(weights), to_numpy(values)
        for slab in row_slabs(sums.shape, SLAB_BYTES // sums.itemsize):
            moments.add_values(sums[slab], weights[slab[1]], values[slab])

    @override
    def merge(self, sums: Array, others: Array) -> None:
        moments.add_moments(sums, others)

    @override
    def add_nothing(self, sums: Array, share: Array) -> None:
        moments.add_constants(sums, share, self.output.nothing.tolist())

    @override
    def reduce(self, sums: Array) -> Array:
        def deviations(part: Array) -> Array:
            return as_float32(namespace(part).sqrt(moments.variance(part)))

        return _by_slabs(deviations, sums, self.output.channels)


RULES: MappingProxyType[str, type[CombineRule]] = MappingProxyType(
    {
        "weighted_avg": AverageRule,
        "soft": LabelRule,
        "hard": LabelRule,
        "std": DeviationRule,
        "entropy": EntropyRule,
    }
)
"""Value of `combine` -> rule."""


@lru_cache(maxsize=64)
def rule_of(output: OutputSpec) -> CombineRule:
    """Return the rule of an output."""
    return RULES[output.combine](output)


def entropy(shares: Array) -> Array:
    """Return the entropy in nats (1, *S), float32, of shares (C, *S) that add up to 1.

    A single channel is the share of one of two classes.
    """
    xp, channels = namespace(shares), len(shares)
    parts = [shares[0], 1 - shares[0]] if channels == 1 else shares
    total = xp.zeros_like(shares[0])
    smallest = float(np.finfo(np.float32).tiny)
    for part in parts:
        share = _clipped(part, 0, 1)
        total -= share * xp.log(_clipped(share, smallest, 1))
    return _clipped(total, 0, log(max(2, channels)))[np.newaxis]


def _clipped(values: Array, low: float, high: float) -> Array:
    if isinstance(values, np.ndarray):
        return np.clip(values, np.float32(low), np.float32(high))
    return values.clamp(low, high)


def _by_slabs(function: Callable[[Array], Array], sums: Array, channels: int) -> Array:
    """Return a function of sums (K, *S) -> (channels, *S), float32.

    In host memory it is computed slab by slab, so that few temporary bytes exist.
    """
    if not is_host_array(sums):
        return function(sums)
    sums = to_numpy(sums)
    result = buffers.zeros((channels, *sums.shape[1:]), np.float32)
    for slab in row_slabs(sums.shape, SLAB_BYTES // sums.itemsize):
        result[slab] = function(sums[slab])
    return result
