"""Detect networks whose output has a lower resolution than the voxels they receive.

chunkq takes a smaller output for the middle of the patch. The output of a network that keeps a
stride, such as a heatmap at a quarter of the resolution, covers the whole patch instead. Both have
the same shape. They differ in how far the output moves with the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.errors import ModelError, PredictionError
from chunkq.plan.chunk import Patch
from chunkq.plan.plan import Plan

MIN_LENGTH = 4
"""Shortest output patch along an axis of which a shift can be seen."""
MAX_RATIO = 0.4
"""Largest change of outputs that are compared after a shift, as a fraction of their change without.

A network that does not reduce the resolution reaches about 1 with noise."""
Values = npt.NDArray[Any]
Halos = Sequence[Values]
Predict = Callable[[Sequence[Patch], Halos, Sequence[int]], tuple[Values, ...] | None]
"""Returns raw outputs (n, C, *Q) of each head, as `Batcher.raw`."""


def check_resolution(predict: Predict, plan: Plan, patch: Patch, halos: Halos) -> None:
    """Raise ModelError if the outputs cover the whole patch at a lower resolution.

    `halos` are the inputs around the patch; noise with their range of values is predicted. Without
    a smaller output that can be one of a lower resolution, nothing is computed.
    """
    source, target = plan.input_patch, plan.output_patch
    has_scale = any(factor != 1 for output in plan.outputs for factor in output.scale)
    if has_scale or not suspected_axes(source, target):
        return
    noise = [_noise(halo, source) for halo in halos]

    def predict_rolled(shift: int, axis: int) -> Values | None:
        rolled = [np.roll(values, shift, axis - len(source)) for values in noise]
        outputs = predict([patch], rolled, patch.source.start) or ()
        fitting = [one for one in outputs if one.shape[-len(source) :] == tuple(target)]
        return fitting[0][0] if fitting else None

    reduced = dict[int, int]()
    with suppress(PredictionError):  # a step can return what no patch of the volume gives
        reduced = reduced_axes(predict_rolled, source, target)
    if reduced:
        factors = [reduced.get(axis, 1) for axis in range(len(source))]
        raise ModelError(
            f"the network reduces the resolution by {factors}: its output {list(target)} covers "
            f"the whole patch {list(source)}, not its middle; set outputs: {{NAME: {{scale: "
            f"{factors}}}}} in the job, or enlarge the output to the size of the patch in "
            "postprocessing_protected of model_config.processing_steps, and set "
            "model_output_shape to match"
        )


def _noise(halo: Values, patch: Sequence[int]) -> Values:
    """Return noise for one patch, with values between the smallest and the largest of an input."""
    low, high = float(np.nanmin(halo)), float(np.nanmax(halo))
    shape = (*halo.shape[: halo.ndim - len(patch)], *patch)
    rng = np.random.default_rng(0)
    return rng.uniform(low, high if high > low else low + 1, shape).astype(halo.dtype)


def suspected_axes(source: Sequence[int], target: Sequence[int]) -> dict[int, int]:
    """Return the axes along which the output can have a lower resolution, with the factor.

    `source` and `target` are the shapes of the input and the output patch.
    """
    return {
        axis: length // reduced
        for axis, (length, reduced) in enumerate(zip(source, target, strict=True))
        if MIN_LENGTH <= reduced < length and length % reduced == 0
    }


def reduced_axes(
    predict: Callable[[int, int], Values | None], source: Sequence[int], target: Sequence[int]
) -> dict[int, int]:
    """Return the axes along which the resolution is reduced, with the factor.

    These are all suspected ones if the outputs move with the input as those of a lower resolution
    do along one of them: at the border of a patch others can differ.
    `predict(shift, axis)` returns the outputs (C, *target) for one patch of noise that is rolled by
    `shift` voxels along a spatial axis, or None if they cannot be computed.
    """
    suspected = suspected_axes(source, target)
    first = predict(0, 0) if suspected else None
    if first is None:
        return {}
    for axis, factor in suspected.items():
        shift = _shift(source[axis], factor)
        rolled = predict(shift, axis)
        if rolled is not None and _moves(first, rolled, shift // factor, axis - len(source)):
            return suspected
    return {}


def _shift(length: int, factor: int) -> int:
    """Return about a quarter of the patch, a multiple of the factor and of 16 where possible.

    Networks with inner layers of a lower resolution move exactly only by multiples of their stride.
    """
    step = int(np.lcm(factor, 16))
    step = step if step <= length // 4 else factor
    return max(length // 4 // step, 1) * step


def _moves(first: Values, shifted: Values, shift: int, axis: int) -> bool:
    """Return whether the outputs have moved by `shift` along an axis, apart from the border."""
    first, shifted = np.moveaxis(first, axis, -1), np.moveaxis(shifted, axis, -1)
    length = first.shape[-1]
    border = length // 4  # networks pad their patch
    there = slice(border + shift, length - border)
    here = slice(border, length - border - shift)
    after = float(np.abs(shifted[..., there] - first[..., here]).mean())
    before = float(np.abs(shifted[..., there] - first[..., there]).mean())
    return bool(np.isfinite(before)) and before > 0 and after <= MAX_RATIO * before
