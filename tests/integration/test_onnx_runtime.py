"""The ONNX runtime: what it loads and runs, and how it refuses what it cannot."""

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
from chunkq_worker.runtimes import onnx as onnx_runtime
from chunkq_worker.runtimes import onnx_cuda
from chunkq_worker.runtimes.base import Runtime, load_runtime
from chunkq_worker.runtimes.onnx_file import open_session
from chunkq_worker.runtimes.onnx_graph import Graph
from chunkq_worker.steps import Steps
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from chunkq.errors import ModelError
from chunkq.job import ModelConfig, parse_job
from chunkq.plan import Plan, Volume
from chunkq.resolve import resolve

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
    """A graph of float32 without output shapes, unless told otherwise."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, axes) for name in inputs],
        [helper.make_tensor_value_info(name, out, None) for name in outputs],
        [numpy_helper.from_array(values, name) for name, values in (weights or {}).items()],
    )
    imports = [helper.make_opsetid(*item) for item in (opsets or {"": 18}).items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir)


def conv(**more: Any) -> onnx.ModelProto:
    """Three channels from one: the network of most tests."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1] * 4)
    return model_of([node], weights={"w": WEIGHTS}, **more)


def identity(**more: Any) -> onnx.ModelProto:
    return model_of([helper.make_node("Identity", ["x"], ["y"])], **more)


