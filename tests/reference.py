"""Naive reference implementation of a job, after the documentation.

Computes the whole volume in memory, one patch after another, in float64 and without chunks. It is
derived from the sections "Geometry" and "Blending" of docs/design.md and the profiles in
docs/concepts.md alone, and imports nothing from chunkq. Spatial axes have the order of the volume.
Predictions are channels first: (C, *Q). A box is (start, stop) in voxels of the volume, with one
integer per axis each and an exclusive stop. Create a `Setup`, then call `reference`.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]
F64 = NDArray[np.float64]
Predict = Callable[[F64, Shape], F64]  # (input patch (*P), its start) -> (C, *Q)
Network = Callable[[F64, Shape], F64]  # (input patch (*P), output shape Q) -> (C, *Q)
WeightFunction = Callable[[Shape], NDArray[Any]]  # Q -> (*Q)


def axis_starts(
    volume: int, patch: int, stride: int, pad: int, offset: int, edge: str, unit: int = 1
) -> list[int]:
    """Return the starts of all input patches along one axis in ascending order.

    The last one that `shift` moves is rounded up to a multiple of `unit`.
    """
    if stride < 1 or patch < 1 or edge not in {"pad", "shift"}:
        raise ValueError(f"invalid patch {patch}, stride {stride} or edge {edge}")
    padded_end = volume + pad
    first = -pad + offset
    starts = [first]
    while starts[-1] + patch < padded_end:
        starts.append(starts[-1] + stride)
    if edge == "shift" and len(starts) > 1:
        starts[-1] = max(math.ceil((padded_end - patch) / unit) * unit, first)
    return starts


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The geometry of one output of a job; every tuple has one integer per spatial axis.

    Grid 0 has offset 0, grid g has offset `offsets[g - 1]`. `scale` are voxels of the input per
    voxel of the output, 1 if empty. `output_patch` is in voxels of the output, all other lengths
    are in voxels of the input and multiples of `unit`, the least common multiple of the scales of
    all outputs, 1 if empty.
    """

    volume: Shape
    input_patch: Shape
    output_patch: Shape
    stride: Shape
    pad_width: Shape
    margin: Shape
    edge: Literal["pad", "shift"]
    offsets: tuple[Shape, ...] = ()
    pad_mode: Literal["constant", "reflect", "symmetric", "edge"] = "constant"
    pad_value: float = 0.0
    scale: tuple[Fraction, ...] = ()
    unit: Shape = ()

    def __post_init__(self) -> None:
        axes = zip(self.input_patch, self.output_patch, self.margin, self.scales, strict=True)
        for p, q, m, f in axes:
            if q * f > p or (p - q * f) % 2:
                raise ValueError(f"output patch {q} cannot be centered in input patch {p}")
            if m < 0 or q * f - 2 * m < f:
                raise ValueError(f"margin {m} removes the whole output patch {q}")

    @property
    def scales(self) -> tuple[Fraction, ...]:
        """Voxels of the input per voxel of the output."""
        return self.scale or (Fraction(1),) * len(self.volume)

    @property
    def own_margin(self) -> Shape:
        """The margin in voxels of the output."""
        return tuple(int(m / f) for m, f in zip(self.margin, self.scales, strict=True))

    @property
    def shape(self) -> Shape:
        """The shape of the output in its own voxels: those that begin inside the volume."""
        return tuple(math.ceil(v / f) for v, f in zip(self.volume, self.scales, strict=True))


def _setup(defaults: dict[str, Any], options: dict[str, Any]) -> Setup:
    zeros = (0,) * len(defaults["volume"])
    return Setup(**({"pad_width": zeros, "margin": zeros} | defaults | options))


def patch(
    volume: Shape, p: Shape, q: Shape | None = None, offsets: Sequence[Shape] = (), **more: Any
) -> Setup:
    """Return the setup of `inference_type: patch`: stride Q, one grid, and one per offset.

    `more` sets pad_width (default 0), edge, pad_mode or pad_value.
    """
    shapes = {"volume": volume, "input_patch": p, "output_patch": q or p, "stride": q or p}
    return _setup(shapes | {"offsets": tuple(offsets), "edge": "pad"}, more)


