"""Chunks on a simulated device: what is copied, launched and awaited, and what results are."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker.batching import Batcher
from chunkq_worker.chunk_pipeline import ChunkPipeline
from chunkq_worker.device_pipeline import DevicePipeline
from chunkq_worker.runtimes.torch import TorchRuntime
from chunkq_worker.runtimes.torch_files import LoadedNetwork
from chunkq_worker.steps import Steps
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkq.blend import Contribution
from chunkq.errors import ErrorCode, ModelError, PredictionError
from chunkq.plan import Chunk, Plan
from chunkq.streaming import output_slices, regions
from chunkq.user_code import load_blend_weights
from chunkq.weights import ArrayWeights, Weights
from tests import reference as ref
from tests.simulated_device import Counts, SimulatedDevice
from tests.strategies import BUILT_INS, Case, cases, plan_for, user_weights, without_margin
from tests.unit.test_blend import assert_as_reference, window, with_weights

Array = npt.NDArray[Any]
BATCH = {"max_batch_size": 5, "device": "cuda", "dtype": "float32"}


class Affine(torch.nn.Module):
    """Return x · factor + factor / 2 with a factor per voxel of the output patch and channel."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        model = plan.job.model
        self._item = tuple(model.model_output_shape or model.model_input_shape)
        self._patch, self._output = plan.input_patch, plan.output_patch
        self._factors = factors(plan)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        center = [
            slice((p - q) // 2, (p + q) // 2)
            for p, q in zip(self._patch, self._output, strict=True)
        ]
        patches = batch.reshape(len(batch), 1, *self._patch)[(slice(None), slice(None), *center)]
        factors = torch.from_numpy(self._factors.astype(np.float32))
        if hasattr(batch, "owner"):
            factors = batch.owner.to_device(factors)
        return (patches * factors + factors / 2).reshape(len(batch), *self._item)


def factors(plan: Plan) -> Array:
    shape = (plan.channels, *plan.output_patch)
    return np.random.default_rng(0).random(shape).astype(np.float32).astype(np.float64)


def predictor(plan: Plan) -> ref.Predict:
    """Return the function of `Affine` in float64."""

    def predict(x: ref.F64, _start: ref.Shape) -> ref.F64:
        center = ref.center_crop(x[np.newaxis], plan.output_patch)
        return center * factors(plan) + factors(plan) / 2

    return predict


def pipeline_for(
    plan: Plan,
    device: SimulatedDevice,
    weights: Weights | None = None,
    network: torch.nn.Module | None = None,
    steps: Steps | None = None,
) -> DevicePipeline:
    steps = steps or Steps()
    loaded = LoadedNetwork((network or Affine(plan)).eval())
    runtime = TorchRuntime(loaded, plan.job.model, steps, 1, device)
    batcher = Batcher(plan, runtime, steps)
    return DevicePipeline(plan, runtime, batcher, weights or load_blend_weights(plan), device)


def compute(
    pipeline: ChunkPipeline, plan: Plan, volume: Array
) -> Iterator[tuple[Chunk, Contribution | None]]:
    """Compute each chunk; it is finished after the next one has started, as in a worker."""
    started: list[tuple[Chunk, Callable[[], Contribution | None]]] = []
    for chunk in map(plan.chunk, plan.indices()):
        halos = [window(plan, volume, chunk.halo)]
        started.append(
            (chunk, pipeline.start(chunk, halos) if chunk.is_active else lambda: None)
        )
        if len(started) > 1:
            previous, finish = started.pop(0)
            yield previous, finish()
    for chunk, finish in started:
        yield chunk, finish()


def output_of(pipeline: ChunkPipeline, plan: Plan, volume: Array) -> Array:
    output = np.zeros(plan.output_shape, plan.output_dtype)
    for box, values in regions(plan, compute(pipeline, plan, volume)):
        output[output_slices(plan, box)] = values
    return output


def random_volume(plan: Plan, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).integers(0, 6, plan.volume.shape)
    return values.astype(plan.volume.dtype)


def on_device(case: Case, **more: Any) -> Case:
    model = case.keys["model"] | BATCH
    return Case(case.volume, case.patch, case.output, case.keys | {"model": model} | more)


def half_overlap(
    volume: tuple[int, ...] = (30, 26, 22), patch: int = 8, channels: int = 3, **more: Any
) -> Plan:
    model = {"model_output_shape": [channels, *(patch,) * len(volume)]}
    model |= BATCH | more.pop("model", {})
    keys = {"weight_function": ["weight_gaussian"], "chunksize": [16] * len(volume)} | more
    return plan_for(
        volume,
        (patch,) * len(volume),
        inference_type="sliding_window",
        strides=[patch // 2] * len(volume),
        model=model,
        **keys,
    )


# ------------------------------------------------------------------------------------ results


@settings(max_examples=120)
@given(
    cases(), st.sampled_from((*BUILT_INS, "user")), st.integers(0, 99), st.booleans(), st.booleans()
)
def test_any_job_equals_the_reference(
    case: Case, weight: str, seed: int, early: bool, zero: bool
) -> None:
    case = on_device(case if weight == "user" else with_weights(case, weight))
    case.keys["nan"] = "zero" if zero else "fail"
    plan, weights = case.plan, None
    if weight == "user":
        weights = ArrayWeights(without_margin(user_weights(case.output), plan.margin))
    volume = random_volume(plan, seed)
    output = output_of(pipeline_for(plan, SimulatedDevice(early=early), weights), plan, volume)
    expected = ref.reference(
        case.setup,
        volume,
        predictor(plan),
        case.keys["combine"],
        user_weights if weight == "user" else weight,
        activation=case.keys["activation"],
    )
    assert_as_reference(plan, output, expected)


def test_one_and_two_chunks_in_flight_and_host_batches_give_the_same_bytes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = half_overlap(combine="weighted_avg")
    volume = random_volume(plan)
    device = SimulatedDevice()
    pipeline = pipeline_for(plan, device)
    expected = output_of(pipeline, plan, volume)
    assert pipeline.max_in_flight == 2
    assert not caplog.records
    limits = {}
    for limit in range(0, device.memory.peak, 1 << 10):
        limited = pipeline_for(plan, SimulatedDevice(memory_bytes=limit))
        print(limit)
