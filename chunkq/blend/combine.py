"""Combine overlapping predictions: activation, votes, weighted sums, labels.

The functions accept NumPy arrays and torch tensors (through the array API), on the host and on a
device. Predictions are channels first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace

from chunkq.errors import PredictionError
from chunkq.plan.outputs import Activation, Combine
from chunkq.system import buffers

Array = Any
"""A NumPy array or a torch tensor."""


def namespace(array: Array) -> Any:
    """Return the array API namespace of an array.

    NumPy arrays use NumPy itself, because its wrapper in array_api_compat takes 0.1 s to import.
    """
    return np if isinstance(array, np.ndarray) else array_namespace(array)


def pick_channels(raw: Array, picks: Sequence[int] | None) -> Array:
    """Return some channels of raw outputs (N, C, *Q), in the order of `picks`; None for all.

    The result is contiguous, so that it has the bytes of a network that returns these channels.
    """
    if picks is None or list(picks) == list(range(raw.shape[1])):
        return raw
    xp = namespace(raw)
    return xp.stack([raw[:, channel, ...] for channel in picks], axis=1)


def activate(raw: Array, activation: Activation) -> Array:
    """Apply the activation to raw outputs of shape (N, C, *Q); softmax runs over C."""
    if activation == "none":
        return raw
    xp = namespace(raw)
    if not _is_host_array(raw):  # one kernel
        raw = xp.astype(raw, xp.float32, copy=False)
        return xp.sigmoid(raw) if activation == "sigmoid" else xp.softmax(raw, dim=1)
    if activation == "sigmoid":
        # tanh does not overflow where exp(-x) would.
        return (xp.tanh(raw / 2) + 1) / 2
    powers = xp.exp(raw - xp.max(raw, axis=1, keepdims=True))
    return powers / xp.sum(powers, axis=1, keepdims=True)


def to_votes(predictions: Array) -> Array:
    """Return the votes of predictions (N, C, *Q), 0 or 1, in the same shape and dtype.

    The vote of a voxel is 1 in its largest channel, the lowest one in a tie. A single channel is 1
    where the prediction is at least 0.5.
    """
    xp = namespace(predictions)
    if predictions.shape[1] == 1:
        return xp.astype(predictions >= 0.5, predictions.dtype)
    if not _is_host_array(predictions):  # few kernels; `argmax` is slow on the host only
        winner = xp.argmax(predictions, axis=1, keepdims=True)
        return xp.zeros_like(predictions).scatter_(1, winner, 1)
    winners = _largest(predictions, axis=1)
    votes = [
        xp.astype(winners == channel, predictions.dtype) for channel in range(predictions.shape[1])
    ]
    return xp.stack(votes, axis=1)


def label_votes(labels: Array, classes: int) -> Array:
    """Return votes (N, classes, *Q), float32 0 or 1, of labels (N, 1, *Q).

    A value that is no label from 0 to `classes` - 1 votes for nothing.
    """
    xp, values = namespace(labels), labels[:, 0, ...]
    return xp.stack([xp.astype(values == label, xp.float32) for label in range(classes)], axis=1)


def add_weighted(total: Array, weights: Array, values: Array) -> None:
    """Add `weights * values` to `total` in place: weights (*S), values and total (C, *S)."""
    if isinstance(total, np.ndarray):
        for channel, value in zip(total, values, strict=True):
            np.add(channel, weights * value, out=channel)
    else:
        total.addcmul_(weights, values)


def copy_into(total: Array, values: Array) -> None:
    """Copy `values` into `total`, which has the same shape and dtype.

    Host arrays are copied by NumPy, because torch's thread pool slows down if other threads
    compute.
    """
    if _is_host_array(total) and _is_host_array(values):
        np.copyto(to_numpy(total), to_numpy(values))
    else:
        total[...] = values


def as_float32(values: Array) -> Array:
    """Return the values as float32, without a copy if they are; too large ones are infinite."""
    xp = namespace(values)
    with np.errstate(over="ignore"):
        return xp.astype(values, xp.float32, copy=False)


def as_float(values: Array) -> Array:
    """Return the values as float32 or float64, which NumPy can represent, unlike bfloat16."""
    return values if values.dtype == namespace(values).float64 else as_float32(values)


def is_finite(values: Array) -> bool:
    """Return whether all values are finite; can be False for finite values whose sum overflows."""
    if _is_host_array(values):
        values = to_numpy(values)
    xp = namespace(values)
    with np.errstate(over="ignore", invalid="ignore"):
        # The sum needs one pass and no temporary array.
        return bool(xp.isfinite(xp.sum(values)))


def reduce_and_cast(average: Array, combine: Combine, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return the output values of an average or vote share (C, *S), as a NumPy array.

    `weighted_avg` returns the average (C, *S) in `dtype`. `soft` and `hard` return labels (*S): the
    largest channel, the lowest one in a tie, or for a single channel whether it is at least 0.5.
    Raises PredictionError if an average is out of the range of float16.
    """
    return cast_output(to_numpy(reduce(average, combine)), combine, dtype)


def reduce(average: Array, combine: Combine) -> Array:
    """Return the average (C, *S), or its labels (*S) for `soft` and `hard`, on the same device."""
    if combine == "weighted_avg":
        return average
    if _is_host_array(average):
        average = to_numpy(average)
    return average[0] >= 0.5 if average.shape[0] == 1 else _largest(average, axis=0)


def cast_output(
    result: npt.NDArray[Any], combine: Combine, dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """Return the result of `reduce` in the output's dtype.

    Raises PredictionError if an average is out of the range of float16.
    """
    with np.errstate(over="ignore"):
        output = result if result.dtype == dtype else buffers.cast(result, dtype)
    if combine == "weighted_avg" and output.dtype == np.float16 and not np.isfinite(output).all():
        raise PredictionError(
            "output_dtype: float16 cannot hold an average of this chunk; use float32"
        )
    return output


def to_numpy(array: Array) -> npt.NDArray[Any]:
    """Return the array as a NumPy array, without a copy if it is in host memory."""
    if isinstance(array, np.ndarray):
        return array
    return cast("npt.NDArray[Any]", array.detach().cpu().numpy())


def _is_host_array(array: Array) -> bool:
    return isinstance(array, np.ndarray) or array.device.type == "cpu"


def _largest(values: Array, axis: int) -> Array:
    """Return the index of the largest entry along `axis`, the lowest one in a tie.

    The dtype is uint8 for up to 256 entries, else int32. Values must not be NaN. Faster than
    `argmax` over a strided axis and than `where` by an order of magnitude.
    """
    xp = namespace(values)
    channels = xp.moveaxis(values, axis, 0)
    best = channels[0, ...]
    dtype = xp.uint8 if channels.shape[0] <= 256 else xp.int32
    winner = xp.zeros_like(best, dtype=dtype)
    for number in range(1, channels.shape[0]):
        channel = channels[number, ...]
        # `number` exceeds every earlier winner, so the maximum selects it where the channel wins.
        wins = xp.astype(channel > best, dtype) * xp.asarray(number, dtype=dtype)
        winner = xp.maximum(winner, wins)
        if number + 1 < channels.shape[0]:
            best = xp.maximum(best, channel)
    return winner
