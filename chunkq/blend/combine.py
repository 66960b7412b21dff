"""Combine overlapping predictions: activation, votes, weighted sums, labels.

The functions accept NumPy arrays and torch tensors (through the array API), on the host and on a
device. Predictions are channels first.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace

from chunkq.plan.outputs import Activation
from chunkq.system import buffers

Array = Any
"""A NumPy array or a torch tensor."""
PRODUCT_BYTES = 1 << 18
"""Bytes of products of weights and predictions that are computed before they are added."""


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
    if not is_host_array(raw):  # one kernel
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
    if not is_host_array(predictions):  # few kernels; `argmax` is slow on the host only
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
        for slab in row_slabs(total.shape, PRODUCT_BYTES // total.itemsize):
            total[slab] += weights[slab[1]] * values[slab]
    else:
        total.addcmul_(weights, values)


def row_slabs(shape: Sequence[int], values: int) -> list[tuple[slice, slice]]:
    """Return slices of the first two axes that cover (K, *S) in parts of about so many values."""
    row = max(1, prod(shape) // max(1, shape[1]))
    step = max(1, values // row)
    return [(slice(None), slice(first, first + step)) for first in range(0, shape[1], step)]


def copy_into(total: Array, values: Array) -> None:
    """Copy `values` into `total`, which has the same shape and dtype.

    Host arrays are copied by NumPy, because torch's thread pool slows down if other threads
    compute.
    """
    if is_host_array(total) and is_host_array(values):
        np.copyto(to_numpy(total), to_numpy(values))
    else:
        total[...] = values


def as_float32(values: Array) -> Array:
    """Return the values as float32, without a copy if they are; too large ones are infinite."""
    xp = namespace(values)
    if values.dtype == xp.float32:
        return values
    with np.errstate(over="ignore"):
        return xp.astype(values, xp.float32, copy=False)


def as_float(values: Array) -> Array:
    """Return the values as float32 or float64, which NumPy can represent, unlike bfloat16."""
    return values if values.dtype == namespace(values).float64 else as_float32(values)


def is_finite(values: Array) -> bool:
    """Return whether all values are finite; can be False for finite values whose sum overflows."""
    if is_host_array(values):
        values = to_numpy(values)
    xp = namespace(values)
    with np.errstate(over="ignore", invalid="ignore"):
        # The sum needs one pass and no temporary array.
        return bool(xp.isfinite(xp.sum(values)))


def labels_of(average: Array) -> Array:
    """Return the labels (*S) of an average or vote share (C, *S), on the same device.

    The label is the largest channel, the lowest one in a tie, or for a single channel whether it is
    at least 0.5.
    """
    if is_host_array(average):
        average = to_numpy(average)
    return average[0] >= 0.5 if average.shape[0] == 1 else _largest(average, axis=0)


def to_labels(average: Array, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return `labels_of` an average (C, *S) as a NumPy array of a dtype."""
    labels = to_numpy(labels_of(average))
    return labels if labels.dtype == dtype else buffers.cast(labels, dtype)


def to_numpy(array: Array) -> npt.NDArray[Any]:
    """Return the array as a NumPy array, without a copy if it is in host memory."""
    if isinstance(array, np.ndarray):
        return array
    return cast("npt.NDArray[Any]", array.detach().cpu().numpy())


def is_host_array(array: Array) -> bool:
    """Return whether an array is in host memory."""
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
