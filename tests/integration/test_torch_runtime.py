"""The torch runtime and its batches. Tests of all runtimes are in tests/contract."""

import functools
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker import inference_engine
from chunkq_worker.batching import Batcher
from chunkq_worker.inference_engine import InferenceEngine
from chunkq_worker.runtimes.base import load_runtime
from chunkq_worker.runtimes.cache_folder import COMPILER_VARIABLE, use_compiler_cache
from chunkq_worker.steps import Steps

from chunkq.create import check_job
from chunkq.errors import ErrorCode, ModelError, PredictionError
from chunkq.job.job_reading import load_job
from chunkq.job.model_config import ModelConfig
from tests.harness.assertions import assert_contains
from tests.harness.predictions import each_prediction
from tests.harness.torch_networks import (
    PATCH,
    FakeRuntime,
    TrainedNet,
    as_file,
    as_program,
    as_script,
    create_plan,
    exhaust_cpu_memory,
    load,
    load_error,
    predictions,
    program,
    scripted,
    trained,
)
from tests.harness.volumes import random_volume, write_zarr


def test_the_last_batch_of_a_chunk_has_the_remaining_patches(tmp_path: Path) -> None:
    plan, fake = create_plan(tmp_path, shape=(24, 16), chunksize=[24, 16]), FakeRuntime()
    fake.any_batch = True
    padded = predictions(plan, FakeRuntime())
    np.testing.assert_array_equal(predictions(plan, fake), padded)
    assert [len(batch) for batch in fake.batches] == [4, 2]
    assert all(batch.all() for batch in fake.batches)


def test_exported_programs_do_not_accept_any_batch_size(tmp_path: Path) -> None:
    assert load(create_plan(tmp_path)).any_batch
    script = as_script(scripted(trained(), tmp_path / "net.ts"))
    assert load(create_plan(tmp_path, model=script)).any_batch
    exported = as_program(program(tmp_path / "net.pt2"))
    assert not load(create_plan(tmp_path, model=exported)).any_batch


def test_batches_are_padded_with_the_last_patch_for_a_network_of_one_batch_size(
    tmp_path: Path,
) -> None:
    plan, fake = create_plan(tmp_path, shape=(24, 16), chunksize=[24, 16]), FakeRuntime()
    assert len(predictions(plan, fake)) == 6
    assert [len(batch) for batch in fake.batches] == [4, 4]
    last = fake.batches[1]
    assert all(np.array_equal(item, last[1]) for item in last[2:])
    assert not np.array_equal(last[0], last[1])


def test_a_batch_contains_patches_of_one_chunk_only(tmp_path: Path) -> None:
    plan, fake = create_plan(tmp_path, shape=(24, 16), chunksize=[16, 16]), FakeRuntime()
    batcher = Batcher(plan, plan.job.model, fake, Steps())
    for number, index in enumerate(plan.indices(), start=1):
        chunk = plan.chunk(index)
        region = np.full(chunk.halo.shape, number, np.float32)
        list(each_prediction(batcher, list(plan.patches(chunk)), [region], chunk.halo.start))
    assert [set(np.unique(batch)) - {0} for batch in fake.batches] == [{1}, {2}]
    assert batcher.patches_run == plan.costs.patches == 6