def convolved(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What `conv` is to give, by torch."""
    with torch.inference_mode():
        given = torch.from_numpy(batch.astype(np.float32))
        return torch.nn.functional.conv2d(given, torch.from_numpy(WEIGHTS), padding=1).numpy()


def config(path: Path | str, **more: Any) -> ModelConfig:
    values = {
        "runtime": "onnx",
        "type": "file",
        "model_file": str(path),
        "model_input_shape": [1, *PATCH],
        "model_output_shape": [3, *PATCH],
        "max_batch_size": 4,
    }
    return ModelConfig.model_validate(values | more)


def load(path: Path | str, steps: Steps | None = None, **more: Any) -> Runtime:
    return load_runtime(config(path, **more), steps or Steps(), 1)


def plan_of(path: Path, dtype: str = "float32", **more: Any) -> Plan:
    model = config(path, **more).model_dump(exclude_none=True)
    values = {"input": "/in.zarr", "output": "/out.zarr", "chunksize": [32, 16]}
    return resolve(parse_job({**values, "model_config": model}), Volume((32, 16), dtype))


def random_batch(count: int = 4, dtype: str = "float32", seed: int = 0) -> npt.NDArray[Any]:
    return (np.random.default_rng(seed).random((count, 1, *PATCH)) * 50).astype(dtype)


def refusal(path: Path | str, steps: Steps | None = None, **more: Any) -> str:
    """The one line with which a file or a declaration is refused."""
    with pytest.raises(ModelError) as caught:
        load(path, steps, **more)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return save(tmp_path / "net.onnx", conv())


def test_a_graph_computes_what_the_same_layers_compute_in_torch(network: Path) -> None:
    batch = random_batch()
    found = load(network)(batch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, convolved(batch), rtol=0, atol=1e-4)


def test_a_graph_behind_a_url_is_the_same_network(network: Path) -> None:
    fsspec.filesystem("memory").pipe("/models/net.onnx", network.read_bytes())
    batch = random_batch()
    far = load("memory://models/net.onnx")
    np.testing.assert_array_equal(far(batch), load(network)(batch))


def test_a_url_with_nothing_behind_it_is_refused() -> None:
    line = refusal("memory://models/nowhere.onnx")
    assert line.startswith("model_config.model_file: memory://models/nowhere.onnx cannot be read")


def test_weights_in_a_file_beside_the_graph_are_found(tmp_path: Path, network: Path) -> None:
    path = tmp_path / "split.onnx"
    onnx.save(
        conv(), path, save_as_external_data=True, location="split.onnx.data", size_threshold=0
    )
    assert (tmp_path / "split.onnx.data").stat().st_size > 0
    batch = random_batch()
    np.testing.assert_array_equal(load(path)(batch), load(network)(batch))
    (tmp_path / "split.onnx.data").unlink()
    assert "keeps weights in another file, which is not there" in refusal(path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["uint8", "int16", "float32", ">f8"])
def test_batches_of_any_dtype_are_cast_to_the_one_that_the_graph_takes(
    tmp_path: Path, dtype: str, source: str
) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["f", "f", "f"], ["y"], axis=1),
    ]
    path = save(tmp_path / "net.onnx", model_of(nodes, kind=DTYPES[dtype]))
    batch = random_batch(dtype=source)
    found = load(path, dtype=dtype)(batch)
    assert found.dtype == np.float32
    expected = batch.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(found, np.repeat(expected, 3, axis=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_float32_or_better_whatever_the_graph_gives(tmp_path: Path, dtype: str) -> None:
    model = identity(kind=DTYPES[dtype], out=DTYPES[dtype])
    path = save(tmp_path / "net.onnx", model)
    batch = random_batch(dtype="uint8")
    found = load(path, dtype=dtype)(batch)
    assert found.dtype == (np.float64 if dtype == "float64" else np.float32)
    np.testing.assert_array_equal(found, batch)


def test_values_that_a_small_dtype_cannot_hold_raise_no_warning(tmp_path: Path) -> None:
    model = identity(kind=TensorProto.FLOAT16, out=TensorProto.FLOAT16)
    runtime = load(save(tmp_path / "net.onnx", model), dtype="float16")
    assert np.isinf(runtime(np.full((4, 1, *PATCH), 1e6, np.float32))).all()


def test_a_patch_predicts_the_same_whatever_its_place_and_the_batch_size(network: Path) -> None:
    runtime, batch = load(network), random_batch(8)
    whole = np.array(runtime(batch))
    np.testing.assert_array_equal(runtime(batch[::-1])[::-1], whole)
    np.testing.assert_allclose(runtime(batch[:1])[0], whole[0], rtol=0, atol=1e-4)


def test_two_sessions_give_the_same_bytes(network: Path) -> None:
    batch = random_batch()
    assert load(network)(batch).tobytes() == load(network)(batch).tobytes()


@pytest.mark.parametrize("threads", [1, 2, None])
def test_the_session_gets_the_threads_that_the_job_gives(
    network: Path, threads: int | None
) -> None:
    options = open_session(str(network), threads).get_session_options()
    assert options.intra_op_num_threads == (threads or 0)
    assert options.inter_op_num_threads == 1
    assert options.use_deterministic_compute


def test_patches_go_through_the_batcher_like_those_of_any_runtime(network: Path) -> None:
    plan = plan_of(network, "uint8")
    chunk = plan.chunk((0, 0))
    region = np.random.default_rng(1).integers(0, 255, chunk.halo.shape, np.uint8)
    batcher = Batcher(plan, load_runtime(plan.job.model, Steps(), 1), Steps())
    patches = list(plan.patches(chunk))
    found = list(batcher.predictions(patches, [region], chunk.halo.start))
    assert len(found) == 8
    for patch, prediction in found:
        item = region[patch.source.slices(chunk.halo.start)][None, None]
        np.testing.assert_allclose(prediction, convolved(item)[0], rtol=0, atol=1e-3)


def test_protected_steps_get_numpy_arrays_in_the_networks_dtype(network: Path) -> None:
    seen: list[tuple[type, np.dtype[Any], tuple[int, ...]]] = []

    def note(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        seen.append((type(batch), batch.dtype, batch.shape))
        return batch * 2

    steps = Steps(preprocessing_protected=note, postprocessing_protected=note)
    batch = random_batch(dtype="uint8")
    found = load(network, steps)(batch)
    np.testing.assert_allclose(found, convolved(batch * 2.0) * 2, rtol=1e-5, atol=1e-3)
    assert seen == [
        (np.ndarray, np.dtype(np.float32), (4, 1, *PATCH)),
        (np.ndarray, np.dtype(np.float32), (4, 3, *PATCH)),
    ]


def test_a_step_that_works_in_place_leaves_the_batch_as_it_was(network: Path) -> None:
    def in_place(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        batch *= 2
        return batch

    batch = random_batch()
    before = batch.copy()
    runtime = load(network, Steps(preprocessing_protected=in_place))
    np.testing.assert_array_equal(runtime(batch), runtime(batch))
    np.testing.assert_array_equal(batch, before)


def test_a_step_may_change_dtype_and_shape_to_what_the_graph_takes(tmp_path: Path) -> None:
    nodes = [helper.make_node("Slice", ["x", "zero", "three", "one"], ["y"])]
    ends = {"zero": [0], "three": [3], "one": [1]}
    weights = {name: np.array(values, np.int64) for name, values in ends.items()}
    model = model_of(nodes, axes=("batch", 4, *PATCH), weights=weights)
    steps = Steps(preprocessing_protected=lambda b: np.repeat(b, 4, 1).astype(np.float32))
    runtime = load(save(tmp_path / "net.onnx", model), steps, dtype="int16")
    batch = random_batch(dtype="int16")
    np.testing.assert_array_equal(runtime(batch), np.repeat(batch, 3, 1))


def test_a_step_that_gives_what_the_graph_cannot_take_is_refused(network: Path) -> None:
    steps = Steps(preprocessing_protected=lambda b: b.astype(np.float64)[:, :, :7])
    with pytest.raises(ModelError) as caught:
        load(network, steps)(random_batch())
    assert str(caught.value) == (
        f"model_config.model_file: input 'x' of {network} takes float32 (any, 1, 8, 8) but was "
        "given float64 (4, 1, 7, 8); processing_steps must give that"
    )


def test_no_torch_is_needed(network: Path) -> None:
    """An installation of `chunkq[onnx]` has none."""
    plan = plan_of(network)
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from chunkq.job import Job
from chunkq.plan import Volume
from chunkq.resolve import resolve
from chunkq_worker.batching import Batcher
from chunkq_worker.runtimes.base import load_runtime
from chunkq_worker.steps import Steps

plan = resolve(Job.model_validate_json({plan.job.model_dump_json(by_alias=True)!r}),
               Volume((32, 16), "float32"))
batcher = Batcher(plan, load_runtime(plan.job.model, Steps(), 1), Steps())
chunk = plan.chunk((0, 0))
halo = np.ones(chunk.halo.shape, np.float32)
print(len(list(batcher.predictions(list(plan.patches(chunk)), [halo], chunk.halo.start))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout, done.stderr) == ("8\n", "")


def test_onnx_runtime_sends_no_telemetry_and_stores_no_device_id(tmp_path: Path) -> None:
    path, home = save(tmp_path / "net.onnx", identity()), tmp_path / "home"
    home.mkdir()
    code = f"""
import os
from chunkq_worker.runtimes.onnx_file import open_session

open_session({str(path)!r}, None)
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""
    # ONNX Runtime sends none either where it sees variables of a CI or of pytest.
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=env,
    )
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert not list(home.iterdir())


