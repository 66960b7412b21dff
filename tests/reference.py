"""The naive reference: what a job computes, by the words of docs/design.md, section 3.

Whole volume in memory, one patch after the other, float64 throughout, no chunks. Derived from the
text alone, and imports nothing of the package. Spatial axes come in the volume's order everywhere;
a prediction has its channels first: (C, *Q). A box is (start, stop), one integer per axis each,
stop exclusive, in voxels of the volume. Start at `Setup`, end at `reference`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    volume: int, patch: int, stride: int, pad: int, offset: int, edge: str
) -> list[int]:
    """Starts of the input patches along one axis, ascending; none is dropped here."""
    if stride < 1 or patch < 1 or edge not in {"pad", "shift"}:
        raise ValueError(f"impossible patch {patch}, stride {stride} or edge {edge}")
    goal = volume + pad
    first = -pad + offset
    starts = [first]
    while starts[-1] + patch < goal:
        starts.append(starts[-1] + stride)
    if edge == "shift" and len(starts) > 1:
        starts[-1] = max(goal - patch, first)
    return starts


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The geometry of one job; every tuple has one integer per spatial axis.

    `offsets` holds the extra grids only: grid 0 has offset 0, grid g has `offsets[g - 1]`.
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

    def __post_init__(self) -> None:
        for p, q, m in zip(self.input_patch, self.output_patch, self.margin, strict=True):
            if q > p or (p - q) % 2:
                raise ValueError(f"an output patch of {q} has no centered place in {p}")
            if m < 0 or q - 2 * m < 1:
                raise ValueError(f"a margin of {m} leaves nothing of an output patch of {q}")


def _setup(defaults: dict[str, Any], given: dict[str, Any]) -> Setup:
    zeros = (0,) * len(defaults["volume"])
    return Setup(**({"pad_width": zeros, "margin": zeros} | defaults | given))


def patch(
    volume: Shape, p: Shape, q: Shape | None = None, offsets: Sequence[Shape] = (), **more: Any
) -> Setup:
    """`inference_type: patch`: stride Q, one grid at 0 and one more per entry of `offsets`.

    Here and below `more` sets pad_width, edge, pad_mode or pad_value; pad_width is 0 by default.
    """
    shapes = {"volume": volume, "input_patch": p, "output_patch": q or p, "stride": q or p}
    return _setup(shapes | {"offsets": tuple(offsets), "edge": "pad"}, more)


def sliding_window(
    volume: Shape, p: Shape, strides: Shape, q: Shape | None = None, **more: Any
) -> Setup:
    """`inference_type: sliding_window`: stride `strides`, one grid, shifted at the edge."""
    shapes = {"volume": volume, "input_patch": p, "output_patch": q or p, "stride": strides}
    return _setup(shapes | {"edge": "shift"}, more)


def crop_margin(
    volume: Shape, p: Shape, margin: Shape, q: Shape | None = None, **more: Any
) -> Setup:
    """`inference_type: crop_margin`: stride Q - 2 margin, pad_width margin + (P-Q)/2 by default."""
    q = q or p
    stride = tuple(b - 2 * m for b, m in zip(q, margin, strict=True))
    pad = tuple(m + (a - b) // 2 for a, b, m in zip(p, q, margin, strict=True))
    shapes = {"volume": volume, "input_patch": p, "output_patch": q, "stride": stride}
    return _setup(shapes | {"margin": margin, "pad_width": pad, "edge": "pad"}, more)


def patches(setup: Setup) -> list[tuple[int, Shape, tuple[Shape, Shape]]]:
    """(grid, input start, kept box not clipped), ordered by grid, then by start, last axis fastest.

    The kept box is the output patch without its margin; patches whose kept box misses the volume
    are left out.
    """
    s, rank, found = setup, len(setup.volume), []
    for grid, offset in enumerate([(0,) * rank, *s.offsets]):
        numbers = zip(s.volume, s.input_patch, s.stride, s.pad_width, offset, strict=True)
        for start in itertools.product(*(axis_starts(*of_axis, s.edge) for of_axis in numbers)):
            lo, hi = [], []
            for a in range(rank):
                output_start = start[a] + (s.input_patch[a] - s.output_patch[a]) // 2
                lo.append(output_start + s.margin[a])
                hi.append(output_start + s.output_patch[a] - s.margin[a])
            if all(hi[a] > 0 and lo[a] < s.volume[a] for a in range(rank)):
                found.append((grid, start, (tuple(lo), tuple(hi))))
    return found


def _inside(setup: Setup, box: tuple[Shape, Shape]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of a kept box's part inside the volume: into the volume, and into a (*Q) array."""
    there, here = [], []
    for lo, hi, v, m in zip(*box, setup.volume, setup.margin, strict=True):
        a, b = max(lo, 0), min(hi, v)
        there.append(slice(a, b))
        here.append(slice(a - lo + m, b - lo + m))
    return tuple(there), tuple(here)