def test_a_prediction_does_not_depend_on_the_other_patches_of_its_batch(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    plan = create_plan(tmp_path, model={"checkpoint": str(tmp_path / "weights.pt")})
    chunk = plan.chunk((0, 0))
    region = np.random.default_rng(1).random(chunk.halo.shape).astype(np.float32)
    patches = list(plan.patches(chunk))
    batcher = Batcher(plan, plan.job.model, load(plan), Steps())
    expected = [
        np.asarray(p).copy() for _, p in each_prediction(batcher, patches, [region], (0, 0))
    ]
    # The batch size stays the same: processors use other kernels for other sizes.
    for position, patch in enumerate(patches):
        batch = [patches[position - 1]] * len(patches)
        batch[position] = patch
        outputs = [
            np.asarray(p).copy() for _, p in each_prediction(batcher, batch, [region], (0, 0))
        ]
        np.testing.assert_array_equal(outputs[position], expected[position])
        assert not np.array_equal(outputs[position - 1], outputs[position])


def test_out_of_memory_halves_the_batch_size_once_and_permanently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = create_plan(tmp_path, shape=(64, 16), chunksize=[64, 16], model={"max_batch_size": 8})
    expected = predictions(plan, FakeRuntime())
    fake, chunk = FakeRuntime(max_items=4), plan.chunk((0, 0))
    batcher, patches = Batcher(plan, plan.job.model, fake, Steps()), list(plan.patches(chunk))
    region = np.random.default_rng(1).random(chunk.halo.shape).astype(np.float32)
    with caplog.at_level(logging.INFO, logger="chunkq.worker"):
        for _ in range(2):
            outputs = [
                np.asarray(p) for _, p in each_prediction(batcher, patches, [region], (0, 0))
            ]
    np.testing.assert_allclose(np.stack(outputs), expected, rtol=0, atol=1e-6)
    assert batcher.size == 4
    assert {len(batch) for batch in fake.batches} == {4}
    [record] = caplog.records
    assert_contains(record.getMessage(), "out of memory", " 4 patches")


def test_too_little_memory_for_one_patch_is_an_error(tmp_path: Path) -> None:
    plan = create_plan(tmp_path)
    batcher = Batcher(plan, plan.job.model, FakeRuntime(max_items=0), Steps())
    with pytest.raises(ModelError) as caught:
        batcher.warm_up()
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    assert_contains(str(caught.value), "memory", "one patch")


def test_a_network_that_fails_for_zeros_is_unusable(tmp_path: Path) -> None:
    plan = create_plan(tmp_path)
    fake = FakeRuntime(max_items=0, error=ZeroDivisionError("message of the network"))
    batcher = Batcher(plan, plan.job.model, fake, Steps())
    with pytest.raises(ModelError) as caught:
        batcher.warm_up()
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    assert_contains(str(caught.value), "ZeroDivisionError", "zeros", "message of the network")
    assert batcher.size == 4
    with pytest.raises(ModelError, match="message of the network"):
        predictions(plan, fake)


class FailsForPatches(FakeRuntime):
    """Raise an error for every batch that is not zero."""

    def forward(self, batch: npt.NDArray[Any]) -> Any:
        outputs = super().forward(batch)
        if batch.any():
            raise ZeroDivisionError("these patches")
        return outputs


def test_an_error_for_some_patches_is_raised_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="these patches"):
        predictions(create_plan(tmp_path), FailsForPatches())


