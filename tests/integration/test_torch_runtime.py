"""The torch runtime: how networks are loaded, batched, and held to what the job declares."""

import logging
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker.batching import Batcher
from chunkq_worker.runtimes.base import Runtime, load_runtime

from chunkq.errors import ModelError, PredictionError
from chunkq.job import parse_job
from chunkq.plan import Plan, Volume
from chunkq.resolve import resolve

CLASS = """\
import torch


class Net(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, width, 3, padding=1)

    def forward(self, x):
        return self.layer(x)


class Other(torch.nn.Module):
    def forward(self, x):
        return [x]
"""
PATCH = (8, 8)


def namespace() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "user"}
    exec(CLASS, names)
    return names


def trained() -> torch.nn.Module:
    torch.manual_seed(3)
    module: torch.nn.Module = namespace()["Net"](width=3)
    return module


def scripted(module: torch.nn.Module, path: Path) -> Path:
    """Script and save; by tracing, as the class has no source file to script from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(module, torch.zeros(2, 1, *PATCH)).save(str(path))
    return path


def plan_of(
    folder: Path, shape: tuple[int, int] = (32, 16), dtype: str = "float32", **more: Any
) -> Plan:
    (folder / "net.py").write_text(CLASS)
    (folder / "kwargs.py").write_text("kwargs = {'width': 3}\n")
    model = {
        "runtime": "torch",
        "type": "class",
        "class_file": str(folder / "net.py"),
        "class_name": "Net",
        "kwargs_file": str(folder / "kwargs.py"),
        "model_input_shape": [1, *PATCH],
        "model_output_shape": [3, *PATCH],
        "max_batch_size": 4,
    } | more.pop("model", {})
    values = {"input": "/in.zarr", "output": "/out.zarr", "chunksize": [16, 16]} | more
    return resolve(parse_job({**values, "model_config": model}), Volume(shape, dtype))


def predictions(plan: Plan, runtime: Any = None) -> npt.NDArray[Any]:
    """The predictions of chunk 0.0's patches over a fixed input: (patches, C, *Q)."""
    chunk = plan.chunk((0, 0))
    values = np.random.default_rng(1).random(chunk.halo.shape)
    region = (values if plan.volume.dtype.startswith("float") else values * 100).astype(
        plan.volume.dtype
    )
    batcher = Batcher(plan, runtime or load_runtime(plan.job.model, 1))
    found = batcher.predictions(list(plan.patches(chunk)), region, chunk.halo.start)
    return np.stack([np.asarray(prediction).copy() for _, prediction in found])


class Fake(Runtime):
    """A network that notes its batches; runs out of memory above `fits` items."""

    device = "cpu"

    def __init__(self, fits: int = 1000, error: Exception | None = None) -> None:
        self.batches: list[npt.NDArray[Any]] = []
        self._fits, self._error = fits, error or RuntimeError("can't allocate memory")

    def __call__(self, batch: npt.NDArray[Any]) -> Any:
        if len(batch) > self._fits:
            raise self._error
        self.batches.append(batch.copy())
        return torch.from_numpy(batch.astype(np.float32)).repeat(1, 3, 1, 1) / 7

    def zeros(self, shape: tuple[int, ...]) -> Any:
        return torch.zeros(shape)

    def place(self, array: npt.NDArray[Any]) -> Any:
        return torch.from_numpy(array)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return "can't allocate memory" in str(error)

    def close(self) -> None:
        pass


def test_a_class_with_its_checkpoint_and_its_torchscript_predict_the_same(tmp_path: Path) -> None:
    module = trained()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    path = scripted(module, tmp_path / "net.ts")
    by_class = predictions(plan_of(tmp_path, model={"checkpoint": str(tmp_path / "weights.pt")}))
    script = {"type": "torchscript", "ts_file": str(path)}
    by_script = predictions(plan_of(tmp_path, model=script))
    assert by_class.shape == (4, 3, *PATCH)
    np.testing.assert_allclose(by_class, by_script, rtol=0, atol=1e-6)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "network"])
def test_weights_are_found_where_training_scripts_put_them(tmp_path: Path, key: str) -> None:
    module = trained()
    bare, nested = tmp_path / "bare.pt", tmp_path / "nested.pt"
    torch.save(module.state_dict(), bare)
    torch.save({"epoch": 3, key: module.state_dict(), "optimizer": {"lr": 0.1}}, nested)
    first = predictions(plan_of(tmp_path, model={"checkpoint": str(bare)}))
    second = predictions(plan_of(tmp_path, model={"checkpoint": str(nested)}))
    np.testing.assert_array_equal(first, second)


