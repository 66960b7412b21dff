"""The torch runtime and its batches; what all runtimes share stands in tests/contract."""

import functools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_producer import submit
from chunkq_worker import inference_engine
from chunkq_worker.batching import Batcher
from chunkq_worker.inference_engine import InferenceEngine
from chunkq_worker.steps import Steps

from chunkq.errors import ModelError, PredictionError
from chunkq.job import load_job
from tests.harness.torch_networks import (
    PATCH,
    Fake,
    TrainedNet,
    as_file,
    as_program,
    as_script,
    load,
    of_cpu,
    plan_of,
    predictions,
    program,
    refused,
    scripted,
    trained,
)
from tests.harness.volumes import random_volume, write_zarr


def test_a_chunks_last_batch_has_what_is_left(tmp_path: Path) -> None:
    plan, fake = plan_of(tmp_path, shape=(24, 16), chunksize=[24, 16]), Fake()
    fake.any_batch = True
    padded = predictions(plan, Fake())
    np.testing.assert_array_equal(predictions(plan, fake), padded)
    assert [len(batch) for batch in fake.batches] == [4, 2]
    assert all(batch.all() for batch in fake.batches)


def test_only_networks_prepared_for_one_size_have_their_last_batch_filled_up(
    tmp_path: Path,
) -> None:
    assert load(plan_of(tmp_path)).any_batch
    script = as_script(scripted(trained(), tmp_path / "net.ts"))
    assert load(plan_of(tmp_path, model=script)).any_batch
    exported = as_program(program(tmp_path / "net.pt2"))
    assert not load(plan_of(tmp_path, model=exported)).any_batch


def test_for_a_network_prepared_for_one_size_batches_are_filled_up_with_zeros(
    tmp_path: Path,
) -> None:
    plan, fake = plan_of(tmp_path, shape=(24, 16), chunksize=[24, 16]), Fake()
    found = predictions(plan, fake)
    assert len(found) == 6
    assert [len(batch) for batch in fake.batches] == [4, 4]
    assert not fake.batches[1][2:].any()
    assert fake.batches[1][:2].all()


def test_a_batch_never_holds_patches_of_two_chunks(tmp_path: Path) -> None:
    plan, fake = plan_of(tmp_path, shape=(24, 16), chunksize=[16, 16]), Fake()
    batcher = Batcher(plan, fake, Steps())
    for number, index in enumerate(plan.indices(), start=1):
        chunk = plan.chunk(index)
        region = np.full(chunk.halo.shape, number, np.float32)
        list(batcher.predictions(list(plan.patches(chunk)), [region], chunk.halo.start))
    assert [set(np.unique(batch)) - {0} for batch in fake.batches] == [{1}, {2}]
    assert batcher.patches_run == plan.costs.patches == 6


def test_a_patch_predicts_the_same_whatever_else_is_in_its_batch(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    plan = plan_of(tmp_path, model={"checkpoint": str(tmp_path / "weights.pt")})
    chunk = plan.chunk((0, 0))
    region = np.random.default_rng(1).random(chunk.halo.shape).astype(np.float32)
    patches = list(plan.patches(chunk))
    batcher = Batcher(plan, load(plan), Steps())
    together = [np.asarray(p).copy() for _, p in batcher.predictions(patches, [region], (0, 0))]
    # In a batch of another size the last bits may differ: processors have kernels for sizes.
    for place, patch in enumerate(patches):
        others = [patches[place - 1]] * len(patches)
        others[place] = patch
        found = [np.asarray(p).copy() for _, p in batcher.predictions(others, [region], (0, 0))]
        np.testing.assert_array_equal(found[place], together[place])
        assert not np.array_equal(found[place - 1], found[place])


def test_running_out_of_memory_halves_the_batch_once_and_for_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(tmp_path, shape=(64, 16), chunksize=[64, 16], model={"max_batch_size": 8})
    whole = predictions(plan, Fake())
    small, chunk = Fake(fits=4), plan.chunk((0, 0))
    batcher = Batcher(plan, small, Steps())
    region = np.random.default_rng(1).random(chunk.halo.shape).astype(np.float32)
    with caplog.at_level(logging.INFO, logger="chunkq.worker"):
        for _ in range(2):
            found = [p for _, p in batcher.predictions(list(plan.patches(chunk)), [region], (0, 0))]
    np.testing.assert_allclose(np.stack([np.asarray(p) for p in found]), whole, rtol=0, atol=1e-6)
    assert batcher.size == 4
    assert {len(batch) for batch in small.batches} == {4}
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: batches have 4 patches from here on"
    ]


