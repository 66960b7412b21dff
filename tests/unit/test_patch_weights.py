"""Normalized weights of patches: products of profiles, and the cache of maps for other weights."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from chunkq.blend import patch_weights
from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.weights import ArrayWeights, Neighbors, Weights
from chunkq.plan.chunk import Patch
from tests.strategies import BUILT_INS, JobPlan, plan_for, user_weights

Array = npt.NDArray[Any]


def in_numpy(array: Array) -> Any:
    return array


def sliding(volume: tuple[int, ...], patch: tuple[int, ...], strides: list[int]) -> JobPlan:
    return plan_for(
        volume,
        patch,
        inference_type="sliding_window",
        strides=strides,
        weight_function=["weight_hann"],
    )


def weights_of(plan: JobPlan) -> Weights:
    """Return weights that are no product."""
    return ArrayWeights(user_weights(plan.output_patch))


class RecordingWeights:
    """Weights that record the calls of `normalized`."""

    def __init__(self, weights: Weights) -> None:
        self.calls: list[tuple[Neighbors, ...]] = []
        self._weights = weights

    def normalized(
        self, neighbors: tuple[Neighbors, ...], dtype: npt.DTypeLike
    ) -> npt.NDArray[np.floating]:
        self.calls.append(neighbors)
        return self._weights.normalized(neighbors, dtype)


def all_patches(plan: JobPlan) -> list[Patch]:
    return [p for i in plan.indices() for p in plan.patches(plan.chunk(i))]


def all_weights(plan: JobPlan, cache: PatchWeights) -> list[tuple[Patch, Array]]:
    return [(patch, cache.weights(patch)) for patch in all_patches(plan)]


def test_patches_with_equal_neighbors_share_their_weights() -> None:
    plan = sliding((100, 20), (8, 8), [3, 4])
    recorder = RecordingWeights(weights_of(plan))
    weights_by_patch = all_weights(plan, PatchWeights(plan, recorder, in_numpy))  # type: ignore[arg-type]
    assert len(set(recorder.calls)) == len(recorder.calls) < len(weights_by_patch) / 2
    assert all(weights.shape == patch.target.shape for patch, weights in weights_by_patch)


def test_a_full_cache_keeps_the_oldest_maps_and_returns_the_same_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = sliding((40,), (8,), [3])
    unlimited = all_weights(plan, PatchWeights(plan, weights_of(plan), in_numpy))
    # Three patches fit in the cache.
    monkeypatch.setattr(patch_weights, "MAP_CACHE_BYTES", 96)
    recorder = RecordingWeights(weights_of(plan))
    limited = PatchWeights(plan, recorder, in_numpy)  # type: ignore[arg-type]
    for _ in range(2):
        for (_, expected), (_, weights) in zip(unlimited, all_weights(plan, limited), strict=True):
            assert np.array_equal(weights, expected)
    # The two oldest maps stayed, the others replaced each other.
    calls = [recorder.calls.count(call) for call in dict.fromkeys(recorder.calls)]
    assert calls[:2] == [1, 1]
    assert set(calls[2:]) == {2}


@pytest.mark.parametrize("weight", BUILT_INS)
def test_the_product_of_the_profiles_is_the_normalized_weight(weight: str) -> None:
    plan = plan_for(
        (30, 20),
        (8, 10),
        inference_type="sliding_window",
        strides=[3, 4],
        pad_width=[2, 0],
        weight_function=[weight],
    )
    built_in = plan.blend_weights()
    weights = PatchWeights(plan, built_in, in_numpy)
    assert weights.is_product
    for patch in all_patches(plan):
        near = weights.neighbors(patch)
        expected = built_in.normalized(near)
        assert weights.weights(patch) == pytest.approx(expected, rel=1e-6, abs=1e-30)
        rows, columns = (weights.profile(axis, n) for axis, n in enumerate(near))
        kept = np.outer(rows, columns)
        inside = tuple(slice(n.low, n.high) for n in near)
        assert np.array_equal(kept[inside], weights.weights(patch))
        kept[inside] = 0
        assert not kept.any()  # no weight outside the volume


def test_weights_of_several_grids_and_of_users_are_no_product() -> None:
    plan = plan_for((20,), (4,), offsets=[[2]], weight_function=["weight_hann"])
    assert not PatchWeights(plan, plan.blend_weights(), in_numpy).is_product
    plan = sliding((20,), (4,), [2])
    assert not PatchWeights(plan, weights_of(plan), in_numpy).is_product


def test_prepared_weights_are_not_computed_again() -> None:
    plan = sliding((100, 20), (8, 8), [3, 4])
    recorder = RecordingWeights(weights_of(plan))
    cache = PatchWeights(plan, recorder, in_numpy)  # type: ignore[arg-type]
    cache.prepare(all_patches(plan))
    prepared = list(recorder.calls)
    all_weights(plan, cache)
    assert recorder.calls == prepared
    assert len(set(prepared)) == len(prepared) > 0


def test_no_more_weights_are_prepared_than_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = sliding((40,), (8,), [3])
    monkeypatch.setattr(patch_weights, "MAP_CACHE_BYTES", 64)
    recorder = RecordingWeights(weights_of(plan))
    cache = PatchWeights(plan, recorder, in_numpy)  # type: ignore[arg-type]
    cache.prepare(all_patches(plan))
    assert len(recorder.calls) == 2


def test_no_weights_are_prepared_for_patches_without_overlap() -> None:
    plan = sliding((24,), (8,), [8])
    recorder = RecordingWeights(weights_of(plan))
    cache = PatchWeights(plan, recorder, in_numpy)  # type: ignore[arg-type]
    cache.prepare(all_patches(plan))
    assert recorder.calls == []