class ReturnsNonFinite(FakeRuntime):
    """Set the first class of the second item to a value that is not finite."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value

    def forward(self, batch: npt.NDArray[Any]) -> Any:
        outputs = super().forward(batch)
        outputs[1, 0] = self._value
        return outputs


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_error_for_a_prediction_that_is_not_finite_names_the_patch(
    tmp_path: Path, value: float
) -> None:
    with pytest.raises(PredictionError) as caught:
        predictions(create_plan(tmp_path), ReturnsNonFinite(value))
    assert caught.value.code is ErrorCode.PREDICTION_INVALID
    assert_contains(str(caught.value), "[0, 8]", "[8, 16]")


@pytest.mark.parametrize("activation", ["none", "softmax", "sigmoid"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_zero_replaces_non_finite_values_after_the_activation(
    tmp_path: Path, value: float, activation: str
) -> None:
    plan = create_plan(tmp_path, nan="zero", activation=activation)
    outputs = predictions(plan, ReturnsNonFinite(value))
    assert np.isfinite(outputs).all()
    assert not outputs[1, 0].any()
    assert outputs[1, 1:].all()
    assert outputs[[0, 2, 3]].all()


def test_non_finite_values_in_the_padding_of_a_batch_are_ignored(tmp_path: Path) -> None:
    class NanInPadding(FakeRuntime):
        def forward(self, batch: npt.NDArray[Any]) -> Any:
            outputs = super().forward(batch)
            repeated = [np.array_equal(item, batch[n - 1]) for n, item in enumerate(batch) if n]
            outputs[1:][repeated] = np.nan
            return outputs

    plan = create_plan(tmp_path, shape=(24, 16), chunksize=[24, 16])
    assert np.isfinite(predictions(plan, NanInPadding())).all()


@pytest.mark.parametrize("declared", [[3, 8, 6], [2, 8, 8], [8, 8]])
def test_the_error_for_another_output_shape_than_declared_names_both_shapes(
    tmp_path: Path, declared: list[int]
) -> None:
    plan = create_plan(tmp_path, model={"model_output_shape": declared}, pad_width=[0, 1])
    batcher = Batcher(plan, plan.job.model, load(plan), Steps())
    with pytest.raises(ModelError) as caught:
        batcher.warm_up()
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    key = "model_config.model_output_shape"
    assert_contains(str(caught.value), key, [4, 3, 8, 8], [4, *declared])


def test_a_network_that_does_not_return_a_tensor_is_an_error(tmp_path: Path) -> None:
    plan = create_plan(tmp_path, model={"class_name": "Other", "kwargs_file": None})
    runtime = load(plan)
    with pytest.raises(ModelError) as caught:
        runtime(np.zeros((4, 1, *PATCH), np.float32))
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    assert_contains(str(caught.value), "list", "one tensor")


@pytest.mark.parametrize(
    "dtype",
    ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "float16", "float64", "bool"],
)
def test_every_input_dtype_reaches_the_network_with_its_values(tmp_path: Path, dtype: str) -> None:
    plan = create_plan(tmp_path, dtype=dtype)
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    plan = create_plan(tmp_path, dtype=dtype, model={"checkpoint": str(tmp_path / "weights.pt")})
    values = np.random.default_rng(1).random((32, 16))
    values = values if np.dtype(dtype).kind == "f" else values * np.iinfo(np.int8).max
    volume = values.astype(dtype)
    chunk = plan.chunk((0, 0))
    batcher = Batcher(plan, plan.job.model, load(plan), Steps())
    pairs = list(each_prediction(batcher, list(plan.patches(chunk)), [volume[:16]], (0, 0)))
    assert len(pairs) == 4
    with torch.inference_mode():
        for patch, prediction in pairs:
            item = torch.from_numpy(volume[patch.source.slices((0, 0))].astype(np.float32))
            expected = trained()(item[None, None])[0]
            np.testing.assert_allclose(
                np.asarray(prediction), expected.numpy(), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_batches_are_cast_to_the_dtype_of_the_job(tmp_path: Path, name: str) -> None:
    (tmp_path / "checks_dtype.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        f"        assert x.dtype is torch.{name}, x.dtype\n"
        "        return torch.cat([x, x / 2, x / 3], 1)\n"
    )
    model = {"class_file": str(tmp_path / "checks_dtype.py"), "kwargs_file": None, "dtype": name}
    outputs = predictions(create_plan(tmp_path, dtype="uint8", model=model))
    assert outputs.dtype == np.float32
    assert outputs.max() > 50


def test_wide_unsigned_values_do_not_overflow(tmp_path: Path) -> None:
    plan = create_plan(tmp_path, dtype="uint16", model={"dtype": "float64"})
    runtime = load(plan)
    assert runtime.to_device(np.array([65535], np.uint16)).tolist() == [65535]
    assert runtime.to_device(np.array([4294967295], np.uint32)).tolist() == [4294967295]


@pytest.mark.parametrize(
    "array",
    [
        np.broadcast_to(np.float32(3), (2, 3)),
        np.arange(6, dtype=np.float32).reshape(2, 3)[::-1, ::-1],
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.arange(6, dtype=np.uint64).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    ],
    ids=["read-only", "negative strides", "big-endian", "uint64", "Fortran order"],
)
def test_to_device_keeps_the_values_of_any_array(tmp_path: Path, array: npt.NDArray[Any]) -> None:
    tensor = load(create_plan(tmp_path)).to_device(array)
    np.testing.assert_array_equal(tensor.to(torch.float32).numpy(), array.astype(np.float32))


def test_a_network_that_modifies_and_returns_its_batch_does_not_change_the_input(
    tmp_path: Path,
) -> None:
    (tmp_path / "inplace.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.add_(1)\n"
    )
    model = {
        "class_file": str(tmp_path / "inplace.py"),
        "kwargs_file": None,
        "model_output_shape": [1, *PATCH],
        "max_batch_size": 2,
    }
    plan = create_plan(tmp_path, dtype="float32", combine="weighted_avg", model=model)
    batcher = Batcher(plan, plan.job.model, load(plan), Steps())
    chunk = plan.chunk((0,) * plan.rank)
    patches = list(plan.patches(chunk))
    assert len(patches) == 2 * batcher.size
    halo = np.random.default_rng(0).random(chunk.halo.shape, np.float32)
    copy = halo.copy()
    for _ in range(2):
        for patch, prediction in each_prediction(batcher, patches, [halo], chunk.halo.start):
            values = halo[patch.source.slices(chunk.halo.start)]
            np.testing.assert_array_equal(prediction[0].numpy(), values + 1)
    np.testing.assert_array_equal(halo, copy)


# -------------------------------------------------------- memory, and causes of NaN values


def exhaust_torchscript_memory() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(lambda x: x.expand(1 << 55) + 1, torch.zeros(1), check_trace=False)


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "fail",
    [
        exhaust_cpu_memory,
        exhaust_torchscript_memory,
        raising(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        raising(
            RuntimeError("The following operation failed ...\nRuntimeError: CUDA out of memory.")
        ),
        raising(RuntimeError("CUDA error: out of memory")),
        raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")),
        raising(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),
        raising(MemoryError("Unable to allocate 2.00 TiB for an array")),
    ],
    ids=["cpu", "torchscript on cpu", "cuda", "torchscript", "driver", "cublas", "cudnn", "numpy"],
)
def test_failed_allocations_are_out_of_memory(tmp_path: Path, fail: Callable[[], None]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of several classes
        fail()
    assert load(create_plan(tmp_path)).is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904]"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("CUDA out of memory"),
        OSError("Cannot allocate memory"),
    ],
    ids=str,
)
def test_other_errors_are_not_out_of_memory(tmp_path: Path, error: Exception) -> None:
    assert not load(create_plan(tmp_path)).is_out_of_memory(error)


def test_a_later_job_with_the_same_network_starts_with_the_batch_size_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fakes: list[FakeRuntime] = []

    def load_fake(*_: object, **__: object) -> FakeRuntime:
        fakes.append(FakeRuntime(max_items=3))
        return fakes[-1]

    monkeypatch.setattr(inference_engine, "load_runtime", load_fake)
    write_zarr(tmp_path / "in.zarr", random_volume((32, 16)), (8, 8))
    torch.save(trained().state_dict(), tmp_path / "weights.pt")

    def batch_size(output: str, max_batch_size: int) -> int:
        checkpoint = str(tmp_path / "weights.pt")
        model = {"checkpoint": checkpoint, "max_batch_size": max_batch_size}
        job = create_plan(tmp_path, model=model).job.as_dict()
        paths = {"input": str(tmp_path / "in.zarr"), "output": str(tmp_path / output)}
        record = check_job(load_job(job | paths)).record
        return InferenceEngine(record, record.plan()).batcher.size

    def logged_sizes() -> list[str]:
        """Return the batch sizes of the logged out-of-memory messages, and clear the log."""
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        assert all("out of memory" in message for message in messages)
        return [re.findall(r"\d+", message)[0] for message in messages]

    with caplog.at_level(logging.INFO, logger="chunkq.worker"):
        assert batch_size("a.zarr", 4) == 2
        assert logged_sizes() == ["2"]
        sizes = (batch_size("b.zarr", 4), batch_size("c.zarr", 16), batch_size("d.zarr", 1))
        assert sizes == (2, 2, 1)
        assert logged_sizes() == []
        torch.save({k: v * 2 for k, v in trained().state_dict().items()}, tmp_path / "weights.pt")
        assert batch_size("e.zarr", 4) == 2  # other weights, so the size is measured again
        assert logged_sizes() == ["2"]
    assert [len(b) for b in fakes[0].batches + fakes[1].batches] == [2, 2]


def nan_above(limit: float, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Set values above `limit` to NaN. Steps can work in place."""
    batch -= 0.5
    batch[batch > limit - 0.5] = np.nan
    return batch