def sliding_window(
    volume: Shape, p: Shape, strides: Shape, q: Shape | None = None, **more: Any
) -> Setup:
    """Return the setup of `inference_type: sliding_window`: one grid, shifted at the edge.

    `more` sets pad_width (default 0), edge, pad_mode or pad_value.
    """
    shapes = {"volume": volume, "input_patch": p, "output_patch": q or p, "stride": strides}
    return _setup(shapes | {"edge": "shift"}, more)


def crop_margin(
    volume: Shape, p: Shape, margin: Shape, q: Shape | None = None, **more: Any
) -> Setup:
    """Return the setup of `inference_type: crop_margin`: stride Q - 2 margin.

    `more` sets pad_width (default margin + (P - Q) / 2), edge, pad_mode or pad_value.
    """
    q = q or p
    stride = tuple(b - 2 * m for b, m in zip(q, margin, strict=True))
    pad = tuple(m + (a - b) // 2 for a, b, m in zip(p, q, margin, strict=True))
    shapes = {"volume": volume, "input_patch": p, "output_patch": q, "stride": stride}
    return _setup(shapes | {"margin": margin, "pad_width": pad, "edge": "pad"}, more)


def patches(setup: Setup) -> list[tuple[int, Shape, tuple[Shape, Shape]]]:
    """Return (grid, input start, kept box) of the patches whose kept box intersects the volume.

    They are ordered by grid, then by start, last axis fastest. The kept box is the output patch
    without its margin, in voxels of the output; it is not clipped to the volume.
    """
    s, rank, listed = setup, len(setup.volume), []
    for grid, offset in enumerate([(0,) * rank, *s.offsets]):
        edges, units = (s.edge,) * rank, s.unit or (1,) * rank
        numbers = zip(
            s.volume, s.input_patch, s.stride, s.pad_width, offset, edges, units, strict=True
        )
        for start in itertools.product(*(axis_starts(*of_axis) for of_axis in numbers)):
            lo, hi = [], []
            for a in range(rank):
                f, q = s.scales[a], s.output_patch[a]
                output_start = start[a] / f + (s.input_patch[a] / f - q) / 2
                if output_start != int(output_start):
                    raise ValueError(f"a patch at {start} begins between voxels of the output")
                lo.append(int(output_start) + s.own_margin[a])
                hi.append(int(output_start) + q - s.own_margin[a])
            if all(hi[a] > 0 and lo[a] < s.shape[a] for a in range(rank)):
                listed.append((grid, start, (tuple(lo), tuple(hi))))
    return listed


def _inside(setup: Setup, box: tuple[Shape, Shape]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the slices of a kept box clipped to the volume, into the volume and a (*Q) array."""
    in_volume, in_patch = [], []
    for lo, hi, v, m in zip(*box, setup.shape, setup.own_margin, strict=True):
        a, b = max(lo, 0), min(hi, v)
        in_volume.append(slice(a, b))
        in_patch.append(slice(a - lo + m, b - lo + m))
    return tuple(in_volume), tuple(in_patch)


def covered(setup: Setup) -> NDArray[np.bool_]:
    """Return whether each voxel of the output is in the kept box of a patch: bool, (*V)."""
    mask = np.zeros(setup.shape, dtype=np.bool_)
    for _, _, box in patches(setup):
        mask[_inside(setup, box)[0]] = True
    return mask


def pad_read(
    volume: NDArray[Any], start: Shape, shape: Shape, pad_mode: str, pad_value: float = 0.0
) -> NDArray[Any]:
    """Return the window [start, start + shape) of the padded volume, in the volume's dtype.

    The whole volume is padded with `np.pad` as far as the window extends.
    """
    before = [max(0, -s) for s in start]
    after = [max(0, s + n - v) for s, n, v in zip(start, shape, volume.shape, strict=True)]
    value = {"constant_values": pad_value} if pad_mode == "constant" else {}
    pad: Any = np.pad
    width = list(zip(before, after, strict=True))
    padded: NDArray[Any] = pad(volume, width, mode=pad_mode, **value)
    window = [slice(s + b, s + b + n) for s, b, n in zip(start, before, shape, strict=True)]
    return padded[tuple(window)]


def _log_profile(name: str, n: int) -> F64:
    """Return the natural logarithm of a built-in 1-D profile: (n,)."""
    i = np.arange(n, dtype=np.float64)
    profiles: dict[str, Callable[[], Any]] = {
        "weight_uniform": lambda: 0 * i,
        "weight_gaussian": lambda: -((i - (n - 1) / 2) ** 2) / (2 * (n / 8) ** 2),
        "weight_linear": lambda: np.log(np.minimum(i + 1, n - i)),
        "weight_hann": lambda: np.log(np.sin(math.pi * (i + 1) / (n + 1)) ** 2),
        "weight_bump": lambda: -1 / (1 - ((2 * i + 1) / n - 1) ** 2),
    }
    return np.asarray(profiles[name](), dtype=np.float64)


def log_weights(name: str, shape: Shape) -> F64:
    """Return the log of built-in weights for an output patch: (*shape), finite for every size."""
    total = np.zeros(shape)
    for axis, n in enumerate(shape):
        broadcast = [n if a == axis else 1 for a in range(len(shape))]
        total = total + _log_profile(name, n).reshape(broadcast)
    return total


def _weights(name: str, shape: Shape) -> F64:
    """Return built-in weights for an output patch: (*shape), 0 where float64 underflows."""
    return np.asarray(np.exp(log_weights(name, shape)), dtype=np.float64)


weight_uniform = partial(_weights, "weight_uniform")
weight_gaussian = partial(_weights, "weight_gaussian")
weight_linear = partial(_weights, "weight_linear")
weight_hann = partial(_weights, "weight_hann")
weight_bump = partial(_weights, "weight_bump")


def _log_of(weight: str | WeightFunction, shape: Shape) -> F64:
    """Return the log weights (*shape) of a built-in, or of a function, which must be positive."""
    if isinstance(weight, str):
        return log_weights(weight, shape)
    values = np.asarray(weight(shape), dtype=np.float64)
    if values.shape != shape or not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError(f"weights must be finite and positive and have shape {shape}")
    return np.asarray(np.log(values), dtype=np.float64)


class Reference(NamedTuple):
    """Result of `reference`.

    average              float64 (C, *V): the weighted average, or the vote shares for `hard`
    labels               (*V), uint8, or uint16 for more than 256 classes: the argmax of `average`
    margin_of_decision   float64 (*V): difference between the two largest channels of `average`, or
                         |average - 0.5| for a single channel. For `hard`, the minimum of this and
                         of the same difference of each prediction at the voxel, because rounding
                         can change a whole vote
    """

    average: F64
    labels: NDArray[Any]
    margin_of_decision: F64


def activate(y: F64, activation: str) -> F64:
    """Return the activation of one prediction (C, *Q); softmax runs over the channels."""
    if activation == "softmax":
        e = np.exp(y - y.max(axis=0, keepdims=True))
        return np.asarray(e / e.sum(axis=0, keepdims=True))
    if activation == "sigmoid":
        return np.asarray(np.exp(-np.logaddexp(0.0, -y)))  # 1/(1+e^-y), without overflow
    if activation != "none":
        raise ValueError(f"invalid activation {activation!r}")
    return y


def labels_of(y: F64) -> NDArray[np.intp]:
    """Return the class of each voxel of (C, ...), or y ≥ 0.5 for a single channel.

    The class is the largest channel, the lowest one in a tie, as `np.argmax` returns it.
    """
    return np.asarray(y[0] >= 0.5 if len(y) == 1 else np.argmax(y, axis=0), dtype=np.intp)


def decision_margin(y: F64) -> F64:
    """Return the difference of the two largest channels of (C, ...), |y - 0.5| of a single one."""
    ranked = np.sort(y, axis=0)
    return np.asarray(np.abs(y[0] - 0.5) if len(y) == 1 else ranked[-1] - ranked[-2])


def _check(setup: Setup, volume: NDArray[Any], combine: str) -> None:
    if combine not in {"weighted_avg", "soft", "hard"} or volume.shape != setup.volume:
        raise ValueError(f"invalid combine {combine!r}, or {volume.shape} is not {setup.volume}")
    if not covered(setup).all():
        raise ValueError(f"no patch covers voxel {np.argwhere(~covered(setup))[0].tolist()}")


class Skip(NamedTuple):
    """Which patches are skipped, and what stands in their place.

    inside      whether each voxel is inside the mask, bool (*V); None without a mask
    is_empty    called with the voxels of an input patch inside the volume and the slices of the
                volume in which they lie; None if no patch is empty
    fill_value  value outside the mask, and prediction of empty patches; a class for labels
    """

    inside: NDArray[np.bool_] | None = None
    is_empty: Callable[[NDArray[Any], tuple[slice, ...]], bool] | None = None
    fill_value: float = 0.0


NO_SKIP = Skip()


def nothing(channels: int, combine: str, fill_value: float) -> F64:
    """Return the prediction of an empty patch, after activation and voting: (C,)."""
    if combine == "weighted_avg" or channels == 1:
        return np.full(channels, fill_value, dtype=np.float64)
    return np.asarray(np.arange(channels) == fill_value, dtype=np.float64)


def skipped(setup: Setup, volume: NDArray[Any], skip: Skip) -> list[tuple[bool, bool]]:
    """Return for each of `patches` whether the mask skips it, and whether it is empty."""
    found = []
    for _, start, box in patches(setup):
        in_volume, _ = _inside(setup, box)
        window = zip(start, setup.input_patch, setup.volume, strict=True)
        read = tuple(slice(max(s, 0), min(s + p, v)) for s, p, v in window)
        by_mask = skip.inside is not None and not skip.inside[in_volume].any()
        found.append((by_mask, skip.is_empty is not None and skip.is_empty(volume[read], read)))
    return found


def reference(
    setup: Setup,
    volume: NDArray[Any],
    predict: Predict,
    combine: str = "weighted_avg",
    weight: str | WeightFunction = "weight_uniform",
    *,
    activation: str = "none",
    skip: Skip = NO_SKIP,
    channels: int = 0,
) -> Reference:
    """Run the network on every patch that is not skipped and combine the predictions.

    `channels` are those of a prediction, needed if the first patch is skipped.

    `predict` is called with a patch (*P), float64, and its start. Weights are computed for the
    output patch Q and cropped by the margin. The weights of each voxel are divided by the largest
    of them before they are summed, so that they do not underflow.
    """
    _check(setup, volume, combine)
    all_patches = patches(setup)
    log_w = _log_of(weight, setup.output_patch)
    largest = np.full(setup.shape, -np.inf)
    for _, _, box in all_patches:
        in_volume, in_patch = _inside(setup, box)
        largest[in_volume] = np.maximum(largest[in_volume], log_w[in_patch])

    starts = [start for _, start, _ in all_patches]
    low = tuple(min(coordinates) for coordinates in zip(*starts, strict=True))
    high = tuple(max(coordinates) for coordinates in zip(*starts, strict=True))
    shape = tuple(b + p - a for a, b, p in zip(low, high, setup.input_patch, strict=True))
    padded = pad_read(volume, low, shape, setup.pad_mode, setup.pad_value).astype(np.float64)

    sums, total = np.zeros((channels, *setup.shape)), np.zeros(setup.shape)
    margin = np.full(setup.shape, np.inf)
    outcomes = skipped(setup, volume, skip)
    for (_, start, box), (by_mask, is_empty) in zip(all_patches, outcomes, strict=True):
        if by_mask:
            continue
        if is_empty:
            in_volume, in_patch = _inside(setup, box)
            w = np.exp(log_w[in_patch] - largest[in_volume])
            for c, value in enumerate(nothing(channels, combine, skip.fill_value)):
                sums[c][in_volume] += w * value
            total[in_volume] += w
            continue
        window = zip(start, low, setup.input_patch, strict=True)
        x = padded[tuple(slice(s - a, s - a + p) for s, a, p in window)].copy()
        y = np.asarray(predict(x, start), dtype=np.float64)
        if y.shape[1:] != setup.output_patch:
            raise ValueError(f"prediction {y.shape} is not (C, *{setup.output_patch})")
        if not np.isfinite(y).all():
            raise ValueError(f"non-finite prediction in the patch at {start}")
        y = activate(y, activation)
        if sums.size == 0:
            sums = np.zeros((len(y), *setup.shape))
        in_volume, in_patch = _inside(setup, box)
        if combine == "hard":
            margin[in_volume] = np.minimum(margin[in_volume], decision_margin(y)[in_patch])
            classes = [1] if len(y) == 1 else range(len(y))
            y = np.stack([labels_of(y) == c for c in classes]).astype(np.float64)
        w = np.exp(log_w[in_patch] - largest[in_volume])
        for c in range(len(y)):
            sums[c][in_volume] += w * y[c][in_patch]
        total[in_volume] += w
    average = sums / np.where(total > 0, total, 1)
    labels = labels_of(average).astype(np.uint8 if len(average) <= 256 else np.uint16)
    margin = np.minimum(decision_margin(average), margin)
    if skip.inside is not None:
        average[:, ~skip.inside] = skip.fill_value
        labels[~skip.inside] = skip.fill_value
        margin[~skip.inside] = np.inf
    return Reference(average, labels, margin)


def center_crop(y: F64, out_shape: Shape) -> F64:
    """Return the central part (C, *out_shape) of an array (C, *P)."""
    first = [(n - q) // 2 for n, q in zip(y.shape[1:], out_shape, strict=True)]
    return y[(slice(None), *(slice(f, f + q) for f, q in zip(first, out_shape, strict=True)))]


def pointwise(channels: int) -> Network:
    """Return a network with output 2tx - t², t = (c+½)/C; its argmax is the t closest to x.

    The output depends on the voxel only, not on its position.
    """

    def network(x: F64, out_shape: Shape) -> F64:
        ts = (np.arange(channels) + 0.5) / channels
        return center_crop(np.stack([2 * t * x - t * t for t in ts]), out_shape)

    return network


def position_dependent(channels: int) -> Network:
    """Return a network whose output depends on the position in the patch, so borders are visible.

    The output is 2tx(1 + cos(2πu + c)/2) - t² with u the mean of (i+½)/P over the axes.
    """

    def network(x: F64, out_shape: Shape) -> F64:
        u = np.mean([(i + 0.5) / n for i, n in zip(np.indices(x.shape), x.shape, strict=True)], 0)
        ts = (np.arange(channels) + 0.5) / channels
        gains = [1 + np.cos(2 * math.pi * u + c) / 2 for c in range(channels)]
        y = np.stack([2 * t * x * gain - t * t for t, gain in zip(ts, gains, strict=True)])
        return center_crop(y, out_shape)

    return network


def box_blur(channels: int) -> Network:
    """Return a network with the channels of `pointwise` of the mean of the 3^d neighborhood.

    Voxels outside the patch count as zero.
    """

    def network(x: F64, out_shape: Shape) -> F64:
        padded, total = np.pad(x, 1), np.zeros(x.shape)
        for shift in itertools.product(range(3), repeat=x.ndim):
            total += padded[tuple(slice(s, s + n) for s, n in zip(shift, x.shape, strict=True))]
        return pointwise(channels)(total / 3**x.ndim, out_shape)

    return network


NETWORKS: dict[str, Callable[[int], Network]] = {
    "pointwise": pointwise,
    "position_dependent": position_dependent,
    "box_blur": box_blur,
}


def predictor(name: str, channels: int, out_shape: Shape) -> Predict:
    """Return a toy network by name, as the `predict` of `reference`."""
    network = NETWORKS[name](channels)
    return lambda x, _start: network(x, out_shape)


def reduce_cells(
    values: NDArray[Any], factors: Sequence[int], method: Literal["mean", "mode", "nearest"]
) -> NDArray[Any]:
    """Return one level of a pyramid from the one below: each cell of the last axes is one voxel.

    A cell has `factors` voxels, fewer at the high side of an axis that they do not divide.
    """
    every = (1,) * (values.ndim - len(factors)) + tuple(factors)
    shape = [math.ceil(n / f) for n, f in zip(values.shape, every, strict=True)]
    result = np.empty(shape, values.dtype)
    for index in itertools.product(*map(range, shape)):
        cell = values[tuple(slice(i * f, i * f + f) for i, f in zip(index, every, strict=True))]
        flat = cell.ravel().tolist()
        if method == "nearest":
            result[index] = flat[0]
        elif method == "mode":
            counts = Counter(flat)
            result[index] = min(v for v, n in counts.items() if n == max(counts.values()))
        else:
            mean = np.mean(cell.astype(np.float64))
            result[index] = np.rint(mean) if values.dtype.kind in "iu" else mean
    return result