# What does not fit the declaration.


def test_a_dtype_other_than_the_graphs_is_refused_with_the_one_to_write(tmp_path: Path) -> None:
    path = save(tmp_path / "half.onnx", identity(kind=TensorProto.FLOAT16, out=TensorProto.FLOAT16))
    assert refusal(path) == (
        f"model_config.dtype: float32, but input 'x' of {path} takes float16; write dtype: float16"
    )


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.BOOL, TensorProto.BFLOAT16])
def test_an_input_type_that_no_job_can_declare_is_refused(tmp_path: Path, kind: int) -> None:
    line = refusal(save(tmp_path / "net.onnx", identity(kind=kind, out=kind)))
    name = {TensorProto.UINT8: "uint8", TensorProto.BOOL: "bool"}.get(kind, "bfloat16")
    assert f"input 'x' takes {name}; export the network with an input of float16, float32" in line


def test_an_output_that_is_no_number_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.STRING)]
    line = refusal(save(tmp_path / "net.onnx", model_of(nodes, out=TensorProto.STRING)))
    assert "output 'y' is string; export the network" in line


@pytest.mark.parametrize(
    ("axes", "declared", "words"),
    [
        (("batch", 1, 8, 8), [8, 8], "batches of 3 axes, but"),
        (("batch", 1, 8, 8), [8, 8], "write model_input_shape: [1, 8, 8]"),
        (("batch", 1, "h", "w"), [8, 8], "write model_input_shape: 3 entries"),
        (("batch", 8, 8), [1, 8, 8], "takes 3, (any, 8, 8); write model_input_shape: [8, 8]"),
        (("batch", 1, 16, 16), [1, 8, 8], "takes (any, 1, 16, 16); write model_input_shape: [1, 1"),
        (("batch", 1, "h", 12), [1, 8, 8], "takes (any, 1, any, 12); write model_input_shape: [1,"),
        (("batch", 3, 8, 8), [1, 8, 8], "write model_input_shape: [3, 8, 8]"),
    ],
)
def test_a_patch_shape_that_the_graph_does_not_take_is_refused(
    tmp_path: Path, axes: Any, declared: list[int], words: str
) -> None:
    path = save(tmp_path / "net.onnx", identity(axes=axes))
    line = refusal(path, model_input_shape=declared)
    assert line.startswith(f"model_config.model_input_shape: {declared}")
    assert words in line


