"""The ONNX runtime: loading, running and the errors for unusable files and declarations."""

import json
import logging
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from chunkq_worker.batching import Batcher
from chunkq_worker.runtimes import onnx_cuda, onnx_host, onnx_tensorrt
from chunkq_worker.runtimes.base import Runtime, load_runtime
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.onnx_file import open_session
from chunkq_worker.runtimes.onnx_graph import Graph
from chunkq_worker.steps import Steps
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from chunkq.errors import ErrorCode, ModelError
from chunkq.install_hint import install_command
from chunkq.job.job_parsing import parse_job
from chunkq.job.model_config import ModelConfig
from chunkq.plan.volume import Volume
from tests.harness.assertions import assert_contains
from tests.harness.predictions import each_prediction
from tests.strategies import JobPlan

PATCH = (8, 8)
ANY = ("batch", 1, *PATCH)
WEIGHTS = np.random.default_rng(3).normal(size=(3, 1, 3, 3)).astype(np.float32)
DTYPES = {
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int8": TensorProto.INT8,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


def save(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def model_of(
    nodes: list[onnx.NodeProto],
    *,
    kind: int = TensorProto.FLOAT,
    axes: Any = ANY,
    out: int = TensorProto.FLOAT,
    inputs: tuple[str, ...] = ("x",),
    outputs: tuple[str, ...] = ("y",),
    weights: dict[str, npt.NDArray[Any]] | None = None,
    opsets: dict[str, int] | None = None,
    ir: int = 10,
) -> onnx.ModelProto:
    """Return a model with the nodes. By default it is float32 and declares no output shapes."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, axes) for name in inputs],
        [helper.make_tensor_value_info(name, out, None) for name in outputs],
        [numpy_helper.from_array(values, name) for name, values in (weights or {}).items()],
    )
    imports = [helper.make_opsetid(*item) for item in (opsets or {"": 18}).items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir)


def conv(**overrides: Any) -> onnx.ModelProto:
    """Return a convolution from one channel to three, the network of most tests."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1] * 4)
    return model_of([node], weights={"w": WEIGHTS}, **overrides)


def identity(**overrides: Any) -> onnx.ModelProto:
    return model_of([helper.make_node("Identity", ["x"], ["y"])], **overrides)


def convolved(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the output that `conv` must return, computed by torch."""
    with torch.inference_mode():
        inputs = torch.from_numpy(batch.astype(np.float32))
        return torch.nn.functional.conv2d(inputs, torch.from_numpy(WEIGHTS), padding=1).numpy()


def config(path: Path | str, **overrides: Any) -> ModelConfig:
    values = {
        "runtime": "onnx",
        "type": "file",
        "model_file": str(path),
        "model_input_shape": [1, *PATCH],
        "model_output_shape": [3, *PATCH],
        "max_batch_size": 4,
    }
    return ModelConfig.model_validate(values | overrides)


def load(path: Path | str, steps: Steps | None = None, **overrides: Any) -> Runtime:
    return load_runtime(config(path, **overrides), steps or Steps(), 1)


def plan_of(path: Path, dtype: str = "float32", **overrides: Any) -> JobPlan:
    model = config(path, **overrides).model_dump(exclude_none=True)
    values = {"input": "/in.zarr", "output": "/out.zarr", "chunksize": [32, 16]}
    return JobPlan.of(parse_job({**values, "model_config": model}), Volume((32, 16), dtype))


def random_batch(count: int = 4, dtype: str = "float32", seed: int = 0) -> npt.NDArray[Any]:
    return (np.random.default_rng(seed).random((count, 1, *PATCH)) * 50).astype(dtype)


def load_error(path: Path | str, steps: Steps | None = None, **overrides: Any) -> str:
    """Return the message of the ModelError that loading raises."""
    with pytest.raises(ModelError) as caught:
        load(path, steps, **overrides)
    line = str(caught.value)
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    assert "\n" not in line
    return line


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return save(tmp_path / "net.onnx", conv())


def test_a_graph_computes_what_the_same_layers_compute_in_torch(network: Path) -> None:
    batch = random_batch()
    outputs = load(network)(batch)[0]
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, convolved(batch), rtol=0, atol=1e-4)


def test_a_graph_is_loaded_from_a_url(network: Path) -> None:
    fsspec.filesystem("memory").pipe("/models/net.onnx", network.read_bytes())
    batch = random_batch()
    runtime = load("memory://models/net.onnx")
    np.testing.assert_array_equal(runtime(batch)[0], load(network)(batch)[0])


def test_a_missing_url_is_an_error() -> None:
    line = load_error("memory://models/missing.onnx")
    assert line.startswith("model_config.model_file: memory://models/missing.onnx ")


def test_external_weights_are_read_from_the_folder_of_the_graph(
    tmp_path: Path, network: Path
) -> None:
    path = tmp_path / "split.onnx"
    onnx.save(
        conv(), path, save_as_external_data=True, location="split.onnx.data", size_threshold=0
    )
    assert (tmp_path / "split.onnx.data").stat().st_size > 0
    batch = random_batch()
    np.testing.assert_array_equal(load(path)(batch)[0], load(network)(batch)[0])
    (tmp_path / "split.onnx.data").unlink()
    line = load_error(path)
    assert_contains(line, f"model_config.model_file: {path} ", "weights in another file", "missing")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["uint8", "int16", "float32", ">f8"])
def test_batches_of_any_dtype_are_cast_to_the_dtype_of_the_graph(
    tmp_path: Path, dtype: str, source: str
) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["f", "f", "f"], ["y"], axis=1),
    ]
    path = save(tmp_path / "net.onnx", model_of(nodes, kind=DTYPES[dtype]))
    batch = random_batch(dtype=source)
    outputs = load(path, dtype=dtype)(batch)[0]
    assert outputs.dtype == np.float32
    expected = batch.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(outputs, np.repeat(expected, 3, axis=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_of_any_dtype_are_cast_to_float32_or_float64(tmp_path: Path, dtype: str) -> None:
    model = identity(kind=DTYPES[dtype], out=DTYPES[dtype])
    path = save(tmp_path / "net.onnx", model)
    batch = random_batch(dtype="uint8")
    outputs = load(path, dtype=dtype)(batch)[0]
    assert outputs.dtype == (np.float64 if dtype == "float64" else np.float32)
    np.testing.assert_array_equal(outputs, batch)


def test_values_outside_the_range_of_the_dtype_raise_no_warning(tmp_path: Path) -> None:
    model = identity(kind=TensorProto.FLOAT16, out=TensorProto.FLOAT16)
    runtime = load(save(tmp_path / "net.onnx", model), dtype="float16")
    assert np.isinf(runtime(np.full((4, 1, *PATCH), 1e6, np.float32))[0]).all()


def test_a_prediction_does_not_depend_on_position_or_batch_size(network: Path) -> None:
    runtime, batch = load(network), random_batch(8)
    expected = np.array(runtime(batch)[0])
    np.testing.assert_array_equal(runtime(batch[::-1])[0][::-1], expected)
    np.testing.assert_allclose(runtime(batch[:1])[0][0], expected[0], rtol=0, atol=1e-4)


def test_two_sessions_return_the_same_bytes(network: Path) -> None:
    batch = random_batch()
    assert load(network)(batch)[0].tobytes() == load(network)(batch)[0].tobytes()


@pytest.mark.parametrize("threads", [1, 2, None])
def test_the_session_uses_the_threads_of_the_job(network: Path, threads: int | None) -> None:
    options = open_session(str(network), threads).get_session_options()
    assert options.intra_op_num_threads == (threads or 0)
    assert options.inter_op_num_threads == 1
    assert options.use_deterministic_compute


def test_the_batcher_predicts_every_patch_of_a_chunk(network: Path) -> None:
    plan = plan_of(network, "uint8")
    chunk = plan.chunk((0, 0))
    region = np.random.default_rng(1).integers(0, 255, chunk.halo.shape, np.uint8)
    batcher = Batcher(plan, plan.job.model, load_runtime(plan.job.model, Steps(), 1), Steps())
    patches = list(plan.patches(chunk))
    pairs = list(each_prediction(batcher, patches, [region], chunk.halo.start))
    assert len(pairs) == 8
    for patch, prediction in pairs:
        item = region[patch.source.slices(chunk.halo.start)][None, None]
        np.testing.assert_allclose(prediction, convolved(item)[0], rtol=0, atol=1e-3)


def test_protected_steps_get_numpy_arrays_in_the_dtype_of_the_network(network: Path) -> None:
    inputs: list[tuple[type, np.dtype[Any], tuple[int, ...]]] = []

    def double(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        inputs.append((type(batch), batch.dtype, batch.shape))
        return batch * 2

    steps = Steps(preprocessing_protected=double, postprocessing_protected=double)
    batch = random_batch(dtype="uint8")
    outputs = load(network, steps)(batch)[0]
    np.testing.assert_allclose(outputs, convolved(batch * 2.0) * 2, rtol=1e-5, atol=1e-3)
    assert inputs == [
        (np.ndarray, np.dtype(np.float32), (4, 1, *PATCH)),
        (np.ndarray, np.dtype(np.float32), (4, 3, *PATCH)),
    ]


def test_a_step_that_works_in_place_does_not_change_the_batch(network: Path) -> None:
    def in_place(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        batch *= 2
        return batch

    batch = random_batch()
    before = batch.copy()
    runtime = load(network, Steps(preprocessing_protected=in_place))
    np.testing.assert_array_equal(runtime(batch)[0], runtime(batch)[0])
    np.testing.assert_array_equal(batch, before)


def test_a_step_can_change_the_batch_to_the_dtype_and_shape_of_the_graph(tmp_path: Path) -> None:
    nodes = [helper.make_node("Slice", ["x", "zero", "three", "one"], ["y"])]
    constants = {"zero": [0], "three": [3], "one": [1]}
    weights = {name: np.array(values, np.int64) for name, values in constants.items()}
    model = model_of(nodes, axes=("batch", 4, *PATCH), weights=weights)
    steps = Steps(preprocessing_protected=lambda b: np.repeat(b, 4, 1).astype(np.float32))
    runtime = load(save(tmp_path / "net.onnx", model), steps, dtype="int16")
    batch = random_batch(dtype="int16")
    np.testing.assert_array_equal(runtime(batch)[0], np.repeat(batch, 3, 1))


def test_a_step_that_returns_another_dtype_or_shape_than_the_graph_is_an_error(
    network: Path,
) -> None:
    steps = Steps(preprocessing_protected=lambda b: b.astype(np.float64)[:, :, :7])
    with pytest.raises(ModelError) as caught:
        load(network, steps)(random_batch())[0]
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    assert_contains(
        str(caught.value),
        "model_config.model_file: ",
        f"input 'x' of {network}",
        "float32 (any, 1, 8, 8)",
        "float64 (4, 1, 7, 8)",
        "processing_steps",
    )


def test_the_runtime_works_without_torch(network: Path) -> None:
    """`chunkq[onnx]` does not install torch."""
    plan = plan_of(network)
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from chunkq.job.job_file import Job
from chunkq.plan.volume import Volume
from chunkq_worker.batching import Batcher
from chunkq_worker.runtimes.base import load_runtime
from chunkq_worker.steps import Steps
from tests.harness.predictions import each_prediction
from tests.strategies import JobPlan

plan = JobPlan.of(Job.model_validate_json({plan.job.model_dump_json(by_alias=True)!r}),
               Volume((32, 16), "float32"))
batcher = Batcher(plan, plan.job.model, load_runtime(plan.job.model, Steps(), 1), Steps())
chunk = plan.chunk((0, 0))
halo = np.ones(chunk.halo.shape, np.float32)
print(len(list(each_prediction(batcher, list(plan.patches(chunk)), [halo], chunk.halo.start))))
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (process.stdout, process.stderr) == ("8\n", "")


def test_onnx_runtime_sends_no_telemetry_and_stores_no_device_id(tmp_path: Path) -> None:
    path, home = save(tmp_path / "net.onnx", identity()), tmp_path / "home"
    home.mkdir()
    code = f"""
import os
from chunkq_worker.runtimes.onnx_file import open_session

open_session({str(path)!r}, None)
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""
    # ONNX Runtime sends no telemetry if variables of a CI or of pytest are set.
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=env,
    )
    assert (process.stdout, process.stderr) == ("1\n", "")
    assert not list(home.iterdir())


# --------------------------------------------------------------------- wrong declarations


def test_the_error_for_another_dtype_than_that_of_the_graph_names_the_value_to_set(
    tmp_path: Path,
) -> None:
    path = save(tmp_path / "half.onnx", identity(kind=TensorProto.FLOAT16, out=TensorProto.FLOAT16))
    line = load_error(path)
    assert line.startswith("model_config.dtype: float32")
    assert_contains(line, f"input 'x' of {path}", "dtype: float16")


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.BOOL, TensorProto.BFLOAT16])
def test_an_unsupported_input_dtype_is_an_error(tmp_path: Path, kind: int) -> None:
    line = load_error(save(tmp_path / "net.onnx", identity(kind=kind, out=kind)))
    name = {TensorProto.UINT8: "uint8", TensorProto.BOOL: "bool"}.get(kind, "bfloat16")
    assert_contains(line, "model_config.model_file: ", "input 'x'", f" {name},", *DTYPES)