def test_memory_too_small_for_a_single_patch_is_one_clear_error(tmp_path: Path) -> None:
    batcher = Batcher(plan_of(tmp_path), Fake(fits=0), Steps())
    with pytest.raises(ModelError, match="batch of one patch; use smaller patches"):
        batcher.warm_up()


def test_a_network_that_can_do_nothing_is_found_out_with_a_batch_of_zeros(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    broken = Fake(fits=0, error=ZeroDivisionError("ours"))
    batcher = Batcher(plan, broken, Steps())
    with pytest.raises(ModelError, match="raised ZeroDivisionError on a batch of zeros: ours"):
        batcher.warm_up()
    assert batcher.size == 4
    with pytest.raises(ModelError, match="raised ZeroDivisionError on a batch of zeros: ours"):
        predictions(plan, broken)


class Picky(Fake):
    """Takes nothing but zeros."""

    def __call__(self, batch: npt.NDArray[Any]) -> Any:
        outputs = super().__call__(batch)
        if batch.any():
            raise ZeroDivisionError("these patches")
        return outputs


def test_an_error_over_some_patches_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="these patches"):
        predictions(plan_of(tmp_path), Picky())


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
    batcher = Batcher(plan, load(plan), Steps())
    with pytest.raises(ModelError) as caught:
        batcher.warm_up()
    assert "returned shape [4, 3, 8, 8]" in str(caught.value)
    assert f"declares {[4, *declared]}" in str(caught.value)


def test_a_network_that_returns_no_tensor_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, model={"class_name": "Other", "kwargs_file": None})
    runtime = load(plan)
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
    batcher = Batcher(plan, load(plan), Steps())
    found = list(batcher.predictions(list(plan.patches(chunk)), [typed[:16]], (0, 0)))
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
    runtime = load(plan)
    assert runtime.to_device(np.array([65535], np.uint16)).tolist() == [65535]
    assert runtime.to_device(np.array([4294967295], np.uint32)).tolist() == [4294967295]


@pytest.mark.parametrize(
    "given",
    [
        np.broadcast_to(np.float32(3), (2, 3)),
        np.arange(6, dtype=np.float32).reshape(2, 3)[::-1, ::-1],
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.arange(6, dtype=np.uint64).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    ],
    ids=["read-only", "turned", "of another byte order", "uint64", "column by column"],
)
def test_arrays_that_steps_may_give_are_placed_with_their_values(
    tmp_path: Path, given: npt.NDArray[Any]
) -> None:
    placed = load(plan_of(tmp_path)).to_device(given)
    np.testing.assert_array_equal(placed.to(torch.float32).numpy(), given.astype(np.float32))