def test_free_axes_take_any_patch_shape(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", conv(axes=("batch", 1, "h", "w")))
    batch = np.zeros((2, 1, 12, 20), np.float32)
    assert load(path, model_input_shape=[1, 12, 20])(batch).shape == (2, 3, 12, 20)


def test_a_graph_that_does_not_tell_its_shape_takes_any(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", identity(axes=None))
    assert load(path)(random_batch(3)).shape == (3, 1, *PATCH)


def test_the_axis_along_which_inputs_are_stacked_may_be_longer_in_the_graph(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", identity(axes=("batch", 2, *PATCH)))
    batch = np.ones((4, 2, *PATCH), np.float32)
    assert load(path, join_dim=1)(batch).shape == (4, 2, *PATCH)


def test_a_fixed_batch_size_other_than_the_jobs_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", conv(axes=(2, 1, *PATCH)))
    assert refusal(path) == (
        f"model_config.max_batch_size: 4, but input 'x' of {path} takes batches of exactly 2; "
        "write max_batch_size: 2, or export it with a dynamic batch axis"
    )
    np.testing.assert_allclose(
        load(path, max_batch_size=2)(random_batch(2)), convolved(random_batch(2)), atol=1e-4
    )


def test_a_fixed_batch_that_cannot_be_halved_when_memory_runs_out_says_so(tmp_path: Path) -> None:
    runtime = load(save(tmp_path / "net.onnx", conv(axes=(4, 1, *PATCH))))
    with pytest.raises(ModelError, match="its batch size is fixed; export it with a dynamic batch"):
        runtime(random_batch(2))


@pytest.mark.parametrize("which", ["inputs", "outputs", "no inputs"])
def test_a_graph_with_several_ins_or_outs_is_refused_by_their_names(
    tmp_path: Path, which: str
) -> None:
    if which == "inputs":
        model = model_of([helper.make_node("Add", ["x", "b"], ["y"])], inputs=("x", "b"))
        words = "takes 2 inputs (x, b); export the network so that it takes one batch"
    elif which == "outputs":
        nodes = [helper.make_node("Identity", ["x"], [name]) for name in ("y", "z")]
        model, words = model_of(nodes, outputs=("y", "z")), "gives 2 outputs (y, z); export"
    else:
        nodes = [helper.make_node("Constant", [], ["y"], value_floats=[1.0])]
        model, words = model_of(nodes, inputs=()), "takes 0 inputs (none)"
    path = save(tmp_path / "net.onnx", model)
    assert f"model_config.model_file: {path} {words}" in refusal(path)


# What is no graph that this runtime can read.


def test_an_opset_that_is_too_new_is_named_with_the_highest_known(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", conv(opsets={"": 99}))
    line = refusal(path)
    assert line.startswith(f"model_config.model_file: {path} is of opset 99, which onnxruntime ")
    assert "does not know; install a newer onnxruntime or export it with opset_version 2" in line


def test_an_ir_version_that_is_too_new_is_named_with_the_highest_known(tmp_path: Path) -> None:
    line = refusal(save(tmp_path / "net.onnx", conv(ir=99)))
    assert "is of IR version 99, but onnxruntime " in line
    assert "or save it with model.ir_version = 1" in line


@pytest.mark.parametrize(("domain", "name"), [("com.me", "com.me:Foo"), ("", "Foo")])
def test_an_operator_that_is_not_known_is_named(tmp_path: Path, domain: str, name: str) -> None:
    node = helper.make_node("Foo", ["x"], ["y"], domain=domain)
    model = model_of([node], opsets={"": 18, "com.me": 1})
    line = refusal(save(tmp_path / "net.onnx", model))
    assert f"uses {name}, an operator that onnxruntime " in line


def test_an_operator_without_a_kernel_for_its_dtype_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
    kinds = {"kind": TensorProto.DOUBLE, "out": TensorProto.DOUBLE}
    model = model_of([node], weights={"w": WEIGHTS.astype(np.float64)}, **kinds)
    line = refusal(save(tmp_path / "net.onnx", model), dtype="float64")
    assert "uses Conv(11) with a dtype that onnxruntime " in line
    assert "export the network in float32" in line


def other_format(folder: Path, what: str) -> Path:
    path, module = folder / "model.onnx", torch.nn.Conv2d(1, 3, 3, padding=1)
    if what == "torch.save":
        torch.save(module.state_dict(), path)
    elif what == "TorchScript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.trace(module, torch.zeros(2, 1, *PATCH)).save(str(path))
    elif what == "pt2":
        program = torch.export.export(module.eval(), (torch.zeros(2, 1, *PATCH),))
        torch.export.save(program, folder / "model.pt2")
        (folder / "model.pt2").rename(path)
    elif what == "Keras":
        with zipfile.ZipFile(path, "w") as file:
            for name in ("metadata.json", "config.json", "model.weights.h5"):
                file.writestr(name, "{}")
    elif what == "HDF5":
        path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    elif what == "JSON":
        path.write_text(json.dumps({"class_name": "Functional", "config": {}}))
    elif what in ("SavedModel", "folder"):
        path.mkdir()
        (path / ("saved_model.pb" if what == "SavedModel" else "x")).touch()
    elif what == "pickle":
        path.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    elif what == "cut off":
        path.write_bytes(conv().SerializeToString()[:-40])
    else:
        path.write_text(what)
    return path


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("torch.save", ("torch.save", "runtime: torch", "type: class", "`chunkq export`")),
        ("TorchScript", ("TorchScript", "runtime: torch", "type: torchscript", "chunkq export")),
        ("pt2", ("torch.export", "runtime: torch", "type: exported")),
        ("Keras", ("Keras", "runtime: tensorflow", "type: file")),
        ("HDF5", ("HDF5", "runtime: tensorflow")),
        ("JSON", ("JSON", "runtime: tensorflow", "type: json")),
        ("SavedModel", ("is a SavedModel", "runtime: tensorflow, type: file")),
        ("folder", ("is a folder; name the .onnx file in it",)),
        ("pickle", ("is no ONNX file, or a damaged one",)),
        ("cut off", ("is no ONNX file, or a damaged one",)),
        ("hello", ("is no ONNX file, or a damaged one",)),
        ("", ("is no ONNX file, or a damaged one",)),
    ],
)
def test_a_file_of_another_kind_is_recognised_and_the_right_runtime_named(
    tmp_path: Path, what: str, words: tuple[str, ...]
) -> None:
    path = other_format(tmp_path, what)
    line = refusal(path)
    assert line.startswith(f"model_config.model_file: {path} is ")
    for word in words:
        assert word in line


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.onnx"
    assert refusal(path) == f"model_config.model_file: {path} is not there"


def test_a_runtime_that_is_not_installed_names_the_extra(
    network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("chunkq_worker.runtimes.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    line = refusal(network)
    assert line.startswith("model_config.runtime: onnx is not installed here")
    assert line.endswith("pip install 'chunkq[onnx]'")


# Memory.


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
def test_an_allocation_that_fails_is_out_of_memory(network: Path, error: Exception) -> None:
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
def test_no_other_error_is_out_of_memory(network: Path, error: Exception) -> None:
    assert not load(network).is_out_of_memory(error)


def test_memory_that_really_runs_out_halves_the_batch_and_says_so_once(tmp_path: Path) -> None:
    """In a process of its own, whose memory is limited: 8 patches need 400 MB, 4 of them 200."""
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
from tests.integration.test_onnx_runtime import plan_of

logging.basicConfig(format="%(message)s", level=logging.WARNING)
plan = plan_of({str(path)!r}, max_batch_size=8, model_output_shape=[1, 8, 8])
runtime = load_runtime(plan.job.model, Steps(), 1)
batcher = Batcher(plan, runtime, Steps())
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (250 << 20),) * 2)
chunk = plan.chunk((0, 0))
region = np.random.default_rng(0).random(chunk.halo.shape).astype(np.float32)
found = list(batcher.predictions(list(plan.patches(chunk)), [region], chunk.halo.start))
for patch, prediction in found:
    expected = 1 / (1 + np.exp(-region[patch.source.slices(chunk.halo.start)]))
    assert np.allclose(prediction[0], expected, rtol=0, atol=1e-4)
print(batcher.size, len(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    size, count = map(int, done.stdout.split())
    assert size < 8
    assert count == 8
    lines = done.stderr.splitlines()
    assert lines[-1] == f"out of memory: batches have {size} patches from here on"
    assert all(line.startswith("out of memory: batches have") for line in lines), done.stderr


# The GPU, as far as it can be tried without one.


def test_which_provider_runs_is_logged(network: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="chunkq.worker"):
        load(network)
    [record] = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage() == (
        f"onnxruntime {onnxruntime.__version__} runs {network} with CPUExecutionProvider"
    )


def test_cuda_without_a_provider_for_it_is_refused(network: Path) -> None:
    assert refusal(network, device="cuda") == (
        "model_config.device: cuda, but the onnxruntime installed here has no CUDA provider; "
        "replace it (pip uninstall onnxruntime && pip install 'chunkq[onnx-gpu]') or set device: "
        "cpu"
    )


def test_a_cuda_provider_that_silently_does_not_load_is_refused(
    network: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """onnxruntime-gpu on a machine without CUDA: listed, then dropped with a mere log line."""
    session = open_session(str(network), 1)
    asked: list[Any] = []

    def without_cuda(source: str, options: Any, providers: list[Any], **more: Any) -> Any:
        asked.extend(providers)
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
    line = refusal(network, device="cuda")
    assert "cannot load its CUDA provider here; install CUDA and cuDNN for it" in line
    assert "pip install 'chunkq[onnx-gpu]'" in line
    assert [asked[0][0], asked[1]] == [onnx_cuda.CUDA, "CPUExecutionProvider"]
    assert capsys.readouterr().out == ""


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes runtimes that bind torch tensors, with the host in the place of the GPU."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (600, 1000))

    def make(path: Path, steps: Steps | None = None, **more: Any) -> onnx_cuda.OnnxOnTorch:
        session, model = open_session(str(path), 1), config(path, **more)
        graph, device = Graph.of(session, str(path)), torch.device("cpu")
        return onnx_cuda.OnnxOnTorch(session, graph, model, steps or Steps(), device, 900)

    return make


def test_bound_tensors_give_what_arrays_give(network: Path, bound: Any) -> None:
    runtime, plain = bound(network), load(network)
    for count in (4, 2, 4):
        batch = random_batch(count, "uint16", seed=count)
        found = runtime(batch)
        assert isinstance(found, torch.Tensor)
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), plain(batch))


def test_each_result_of_a_bound_graph_has_memory_of_its_own(network: Path, bound: Any) -> None:
    runtime = bound(network)
    first = runtime(random_batch(seed=1))
    kept = first.clone()
    runtime(random_batch(seed=2))
    assert torch.equal(first, kept)


def test_arrays_of_any_kind_become_tensors_with_the_same_values(network: Path, bound: Any) -> None:
    runtime = bound(network)
    for dtype, placed in (("uint16", torch.int32), ("uint32", torch.int64), (">i2", torch.int16)):
        found = runtime.place(np.array([1, 30000], dtype))
        assert (found.dtype, found.tolist()) == (placed, [1, 30000])
    fixed = np.arange(4.0)[::-1]
    fixed.flags.writeable = False
    assert runtime.place(fixed).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_graphs_take_and_give_every_dtype(tmp_path: Path, bound: Any, dtype: str) -> None:
    model = identity(kind=DTYPES[dtype], out=DTYPES[dtype])
    batch = random_batch(dtype="uint8")
    found = bound(save(tmp_path / "net.onnx", model), dtype=dtype)(batch)
    assert found.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    np.testing.assert_array_equal(found.numpy(), batch)


def test_protected_steps_of_a_bound_graph_get_tensors_and_may_give_views(
    network: Path, bound: Any
) -> None:
    def turned(batch: torch.Tensor) -> torch.Tensor:
        assert isinstance(batch, torch.Tensor)
        return batch.transpose(2, 3)

    steps = Steps(preprocessing_protected=turned, postprocessing_protected=turned)
    batch = random_batch()
    expected = convolved(batch.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    np.testing.assert_allclose(bound(network, steps)(batch).numpy(), expected, rtol=0, atol=1e-4)


def test_the_device_is_waited_for_before_each_run(network: Path, bound: Any) -> None:
    bound(network)(random_batch())
    waited = torch.cuda.current_stream.return_value.synchronize  # type: ignore[attr-defined]
    assert waited.call_count == 2  # the first run of a batch size learns the output's shape


def test_memory_on_the_device_is_counted_from_before_the_graph_was_loaded(
    network: Path, bound: Any
) -> None:
    assert bound(network).device_bytes() == 300
    assert load(network).device_bytes() is None


def test_running_out_of_torchs_memory_counts_too(network: Path, bound: Any) -> None:
    runtime = bound(network)
    assert runtime.is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert not runtime.is_out_of_memory(RuntimeError("something else"))


def test_layers_that_normalise_by_the_tile_are_named(tmp_path: Path, network: Path) -> None:
    weights = {"s": np.ones(1, np.float32), "b": np.zeros(1, np.float32)}
    node = helper.make_node("InstanceNormalization", ["x", "s", "b"], ["y"], name="norm1")
    path = save(tmp_path / "norm.onnx", model_of([node], weights=weights))
    assert load(path).tile_norms() == ("norm1 (InstanceNormalization)",)
    assert load(network).tile_norms() == ()


def test_a_closed_runtime_lets_go_of_its_session(network: Path) -> None:
    runtime = load(network)
    assert isinstance(runtime, onnx_runtime.OnnxRuntime)
    runtime.close()
    assert runtime._session is None
