"""A smaller output is the middle of the patch, or the whole patch at a lower resolution."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from chunkq_worker.resolution_check import check_resolution, reduced_axes

from chunkq.errors import ErrorCode, ModelError
from chunkq.geometry.box import Box
from chunkq.plan.chunk import Patch
from tests.strategies import plan_for

Values = npt.NDArray[Any]
Shape = tuple[int, ...]


def smooth(patch: Values) -> Values:
    """Average 3 voxels along each axis, with zeros around the patch, and cut off small values."""
    for axis in range(patch.ndim):
        padded = np.pad(patch, [(1, 1) if a == axis else (0, 0) for a in range(patch.ndim)])
        parts = (np.take(padded, range(n, n + patch.shape[axis]), axis) for n in range(3))
        patch = sum(parts, np.zeros_like(patch)) / 3
    return np.maximum(patch - 0.4, 0)


def pooled(factors: Shape) -> Callable[[Values], Values]:
    """Return a network that averages over boxes of `factors` voxels."""

    def network(patch: Values) -> Values:
        values = smooth(patch)
        for axis, factor in enumerate(factors):
            shape = (*values.shape[:axis], -1, factor, *values.shape[axis + 1 :])
            values = values.reshape(shape).mean(axis + 1)
        return values

    return network


def cropped(margins: Shape) -> Callable[[Values], Values]:
    """Return a network that predicts the middle of its patch."""

    def network(patch: Values) -> Values:
        values = smooth(smooth(patch))
        return values[tuple(slice(m, n - m) for m, n in zip(margins, patch.shape, strict=True))]

    return network


def found(network: Callable[[Values], Values], source: Shape, seed: int = 0) -> dict[int, int]:
    patch = np.random.default_rng(seed).random(source)
    target = network(patch).shape
    return reduced_axes(lambda n, axis: network(np.roll(patch, n, axis))[None], source, target)


@pytest.mark.parametrize(
    ("factors", "source"),
    [((2, 2), (32, 32)), ((4, 4, 4), (32, 32, 48)), ((1, 4, 4), (8, 64, 64)), ((8, 1), (64, 20))],
)
def test_the_factors_of_an_output_of_lower_resolution_are_found(
    factors: Shape, source: Shape
) -> None:
    expected = {axis: factor for axis, factor in enumerate(factors) if factor > 1}
    assert found(pooled(factors), source) == expected


@pytest.mark.parametrize(
    ("margins", "source"),
    [((8, 8), (32, 32)), ((12, 12, 12), (32, 32, 32)), ((0, 16), (8, 64)), ((24, 24), (64, 64))],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_middle_of_a_patch_is_no_lower_resolution(
    margins: Shape, source: Shape, seed: int
) -> None:
    assert found(cropped(margins), source, seed) == {}


def test_a_constant_output_shows_no_resolution() -> None:
    assert found(lambda patch: np.zeros((8, 8)), (32, 32)) == {}


def test_a_network_that_reduces_the_resolution_is_refused_with_its_factors() -> None:
    model = {"model_input_shape": (32, 32), "model_output_shape": (8, 8)}
    plan = plan_for((64, 64), (8, 8), model=model, pad_width=(12, 12))
    patch = Patch(0, (0, 0), Box((0, 0), (32, 32)), Box((12, 12), (20, 20)))
    halo = np.arange(48 * 48, dtype=np.uint16).reshape(48, 48)

    def predict(network: Callable[[Values], Values]) -> Callable[..., tuple[Values, ...]]:
        return lambda patches, halos, origin: (network(halos[0].astype(float))[None, None],)

    check_resolution(predict(cropped((12, 12))), plan, patch, [halo])
    with pytest.raises(ModelError, match=r"by \[4, 4\]") as raised:
        check_resolution(predict(pooled((4, 4))), plan, patch, [halo])
    assert raised.value.code is ErrorCode.MODEL_UNUSABLE
