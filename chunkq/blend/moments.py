"""Weighted means and squared deviations of predictions, added without cancellation.

The moments of C channels are an array (1 + 2 C, *S), float64: the sum of the weights, the weighted
mean of each channel, and its weighted sum of squared deviations from that mean. They are merged
pairwise (Chan, Golub and LeVeque, 1979), so that a difference of 1e-3 between values of 1e4 is not
lost, as it would be in a difference of sums of squares. The functions accept NumPy arrays and torch
tensors, on the host and on a device, and change moments in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from chunkq.blend.combine import Array, is_host_array, namespace, to_numpy

TINY = float(np.finfo(np.float64).tiny)


def moment_channels(channels: int) -> int:
    """Return the number of entries of moments for each voxel."""
    return 1 + 2 * channels


def put_values(moments: Array, values: Array) -> None:
    """Replace moments by those of one prediction (C, *S)."""
    moments = _host(moments)
    total, mean, squares = _split(moments)
    total[...] = 1
    mean[...] = _host(values)
    squares[...] = 0


def add_values(moments: Array, weights: Array, values: Array) -> None:
    """Add predictions (C, *S) with positive or zero weights, float64, of one channel (*S)."""
    moments, weights, values = _host(moments), _host(weights), _host(values)
    xp = namespace(moments)
    _add(moments, weights, xp.astype(values, xp.float64) - _split(moments)[1])


def add_constants(moments: Array, weights: Array, values: Sequence[float]) -> None:
    """Add predictions that are everywhere the same, one value per channel, with weights (*S)."""
    moments, weights = _host(moments), _host(weights)
    deltas = -_split(moments)[1]
    for channel, value in enumerate(values):
        deltas[channel] += value
    _add(moments, weights, deltas)


def add_moments(moments: Array, others: Array) -> None:
    """Add moments of the same shape."""
    moments, others = _host(moments), _host(others)
    weights, means, squares = _split(others)
    _add(moments, weights, means - _split(moments)[1])
    _split(moments)[2][...] += squares


def _add(moments: Array, weights: Array, deltas: Array) -> None:
    """Add predictions whose difference from the mean is `deltas` (C, *S), which is overwritten."""
    total, mean, squares = _split(moments)
    new = total + weights
    ratio = weights / _at_least_tiny(new)
    mean += deltas * ratio
    deltas *= deltas
    deltas *= total * ratio
    squares += deltas
    total[...] = new


def variance(moments: Array) -> Array:
    """Return the weighted variance of each channel (C, *S), float64; 0 where nothing was added."""
    total, _, squares = _split(moments)
    return squares / _at_least_tiny(total)


def _split(moments: Array) -> tuple[Array, Array, Array]:
    """Return views of the weights (1, *S), the means and the squares (C, *S)."""
    channels = (len(moments) - 1) // 2
    return moments[:1], moments[1 : 1 + channels], moments[1 + channels :]


def _at_least_tiny(weights: Array) -> Array:
    """Return sums of weights that can be divided by: 0 becomes the smallest normal number."""
    return np.maximum(weights, TINY) if isinstance(weights, np.ndarray) else weights.clamp(min=TINY)


def _host(array: Array) -> Any:
    """Return an array in host memory as a NumPy array, which shares its memory."""
    return to_numpy(array) if is_host_array(array) else array