def test_an_output_that_is_not_numeric_is_an_error(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.STRING)]
    line = load_error(save(tmp_path / "net.onnx", model_of(nodes, out=TensorProto.STRING)))
    assert_contains(line, "model_config.model_file: ", "output 'y'", "string")


@pytest.mark.parametrize(
    ("axes", "declared", "fragments"),
    [
        (("batch", 8, 8, 8, 1), [8, 8], ("3 axes", " 5, (any, 8, 8, 8, 1)", ": [8, 8, 8, 1]")),
        (("batch", 8, 1, "h", "w"), [8, 8], ("3 axes", "model_input_shape: 4 entries")),
        (("batch", 8, 8), [1, 8, 8], ("4 axes", " 3, (any, 8, 8)", "model_input_shape: [8, 8]")),
        (("batch", 1, 16, 16), [1, 8, 8], ("(any, 1, 16, 16)", "model_input_shape: [1, 16, 16]")),
        (("batch", 1, "h", 12), [1, 8, 8], ("(any, 1, any, 12)", "model_input_shape: [1, 8, 12]")),
        (("batch", 3, 8, 8), [1, 8, 8], ("(any, 3, 8, 8)", "model_input_shape: [3, 8, 8]")),
        (("batch", 16, 16, 1), [8, 8, 1], ("(any, 16, 16, 1)", "input_shape: [16, 16, 1]")),
        (("batch", 16, 16, 1), [8, 8], ("(any, 16, 16, 1)", "input_shape: [16, 16]")),
    ],
)
def test_the_error_for_another_patch_shape_than_that_of_the_graph_names_the_shape_to_set(
    tmp_path: Path, axes: Any, declared: list[int], fragments: tuple[str, ...]
) -> None:
    path = save(tmp_path / "net.onnx", identity(axes=axes))
    line = load_error(path, model_input_shape=declared)
    assert line.startswith(f"model_config.model_input_shape: {declared}")
    assert_contains(line, *fragments)


