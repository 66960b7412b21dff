import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.weights import (
    ArrayWeights,
    Float64,
    Neighbors,
    Weights,
    built_in_weights,
    neighbors,
)
from chunkq.plan.chunk import Patch
from chunkq.plan.plan import Plan
from tests import reference as ref
from tests.strategies import BUILT_INS, Case, cases, plan_for, user_weights, without_margin


def profile(name: str, n: int) -> Float64:
    return np.exp(built_in_weights(name, (n,), (0,)).profiles[0])


def all_patches(plan: Plan) -> Iterator[Patch]:
    for index in plan.indices():
        yield from plan.patches(plan.chunk(index))


def weights_of(plan: Plan, name: str) -> tuple[Weights, Float64]:
    """Return the weights under test, and the reference's log weights of the kept voxels."""
    if name == "user":
        array = without_margin(user_weights(plan.output_patch), plan.margin)
        return ArrayWeights(array), np.log(array)
    logs = without_margin(ref.log_weights(name, plan.output_patch), plan.margin)
    return built_in_weights(name, plan.output_patch, plan.margin), logs


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("weight_uniform", [1, 1, 1]),
        (
            "weight_gaussian",
            [math.exp(-4.5), math.exp(-0.5), math.exp(-0.5), math.exp(-4.5)],
        ),  # σ = ½
        ("weight_linear", [1, 2, 3, 2, 1]),
        ("weight_linear", [1, 2, 2, 1]),
        ("weight_linear", [1]),
        ("weight_hann", [0.5, 1, 0.5]),  # sin² of 45°, 90°, 135°
        ("weight_hann", [1]),
        ("weight_hann", [0.25, 0.75, 1, 0.75, 0.25]),  # sin² of 30°, 60°, 90°, …
        ("weight_bump", [math.exp(-1)]),  # t = 0
        ("weight_bump", [math.exp(-4 / 3), math.exp(-4 / 3)]),  # t = ∓1/2
        ("weight_bump", [math.exp(-9 / 5), math.exp(-1), math.exp(-9 / 5)]),  # t = ∓2/3, 0
    ],
)
def test_profiles_equal_values_computed_by_hand(name: str, values: list[float]) -> None:
    assert profile(name, len(values)) == pytest.approx(values, rel=1e-12)


def test_the_sigma_of_the_gaussian_is_an_eighth_of_the_patch() -> None:
    # n = 16: σ = 2, center 7.5
    expected = [math.exp(-((i - 7.5) ** 2) / 8) for i in range(16)]
    assert profile("weight_gaussian", 16) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", BUILT_INS)
@pytest.mark.parametrize("n", [1, 2, 7, 128, 1000])
def test_built_in_weights_are_symmetric_and_nonzero(name: str, n: int) -> None:
    logs = built_in_weights(name, (n,), (0,)).profiles[0]
    assert np.isfinite(logs).all()
    assert logs == pytest.approx(logs[::-1], abs=1e-9 * np.abs(logs).max())


def test_a_margin_crops_the_weights_of_the_output_patch() -> None:
    weights = built_in_weights("weight_linear", (6, 5), (2, 1))
    assert np.exp(weights.profiles[0]) == pytest.approx([3, 3])
    assert np.exp(weights.profiles[1]) == pytest.approx([2, 3, 2])


@pytest.mark.parametrize("name", [*BUILT_INS, "user"])
@settings(max_examples=60)
@given(case=cases(max_rank=3))
def test_the_weights_of_all_patches_over_a_voxel_sum_to_one(name: str, case: Case) -> None:
    plan = case.plan
    weights, _ = weights_of(plan, name)
    cache = PatchWeights(plan, weights, lambda array: array)
    total = np.zeros(case.volume)
    for patch in all_patches(plan):
        part = cache.weights(patch)
        assert part.dtype == np.float32
        total[patch.target.slices((0,) * plan.rank)] += part
    assert np.abs(total - 1).max() < 1e-6


@settings(max_examples=60)
@given(case=cases(max_rank=3), name=st.sampled_from((*BUILT_INS, "user")))
def test_normalized_weights_equal_the_weights_divided_by_the_sum_over_all_grids(
    case: Case, name: str
) -> None:
    plan = case.plan
    weights, logs = weights_of(plan, name)
    cache = PatchWeights(plan, weights, lambda array: array)
    kept = [axis.grids[0] for axis in plan.axes]

    def log_weights_of(patch: Patch) -> Float64:
        first = [s + g.lead for s, g in zip(patch.source.start, kept, strict=True)]
        return logs[patch.target.slices(first)]

    total = np.full(case.volume, -np.inf)
    for patch in all_patches(plan):
        target = patch.target.slices((0,) * plan.rank)
        total[target] = np.logaddexp(total[target], log_weights_of(patch))
    for patch in all_patches(plan):
        expected = np.exp(log_weights_of(patch) - total[patch.target.slices((0,) * plan.rank)])
        assert np.abs(cache.weights(patch) - expected).max() < 1e-6