NAN_CAUSES: dict[str, tuple[Steps, float, str]] = {
    "the input": (Steps(), np.nan, "the input "),
    "the input through a step": (
        Steps(preprocessing=lambda batch: batch * 2),
        np.inf,
        "the input ",
    ),
    "preprocessing": (
        Steps(preprocessing=functools.partial(nan_above, 2)),
        3.0,
        "model_config.processing_steps: preprocessing ",
    ),
    "postprocessing": (
        Steps(
            preprocessing=lambda batch: batch * 2,
            postprocessing=lambda batch: np.where(batch > 5, np.inf, batch),
        ),
        3.0,
        "model_config.processing_steps: postprocessing ",
    ),
    "the network": (
        Steps(preprocessing=lambda batch: batch * 2, postprocessing=lambda batch: batch + 1),
        30.0,
        "the network ",
    ),
    "the network with protected steps": (
        Steps(postprocessing_protected=lambda batch: batch),
        30.0,
        "the network with its protected steps ",
    ),
}


class NanAbove(FakeRuntime):
    """Return NaN for values above 20."""

    def forward(self, batch: npt.NDArray[Any]) -> Any:
        outputs = super().forward(batch) * 7
        outputs[outputs > 20] = np.nan
        return outputs


@pytest.mark.parametrize("cause", NAN_CAUSES)
def test_the_error_for_nan_names_the_first_stage_that_has_it(tmp_path: Path, cause: str) -> None:
    steps, value, start = NAN_CAUSES[cause]
    plan = create_plan(tmp_path)
    chunk = plan.chunk((0, 0))
    region = np.random.default_rng(1).random(chunk.halo.shape).astype(np.float32)
    region[9, 2] = value
    batcher = Batcher(plan, plan.job.model, NanAbove(), steps)
    with pytest.raises(PredictionError) as caught:
        list(each_prediction(batcher, list(plan.patches(chunk)), [region], (0, 0)))
    assert caught.value.code is ErrorCode.PREDICTION_INVALID
    line = str(caught.value)
    assert line.startswith(start)
    assert ("protected" in line) == ("protected" in start)
    assert_contains(line, "[8, 0]", "[16, 8]")