def test_a_network_that_works_in_place_and_gives_back_its_batch_spoils_no_patch(
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
    plan = plan_of(tmp_path, dtype="float32", combine="weighted_avg", model=model)
    batcher = Batcher(plan, load(plan), Steps())
    chunk = plan.chunk((0,) * plan.rank)
    patches = list(plan.patches(chunk))
    assert len(patches) == 2 * batcher.size
    halo = np.random.default_rng(0).random(chunk.halo.shape, np.float32)
    before = halo.copy()
    for _ in range(2):
        for patch, prediction in batcher.predictions(patches, [halo], chunk.halo.start):
            there = halo[patch.source.slices(chunk.halo.start)]
            np.testing.assert_array_equal(prediction[0].numpy(), there + 1)
    np.testing.assert_array_equal(halo, before)


# -------------------------------------------------------------- memory, and who is to blame


def of_torchscript() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(lambda x: x.expand(1 << 55) + 1, torch.zeros(1), check_trace=False)


def raising(error: BaseException) -> Callable[[], None]:
    def give_up() -> None:
        raise error

    return give_up


@pytest.mark.parametrize(
    "fail",
    [
        of_cpu,
        of_torchscript,
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
def test_every_lack_of_memory_is_recognised(tmp_path: Path, fail: Callable[[], None]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of several types
        fail()
    assert load(plan_of(tmp_path)).is_out_of_memory(caught.value)


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
def test_another_error_is_no_lack_of_memory(tmp_path: Path, error: Exception) -> None:
    assert not load(plan_of(tmp_path)).is_out_of_memory(error)


def test_a_later_job_with_the_same_network_starts_with_the_batch_that_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Fake] = []

    def tight(*_: object) -> Fake:
        made.append(Fake(fits=3))
        return made[-1]

    monkeypatch.setattr(inference_engine, "load_runtime", tight)
    write_zarr(tmp_path / "in.zarr", random_volume((32, 16)), (8, 8))
    torch.save(trained().state_dict(), tmp_path / "weights.pt")

    def batch_of(output: str, most: int) -> int:
        checkpoint = {"checkpoint": str(tmp_path / "weights.pt"), "max_batch_size": most}
        job = plan_of(tmp_path, model=checkpoint).job.as_dict()
        paths = {"input": str(tmp_path / "in.zarr"), "output": str(tmp_path / output)}
        record = submit.prepare(load_job(job | paths)).record
        return InferenceEngine(record, record.plan()).batcher.size

    def said() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    with caplog.at_level(logging.INFO, logger="chunkq.worker"):
        assert batch_of("a.zarr", 4) == 2
        assert said() == ["out of memory: batches have 2 patches from here on"]
        assert (batch_of("b.zarr", 4), batch_of("c.zarr", 16), batch_of("d.zarr", 1)) == (2, 2, 1)
        assert said() == []
        torch.save({k: v * 2 for k, v in trained().state_dict().items()}, tmp_path / "weights.pt")
        assert batch_of("e.zarr", 4) == 2  # another network, which has to find out
        assert said() == ["out of memory: batches have 2 patches from here on"]
    assert [len(b) for b in made[0].batches + made[1].batches] == [2, 2]


def nan_above(limit: float, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """In place, as steps may work."""
    batch -= 0.5
    batch[batch > limit - 0.5] = np.nan
    return batch


GUILTY: dict[str, tuple[Steps, float, str]] = {
    "the input": (Steps(), np.nan, "the input has NaN or infinity for"),
    "the input through a step": (
        Steps(preprocessing=lambda batch: batch * 2),
        np.inf,
        "the input has NaN or infinity for",
    ),
    "preprocessing": (
        Steps(preprocessing=functools.partial(nan_above, 2)),
        3.0,
        "model_config.processing_steps: preprocessing returned NaN or infinity for",
    ),
    "postprocessing": (
        Steps(
            preprocessing=lambda batch: batch * 2,
            postprocessing=lambda batch: np.where(batch > 5, np.inf, batch),
        ),
        3.0,
        "model_config.processing_steps: postprocessing returned NaN or infinity for",
    ),
    "the network": (
        Steps(preprocessing=lambda batch: batch * 2, postprocessing=lambda batch: batch + 1),
        30.0,
        "the network returned NaN or infinity for",
    ),
    "the network among its steps": (
        Steps(postprocessing_protected=lambda batch: batch),
        30.0,
        "the network with its protected steps returned NaN or infinity for",
    ),
}


class NanAbove(Fake):
    """Gives NaN for items that reach 20."""

    def __call__(self, batch: npt.NDArray[Any]) -> Any:
        outputs = super().__call__(batch) * 7
        outputs[outputs > 20] = np.nan
        return outputs


@pytest.mark.parametrize("who", GUILTY)
def test_the_first_to_have_nan_is_blamed_for_it(tmp_path: Path, who: str) -> None:
    steps, value, line = GUILTY[who]
    plan = plan_of(tmp_path)
    chunk = plan.chunk((0, 0))
    region = np.random.default_rng(1).random(chunk.halo.shape).astype(np.float32)
    region[9, 2] = value
    batcher = Batcher(plan, NanAbove(), steps)
    with pytest.raises(PredictionError) as caught:
        list(batcher.predictions(list(plan.patches(chunk)), [region], (0, 0)))
    assert str(caught.value).startswith(line)
    assert "the patch that reads voxels [8, 0] to [16, 8]; fix it" in str(caught.value)


def test_nan_zero_also_counts_what_steps_gave(tmp_path: Path) -> None:
    steps = Steps(postprocessing=lambda batch: np.where(batch > 0.1, np.nan, batch))
    found = predictions(plan_of(tmp_path, nan="zero"), Fake(), steps)
    assert np.isfinite(found).all()
    assert (found == 0).any()
    assert (found > 0).any()


# ----------------------------------------------------------------------- dtypes and options


@pytest.mark.parametrize(
    ("dtype", "how"),
    [("float16", as_script), ("float64", as_script), ("int8", as_script), ("int8", None)],
    ids=["float16", "float64", "int8", "int8 by class"],
)
def test_a_dtype_other_than_the_networks_is_one_line_with_the_one_to_set(
    tmp_path: Path, dtype: str, how: Any
) -> None:
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    model = how(scripted(trained(), tmp_path / "net.ts")) if how else {}
    line = refused(tmp_path, dtype=dtype, **model)
    assert line.startswith("model_config.dtype: the network's parameters are float32 and it was ")
    assert f"given {dtype} (" in line
    assert "set dtype: float32" in line


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_weights_of_a_class_take_the_jobs_dtype(tmp_path: Path, dtype: str) -> None:
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    model = {"checkpoint": str(tmp_path / "weights.pt"), "dtype": dtype}
    exact = predictions(plan_of(tmp_path), TrainedNet())
    found = predictions(plan_of(tmp_path, model=model))
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6 if dtype == "float64" else 2e-2)


def test_a_network_in_half_precision_takes_that(tmp_path: Path) -> None:
    path = scripted(trained().bfloat16(), tmp_path / "half.ts", torch.bfloat16)
    found = predictions(plan_of(tmp_path, model=as_script(path, dtype="bfloat16")))
    exact = predictions(plan_of(tmp_path), TrainedNet())
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-2)
    assert "set dtype: bfloat16" in refused(tmp_path, **as_script(path))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", ["class", "torchscript", "exported"])
def test_autocast_computes_in_half_precision(tmp_path: Path, dtype: str, form: str) -> None:
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    model: dict[str, Any] = {"checkpoint": str(tmp_path / "weights.pt")}
    if form == "torchscript":
        model = as_script(scripted(trained(), tmp_path / "net.ts"))
    elif form == "exported":
        model = as_program(program(tmp_path / "net.pt2"))
    exact = predictions(plan_of(tmp_path, model=model))
    found = predictions(plan_of(tmp_path, model=model | {"autocast": dtype}))
    assert np.abs(found - exact).max() > 1e-5
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_autocast_of_what_is_not_float32_is_refused(tmp_path: Path, dtype: str) -> None:
    line = refused(tmp_path, autocast="bfloat16", dtype=dtype)
    assert line.startswith("model_config.autocast: bfloat16 is for networks in float32")


LAYOUT = """\
import torch


class Net(torch.nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.layer = getattr(torch.nn, f"Conv{rank}d")(2, 3, 3, padding=1)
        self.layout = {2: torch.channels_last, 3: torch.channels_last_3d}[rank]

    def forward(self, x):
        for given in (x, self.layer.weight):
            assert given.is_contiguous(memory_format=self.layout), given.stride()
            assert not given.is_contiguous()
        return self.layer(x)
"""


@pytest.mark.parametrize("rank", [2, 3])
def test_channels_last_lays_batches_and_weights_out_that_way(tmp_path: Path, rank: int) -> None:
    (tmp_path / "layout.py").write_text(LAYOUT)
    (tmp_path / "rank.py").write_text(f"kwargs = {{'rank': {rank}}}\n")
    model = {"class_file": str(tmp_path / "layout.py"), "kwargs_file": str(tmp_path / "rank.py")}
    runtime = load(plan_of(tmp_path, model=model | {"channels_last": True}))
    given = np.random.default_rng(0).random((4, 2, *[8] * rank), np.float32)
    assert tuple(runtime(given).shape) == (4, 3, *[8] * rank)


def test_channels_last_changes_no_result(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    model = {"checkpoint": str(tmp_path / "weights.pt")}
    exact = predictions(plan_of(tmp_path, model=model))
    found = predictions(plan_of(tmp_path, model=model | {"channels_last": True}))
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6)


def test_channels_last_without_channels_is_refused(tmp_path: Path) -> None:
    line = refused(tmp_path, model_input_shape=[8, 8], channels_last=True)
    assert line.startswith("model_config.channels_last: the network is given [4, 8, 8]; ")


def test_compiled_networks_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch.compile, but not handed to the C++ compiler, which takes half a minute."""
    asked: list[dict[str, Any]] = []

    def compile_quickly(module: Any, **options: Any) -> Any:
        asked.append(options)
        return real(module, backend="eager", fullgraph=True, **options)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile_quickly)
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    for model in (
        {"checkpoint": str(tmp_path / "weights.pt")},
        as_program(program(tmp_path / "net.pt2")),
    ):
        exact = predictions(plan_of(tmp_path, model=model))
        found = predictions(plan_of(tmp_path, model=model | {"compile": True}))
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6)
    assert len(asked) == 2


def test_a_compiler_that_is_not_there_is_one_line(
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
    line = refused(tmp_path, compile=True, **model)
    assert line.startswith("model_config.compile: torch.compile cannot compile this network here (")
    assert line.endswith("leave compile out")


def test_torchscript_is_not_compiled_again(tmp_path: Path) -> None:
    path = scripted(trained(), tmp_path / "net.ts")
    line = refused(tmp_path, **as_script(path, compile=True))
    assert line.startswith("model_config.compile: TorchScript is compiled already")


# ------------------------------------------------------------------------ norms of the tile


class Norms(torch.nn.Module):
    """Layers that normalise by the tile, and layers that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.group = torch.nn.GroupNorm(1, 3)
        self.instance = torch.nn.InstanceNorm2d(3)
        self.batch = torch.nn.BatchNorm2d(3, track_running_stats=False)
        self.layer = torch.nn.LayerNorm([8, 8])
        self.calm = torch.nn.Sequential(
            torch.nn.BatchNorm2d(3),
            torch.nn.InstanceNorm2d(3, track_running_stats=True),
            torch.nn.LayerNorm(8),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.instance(self.group(x.repeat(1, 3, 1, 1)))
        found: torch.Tensor = self.calm(self.layer(self.batch(x)))
        return found


def test_layers_that_normalise_by_the_tile_are_named(tmp_path: Path) -> None:
    torch.save(Norms(), tmp_path / "whole.pt")
    whole = load(plan_of(tmp_path, model=as_file(tmp_path / "whole.pt")))
    kinds = ["GroupNorm", "InstanceNorm2d", "BatchNorm2d", "LayerNorm"]
    names = ["group", "instance", "batch", "layer"]
    assert list(whole.tile_norms()) == [f"{n} ({k})" for n, k in zip(names, kinds, strict=True)]
    exported = load(plan_of(tmp_path, model=as_program(program(tmp_path / "n.pt2", Norms()))))
    operators = [name.rpartition("(aten.")[2].partition(".")[0] for name in exported.tile_norms()]
    assert operators == ["group_norm", "instance_norm", "batch_norm", "layer_norm"]
    script = tmp_path / "norms.ts"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Norms()).save(str(script))
    found = load(plan_of(tmp_path, model=as_script(script))).tile_norms()
    assert [name.partition(" ")[0] for name in found] == ["group", "instance", "batch", "layer"]
    assert load(plan_of(tmp_path)).tile_norms() == ()
    assert whole.device_bytes() is None