@pytest.mark.parametrize("name", [*BUILT_INS, "user"])
@settings(max_examples=40)
@given(case=cases(max_rank=3))
def test_the_weight_of_a_voxel_that_one_patch_covers_is_exactly_one(name: str, case: Case) -> None:
    plan = case.plan
    weights, _ = weights_of(plan, name)
    cache = PatchWeights(plan, weights, lambda array: array)
    count = np.zeros(case.volume, dtype=int)
    for patch in all_patches(plan):
        count[patch.target.slices((0,) * plan.rank)] += 1
    for patch in all_patches(plan):
        covered_once = count[patch.target.slices((0,) * plan.rank)] == 1
        assert (cache.weights(patch)[covered_once] == 1.0).all()
        assert cache.has_no_overlap(patch) == covered_once.all()


@pytest.mark.parametrize("name", BUILT_INS)
def test_the_weights_of_a_single_patch_are_one_also_in_its_corners(name: str) -> None:
    plan = plan_for((32, 32, 32), (32, 32, 32))
    weights, _ = weights_of(plan, name)
    (patch,) = all_patches(plan)
    assert (PatchWeights(plan, weights, lambda array: array).weights(patch) == 1.0).all()


def test_normalized_bump_weights_are_exact_in_the_corner_of_a_128_cube() -> None:
    # The product of the profiles is about exp(-193), which underflows float32.
    plan = plan_for(
        (192, 128, 128), (128, 128, 128), inference_type="sliding_window", strides=[64, 64, 64]
    )
    weights, _ = weights_of(plan, "weight_bump")
    cache = PatchWeights(plan, weights, lambda array: array)
    low, high = (cache.weights(patch).copy() for patch in all_patches(plan))
    assert np.isfinite(low).all()
    assert np.isfinite(high).all()
    assert low[0, 0, 0] == low[63, 127, 0] == high[64, 0, 0] == high[127, 127, 127] == 1.0

    def log_bump(i: int) -> float:
        t = (2 * i + 1) / 128 - 1
        return -1 / (1 - t * t)

    # Voxel 96 + x of the first patch is voxel 32 + x of the second; other axes do not matter.
    for x in (-16, 0, 16):
        expected = 1 / (1 + math.exp(log_bump(32 + x) - log_bump(96 + x)))
        assert low[96 + x, 0, 0] == pytest.approx(expected, rel=1e-6)
        assert high[32 + x, 127, 0] == pytest.approx(1 - expected, rel=1e-6)


def test_bump_weights_along_four_axes_do_not_underflow_with_several_grids() -> None:
    # The sum of each grid in the corner is about exp(-4·n/4), which underflows float64 for n > 750.
    shape = (800, 1, 1, 1)
    wide = built_in_weights("weight_bump", (800, 800, 800, 800), (0,) * 4)
    corner = [Neighbors(0, n, ((0,), (0,))) for n in shape]
    assert sum(p[0] for p in wide.profiles) < math.log(5e-324)
    assert wide.normalized(corner) == pytest.approx(np.full(shape, 0.5))


def test_positions_of_neighbors_are_relative_to_the_first_kept_voxel() -> None:
    # Starts 0, 3, 6; volume 10, patch 4: patch 1 is overlapped by one voxel on each side.
    plan = plan_for((10,), (4,), inference_type="sliding_window", strides=[3])
    assert neighbors(plan.axes[0], 0, 1) == Neighbors(0, 4, ((-3, 0, 3),))
    assert neighbors(plan.axes[0], 0, 0) == Neighbors(0, 4, ((0, 3),))


def test_neighbors_are_clipped_to_the_volume_and_include_every_grid() -> None:
    # Grid 0 starts at -1, 3, 7; grid 1 at -3, 1, 5, 9. Patch 0 of grid 0 covers [0, 3).
    plan = plan_for((9,), (4,), pad_width=[1], offsets=[[-2]])
    assert neighbors(plan.axes[0], 0, 0) == Neighbors(1, 4, ((0,), (-2, 2)))
    # Patch 2 of grid 0 covers [7, 9).
    assert neighbors(plan.axes[0], 0, 2) == Neighbors(0, 2, ((0,), (-2,)))


def test_patches_far_from_the_ends_have_equal_neighbors() -> None:
    plan = plan_for((100,), (8,), inference_type="sliding_window", strides=[3])
    inner = {neighbors(plan.axes[0], 0, k) for k in range(3, 28)}
    assert len(inner) == 1


def test_user_weights_are_normalized_by_their_sum() -> None:
    # Two patches of 3, stride 2: both cover voxel 2, at their index 2 and 0.
    weights = ArrayWeights(np.array([1.0, 5.0, 3.0]))
    first = weights.normalized([Neighbors(0, 3, ((0, 2),))])
    second = weights.normalized([Neighbors(0, 3, ((-2, 0),))])
    assert first.tolist() == [1.0, 1.0, 0.75]
    assert second.tolist() == [0.25, 1.0, 1.0]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_user_weights_may_be_as_large_as_the_largest_float64() -> None:
    weights = ArrayWeights(np.full(2, 1e308))
    assert weights.normalized([Neighbors(0, 2, ((0,), (0,)))]).tolist() == [0.5, 0.5]