def test_nan_zero_also_replaces_values_of_steps(tmp_path: Path) -> None:
    steps = Steps(postprocessing=lambda batch: np.where(batch > 0.1, np.nan, batch))
    outputs = predictions(create_plan(tmp_path, nan="zero"), FakeRuntime(), steps)
    assert np.isfinite(outputs).all()
    assert (outputs == 0).any()
    assert (outputs > 0).any()


# ----------------------------------------------------------------------- dtypes and options


@pytest.mark.parametrize(
    ("dtype", "keys_of"),
    [("float16", as_script), ("float64", as_script), ("int8", as_script), ("int8", None)],
    ids=["float16", "float64", "int8", "int8 by class"],
)
def test_the_error_for_another_dtype_than_that_of_the_network_names_the_dtype_to_set(
    tmp_path: Path, dtype: str, keys_of: Any
) -> None:
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    model = keys_of(scripted(trained(), tmp_path / "net.ts")) if keys_of else {}
    line = load_error(tmp_path, dtype=dtype, **model)
    assert line.startswith(f"model_config.dtype: {dtype}")
    assert_contains(line, "dtype: float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_weights_of_a_class_are_cast_to_the_dtype_of_the_job(
    tmp_path: Path, dtype: str
) -> None:
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    model = {"checkpoint": str(tmp_path / "weights.pt"), "dtype": dtype}
    expected = predictions(create_plan(tmp_path), TrainedNet())
    outputs = predictions(create_plan(tmp_path, model=model))
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-6 if dtype == "float64" else 2e-2)


def test_a_network_in_half_precision_accepts_half_precision(tmp_path: Path) -> None:
    path = scripted(trained().bfloat16(), tmp_path / "half.ts", torch.bfloat16)
    outputs = predictions(create_plan(tmp_path, model=as_script(path, dtype="bfloat16")))
    expected = predictions(create_plan(tmp_path), TrainedNet())
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=2e-2)
    assert "dtype: bfloat16" in load_error(tmp_path, **as_script(path))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", ["class", "torchscript", "exported"])
def test_half_precision_is_torchs_autocast(tmp_path: Path, dtype: str, form: str) -> None:
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    model: dict[str, Any] = {"checkpoint": str(tmp_path / "weights.pt")}
    if form == "torchscript":
        model = as_script(scripted(trained(), tmp_path / "net.ts"))
    elif form == "exported":
        model = as_program(program(tmp_path / "net.pt2"))
    expected = predictions(create_plan(tmp_path, model=model))
    outputs = predictions(create_plan(tmp_path, model=model | {"precision": dtype}))
    assert np.abs(outputs - expected).max() > 1e-5
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=2e-2)