def test_dynamic_axes_accept_any_patch_shape(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", conv(axes=("batch", 1, "h", "w")))
    batch = np.zeros((2, 1, 12, 20), np.float32)
    assert load(path, model_input_shape=[1, 12, 20])(batch)[0].shape == (2, 3, 12, 20)


def keras_like(axes: Any = ("batch", *PATCH, 1)) -> onnx.ModelProto:
    """Return `conv` as tf2onnx writes a Keras network: channels last outside, first inside."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["a"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["a", "w"], ["b"], name="conv", pads=[1] * 4),
        helper.make_node("Transpose", ["b"], ["y"], perm=[0, 2, 3, 1]),
    ]
    return model_of(nodes, axes=axes, weights={"w": WEIGHTS})


def predictions_of(
    path: Path, shape: list[int], output: list[int] | None = None, steps: Steps | None = None
) -> npt.NDArray[Any]:
    """Return what the batcher gets for `random_batch()`, channels first."""
    model = config(path, model_input_shape=shape, model_output_shape=output or [3, *PATCH])
    runtime = load_runtime(model, steps or Steps(), 1, ItemShapes.of(model, len(PATCH)))
    batch = random_batch()
    return runtime(batch if len(shape) > len(PATCH) else batch[:, 0])[0]


@pytest.mark.parametrize("output", [[3, *PATCH], [*PATCH, 3]])
@pytest.mark.parametrize("shape", [[1, *PATCH], [*PATCH, 1], [*PATCH]])
@pytest.mark.parametrize(
    "axes",
    [
        ("batch", *PATCH, 1),
        ("batch", "h", "w", 1),
        ("batch", "h", "w", "c"),
        None,
    ],
    ids=["fixed", "dynamic patch", "all dynamic", "undeclared"],
)
def test_a_network_with_channels_last_gets_and_returns_them_there(
    tmp_path: Path, axes: Any, shape: list[int], output: list[int]
) -> None:
    """A patch without channels gets them where the graph has them, if it says how many axes."""
    path = save(tmp_path / "net.onnx", keras_like(axes))
    outputs = predictions_of(path, shape, output)
    np.testing.assert_allclose(outputs, convolved(random_batch()), rtol=0, atol=1e-4)
    assert outputs.flags.c_contiguous


@pytest.mark.parametrize("axes", [ANY, ("batch", "c", "h", "w"), None])
@pytest.mark.parametrize("shape", [[1, *PATCH], [*PATCH, 1], [*PATCH]])
def test_a_network_with_channels_first_accepts_shapes_in_either_order(
    tmp_path: Path, axes: Any, shape: list[int]
) -> None:
    outputs = predictions_of(save(tmp_path / "net.onnx", conv(axes=axes)), shape)
    np.testing.assert_allclose(outputs, convolved(random_batch()), rtol=0, atol=1e-4)


def test_protected_steps_around_a_network_with_channels_last_see_channels_first(
    tmp_path: Path,
) -> None:
    shapes = []

    def double(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        shapes.append(batch.shape)
        return batch * 2

    steps = Steps(preprocessing_protected=double, postprocessing_protected=double)
    path = save(tmp_path / "net.onnx", keras_like())
    outputs = predictions_of(path, [*PATCH, 1], steps=steps)
    np.testing.assert_allclose(outputs, convolved(random_batch() * 2) * 2, rtol=1e-5, atol=1e-3)
    assert shapes == [(4, 1, *PATCH), (4, 3, *PATCH)]


def test_steps_that_move_the_channels_themselves_keep_working(tmp_path: Path) -> None:
    steps = Steps(
        preprocessing_protected=lambda x: np.moveaxis(x, 1, -1),
        postprocessing_protected=lambda y: np.moveaxis(y, -1, 1),
    )
    outputs = predictions_of(save(tmp_path / "net.onnx", keras_like()), [1, *PATCH], steps=steps)
    np.testing.assert_allclose(outputs, convolved(random_batch()), rtol=0, atol=1e-4)


def test_a_graph_without_a_declared_shape_accepts_any(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", identity(axes=None))
    assert load(path)(random_batch(3))[0].shape == (3, 1, *PATCH)


def test_the_axis_of_join_dim_can_be_longer_in_the_graph(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", identity(axes=("batch", 2, *PATCH)))
    batch = np.ones((4, 2, *PATCH), np.float32)
    assert load(path, join_dim=1)(batch)[0].shape == (4, 2, *PATCH)


def test_the_error_for_another_fixed_batch_size_names_the_size_to_set(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", conv(axes=(2, 1, *PATCH)))
    line = load_error(path)
    assert line.startswith("model_config.max_batch_size: 4")
    assert_contains(line, f"input 'x' of {path}", "exactly 2", "max_batch_size: 2", "dynamic")
    np.testing.assert_allclose(
        load(path, max_batch_size=2)(random_batch(2))[0], convolved(random_batch(2)), atol=1e-4
    )


def test_a_fixed_batch_size_is_the_reason_if_a_halved_batch_fails(tmp_path: Path) -> None:
    runtime = load(save(tmp_path / "net.onnx", conv(axes=(4, 1, *PATCH))))
    with pytest.raises(ModelError) as caught:
        runtime(random_batch(2))
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    line = str(caught.value)
    assert_contains(line, "(4, 1, 8, 8)", "(2, 1, 8, 8)", "dynamic batch axis")
    assert "processing_steps" not in line


@pytest.mark.parametrize("case", ["inputs", "outputs", "no inputs"])
def test_the_error_for_several_inputs_or_outputs_lists_their_names(
    tmp_path: Path, case: str
) -> None:
    if case == "inputs":
        model = model_of([helper.make_node("Add", ["x", "b"], ["y"])], inputs=("x", "b"))
        listed = "2 inputs (x, b)"
    elif case == "outputs":
        nodes = [helper.make_node("Identity", ["x"], [name]) for name in ("y", "z")]
        model, listed = model_of(nodes, outputs=("y", "z")), "2 outputs (y, z)"
    else:
        nodes = [helper.make_node("Constant", [], ["y"], value_floats=[1.0])]
        model, listed = model_of(nodes, inputs=()), "0 inputs (none)"
    path = save(tmp_path / "net.onnx", model)
    assert_contains(load_error(path), f"model_config.model_file: {path} ", listed)


# ------------------------------------------------------------------------ unusable files

VERSION = f"onnxruntime {onnxruntime.__version__}"


def test_the_error_for_an_unsupported_opset_names_the_highest_supported(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", conv(opsets={"": 99}))
    line = load_error(path)
    assert line.startswith(f"model_config.model_file: {path} ")
    assert_contains(line, "opset 99", VERSION, "opset_version 2")


def test_the_error_for_an_unsupported_ir_version_names_the_highest_supported(
    tmp_path: Path,
) -> None:
    line = load_error(save(tmp_path / "net.onnx", conv(ir=99)))
    assert_contains(line, "IR version 99", VERSION, "model.ir_version = 1")


@pytest.mark.parametrize(("domain", "name"), [("com.me", "com.me:Foo"), ("", "Foo")])
def test_the_error_for_an_unknown_operator_names_it(tmp_path: Path, domain: str, name: str) -> None:
    node = helper.make_node("Foo", ["x"], ["y"], domain=domain)
    model = model_of([node], opsets={"": 18, "com.me": 1})
    line = load_error(save(tmp_path / "net.onnx", model))
    assert_contains(line, f" {name},", "operator", VERSION)


def test_the_error_for_an_operator_without_a_kernel_names_it(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
    dtypes = {"kind": TensorProto.DOUBLE, "out": TensorProto.DOUBLE}
    model = model_of([node], weights={"w": WEIGHTS.astype(np.float64)}, **dtypes)
    line = load_error(save(tmp_path / "net.onnx", model), dtype="float64")
    assert_contains(line, "Conv(11)", "dtype", VERSION, "float32")


def write_other_format(folder: Path, format_name: str) -> Path:
    path, module = folder / "model.onnx", torch.nn.Conv2d(1, 3, 3, padding=1)
    if format_name == "torch.save":
        torch.save(module.state_dict(), path)
    elif format_name == "TorchScript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.trace(module, torch.zeros(2, 1, *PATCH)).save(str(path))
    elif format_name == "pt2":
        program = torch.export.export(module.eval(), (torch.zeros(2, 1, *PATCH),))
        torch.export.save(program, folder / "model.pt2")
        (folder / "model.pt2").rename(path)
    elif format_name == "Keras":
        with zipfile.ZipFile(path, "w") as file:
            for name in ("metadata.json", "config.json", "model.weights.h5"):
                file.writestr(name, "{}")
    elif format_name == "HDF5":
        path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    elif format_name == "JSON":
        path.write_text(json.dumps({"class_name": "Functional", "config": {}}))
    elif format_name in ("SavedModel", "folder"):
        path.mkdir()
        (path / ("saved_model.pb" if format_name == "SavedModel" else "x")).touch()
    elif format_name == "pickle":
        path.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    elif format_name == "cut off":
        path.write_bytes(conv().SerializeToString()[:-40])
    else:
        path.write_text(format_name)
    return path


@pytest.mark.parametrize(
    ("format_name", "fragments"),
    [
        ("torch.save", ("torch.save", "runtime: torch", "type: class", "`chunkq export`")),
        ("TorchScript", ("TorchScript", "runtime: torch", "type: torchscript", "chunkq export")),
        ("pt2", ("torch.export", "runtime: torch", "type: exported")),
        ("Keras", ("Keras", "runtime: tensorflow", "type: file")),
        ("HDF5", ("HDF5", "runtime: tensorflow")),
        ("JSON", ("JSON", "runtime: tensorflow", "type: json")),
        ("SavedModel", ("SavedModel", "runtime: tensorflow, type: file")),
        ("folder", ("folder", ".onnx file")),
        ("pickle", ("not an ONNX file", "damaged")),
        ("cut off", ("not an ONNX file", "damaged")),
        ("hello", ("not an ONNX file", "damaged")),
        ("", ("not an ONNX file", "damaged")),
    ],
)
def test_the_error_for_a_file_of_another_format_names_the_runtime_to_use(
    tmp_path: Path, format_name: str, fragments: tuple[str, ...]
) -> None:
    path = write_other_format(tmp_path, format_name)
    line = load_error(path)
    assert line.startswith(f"model_config.model_file: {path} is ")
    assert_contains(line, *fragments)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.onnx"
    line = load_error(path)
    assert line.startswith(f"model_config.model_file: {path} ")
    assert_contains(line, "missing")


def test_the_error_for_a_runtime_that_is_not_installed_names_the_extra(
    network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("chunkq_worker.runtimes.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    line = load_error(network)
    assert line.startswith("model_config.runtime: onnx ")
    assert line.endswith(f"`{install_command('onnx')}`")


# ------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    "error",
    [
        ort_errors.Fail("[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested"),
        ort_errors.RuntimeException(
            "BFCArena::AllocateRawInternal Available memory of 1024 is smaller than requested "
            "bytes of 4096"
        ),
        ort_errors.RuntimeException("Status Message: std::bad_alloc"),
        ort_errors.Fail("CUDA failure 2: out of memory ; GPU=0 ; hostname=n1"),
        MemoryError("Unable to allocate 2.00 GiB for an array with shape (4, 1, 8, 8)"),
        RuntimeError("Error in execution: Failed to allocate memory for requested buffer of 99"),
    ],
    ids=str,
)
def test_a_failed_allocation_is_out_of_memory(network: Path, error: Exception) -> None:
    assert load(network).is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        ort_errors.InvalidArgument("Got invalid dimensions for input: x"),
        ort_errors.Fail("Non-zero status code returned while running Conv node"),
        ort_errors.RuntimeException("CUDA failure 700: an illegal memory access was encountered"),
        RuntimeError("the memory of the step is full of holes"),
        ValueError("Failed to allocate memory"),
        ZeroDivisionError("out of memory"),
    ],
    ids=str,
)
def test_other_errors_are_not_out_of_memory(network: Path, error: Exception) -> None:
    assert not load(network).is_out_of_memory(error)


def test_a_process_that_runs_out_of_memory_halves_the_batch_and_logs_it_once(
    tmp_path: Path,
) -> None:
    """Run in a process with limited memory: 8 patches need 400 MB, 4 patches 200 MB."""
    nodes = [
        helper.make_node("Tile", ["x", "times"], ["wide"]),
        helper.make_node("Sigmoid", ["wide"], ["softer"]),
        helper.make_node("ReduceMax", ["softer", "axes"], ["y"], keepdims=1),
    ]
    weights = {"times": np.array([1, 100_000, 1, 1]), "axes": np.array([1])}
    path = save(tmp_path / "hungry.onnx", model_of(nodes, weights=weights))
    code = f"""
import resource, logging, sys
import numpy as np
from chunkq_worker.batching import Batcher
from chunkq_worker.runtimes.base import load_runtime
from chunkq_worker.steps import Steps
from tests.harness.predictions import each_prediction
from tests.integration.test_onnx_runtime import plan_of

logging.basicConfig(format="%(message)s", level=logging.WARNING)
plan = plan_of({str(path)!r}, max_batch_size=8, model_output_shape=[1, 8, 8])
runtime = load_runtime(plan.job.model, Steps(), 1)
batcher = Batcher(plan, plan.job.model, runtime, Steps())
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (250 << 20),) * 2)
chunk = plan.chunk((0, 0))
region = np.random.default_rng(0).random(chunk.halo.shape).astype(np.float32)
pairs = list(each_prediction(batcher, list(plan.patches(chunk)), [region], chunk.halo.start))
for patch, prediction in pairs:
    expected = 1 / (1 + np.exp(-region[patch.source.slices(chunk.halo.start)]))
    assert np.allclose(prediction[0], expected, rtol=0, atol=1e-4)
