"""Compare what is stored of predictions with the reference, for every rule of combination."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from chunkq.blend.rules import entropy, rule_of
from chunkq.errors import ErrorCode, PredictionError
from chunkq.plan.outputs import OutputSpec
from tests import reference as ref
from tests.harness.memory_run import Array, ToDevice, in_numpy, in_torch, run
from tests.strategies import BUILT_INS, Case, JobPlan, cases, plan_for

Library = Callable[[Any], Any]
BOTH = pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
INTEGERS = ("uint8", "uint16", "int8", "int16")


def spec(channels: int = 2, **keys: Any) -> OutputSpec:
    values: dict[str, Any] = {"combine": "weighted_avg", "activation": "none"}
    return OutputSpec("", channels, channel_axis=True, **(values | keys))


@dataclass(frozen=True)
class RuleCase:
    """A job, and the keys of its output that replace those of the job."""

    case: Case
    keys: dict[str, Any]
    network: str
    weight: str
    seed: int

    @property
    def volume(self) -> Array:
        """The volume of the job."""
        return np.random.default_rng(self.seed).integers(0, 6, self.case.volume).astype(np.uint8)

    @property
    def predict(self) -> ref.Predict:
        """The network of the job."""
        return ref.predictor(self.network, self.case.channels, self.case.output)

    def plan(self, **more: Any) -> JobPlan:
        """Return the plan of the job; `more` are further keys of its output."""
        keys = self.case.keys | {"combine": "weighted_avg", "weight_function": [self.weight]}
        plan = plan_for(self.case.volume, self.case.patch, **keys)
        has_axis = plan.channel_axis and self.keys["combine"] != "entropy"
        output = replace(plan.output, **self.keys, **more, channel_axis=has_axis)
        return replace(plan, outputs=(output,))

    def run(self, to_device: ToDevice = in_numpy, **more: Any) -> Array:
        """Return what the job stores."""
        return run(self.plan(**more), self.volume, self.predict, None, to_device)

    @cached_property
    def expected(self) -> ref.Reference:
        """The result of the reference."""
        case = self.case
        return ref.reference(case.setup, self.volume, self.predict, weight=self.weight, **self.keys)


@st.composite
def rule_cases(draw: st.DrawFn) -> RuleCase:
    """Draw a job that stores no labels."""
    case = draw(cases(max_rank=3))
    combine = draw(st.sampled_from(("weighted_avg", "std", "entropy")))
    activations = ("sigmoid", "softmax")[case.channels > 1 :]
    share = draw(st.sampled_from(activations))
    keys = {"combine": combine, "activation": share}
    if combine == "weighted_avg":
        keys = {"combine": combine, "activation": "none", "activation_after": share}
    elif combine == "std":
        keys["activation"] = draw(st.sampled_from(("none", share)))
    network = draw(st.sampled_from(sorted(ref.NETWORKS)))
    return RuleCase(case, keys, network, draw(st.sampled_from(BUILT_INS)), draw(st.integers(0, 99)))


def assert_as_reference(case: RuleCase, out: Array) -> None:
    expected = case.expected.values
    found = out.reshape(expected.shape).astype(np.float64)
    if case.keys["combine"] == "std":
        largest = max(1.0, float(np.abs(case.expected.average).max()))
        assert np.abs(found**2 - expected**2).max() <= 1e-6 * largest**2
    else:
        assert np.abs(found - expected).max() <= 1e-5


@settings(max_examples=60)
@given(rule_cases())
def test_any_job_equals_the_reference(case: RuleCase) -> None:
    assert_as_reference(case, case.run())


@settings(max_examples=15)
@given(rule_cases())
def test_any_job_in_torch_equals_the_reference(case: RuleCase) -> None:
    assert_as_reference(case, case.run(in_torch))


@settings(max_examples=60)
@given(rule_cases(), st.sampled_from(INTEGERS), st.sampled_from([(0.0, 1.0), (-0.5, 3.0)]))
def test_integers_are_within_half_a_step_of_the_clipped_reference(
    case: RuleCase, dtype: str, span: tuple[float, float]
) -> None:
    plan, out = (
        case.plan(average_dtype=dtype, range=span),
        case.run(average_dtype=dtype, range=span),
    )
    values = plan.output.value_range
    assert values is not None
    assert out.dtype == np.dtype(dtype)
    expected = case.expected.values
    found = out.reshape(expected.shape).astype(np.float64) * values.scale + values.offset
    scale = max(1.0, float(np.abs(case.expected.average).max()))
    # A deviation near 0 has a larger error than its variance.
    tolerance = 1e-3 * scale if case.keys["combine"] == "std" else 1e-5
    assert np.abs(found - np.clip(expected, *span)).max() <= values.scale / 2 + tolerance


def test_small_differences_between_large_predictions_are_not_lost() -> None:
    plan = plan_for((24,), (8,), inference_type="sliding_window", strides=[2], chunksize=[8])
    plan = replace(plan, outputs=(replace(plan.output, combine="std"),))

    def predict(_x: ref.F64, start: ref.Shape) -> ref.F64:
        return np.full((1, 8), 1e4 + (0.001 if start[0] % 4 else -0.001))

    out = run(plan, np.zeros(24, np.uint8), predict)
    assert (out[:2].tolist(), out[-2:].tolist()) == ([0, 0], [0, 0])  # one prediction covers them
    stored = np.float32([1e4 - 0.001, 1e4 + 0.001]).astype(np.float64)
    assert out[8:16] == pytest.approx(np.full(8, float(np.ptp(stored)) / 2), rel=1e-6)


def test_equal_predictions_have_no_deviation_for_any_cut() -> None:
    for chunk in ([8, 8], [11, 16], [40, 40]):
        plan = plan_for(
            (23, 31),
            (8, 8),
            inference_type="sliding_window",
            strides=[3, 5],
            chunksize=chunk,
            weight_function=["weight_gaussian"],
        )
        plan = replace(plan, outputs=(replace(plan.output, combine="std"),))
        out = run(plan, np.zeros((23, 31), np.uint8), lambda _x, _s: np.full((1, 8, 8), 1234.567))
        assert not out.any()


@BOTH
def test_the_entropy_lies_between_0_and_that_of_equal_shares(library: Library) -> None:
    shares = np.float32([[0, 1, 1 / 3, 0.5], [1, 0, 1 / 3, 0.5], [0, 1e-7, 1 / 3, 0]])
    found = np.asarray(entropy(library(shares)))
    assert found.shape == (1, 4)
    assert found[0] == pytest.approx([0, 0, log(3), log(2)], abs=2e-6)
    single = np.asarray(entropy(library(np.float32([[0, 1, 0.5, 1.0000001]]))))
    assert single[0] == pytest.approx([0, 0, log(2), 0], abs=2e-6)


@BOTH
@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 9)),
        elements=st.floats(0, 1, width=32),
    )
)
def test_the_entropy_of_any_shares_is_within_its_bounds(library: Library, shares: Array) -> None:
    if len(shares) > 1:
        total = shares.sum(0)
        shares = np.where(total > 0, shares, 1) / np.where(total > 0, total, len(shares))
    found = np.asarray(entropy(library(shares.astype(np.float32))))
    assert found.min() >= 0
    assert found.max() <= np.float32(log(max(2, len(shares))))


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_weighted_average_keeps_its_channels_and_is_cast(library: Library, dtype: str) -> None:
    values = [[0.125, 60000.0], [-1.5, 3.0]]
    rule = rule_of(spec(average_dtype=dtype))
    output = rule.store(np.asarray(rule.reduce(library(np.float32(values)))))
    assert (output.tolist(), output.dtype) == (values, np.dtype(dtype))


@pytest.mark.parametrize("value", [65520.0, -1e30, float("inf")])
def test_an_average_that_float16_cannot_hold_is_an_error(value: float) -> None:
    average = np.float32([[0.0, value]])
    with pytest.raises(PredictionError, match=r"^output_dtype: float16 .*float32") as error:
        rule_of(spec(1, average_dtype="float16")).store(average)
    assert error.value.code is ErrorCode.PREDICTION_INVALID
    assert rule_of(spec(1)).store(average)[0, 1] == np.float32(value)


@pytest.mark.parametrize(
    ("keys", "fill"),
    [
        ({"fill_value": 3.0}, 3.0),
        ({"fill_value": 3.0, "average_dtype": "uint8", "range": (1.0, 5.0)}, 128),
        ({"fill_value": 1.0, "combine": "soft"}, 1),
        ({"fill_value": 1.0, "combine": "std", "activation": "softmax"}, 0.0),
        ({"fill_value": 1.0, "combine": "entropy", "activation": "softmax"}, 0.0),
        ({"combine": "std", "average_dtype": "int8", "range": (0.0, 1.0)}, -128),
    ],
)
def test_voxels_outside_the_mask_have_the_fill_value(keys: dict[str, Any], fill: float) -> None:
    output = spec(**keys)
    output = replace(output, channel_axis=not output.has_labels)
    rule = rule_of(output)
    shape = (6,) if output.has_labels else (output.stored_channels, 6)
    inside = np.array([True, False] * 3)
    stored = rule.store(np.full(shape, 0.25, np.float32), inside)
    assert (output.fill, output.fill.dtype) == (fill, stored.dtype)
    assert (stored[..., 1::2] == fill).all()
    assert (stored[..., ::2] != fill).all() or fill == 0


@pytest.mark.parametrize(
    ("channels", "keys", "expected"),
    [
        (3, {"fill_value": 2.0}, [2, 2, 2]),
        (3, {"fill_value": 2.0, "combine": "soft"}, [0, 0, 1]),
        (3, {"fill_value": 2.0, "combine": "std", "activation": "softmax"}, [0, 0, 1]),
        (3, {"fill_value": 2.0, "combine": "entropy", "activation": "softmax"}, [0, 0, 1]),
        (3, {"fill_value": 0.5, "combine": "std"}, [0.5, 0.5, 0.5]),
        (1, {"fill_value": 1.0, "combine": "entropy", "activation": "sigmoid"}, [1]),
    ],
)
def test_an_empty_patch_predicts_the_class_of_shares_and_else_the_fill_value(
    channels: int, keys: dict[str, Any], expected: list[float]
) -> None:
    assert spec(channels, **keys).nothing.tolist() == expected