def tf32_settings() -> tuple[bool, str]:
    """Return torch's settings for convolutions and for matrix products."""
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (None, (False, "highest")),
        ("float32", (False, "highest")),
        ("tf32", (True, "high")),
        ("bfloat16", (True, "high")),
    ],
)
def test_each_batch_runs_with_the_precision_of_its_job(
    tmp_path: Path, precision: str | None, expected: tuple[bool, str]
) -> None:
    """A program that uses chunkq keeps its settings, also if the network raises an error."""
    plan, during = create_plan(tmp_path), []

    def record(batch: torch.Tensor) -> torch.Tensor:
        during.append(tf32_settings())
        if batch.isnan().any():
            raise ValueError("NaN")
        return batch

    model = plan.job.model.model_copy(update={"precision": precision})  # tf32 needs a GPU
    runtime = load_runtime(model, Steps(preprocessing_protected=record), 1)
    before = (True, "medium") if expected[0] is False else (False, "medium")
    original = tf32_settings()
    batch = np.ones((2, 1, *PATCH), np.float32)
    try:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
        runtime(batch)
        assert tf32_settings() == before
        with pytest.raises(ValueError, match="NaN"):
            runtime(batch * np.nan)
        assert tf32_settings() == before
    finally:
        torch.backends.cudnn.allow_tf32 = original[0]
        torch.set_float32_matmul_precision(original[1])
    assert during == [expected, expected]


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch < 2.9")
def test_the_precision_overrides_settings_per_operation() -> None:
    """In another process: torch cannot return to its initial state."""
    code = """
import torch
from chunkq_worker.runtimes.torch_tf32 import tf32

torch.backends.fp32_precision = "tf32"
torch.backends.cudnn.rnn.fp32_precision = "ieee"
operations = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
before = [one.fp32_precision for one in operations]
assert set(before) == {"tf32", "ieee"}
for allowed, expected in ((False, "ieee"), (True, "tf32")):
    with tf32(allowed=allowed):
        assert [one.fp32_precision for one in operations] == [expected] * 3
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is allowed
    assert [one.fp32_precision for one in operations] == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


LAYOUT = """\
import torch


class Net(torch.nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.layer = getattr(torch.nn, f"Conv{rank}d")(2, 3, 3, padding=1)
        self.layout = {2: torch.channels_last, 3: torch.channels_last_3d}[rank]

    def forward(self, x):
        for tensor in (x, self.layer.weight):
            assert tensor.is_contiguous(memory_format=self.layout), tensor.stride()
            assert not tensor.is_contiguous()
        return self.layer(x)
"""


@pytest.mark.parametrize("rank", [2, 3])
def test_channels_last_sets_the_layout_of_batches_and_weights(tmp_path: Path, rank: int) -> None:
    (tmp_path / "layout.py").write_text(LAYOUT)
    (tmp_path / "rank.py").write_text(f"kwargs = {{'rank': {rank}}}\n")
    model = {"class_file": str(tmp_path / "layout.py"), "kwargs_file": str(tmp_path / "rank.py")}
    runtime = load(create_plan(tmp_path, model=model | {"channels_last": True}))
    batch = np.random.default_rng(0).random((4, 2, *[8] * rank), np.float32)
    assert tuple(runtime(batch)[0].shape) == (4, 3, *[8] * rank)


def test_channels_last_does_not_change_results(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    model = {"checkpoint": str(tmp_path / "weights.pt")}
    expected = predictions(create_plan(tmp_path, model=model))
    outputs = predictions(create_plan(tmp_path, model=model | {"channels_last": True}))
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-6)


def test_channels_last_without_channels_is_an_error(tmp_path: Path) -> None:
    line = load_error(tmp_path, model_input_shape=[8, 8], channels_last=True)
    assert line.startswith("model_config.channels_last: ")
    assert_contains(line, [4, 8, 8])


def test_compiled_networks_return_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces the network; the C++ compiler is skipped because it is slow."""
    calls: list[dict[str, Any]] = []

    def compile_without_cpp(module: Any, **options: Any) -> Any:
        calls.append(options)
        return torch_compile(module, backend="eager", fullgraph=True, **options)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_without_cpp)
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    for model in (
        {"checkpoint": str(tmp_path / "weights.pt")},
        as_program(program(tmp_path / "net.pt2")),
    ):
        expected = predictions(create_plan(tmp_path, model=model))
        outputs = predictions(create_plan(tmp_path, model=model | {"compile": True}))
        np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-6)
    assert len(calls) == 2