def covered(setup: Setup) -> NDArray[np.bool_]:
    """Which voxels lie in the kept box of some patch: bool, (*V)."""
    seen = np.zeros(setup.volume, dtype=np.bool_)
    for _, _, box in patches(setup):
        seen[_inside(setup, box)[0]] = True
    return seen


def pad_read(
    volume: NDArray[Any], start: Shape, shape: Shape, pad_mode: str, pad_value: float = 0.0
) -> NDArray[Any]:
    """The window [start, start + shape) of the endlessly padded volume, in the volume's dtype.

    np.pad is the authority: the whole volume is padded as far as the window reaches.
    """
    before = [max(0, -s) for s in start]
    after = [max(0, s + n - v) for s, n, v in zip(start, shape, volume.shape, strict=True)]
    value = {"constant_values": pad_value} if pad_mode == "constant" else {}
    pad: Any = np.pad
    wide: NDArray[Any] = pad(volume, list(zip(before, after, strict=True)), mode=pad_mode, **value)
    window = [slice(s + b, s + b + n) for s, b, n in zip(start, before, shape, strict=True)]
    return wide[tuple(window)]


def _log_profile(name: str, n: int) -> F64:
    """Natural logarithm of a built-in's 1-D profile: (n,)."""
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
    """Natural logarithm of a built-in for an output patch: (*shape), finite at every size."""
    total = np.zeros(shape)
    for axis, n in enumerate(shape):
        along = [n if a == axis else 1 for a in range(len(shape))]
        total = total + _log_profile(name, n).reshape(along)
    return total


def _weights(name: str, shape: Shape) -> F64:
    """A built-in for an output patch: (*shape), 0 where float64 underflows."""
    return np.asarray(np.exp(log_weights(name, shape)), dtype=np.float64)


weight_uniform = partial(_weights, "weight_uniform")
weight_gaussian = partial(_weights, "weight_gaussian")
weight_linear = partial(_weights, "weight_linear")
weight_hann = partial(_weights, "weight_hann")
weight_bump = partial(_weights, "weight_bump")


def _log_of(weight: str | WeightFunction, shape: Shape) -> F64:
    """Log weights (*shape) of a built-in or a user's function, which must be finite, positive."""
    if isinstance(weight, str):
        return log_weights(weight, shape)
    values = np.asarray(weight(shape), dtype=np.float64)
    if values.shape != shape or not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError(f"the weight function must be finite and positive, of shape {shape}")
    return np.asarray(np.log(values), dtype=np.float64)


class Reference(NamedTuple):
    """What `reference` returns.

    average: float64 (C, *V), the weighted average, or the vote shares for `hard`.
    labels: uint8 (uint16 past 256 classes) (*V), the decision on `average`, for every combine.
    margin_of_decision: float64 (*V), how clear that decision is: the top two of `average` apart,
        or |average - 0.5| for one channel. For `hard` the least of that and of the same number of
        each vote at the voxel, as a vote that rounding may turn over turns over its whole share.
    """

    average: F64
    labels: NDArray[Any]
    margin_of_decision: F64


def activate(y: F64, activation: str) -> F64:
    """The activation of one prediction (C, *Q); softmax runs over the channels."""
    if activation == "softmax":
        e = np.exp(y - y.max(axis=0, keepdims=True))
        return np.asarray(e / e.sum(axis=0, keepdims=True))
    if activation == "sigmoid":
        return np.asarray(np.exp(-np.logaddexp(0.0, -y)))  # 1/(1+e^-y), without overflow
    if activation != "none":
        raise ValueError(f"no activation is called {activation}")
    return y


def decide(y: F64) -> NDArray[np.intp]:
    """Class of each voxel of (C, ...): argmax, ties to the lowest; one channel: y ≥ 0.5."""
    label = y[0] >= 0.5 if len(y) == 1 else np.argmax(y, axis=0)  # argmax: the first of equals
    return np.asarray(label, dtype=np.intp)


def clearness(y: F64) -> F64:
    """How far the decision on each voxel of (C, ...) is from another one."""
    ranked = np.sort(y, axis=0)
    return np.asarray(np.abs(y[0] - 0.5) if len(y) == 1 else ranked[-1] - ranked[-2])