def test_the_prefix_that_data_parallel_training_leaves_is_taken_off(tmp_path: Path) -> None:
    module = trained()
    state = OrderedDict((f"module.{k}", v) for k, v in module.state_dict().items())
    torch.save(module.state_dict(), tmp_path / "bare.pt")
    torch.save({"state_dict": state}, tmp_path / "wrapped.pt")
    first = predictions(plan_of(tmp_path, model={"checkpoint": str(tmp_path / "bare.pt")}))
    second = predictions(plan_of(tmp_path, model={"checkpoint": str(tmp_path / "wrapped.pt")}))
    np.testing.assert_array_equal(first, second)


def test_a_network_in_training_mode_is_put_into_inference_mode(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    dropping = CLASS.replace(
        "return self.layer(x)", "return torch.dropout(self.layer(x), 0.5, self.training)"
    )
    (tmp_path / "net.py").write_text(
        dropping.replace("super().__init__()", "super().__init__(); torch.manual_seed(0)")
    )
    np.testing.assert_array_equal(predictions(plan), predictions(plan))


def test_batches_are_filled_up_with_zeros_to_their_full_size(tmp_path: Path) -> None:
    plan, fake = plan_of(tmp_path, shape=(24, 16), chunksize=[24, 16]), Fake()
    found = predictions(plan, fake)
    assert len(found) == 6
    assert [len(batch) for batch in fake.batches] == [4, 4]
    assert not fake.batches[1][2:].any()
    assert fake.batches[1][:2].all()


def test_a_batch_never_holds_patches_of_two_chunks(tmp_path: Path) -> None:
    plan, fake = plan_of(tmp_path, shape=(24, 16), chunksize=[16, 16]), Fake()
    batcher = Batcher(plan, fake)
    for number, index in enumerate(plan.indices(), start=1):
        chunk = plan.chunk(index)
        region = np.full(chunk.halo.shape, number, np.float32)
        list(batcher.predictions(list(plan.patches(chunk)), region, chunk.halo.start))
    assert [set(np.unique(batch)) - {0} for batch in fake.batches] == [{1}, {2}]
    assert batcher.patches_run == plan.costs.patches == 6


def test_a_patch_predicts_the_same_whatever_else_is_in_its_batch(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    plan = plan_of(tmp_path, model={"checkpoint": str(tmp_path / "weights.pt")})
    chunk = plan.chunk((0, 0))
    region = np.random.default_rng(1).random(chunk.halo.shape).astype(np.float32)
    patches = list(plan.patches(chunk))
    batcher = Batcher(plan, load_runtime(plan.job.model, 1))
    together = [np.asarray(p).copy() for _, p in batcher.predictions(patches, region, (0, 0))]
    for patch, expected in zip(patches, together, strict=True):
        [(_, alone)] = batcher.predictions([patch], region, (0, 0))
        np.testing.assert_array_equal(np.asarray(alone), expected)


def test_running_out_of_memory_halves_the_batch_once_and_for_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(tmp_path, shape=(64, 16), chunksize=[64, 16], model={"max_batch_size": 8})
    whole = predictions(plan, Fake())
    small, chunk = Fake(fits=4), plan.chunk((0, 0))
    batcher = Batcher(plan, small)
    region = np.random.default_rng(1).random(chunk.halo.shape).astype(np.float32)
    with caplog.at_level(logging.INFO, logger="chunkq.worker"):
        for _ in range(2):
            found = [p for _, p in batcher.predictions(list(plan.patches(chunk)), region, (0, 0))]
    np.testing.assert_allclose(np.stack([np.asarray(p) for p in found]), whole, rtol=0, atol=1e-6)
    assert batcher.size == 4
    assert {len(batch) for batch in small.batches} == {4}
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: batches have 4 patches from here on"
    ]


def test_memory_too_small_for_a_single_patch_is_one_clear_error(tmp_path: Path) -> None:
    batcher = Batcher(plan_of(tmp_path), Fake(fits=0))
    with pytest.raises(ModelError, match="batch of one patch; use smaller patches"):
        batcher.warm_up()


def test_an_error_that_is_not_about_memory_is_raised_as_it_is(tmp_path: Path) -> None:
    batcher = Batcher(plan_of(tmp_path), Fake(fits=0, error=ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError, match="ours"):
        batcher.warm_up()
    assert batcher.size == 4


class Poisoned(Fake):
    """Turns the second item's first class into NaN, or into minus infinity."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value

    def __call__(self, batch: npt.NDArray[Any]) -> Any:
        outputs = super().__call__(batch)
        outputs[1, 0] = self._value
        return outputs


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_prediction_that_is_not_finite_fails_with_the_patchs_place(
    tmp_path: Path, value: float
) -> None:
    with pytest.raises(PredictionError, match=r"voxels \[0, 8\] to \[8, 16\]"):
        predictions(plan_of(tmp_path), Poisoned(value))


@pytest.mark.parametrize("activation", ["none", "softmax", "sigmoid"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_zero_counts_them_as_zero_after_the_activation(
    tmp_path: Path, value: float, activation: str
) -> None:
    found = predictions(plan_of(tmp_path, nan="zero", activation=activation), Poisoned(value))
    assert np.isfinite(found).all()
    assert not found[1, 0].any()
    assert found[1, 1:].all()
    assert found[[0, 2, 3]].all()


def test_what_stands_in_the_filling_of_a_batch_can_fail_no_chunk(tmp_path: Path) -> None:
    class BadOnZeros(Fake):
        def __call__(self, batch: npt.NDArray[Any]) -> Any:
            outputs = super().__call__(batch)
            outputs[(batch == 0).all(axis=(1, 2, 3))] = np.nan
            return outputs

    plan = plan_of(tmp_path, shape=(24, 16), chunksize=[24, 16])
    assert np.isfinite(predictions(plan, BadOnZeros())).all()


@pytest.mark.parametrize("declared", [[3, 8, 6], [2, 8, 8], [8, 8]])
def test_a_network_that_returns_another_shape_than_declared_is_refused(
    tmp_path: Path, declared: list[int]
) -> None:
    plan = plan_of(tmp_path, model={"model_output_shape": declared}, pad_width=[0, 1])
    batcher = Batcher(plan, load_runtime(plan.job.model, 1))
    with pytest.raises(ModelError) as caught:
        batcher.warm_up()
    assert "returned shape [4, 3, 8, 8]" in str(caught.value)
    assert f"declares {[4, *declared]}" in str(caught.value)


def test_a_network_that_returns_no_tensor_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, model={"class_name": "Other", "kwargs_file": None})
    runtime = load_runtime(plan.job.model, 1)
    with pytest.raises(ModelError, match="returned list, not one tensor"):
        runtime(np.zeros((4, 1, *PATCH), np.float32))


@pytest.mark.parametrize(
    "dtype",
    ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "float16", "float64", "bool"],
)
def test_every_input_dtype_reaches_the_network_with_its_values(tmp_path: Path, dtype: str) -> None:
    plan = plan_of(tmp_path, dtype=dtype)
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    plan = plan_of(tmp_path, dtype=dtype, model={"checkpoint": str(tmp_path / "weights.pt")})
    values = np.random.default_rng(1).random((32, 16))
    values = values if np.dtype(dtype).kind == "f" else values * np.iinfo(np.int8).max
    typed = values.astype(dtype)
    chunk = plan.chunk((0, 0))
    batcher = Batcher(plan, load_runtime(plan.job.model, 1))
    found = list(batcher.predictions(list(plan.patches(chunk)), typed[:16], (0, 0)))
    assert len(found) == 4
    with torch.inference_mode():
        for patch, prediction in found:
            item = torch.from_numpy(typed[patch.source.slices((0, 0))].astype(np.float32))
            expected = trained()(item[None, None])[0]
            np.testing.assert_allclose(
                np.asarray(prediction), expected.numpy(), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_batches_are_cast_to_the_dtype_that_the_network_takes(tmp_path: Path, name: str) -> None:
    (tmp_path / "seen.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        f"        assert x.dtype is torch.{name}, x.dtype\n"
        "        return torch.cat([x, x / 2, x / 3], 1)\n"
    )
    model = {"class_file": str(tmp_path / "seen.py"), "kwargs_file": None, "dtype": name}
    found = predictions(plan_of(tmp_path, dtype="uint8", model=model))
    assert found.dtype == np.float32
    assert found.max() > 50


def test_wide_unsigned_values_do_not_wrap_round(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, dtype="uint16", model={"dtype": "float64"})
    runtime = load_runtime(plan.job.model, 1)
    assert runtime.place(np.array([65535], np.uint16)).tolist() == [65535]
    assert runtime.place(np.array([4294967295], np.uint32)).tolist() == [4294967295]
