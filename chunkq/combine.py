"""How overlapping predictions become one: activation, votes, weighted sums, the decision.

The same functions serve NumPy arrays and torch tensors (through the array API), on the host
and on a device. Predictions are channels first.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace

from chunkq import buffers
from chunkq.errors import PredictionError

Combine = Literal["weighted_avg", "soft", "hard"]
Activation = Literal["none", "softmax", "sigmoid"]
Array = Any
"""A NumPy array or a torch tensor."""


def namespace(array: Array) -> Any:
    """Return the module whose functions serve an array.

    NumPy serves its own: array_api_compat's wrapping of it takes a tenth of a second to import.
    """
    return np if isinstance(array, np.ndarray) else array_namespace(array)


def activate(raw: Array, activation: Activation) -> Array:
    """Apply the activation to raw outputs of shape (N, C, *Q); softmax runs over C."""
    if activation == "none":
        return raw
    xp = namespace(raw)
    if activation == "sigmoid":
        # tanh does not overflow where exp(-x) would.
        return (xp.tanh(raw / 2) + 1) / 2
    powers = xp.exp(raw - xp.max(raw, axis=1, keepdims=True))
    return powers / xp.sum(powers, axis=1, keepdims=True)


def to_votes(predictions: Array) -> Array:
    """Turn predictions (N, C, *Q) into votes of the same shape and dtype, each 0 or 1.

    Each voxel votes for its largest channel, the lowest of several; a single channel votes
    whether it is at least 0.5.
    """
    xp = namespace(predictions)
    if predictions.shape[1] == 1:
        return xp.astype(predictions >= 0.5, predictions.dtype)
    winners = _largest(predictions, axis=1)
    votes = [
        xp.astype(winners == channel, predictions.dtype) for channel in range(predictions.shape[1])
    ]
    return xp.stack(votes, axis=1)


def add_weighted(total: Array, weights: Array, values: Array) -> None:
    """Add `weights * values` to `total` in place; shapes (C, *S), (*S), (C, *S)."""
    if isinstance(total, np.ndarray):
        for channel, value in zip(total, values, strict=True):
            np.add(channel, weights * value, out=channel)
    else:
        total.addcmul_(weights, values)


def copy_into(total: Array, values: Array) -> None:
    """Copy `values` to `total`, which is alike.

    On the host NumPy does it: torch's threads would wait for each other where others compute.
    """
    if _is_host_array(total) and _is_host_array(values):
        np.copyto(to_numpy(total), to_numpy(values))
    else:
        total[...] = values


def is_finite(values: Array) -> bool:
    """Tell whether no value is NaN or infinite; False also where their sum overflows."""
    if _is_host_array(values):
        values = to_numpy(values)
    xp = namespace(values)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(xp.isfinite(xp.sum(values)))  # a single pass


def reduce_and_cast(average: Array, combine: Combine, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Turn the average or vote share (C, *S) into what is stored, on the host.

    `weighted_avg` keeps (C, *S) and casts; `soft` and `hard` give labels (*S): the largest
    channel, the lowest of several, or for one channel whether it reaches 0.5. Raises
    PredictionError where float16 cannot hold an average.
    """
    return cast_output(to_numpy(reduce(average, combine)), combine, dtype)


def reduce(average: Array, combine: Combine) -> Array:
    """Do the part of `decide` that reduces, where the average lies."""
    if combine == "weighted_avg":
        return average
    if _is_host_array(average):
        average = to_numpy(average)
    return average[0] >= 0.5 if average.shape[0] == 1 else _largest(average, axis=0)


def cast_output(
    result: npt.NDArray[Any], combine: Combine, dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """Do the rest of `decide`, on the host; raises PredictionError as that does."""
    with np.errstate(over="ignore"):
        stored = result if result.dtype == dtype else buffers.cast(result, dtype)
    if combine == "weighted_avg" and stored.dtype == np.float16 and not np.isfinite(stored).all():
        raise PredictionError(
            "an average lies beyond the range of float16; use output_dtype: float32"
        )
    return stored


def to_numpy(array: Array) -> npt.NDArray[Any]:
    """Return the array as NumPy; without a copy where it already lies in host memory."""
    if isinstance(array, np.ndarray):
        return array
    return cast("npt.NDArray[Any]", array.detach().cpu().numpy())


def _is_host_array(array: Array) -> bool:
    return isinstance(array, np.ndarray) or array.device.type == "cpu"


def label_dtype(classes: int) -> np.dtype[Any]:
    """Return the smallest unsigned dtype for labels: uint8, or uint16 past 256 classes."""
    return np.dtype(np.uint8 if classes <= 256 else np.uint16)


def _largest(values: Array, axis: int) -> Array:
    """Return the index of the largest entry along `axis`, the lowest of several; uint8 if it fits.

    Values are not NaN. Channel by channel and without `where`: an argmax over a strided axis, and
    a choice voxel by voxel, are an order of magnitude slower.
    """
    xp = namespace(values)
    channels = xp.moveaxis(values, axis, 0)
    best = channels[0, ...]
    dtype = xp.uint8 if channels.shape[0] <= 256 else xp.int32
    winner = xp.zeros_like(best, dtype=dtype)
    for number in range(1, channels.shape[0]):
        channel = channels[number, ...]
        # Where it is larger than all before, its number is larger than any winner's.
        wins = xp.astype(channel > best, dtype) * xp.asarray(number, dtype=dtype)
        winner = xp.maximum(winner, wins)
        if number + 1 < channels.shape[0]:
            best = xp.maximum(best, channel)
    return winner
