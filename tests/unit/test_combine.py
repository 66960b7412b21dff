from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from chunkq.blend.combine import (
    activate,
    add_weighted,
    copy_into,
    is_finite,
    to_labels,
    to_numpy,
    to_votes,
)
from chunkq.plan.outputs import label_dtype

Library = Callable[[Any], Any]

# Few distinct values, so that ties are common.
COARSE = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 3.0])
FINE = st.floats(-1e4, 1e4, width=32)


def in_numpy(values: Any) -> Any:
    return np.asarray(values, dtype=np.float32)


def in_torch(values: Any) -> Any:
    return torch.from_numpy(np.array(values, dtype=np.float32))


BOTH = pytest.mark.parametrize("library", [in_numpy, in_torch])


@st.composite
def predictions(draw: st.DrawFn, elements: st.SearchStrategy[float] = COARSE) -> Any:
    """Draw float32 predictions (N, C, *Q) with 1 to 3 spatial axes."""
    shape = draw(st.lists(st.integers(1, 4), min_size=3, max_size=5))
    return draw(npst.arrays(np.float32, tuple(shape), elements=elements))


@BOTH
@pytest.mark.parametrize(
    ("scores", "winner"),
    [
        ([0.1, 0.7, 0.2], 1),
        ([0.3, 0.3, 0.4], 2),
        ([0.4, 0.2, 0.4], 0),  # a tie
        ([0.2, 0.4, 0.4], 1),
        ([0.0, 0.0, 0.0], 0),
        ([-3.0, -1.0, -2.0], 1),
    ],
)
def test_the_vote_of_a_voxel_is_its_largest_channel_and_the_lowest_in_a_tie(
    library: Library, scores: list[float], winner: int
) -> None:
    votes = to_numpy(to_votes(library([[[score] for score in scores]])))
    assert votes[0, :, 0].tolist() == [float(c == winner) for c in range(3)]


@BOTH
def test_a_single_channel_votes_1_from_exactly_one_half(library: Library) -> None:
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    votes = to_numpy(to_votes(library([[[0.0, below, 0.5, 1.0, -7.0]]])))
    assert votes.tolist() == [[[0, 0, 1, 1, 0]]]


@BOTH
@given(scores=predictions())
def test_votes_are_one_hot_with_the_shape_and_dtype_of_the_predictions(
    library: Library, scores: Any
) -> None:
    votes = to_numpy(to_votes(library(scores)))
    assert votes.shape == scores.shape
    assert votes.dtype == np.float32
    if scores.shape[1] == 1:
        assert np.array_equal(votes, scores >= 0.5)
    else:
        classes = np.arange(scores.shape[1]).reshape(-1, *[1] * (scores.ndim - 2))
        assert np.array_equal(votes, np.argmax(scores, axis=1)[:, np.newaxis] == classes)


@BOTH
@given(average=predictions())
def test_the_label_is_the_largest_channel_and_the_lowest_in_a_tie(
    library: Library, average: Any
) -> None:
    labels = to_labels(library(average[0]), np.uint8)
    single = average.shape[1] == 1
    assert np.array_equal(labels, average[0, 0] >= 0.5 if single else np.argmax(average[0], axis=0))
    assert labels.dtype == np.uint8


@BOTH
def test_a_single_channel_has_label_1_from_exactly_one_half(library: Library) -> None:
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    labels = to_labels(library([[0.0, below, 0.5, 1.0]]), np.uint8)
    assert labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("classes", "dtype"), [(2, "u1"), (256, "u1"), (257, "u2"), (9000, "u2")])
def test_labels_are_uint16_for_more_than_256_classes(classes: int, dtype: str) -> None:
    assert label_dtype(classes) == np.dtype(dtype)


@BOTH
@pytest.mark.parametrize("classes", [256, 257, 300])
def test_the_label_dtype_can_hold_the_highest_class(library: Library, classes: int) -> None:
    scores = np.zeros((1, classes, 2), np.float32)
    scores[0, [classes - 1, 3], [0, 1]] = 1
    votes = to_votes(library(scores))
    labels = to_labels(votes[0], label_dtype(classes))
    assert labels.tolist() == [classes - 1, 3]


@BOTH
def test_more_than_255_votes_are_counted(library: Library) -> None:
    # In eight bits, 300 votes would be 44.
    total, weight = library([[0.0], [0.0]]), library([1.0])
    for number in range(300 + 290):
        scores = [[[1.0], [0.0]]] if number < 300 else [[[0.0], [1.0]]]
        add_weighted(total, weight, to_votes(library(scores))[0])
    assert to_numpy(total).tolist() == [[300.0], [290.0]]
    assert to_labels(total, np.uint8).tolist() == [0]


@BOTH
def test_weighted_values_are_added_in_place_to_every_channel(library: Library) -> None:
    total = library([[1.0, 2.0], [3.0, 4.0]])
    add_weighted(total, library([0.5, 0.25]), library([[2.0, 4.0], [6.0, 8.0]]))
    assert to_numpy(total).tolist() == [[2.0, 3.0], [6.0, 6.0]]