def reference(
    setup: Setup,
    volume: NDArray[Any],
    predict: Predict,
    combine: str = "weighted_avg",
    weight: str | WeightFunction = "weight_uniform",
    *,
    activation: str = "none",
) -> Reference:
    """Run every patch and combine; `predict` gets a float64 (*P) patch and its start.

    Weights are made for the output patch Q and then lose the margin with it. Each voxel's weights
    are divided by the largest of them before they are summed, so that nothing underflows.
    """
    if combine not in {"weighted_avg", "soft", "hard"} or volume.shape != setup.volume:
        raise ValueError(f"no combine {combine}, or a volume {volume.shape} not {setup.volume}")
    if not covered(setup).all():
        raise ValueError(f"no patch covers voxel {np.argwhere(~covered(setup))[0].tolist()}")
    todo = patches(setup)
    log_w = _log_of(weight, setup.output_patch)
    largest = np.full(setup.volume, -np.inf)
    for _, _, box in todo:
        there, here = _inside(setup, box)
        largest[there] = np.maximum(largest[there], log_w[here])

    starts = [start for _, start, _ in todo]
    low = tuple(min(along) for along in zip(*starts, strict=True))
    high = tuple(max(along) for along in zip(*starts, strict=True))
    reach = tuple(b + p - a for a, b, p in zip(low, high, setup.input_patch, strict=True))
    wide = pad_read(volume, low, reach, setup.pad_mode, setup.pad_value).astype(np.float64)

    sums, total = np.zeros(0), np.zeros(setup.volume)
    clear = np.full(setup.volume, np.inf)
    for _, start, box in todo:
        window = zip(start, low, setup.input_patch, strict=True)
        x = wide[tuple(slice(s - a, s - a + p) for s, a, p in window)].copy()
        y = np.asarray(predict(x, start), dtype=np.float64)
        if y.shape[1:] != setup.output_patch:
            raise ValueError(f"prediction {y.shape} is not (C, *{setup.output_patch})")
        if not np.isfinite(y).all():
            raise ValueError(f"non-finite prediction in the patch at {start}")
        y = activate(y, activation)
        if sums.size == 0:
            sums = np.zeros((len(y), *setup.volume))
        there, here = _inside(setup, box)
        if combine == "hard":
            clear[there] = np.minimum(clear[there], clearness(y)[here])
            classes = [1] if len(y) == 1 else range(len(y))
            y = np.stack([decide(y) == c for c in classes]).astype(np.float64)
        w = np.exp(log_w[here] - largest[there])
        for c in range(len(y)):
            sums[c][there] += w * y[c][here]
        total[there] += w
    average = sums / total
    labels = decide(average).astype(np.uint8 if len(average) <= 256 else np.uint16)
    return Reference(average, labels, np.minimum(clearness(average), clear))


def center_crop(y: F64, out_shape: Shape) -> F64:
    """(C, *P) cut to the centered (C, *out_shape)."""
    first = [(n - q) // 2 for n, q in zip(y.shape[1:], out_shape, strict=True)]
    return y[(slice(None), *(slice(f, f + q) for f, q in zip(first, out_shape, strict=True)))]


def pointwise(channels: int) -> Network:
    """2tx - t² per channel, t = (c+½)/C: the argmax is the t nearest to x, wherever x lies."""

    def network(x: F64, out_shape: Shape) -> F64:
        ts = (np.arange(channels) + 0.5) / channels
        return center_crop(np.stack([2 * t * x - t * t for t in ts]), out_shape)

    return network


def position_dependent(channels: int) -> Network:
    """2tx(1 + cos(2πu + c)/2) - t², u the mean over the axes of (i+½)/P: patch borders show."""

    def network(x: F64, out_shape: Shape) -> F64:
        u = np.mean([(i + 0.5) / n for i, n in zip(np.indices(x.shape), x.shape, strict=True)], 0)
        ts = (np.arange(channels) + 0.5) / channels
        gains = [1 + np.cos(2 * math.pi * u + c) / 2 for c in range(channels)]
        y = np.stack([2 * t * x * gain - t * t for t, gain in zip(ts, gains, strict=True)])
        return center_crop(y, out_shape)

    return network


def box_blur(channels: int) -> Network:
    """Mean of the 3^d neighborhood, zeros beyond the patch, then the channels of `pointwise`."""

    def network(x: F64, out_shape: Shape) -> F64:
        wide, total = np.pad(x, 1), np.zeros(x.shape)
        for shift in itertools.product(range(3), repeat=x.ndim):
            total += wide[tuple(slice(s, s + n) for s, n in zip(shift, x.shape, strict=True))]
        return pointwise(channels)(total / 3**x.ndim, out_shape)

    return network


volume_wide_predictors: dict[str, Callable[[int], Network]] = {
    "pointwise": pointwise,
    "position_dependent": position_dependent,
    "box_blur": box_blur,
}


def predictor(name: str, channels: int, out_shape: Shape) -> Predict:
    """A toy network by name, as the `predict` that `reference` calls."""
    network = volume_wide_predictors[name](channels)
    return lambda x, _start: network(x, out_shape)
