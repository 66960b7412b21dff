"""What the values of one batch suggest about a job."""

from typing import Any

import numpy as np
import pytest
from chunkq_worker.value_watch import NormInput, ValueWatch

from chunkq.plan.outputs import OutputSpec

X = np.linspace(0, 1, 64, dtype=np.float32).reshape(4, 1, 16)
SHARES = np.concatenate([X, 1 - X], 1)
INPUT = np.arange(64, dtype=np.float32)


def check(outputs: Any, *options: Any, received: Any = INPUT, norm: Any = None, **more: Any) -> Any:
    watch = ValueWatch([OutputSpec("", outputs.shape[1], False, *options, **more)])
    watch.start(len(outputs))
    watch.receive(received)
    watch.send([outputs])
    watch.norm_input = norm
    return watch.result()


@pytest.mark.parametrize(
    ("outputs", "activation", "combine", "remedy"),
    [
        (12 * X - 6, "none", "soft", "activation: sigmoid"),
        (2 * X, "none", "hard", "activation: sigmoid"),
        (SHARES, "softmax", "soft", "remove activation"),
        (SHARES, "softmax", "weighted_avg", "remove activation"),
        (X, "sigmoid", "soft", "remove activation"),
        (0 * X + 7, "none", "weighted_avg", "checkpoint"),
        (0 * X, "none", "weighted_avg", "checkpoint"),
        (np.concatenate([0 * X, 0 * X + 9], 1), "softmax", "hard", "checkpoint"),
    ],
)
def test_values_that_are_probably_a_mistake_give_one_warning(
    outputs: Any, activation: str, combine: str, remedy: str
) -> None:
    (warning,) = check(outputs, activation, combine).warnings
    assert remedy in warning
    assert "\n" not in warning


@pytest.mark.parametrize(
    ("outputs", "activation", "combine"),
    [
        (X, "none", "soft"),
        (12 * X - 6, "sigmoid", "soft"),
        (12 * X - 6, "none", "weighted_avg"),
        (SHARES, "none", "soft"),
        (SHARES * 3, "softmax", "soft"),
        (np.concatenate([X, X], 1), "softmax", "soft"),
        (np.concatenate([0 * X, X], 1), "none", "soft"),
        (np.full_like(X, np.nan), "none", "weighted_avg"),
    ],
)
def test_usual_values_give_no_warning(outputs: Any, activation: str, combine: str) -> None:
    assert check(outputs, activation, combine).warnings == ()


def test_labels_give_no_warning() -> None:
    values = np.rint(4 * X)
    result = check(values, "none", "soft", from_labels=True)
    assert result.warnings == ()
    assert result.output_range == (0, 4)


@pytest.mark.parametrize("value", [0, np.inf, np.nan])
def test_constant_outputs_of_a_constant_input_give_no_warning(value: float) -> None:
    received = np.full_like(INPUT, value)
    assert check(0 * X, "none", "weighted_avg", received=received).warnings == ()


def test_ranges_are_those_of_finite_values_and_of_patches_only() -> None:
    watch = ValueWatch([OutputSpec("", 1, False, "none", "weighted_avg")])
    watch.start(2)
    watch.receive(np.array([[5, np.nan], [9, np.inf], [0, 0]], np.float32))
    watch.send([np.array([[[2, np.nan]], [[-1, 3]]], np.float32)])
    watch.receive(np.array([[-100]], np.float32))
    result = watch.result()
    assert (result.input_range, result.output_range) == ((5, 9), (-1, 3))


@pytest.mark.parametrize(
    ("shift", "spread", "warns"),
    [(1, 1, False), (9, 9, False), (0, 0.03, False), (11, 1, True), (0, 11, True), (0, 0.01, True)],
)
def test_an_input_far_from_the_training_gives_a_warning(
    shift: float, spread: float, warns: bool
) -> None:
    norm = NormInput("encoder.norm", shift, spread)
    warnings = check(X, "none", "weighted_avg", norm=norm).warnings
    assert ["encoder.norm" in line for line in warnings] == [True] * warns