@BOTH
def test_weighted_values_can_be_added_to_a_view(library: Library) -> None:
    array = library(np.zeros((1, 4, 4)))
    add_weighted(array[:, 1:3, 2:4], library(np.full((2, 2), 0.5)), library(np.ones((1, 2, 2))))
    expected = np.zeros((1, 4, 4))
    expected[:, 1:3, 2:4] = 0.5
    assert np.array_equal(to_numpy(array), expected)


@BOTH
def test_copying_into_a_view_changes_only_the_view(library: Library) -> None:
    array = library(np.ones((2, 4, 4)))
    copy_into(array[:, 1:3, 2:4], library(np.arange(8).reshape(2, 2, 2)))
    expected = np.ones((2, 4, 4))
    expected[:, 1:3, 2:4] = np.arange(8).reshape(2, 2, 2)
    assert np.array_equal(to_numpy(array), expected)


@BOTH
@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([0.0, -1e30], True),
        ([1.0, np.nan], False),
        ([np.inf, 1.0], False),
        ([np.inf, -np.inf], False),
        ([3e38, 3e38], False),  # the sum overflows; callers check each value then
    ],
)
def test_is_finite_is_true_exactly_if_the_sum_of_the_values_is_finite(
    library: Library, values: list[float], finite: bool
) -> None:
    assert is_finite(library(values)) == finite


@BOTH
def test_activation_none_returns_the_same_array(library: Library) -> None:
    raw = library([[[-3.0, 1e9]]])
    assert activate(raw, "none") is raw


@BOTH
def test_softmax_runs_over_the_channels_and_does_not_overflow(library: Library) -> None:
    raw = [[[1e4, 0.0, -1e4], [0.0, 0.0, -1e4], [-1e4, 0.0, 3e4]]]
    shares = to_numpy(activate(library(raw), "softmax"))
    third = 1 / 3
    expected = [[[1, third, 0], [0, third, 0], [0, third, 1]]]
    assert shares == pytest.approx(np.array(expected), abs=1e-6)


@BOTH
def test_softmax_equals_values_computed_by_hand(library: Library) -> None:
    raw = library([[[0.0], [np.log(3.0)]]])
    assert to_numpy(activate(raw, "softmax"))[0, :, 0] == pytest.approx([0.25, 0.75], abs=1e-6)


@BOTH
def test_sigmoid_does_not_overflow_and_is_one_half_at_zero(library: Library) -> None:
    raw = library([[[-3e38, -1e4, 0.0, np.log(3.0), 1e4, 3e38]]])
    shares = to_numpy(activate(raw, "sigmoid"))
    assert shares[0, 0] == pytest.approx([0, 0, 0.5, 0.75, 1, 1], abs=1e-6)
    assert shares[0, 0, 2] == 0.5


@given(predictions(FINE))
def test_votes_and_labels_of_numpy_and_torch_are_equal(raw: Any) -> None:
    assert np.array_equal(to_votes(raw), to_votes(in_torch(raw)).numpy())
    for dtype in ("u1", "u2"):
        by_numpy, by_torch = to_labels(raw[0], dtype), to_labels(in_torch(raw[0]), dtype)
        assert np.array_equal(by_numpy, by_torch)
        assert by_numpy.dtype == by_torch.dtype


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@given(raw=predictions(FINE))
def test_activations_of_numpy_and_torch_equal_those_in_float64(activation: Any, raw: Any) -> None:
    wide = raw.astype(np.float64)
    if activation == "sigmoid":
        exact = np.exp(-np.logaddexp(0, -wide))
    else:
        exact = np.exp(wide - np.logaddexp.reduce(wide, axis=1, keepdims=True))
    assert np.abs(activate(raw, activation) - exact).max() < 1e-6
    assert np.abs(activate(in_torch(raw), activation).numpy() - exact).max() < 1e-6


@given(predictions(st.floats(-100, 100, width=32)), st.integers(0, 99))
def test_weighted_sums_of_numpy_and_torch_equal_those_in_float64(values: Any, seed: int) -> None:
    weights = np.random.default_rng(seed).random(values.shape[2:], dtype=np.float32)
    by_numpy, by_torch = np.zeros_like(values[0]), in_torch(np.zeros_like(values[0]))
    for value in values:
        add_weighted(by_numpy, weights, value)
        add_weighted(by_torch, in_torch(weights), in_torch(value))
    # torch may fuse the product with the sum; NumPy rounds in between.
    assert np.abs(by_numpy - by_torch.numpy()).max() < 1e-4
    assert np.abs(by_numpy - np.sum(weights * values, axis=0, dtype=np.float64)).max() < 1e-4


def test_to_numpy_does_not_copy_host_memory() -> None:
    array = np.zeros(3)
    tensor = torch.zeros(3, requires_grad=True)
    assert to_numpy(array) is array
    assert to_numpy(tensor).ctypes.data == tensor.data_ptr()
