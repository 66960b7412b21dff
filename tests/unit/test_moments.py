from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkq.blend import moments
from chunkq.blend.combine import to_numpy

BOTH = pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
Library = Callable[[Any], Any]


def exact(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted variance over axis 0 in two passes."""
    mean = (weights * values).sum(0) / weights.sum(0)
    return np.asarray((weights * (values - mean) ** 2).sum(0) / weights.sum(0))


@BOTH
@given(
    seed=st.integers(0, 999),
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    level=st.sampled_from([0.0, 1e4, -3e6]),
    spread=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_moments_of_any_grouping_give_the_variance_of_two_passes(
    library: Library, seed: int, sizes: list[int], level: float, spread: float
) -> None:
    random = np.random.default_rng(seed)
    count, channels, shape = sum(sizes), 2, (3, 4)
    values = level + spread * random.standard_normal((count, channels, *shape))
    values = values.astype(np.float32)
    weights = np.exp(random.uniform(-40, 0, (count, *shape)))
    weights /= weights.sum(0)
    total = library(np.zeros((moments.moment_channels(channels), *shape)))
    first = 0
    for size in sizes:
        part = library(np.zeros((moments.moment_channels(channels), *shape)))
        for n in range(first, first + size):
            moments.add_values(part, library(weights[n]), library(values[n]))
        moments.add_moments(total, part)
        first += size
    expected = exact(values.astype(np.float64), weights[:, np.newaxis])
    found = to_numpy(moments.variance(total))
    assert np.abs(found - expected).max() <= 1e-9 * max(spread**2, float(expected.max()))


@BOTH
def test_equal_predictions_have_a_variance_of_exactly_zero(library: Library) -> None:
    total = library(np.zeros((3, 5)))
    values = library(np.full((1, 5), 12345.678, np.float32))
    for weight in (0.3, 1e-300, 0.7 - 1e-17, 0.0):
        moments.add_values(total, library(np.full(5, weight)), values)
    assert (to_numpy(moments.variance(total)) == 0).all()


@BOTH
def test_voxels_without_a_weight_are_finite_and_count_for_nothing(library: Library) -> None:
    total = library(np.zeros((3, 2)))
    values = library(np.array([[7.0, 9.0]], np.float32))
    moments.add_values(total, library(np.array([0.0, 0.5])), values)
    moments.add_values(total, library(np.array([1.0, 0.5])), values + 2)
    assert to_numpy(total).tolist() == [[1, 1], [9, 10], [0, 1]]


@BOTH
def test_the_moments_of_one_prediction_replace_others(library: Library) -> None:
    total = library(np.full((5, 2), 3.0))
    moments.put_values(total, library(np.array([[1, 2], [3, 4]], np.float32)))
    assert to_numpy(total).tolist() == [[1, 1], [1, 2], [3, 4], [0, 0], [0, 0]]
