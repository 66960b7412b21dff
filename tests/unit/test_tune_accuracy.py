"""The comparison of outputs by `chunkq tune`: values and labels."""

from math import inf, nan
from typing import Any

import numpy as np
import pytest
from chunkq_worker.tune.accuracy import Accuracy
from chunkq_worker.tune.accuracy import compare as compare_heads

REFERENCE = np.array([[[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]]])
"""Outputs (n=1, C=2, Q=4)."""


def compare(reference: np.ndarray, outputs: np.ndarray, activation: Any) -> Accuracy | None:
    return compare_heads([reference], [outputs], [activation])


def changed(index: tuple[int, ...], value: float) -> np.ndarray:
    outputs = REFERENCE.copy()
    outputs[index] = value
    return outputs


def test_equal_outputs_differ_by_nothing() -> None:
    assert compare(REFERENCE, REFERENCE, "none") == Accuracy(0.0, 1.0)


def test_a_difference_is_a_fraction_of_the_range_and_labels_are_compared_by_voxel() -> None:
    assert compare(REFERENCE, changed((0, 0, 3), 2.7), "none") == Accuracy(pytest.approx(0.1), 1.0)
    assert compare(REFERENCE, changed((0, 0, 1), 2.5), "softmax") == Accuracy(0.5, 0.75)


@pytest.mark.parametrize(("activation", "threshold"), [("none", 0.5), ("sigmoid", 0.0)])
def test_a_single_channel_is_compared_with_a_half_after_its_activation(
    activation: str, threshold: float
) -> None:
    reference = np.array([[[threshold - 1, threshold + 1]]])
    above = np.array([[[threshold, threshold + 1]]])
    assert compare(reference, above, activation) == Accuracy(0.5, 0.5)


def test_values_that_are_finite_in_one_of_both_differ_infinitely() -> None:
    for value in (nan, inf):
        accuracy = compare(REFERENCE, changed((0, 0, 0), value), "none")
        assert accuracy is not None
        assert accuracy.difference == inf


def test_outputs_of_other_patches_are_not_compared() -> None:
    assert compare(REFERENCE, REFERENCE[..., :2], "none") is None


def test_the_worst_head_decides() -> None:
    edge = np.array([[[0.0, 1.0]]])
    heads = [REFERENCE, edge]
    assert compare_heads(heads, [REFERENCE, edge + 0.75], ["none", "none"]) == Accuracy(0.75, 0.5)
    first = [changed((0, 0, 1), 2.5), edge + 0.25]
    assert compare_heads(heads, first, ["none", "none"]) == Accuracy(0.5, 0.75)
    assert compare_heads(heads, [REFERENCE, edge[..., :1]], ["none", "none"]) is None