print(batcher.size, len(pairs))
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert process.returncode == 0, process.stderr
    size, count = map(int, process.stdout.split())
    assert size < 8
    assert count == 8
    lines = process.stderr.splitlines()
    assert_contains(lines[-1], f" {size} patches")
    assert all(line.startswith("out of memory: ") for line in lines), process.stderr


# ---------------------------------------------- GPU code that can be tested without a GPU


def test_the_provider_is_logged(network: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="chunkq.worker"):
        load(network)
    [record] = caplog.records
    assert record.levelname == "INFO"
    assert_contains(record.getMessage(), VERSION, network, "CPUExecutionProvider")


def test_cuda_without_a_cuda_provider_is_an_error(network: Path) -> None:
    line = load_error(network, device="cuda")
    assert line.startswith("model_config.device: cuda")
    assert_contains(line, "no CUDA provider", install_command("onnx-gpu"), "device: cpu")


@pytest.mark.parametrize(("precision", "expected"), [(None, "0"), ("float32", "0"), ("tf32", "1")])
def test_the_cuda_provider_uses_tf32_only_if_the_job_says_so(
    network: Path, precision: str | None, expected: str
) -> None:
    model = config(network, device="cuda", precision=precision)
    assert onnx_cuda.provider_options(model)["use_tf32"] == expected