def test_a_missing_compiler_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch._inductor.config as compiler

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler.cpp, "cxx", (None, "/nowhere/g++"))
    (tmp_path / "add.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.cat([x, x + 1, x * 2], 1)\n"
    )
    model = {"class_file": str(tmp_path / "add.py"), "kwargs_file": None}
    line = load_error(tmp_path, compile=True, **model)
    assert line.startswith("model_config.compile: ")
    assert_contains(line, "torch.compile", "remove compile")


COMPILE = """\
import sys
import numpy as np
from chunkq.job.model_config import ModelConfig
from chunkq_worker.runtimes.base import load_runtime
from chunkq_worker.steps import Steps

model = ModelConfig.model_validate_json(sys.argv[1])
runtime = load_runtime(model, Steps(), 1)
for _ in range(2):
    [outputs] = runtime(np.ones((2, 1, 8, 8), np.float32))
assert outputs.tolist() == np.full((2, 1, 8, 8), 7.0).tolist()
from torch._dynamo.utils import counters
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


def test_a_second_process_does_not_compile_the_network_again(tmp_path: Path) -> None:
    """The compiled network is in the user's cache folder, which only the user can read."""
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return (x + 1) * 3 + x\n"
    )
    model = ModelConfig.model_validate(
        {
            "runtime": "torch",
            "type": "class",
            "class_file": str(tmp_path / "net.py"),
            "class_name": "Net",
            "model_input_shape": [1, 8, 8],
            "max_batch_size": 2,
            "compile": True,
        }
    )
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, model.model_dump_json()]
    lines = [
        subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert lines == [["1", "0"], ["0", "1"]]
    folder = tmp_path / "cache" / "chunkq"
    assert folder.stat().st_mode & 0o077 == 0
    assert any((folder / "torch").iterdir())


def test_a_cache_folder_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPILER_VARIABLE, "/mine")
    use_compiler_cache()
    assert os.environ[COMPILER_VARIABLE] == "/mine"


def test_a_cache_folder_that_cannot_be_created_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv(COMPILER_VARIABLE, raising=False)
    use_compiler_cache()
    assert COMPILER_VARIABLE not in os.environ
    [record] = caplog.records
    assert_contains(record.getMessage(), tmp_path / "file", "XDG_CACHE_HOME")


def test_torchscript_cannot_be_compiled(tmp_path: Path) -> None:
    path = scripted(trained(), tmp_path / "net.ts")
    line = load_error(tmp_path, **as_script(path, compile=True))
    assert line.startswith("model_config.compile: ")
    assert_contains(line, "torchscript", "type: class")


# -------------------------------------------------------------------- normalization layers


class Norms(torch.nn.Module):
    """Layers that normalize with statistics of the patch, and layers that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.group = torch.nn.GroupNorm(1, 3)
        self.instance = torch.nn.InstanceNorm2d(3)
        self.batch = torch.nn.BatchNorm2d(3, track_running_stats=False)
        self.layer = torch.nn.LayerNorm([8, 8])
        self.independent = torch.nn.Sequential(
            torch.nn.BatchNorm2d(3),
            torch.nn.InstanceNorm2d(3, track_running_stats=True),
            torch.nn.LayerNorm(8),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.instance(self.group(x.repeat(1, 3, 1, 1)))
        output: torch.Tensor = self.independent(self.layer(self.batch(x)))
        return output


def test_layers_that_normalize_with_statistics_of_the_patch_are_listed(tmp_path: Path) -> None:
    torch.save(Norms(), tmp_path / "pickled.pt")
    runtime = load(create_plan(tmp_path, model=as_file(tmp_path / "pickled.pt")))
    kinds = ["GroupNorm", "InstanceNorm2d", "BatchNorm2d", "LayerNorm"]
    names = ["group", "instance", "batch", "layer"]
    assert list(runtime.tile_norms()) == [f"{n} ({k})" for n, k in zip(names, kinds, strict=True)]
    exported = load(create_plan(tmp_path, model=as_program(program(tmp_path / "n.pt2", Norms()))))
    operators = [name.rpartition("(aten.")[2].partition(".")[0] for name in exported.tile_norms()]
    assert operators == ["group_norm", "instance_norm", "batch_norm", "layer_norm"]
    script = tmp_path / "norms.ts"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Norms()).save(str(script))
    scripted_norms = load(create_plan(tmp_path, model=as_script(script))).tile_norms()
    assert [name.partition(" ")[0] for name in scripted_norms] == names
    assert load(create_plan(tmp_path)).tile_norms() == ()
    assert runtime.device_bytes() is None