def test_a_cuda_provider_that_fails_to_load_is_an_error(
    network: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without CUDA, onnxruntime-gpu lists the provider but only logs that it failed to load."""
    session = open_session(str(network), 1)
    requested: list[Any] = []

    def without_cuda(source: str, options: Any, providers: list[Any], **overrides: Any) -> Any:
        requested.extend(providers)
        return session

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: [onnx_cuda.CUDA, "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", without_cuda)
    monkeypatch.setattr(
        onnxruntime,
        "preload_dlls",
        lambda: print("Failed to load libcudart.so.13"),  # noqa: T201
    )
    line = load_error(network, device="cuda")
    assert line.startswith("model_config.device: cuda")
    assert_contains(line, "cuDNN", install_command("onnx-gpu"), "device: cpu")
    assert [requested[0][0], requested[1]] == [onnx_cuda.CUDA, "CPUExecutionProvider"]
    assert capsys.readouterr().out == ""


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let onnxruntime list the providers of its GPU package; return what sessions are opened with.

    Sessions run on the CPU, as if the libraries were missing.
    """
    providers = [onnx_tensorrt.TENSORRT, onnx_cuda.CUDA, "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    requested: list[Any] = []
    session_class = onnxruntime.InferenceSession

    def open_on_cpu(source: str, options: Any, providers: list[Any], **overrides: Any) -> Any:
        requested.extend(providers)
        session = session_class(source, options, ["CPUExecutionProvider"])
        return mock.Mock(wraps=session, get_providers=lambda: [onnx_cuda.CUDA])

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_on_cpu)
    return requested


def test_tensorrt_without_its_libraries_is_an_error_of_one_line(
    network: Path, tensorrt: list[Any]
) -> None:
    line = load_error(network, device="cuda", provider="tensorrt")
    assert line.startswith("model_config.provider: tensorrt")
    assert_contains(line, "TensorRT", "pip install tensorrt", "provider: cuda")
    assert [name for name, _ in tensorrt[:2]] == [onnx_tensorrt.TENSORRT, onnx_cuda.CUDA]
    folder = Path(tensorrt[0][1]["trt_engine_cache_path"])
    for private in (folder, folder.parents[1]):
        assert private.is_dir()
        assert private.stat().st_mode & 0o077 == 0


def test_an_onnxruntime_without_tensorrt_is_an_error(
    network: Path, monkeypatch: pytest.MonkeyPatch, tensorrt: list[Any]
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [onnx_cuda.CUDA])
    line = load_error(network, device="cuda", provider="tensorrt")
    assert line.startswith("model_config.provider: tensorrt")
    assert_contains(line, "no TensorRT provider", "provider: cuda")
    assert tensorrt == []


@pytest.mark.parametrize(("precision", "expected"), [(None, "0"), ("tf32", "0"), ("float16", "1")])
def test_tensorrt_builds_engines_in_the_precision_of_the_job(
    network: Path, precision: str | None, expected: str
) -> None:
    model = config(network, device="cuda", provider="tensorrt", precision=precision)
    options = onnx_tensorrt.provider_options(model, Path("/cache"))
    assert options["trt_fp16_enable"] == expected
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == "/cache"
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    without = onnx_tensorrt.provider_options(model, None)
    assert "trt_engine_cache_enable" not in without


def test_engines_are_kept_apart_by_graph_weights_gpu_versions_and_precision(
    tmp_path: Path, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(path: Path = network, precision: str | None = None) -> str:
        model = config(path, device="cuda", provider="tensorrt", precision=precision)
        return onnx_tensorrt.engine_key(model).digest()

    first = digest()
    assert first == digest()
    digests = [first, digest(precision="float16")]
    digests.append(digest(save(tmp_path / "other.onnx", conv(ir=9))))
    external = tmp_path / "external.onnx"
    onnx.save_model(
        conv(), str(external), save_as_external_data=True, location="w", size_threshold=0
    )
    digests.append(digest(external))
    content = bytearray((tmp_path / "w").read_bytes())
    content[0] ^= 1
    (tmp_path / "w").write_bytes(content)
    digests.append(digest(external))
    monkeypatch.setattr(onnx_tensorrt, "_gpu", lambda: "NVIDIA H100 9.0")
    digests.append(digest())
    monkeypatch.setattr(onnx_tensorrt, "version", lambda name: "10.9")
    digests.append(digest())
    monkeypatch.setattr(onnxruntime, "__version__", "99")
    digests.append(digest())
    assert len(set(digests)) == len(digests) == 8


def test_tensorrt_gets_batches_of_one_size(network: Path) -> None:
    session = open_session(str(network), 1)
    graph = Graph.from_session(session, str(network))
    for keys, expected in (({}, True), ({"provider": "tensorrt"}, False)):
        model = config(network, device="cuda", **keys)
        layout = graph.layout(ItemShapes.of(model), Steps())
        assert onnx_host.OnnxRuntime(session, graph, model, Steps(), layout).any_batch is expected


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a factory of runtimes that bind torch tensors, on the CPU instead of the GPU."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (600, 1000))

    def create(
        path: Path, steps: Steps | None = None, rank: int | None = None, **overrides: Any
    ) -> onnx_cuda.OnnxOnTorch:
        session, model = open_session(str(path), 1), config(path, **overrides)
        graph, device = Graph.from_session(session, str(path)), torch.device("cpu")
        steps = steps or Steps()
        layout = graph.layout(ItemShapes.of(model, rank), steps)
        return onnx_cuda.OnnxOnTorch(session, graph, model, steps, layout, device, 900)

    return create


def test_bound_tensors_return_the_same_values_as_arrays(network: Path, bound: Any) -> None:
    runtime, plain = bound(network), load(network)
    for count in (4, 2, 4):
        batch = random_batch(count, "uint16", seed=count)
        [outputs] = runtime(batch)
        assert isinstance(outputs, torch.Tensor)
        assert outputs.dtype == torch.float32
        np.testing.assert_array_equal(outputs.numpy(), plain(batch)[0])


@pytest.mark.parametrize("shape", [[1, *PATCH], [*PATCH, 1]])
def test_bound_tensors_of_a_network_with_channels_last_are_moved(
    tmp_path: Path, bound: Any, shape: list[int]
) -> None:
    path = save(tmp_path / "net.onnx", keras_like())
    outputs = bound(path, rank=2, model_input_shape=shape)(random_batch())[0]
    assert outputs.is_contiguous()
    np.testing.assert_allclose(outputs.numpy(), convolved(random_batch()), rtol=0, atol=1e-4)


def test_results_of_a_bound_graph_share_no_memory(network: Path, bound: Any) -> None:
    runtime = bound(network)
    [first] = runtime(random_batch(seed=1))
    copy = first.clone()
    runtime(random_batch(seed=2))
    assert torch.equal(first, copy)


def test_to_device_keeps_the_values_of_any_array(network: Path, bound: Any) -> None:
    runtime = bound(network)
    for dtype, expected in (("uint16", torch.int32), ("uint32", torch.int64), (">i2", torch.int16)):
        tensor = runtime.to_device(np.array([1, 30000], dtype))
        assert (tensor.dtype, tensor.tolist()) == (expected, [1, 30000])
    read_only = np.arange(4.0)[::-1]
    read_only.flags.writeable = False
    assert runtime.to_device(read_only).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_graphs_support_every_dtype(tmp_path: Path, bound: Any, dtype: str) -> None:
    model = identity(kind=DTYPES[dtype], out=DTYPES[dtype])
    batch = random_batch(dtype="uint8")
    outputs = bound(save(tmp_path / "net.onnx", model), dtype=dtype)(batch)[0]
    kept = {"float64": torch.float64, "float16": torch.float16}
    assert outputs.dtype == kept.get(dtype, torch.float32)
    np.testing.assert_array_equal(outputs.numpy(), batch)


def test_a_bound_graph_takes_tensors(network: Path, bound: Any) -> None:
    runtime, batch = bound(network), random_batch()
    assert torch.equal(runtime(torch.from_numpy(batch))[0], runtime(batch)[0])


def test_protected_steps_of_a_bound_graph_get_tensors_and_can_return_views(
    network: Path, bound: Any
) -> None:
    def transpose(batch: torch.Tensor) -> torch.Tensor:
        assert isinstance(batch, torch.Tensor)
        return batch.transpose(2, 3)

    steps = Steps(preprocessing_protected=transpose, postprocessing_protected=transpose)
    batch = random_batch()
    expected = convolved(batch.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    np.testing.assert_allclose(bound(network, steps)(batch)[0].numpy(), expected, rtol=0, atol=1e-4)


def test_the_stream_is_synchronized_before_each_run(network: Path, bound: Any) -> None:
    bound(network)(random_batch())[0]
    synchronize = torch.cuda.current_stream.return_value.synchronize  # type: ignore[attr-defined]
    assert synchronize.call_count == 2  # the first batch of a shape needs a run for its output


def test_device_bytes_include_the_memory_of_the_graph(network: Path, bound: Any) -> None:
    assert bound(network).device_bytes() == 300
    assert load(network).device_bytes() is None


def test_out_of_memory_errors_of_torch_are_recognized(network: Path, bound: Any) -> None:
    runtime = bound(network)
    assert runtime.is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert not runtime.is_out_of_memory(RuntimeError("something else"))


def test_layers_that_normalize_with_statistics_of_the_patch_are_listed(
    tmp_path: Path, network: Path
) -> None:
    weights = {"s": np.ones(1, np.float32), "b": np.zeros(1, np.float32)}
    node = helper.make_node("InstanceNormalization", ["x", "s", "b"], ["y"], name="norm1")
    path = save(tmp_path / "norm.onnx", model_of([node], weights=weights))
    assert load(path).tile_norms() == ("norm1 (InstanceNormalization)",)
    assert load(network).tile_norms() == ()


def test_close_releases_the_session(network: Path) -> None:
    runtime = load(network)
    assert isinstance(runtime, onnx_host.OnnxRuntime)
    runtime.close()
    assert runtime._session is None
