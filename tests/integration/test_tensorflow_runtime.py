"""The TensorFlow runtime: every form of a network, inputs, outputs and errors."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker.batching import Batcher
from chunkq_worker.runtimes import tensorflow as tensorflow_runtime
from chunkq_worker.runtimes.base import Runtime, load_runtime
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.tensorflow_import import keras, tf, without_log_output
from chunkq_worker.steps import Steps

from chunkq.errors import ErrorCode, ModelError
from chunkq.install_hint import install_command
from chunkq.job.job_parsing import parse_job
from chunkq.job.job_reading import load_job
from chunkq.job.model_config import ModelConfig
from chunkq.job.record import JobRecord
from chunkq.paths import file_hash
from chunkq.plan.volume import Volume
from chunkq.storage.images import find_source
from tests.harness.assertions import assert_contains
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace, run_inline
from tests.strategies import JobPlan

# The number of threads can be set only before TensorFlow starts.
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)

NETS = '''\
import keras
import tensorflow as tf

layers = keras.layers


class Net(keras.Model):
    """Has channels-last inputs and outputs."""

    def __init__(self, width=3):
        super().__init__()
        self.conv = layers.Conv2D(width, 3, padding="same")
        self.drop = layers.Dropout(0.5)
        self.norm = layers.BatchNormalization()

    def call(self, x):
        return self.norm(self.drop(self.conv(x)))


class Larger(Net):
    def __init__(self):
        super().__init__()
        self.options = layers.Conv2D(3, 1)

    def call(self, x):
        return self.options(super().call(x))


def functional(width=3, size=8):
    inputs = keras.Input((size, size, 1))
    x = layers.Dropout(0.5)(layers.Conv2D(width, 3, padding="same")(inputs))
    return keras.Model(inputs, layers.BatchNormalization()(x))


def sequential():
    """Declares no input, so that its variables are created with the first batch."""
    return keras.Sequential([layers.Conv2D(3, 3, padding="same"), layers.BatchNormalization()])


def large():
    """Declares another patch than it gets, which Keras accepts for this kind of model."""
    inner = [layers.Conv2D(3, 3, padding="same"), layers.BatchNormalization()]
    return keras.Sequential([keras.Input((32, 32, 1)), *inner])


class BuildsLayers(keras.Model):
    """Creates its layers in `build`."""

    def build(self, shape):
        self.conv = layers.Conv2D(3, 3, padding="same")
        self.conv.build(shape)

    def call(self, x):
        return self.conv(x)


class Plain(layers.Layer):
    """A layer that Keras does not define."""

    def call(self, x):
        return x * 2


def with_plain():
    return keras.Sequential([keras.Input((8, 8, 1)), Plain(), layers.Conv2D(3, 1)])


def with_lambda():
    return keras.Sequential([keras.Input((8, 8, 1)), layers.Lambda(lambda x: x * 2)])


def two_inputs():
    inputs = [keras.Input((8, 8, 1)), keras.Input((8, 8, 1))]
    return keras.Model(inputs, layers.Concatenate()(inputs))


def two_outputs():
    inputs = keras.Input((8, 8, 1))
    return keras.Model(inputs, {"mask": layers.ReLU()(inputs), "edge": layers.ELU()(inputs)})


def list_of_one():
    inputs = keras.Input((8, 8, 1))
    return keras.Model(inputs, [layers.ReLU()(inputs)])


class Raises(keras.Model):
    def call(self, x):
        raise KeyError("mean")


class ChecksDtype(keras.Model):
    """Fails for an input of another dtype. Returns the halved input in three channels."""

    def __init__(self, dtype):
        super().__init__()
        self.expected = dtype

    def call(self, x):
        assert x.dtype == self.expected, (x.dtype, self.expected)
        return keras.ops.concatenate([keras.ops.cast(x, "float32") / 2] * 3, axis=-1)


class AddsBatchSize(keras.Model):
    """Adds the batch size for which its graph was traced."""

    def call(self, x):
        return x + x.shape[0]


class ExhaustsMemory(keras.Model):
    """Allocates too much memory for options than two items."""

    def call(self, x):
        if x.shape[0] > 2:
            x = x + tf.reduce_sum(tf.random.uniform([1 << 46]))
        return keras.ops.concatenate([x] * 3, axis=-1)


def norms():
    inputs = keras.Input((8, 8, 4))
    x = layers.GroupNormalization(2, name="by_group")(inputs)
    x = layers.LayerNormalization(axis=(1, 2), name="by_tile")(x)
    x = layers.BatchNormalization(name="by_batch")(layers.LayerNormalization(name="by_voxel")(x))
    inner = keras.Sequential([layers.GroupNormalization(-1, name="inside")], name="block")
    return keras.Model(inputs, inner(x))


def takes_bytes():
    inputs = keras.Input((8, 8, 1), dtype="uint8")
    return keras.Model(inputs, layers.Lambda(lambda x: keras.ops.cast(x, "float32") * 2)(inputs))


class Swaps(keras.Model):
    """Has channels-first inputs and outputs, and no declared input."""

    def call(self, x):
        assert x.shape[1] == 1, x.shape
        return keras.ops.concatenate([x, x * 2, x * 3], axis=1)


def swapping():
    inputs = keras.Input((1, 8, 8))
    return keras.Model(inputs, layers.Concatenate(1)([inputs, inputs * 2, inputs * 3]))


def sums_channels(count=2):
    inputs = keras.Input((8, 8, count))
    return keras.Model(inputs, keras.ops.sum(inputs, -1, keepdims=True))


class Complex(keras.Model):
    def call(self, x):
        return tf.complex(x, x)


def no_network():
    return 3
'''
PATCH = (8, 8)
Item = tuple[int, ...]


@pytest.fixture(scope="module")
def nets() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "nets"}
    exec(NETS, names)
    return names


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory, nets: dict[str, Any]) -> Path:
    """Return a folder with files of networks, written once per module."""
    folder = tmp_path_factory.mktemp("model_files")
    (folder / "nets.py").write_text(NETS)
    model, subclass = trained(nets["functional"]()), trained(nets["Net"]())
    larger = nets["Larger"]()
    with warnings.catch_warnings(), without_log_output():
        for category in (DeprecationWarning, FutureWarning):  # raised in Keras itself
            warnings.simplefilter("ignore", category)
        model.save(folder / "net.keras")
        model.save(folder / "net.h5")
        model.save_weights(folder / "net.weights.h5")
        model.export(str(folder / "exported"), verbose=False)
        tf.saved_model.save(model, str(folder / "saved"))
        tf.saved_model.save(tf.Module(), str(folder / "unsigned"))
        (folder / "net.json").write_text(model.to_json())
        dynamic = nets["functional"](size=None)
        dynamic.set_weights(model.get_weights())
        dynamic.save(folder / "dynamic.keras")
        dynamic.export(str(folder / "dynamic"), verbose=False)
        large = nets["large"]()
        large.set_weights(model.get_weights())
        large.save(folder / "large.keras")
        subclass.save_weights(folder / "subclass.weights.h5")
        tf.train.Checkpoint(subclass).write(str(folder / "bare"))
        tracked = tf.train.Checkpoint(model=subclass, step=tf.Variable(3))
        for _ in range(2):
            tracked.save(str(folder / "run" / "ckpt"))
        trained(larger).save_weights(folder / "larger.weights.h5")
        tf.train.Checkpoint(model=larger).write(str(folder / "larger"))
        trained(nets["Net"](4)).save_weights(folder / "wider.weights.h5")
        for name in ("with_plain", "with_lambda", "two_inputs", "two_outputs", "list_of_one"):
            nets[name]().save(folder / f"{name}.keras")
            (folder / f"{name}.json").write_text(nets[name]().to_json())
        nets["with_lambda"]().save(folder / "with_lambda.h5")
        nets["two_inputs"]().export(str(folder / "two_inputs"), verbose=False)
        nets["two_outputs"]().export(str(folder / "two_outputs"), verbose=False)
        layer = keras.saving.serialize_keras_object(keras.layers.ReLU())
    (folder / "layer.json").write_text(json.dumps(layer))
    torch.save({"weight": torch.zeros(3)}, folder / "weights.pt")
    (folder / "empty").mkdir()
    return folder


def trained(model: Any) -> Any:
    """Set fixed weights, which are the same for all models with the same layers."""
    model(np.zeros((1, *PATCH, 1), np.float32), training=False)
    rng = np.random.default_rng(4)
    # All forms of the network have the same order of weights.
    values = [rng.normal(0, 0.5, tuple(weight.shape)) for weight in model.weights]
    pairs = zip(values, model.weights, strict=True)
    model.set_weights([abs(v) if "variance" in weight.path else v for v, weight in pairs])
    return model


def config(folder: Path, shape: Item = (*PATCH, 1), **keys: Any) -> ModelConfig:
    """Return a model_config. Relative paths of files are relative to the folder."""
    files = {"class_file", "kwargs_file", "checkpoint", "model_file", "json_file"}
    values = {k: str(folder / v) if k in files and "://" not in v else v for k, v in keys.items()}
    job = {"input": "/in.zarr", "output": "/out.zarr"}
    defaults = {"runtime": "tensorflow", "model_input_shape": list(shape), "max_batch_size": 4}
    return parse_job({**job, "model_config": {**defaults, **values}}).model


def load(
    folder: Path, shape: Item = (*PATCH, 1), steps: Steps | None = None, **keys: Any
) -> Runtime:
    return load_runtime(config(folder, shape, **keys), steps or Steps(), 1)


def load_error(
    folder: Path,
    *fragments: object,
    code: ErrorCode = ErrorCode.MODEL_UNUSABLE,
    shape: Item = (*PATCH, 1),
    **keys: Any,
) -> str:
    """Load a network and call it. Return the message of the ModelError, checked for fragments."""
    with pytest.raises(ModelError) as caught:
        load(folder, shape, **keys)(np.zeros((4, *shape), np.float32))
    line = str(caught.value)
    assert caught.value.code is code, line
    assert_contains(line, *fragments)
    assert "\n" not in line
    assert "\x1b" not in line
    assert "Traceback" not in line
    return line


def batch(shape: Item = (*PATCH, 1), count: int = 4) -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).random((count, *shape), np.float32)


@pytest.fixture(scope="module")
def expected(nets: dict[str, Any]) -> npt.NDArray[np.float32]:
    """Return the output of the trained network for `batch()`."""
    outputs: npt.NDArray[np.float32] = trained(nets["functional"]()).predict(batch(), verbose=0)
    assert outputs.std() > 0.1
    return outputs


def assert_close(outputs: Any, expected: npt.NDArray[Any], atol: float = 1e-6) -> None:
    assert type(outputs) is np.ndarray
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=atol)


def class_of(name: str, **options: Any) -> dict[str, Any]:
    return {"type": "class", "class_file": "nets.py", "class_name": name, **options}


def file_of(name: str, **options: Any) -> dict[str, Any]:
    return {"type": "file", "model_file": name, **options}


# ------------------------------------------------------------------------------ forms


@pytest.mark.parametrize(
    "keys",
    [
        file_of("net.keras"),
        file_of("net.h5"),
        file_of("exported"),
        file_of("saved"),
        {"type": "json", "json_file": "net.json", "checkpoint": "net.weights.h5"},
        {"type": "json", "json_file": "net.json", "checkpoint": "net.keras"},
        class_of("functional", checkpoint="net.weights.h5"),
        class_of("functional", checkpoint="net.keras"),
        class_of("functional", checkpoint="net.h5"),
        class_of("Net", checkpoint="subclass.weights.h5"),
        class_of("Net", checkpoint="bare"),
        class_of("Net", checkpoint="bare.index"),
        class_of("Net", checkpoint="run"),
        class_of("Net", checkpoint="run/ckpt-1"),
    ],
    ids=lambda keys: " ".join(str(v) for v in keys.values()),
)
def test_one_network_predicts_the_same_in_every_form(
    model_files: Path, expected: npt.NDArray[Any], keys: dict[str, Any]
) -> None:
    runtime = load(model_files, **keys)
    assert_close(runtime(batch())[0], expected)
    assert_close(runtime(batch())[0], expected)


def test_weights_are_loaded_into_a_network_that_is_built_with_the_first_batch(
    model_files: Path, expected: npt.NDArray[Any], nets: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(nets["sequential"]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model.save_weights(tmp_path / "sequential.weights.h5")
    keys = class_of("sequential", checkpoint=str(tmp_path / "sequential.weights.h5"))
    assert_close(load(model_files, **keys)(batch())[0], expected)


@pytest.mark.parametrize("name", ["net.keras", "net.h5", "saved"])
def test_a_network_is_loaded_from_a_url(
    model_files: Path, expected: npt.NDArray[Any], memory: Callable[[Path], str], name: str
) -> None:
    url = memory(model_files / name)
    assert_close(load(model_files, **file_of(url))(batch())[0], expected)


@pytest.fixture
def memory() -> Iterator[Callable[[Path], str]]:
    """Return a function that copies a file or folder to a URL and returns the URL."""
    filesystem = fsspec.filesystem("memory")

    def copy(path: Path) -> str:
        filesystem.put(str(path), f"/models/{path.name}", recursive=path.is_dir())
        return f"memory://models/{path.name}"

    yield copy
    filesystem.rm("/models", recursive=True)


def test_the_format_of_a_file_depends_on_its_content_not_its_name(
    model_files: Path, expected: npt.NDArray[Any], tmp_path: Path
) -> None:
    for name, copy in (("net.keras", "best"), ("net.h5", "best.model"), ("net.h5", "a.keras")):
        (tmp_path / copy).write_bytes((model_files / name).read_bytes())
        assert_close(load(model_files, **file_of(str(tmp_path / copy)))(batch())[0], expected)
    weights = (model_files / "net.weights.h5").read_bytes()
    (tmp_path / "epoch 7.hdf5").write_bytes(weights)
    keys = class_of("functional", checkpoint=str(tmp_path / "epoch 7.hdf5"))
    assert_close(load(model_files, **keys)(batch())[0], expected)


def test_without_a_checkpoint_a_class_keeps_its_initial_weights(model_files: Path) -> None:
    assert load(model_files, **class_of("Net"))(batch())[0].std() > 0


def test_custom_layers_are_loaded_from_class_file(model_files: Path) -> None:
    for keys in (file_of("with_plain.keras"), {"type": "json", "json_file": "with_plain.json"}):
        line = load_error(model_files, "'Plain'", "model_config.class_file", **keys)
        assert line.startswith("model_config.")
        outputs = load(model_files, **keys, class_file="nets.py")(batch())[0]
        assert outputs.shape == (4, *PATCH, 3)


def test_code_in_a_file_runs_only_if_the_file_is_trusted(model_files: Path) -> None:
    for keys in (
        file_of("with_lambda.keras"),
        file_of("with_lambda.h5"),
        {"type": "json", "json_file": "with_lambda.json"},
    ):
        code = ErrorCode.MODEL_UNTRUSTED
        load_error(model_files, "model_config.trusted: missing", "Lambda", code=code, **keys)
        assert_close(load(model_files, **keys, trusted=True)(batch())[0], batch() * 2)


# ------------------------------------------------------------------------- inputs and outputs


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "int8", "int16", "int32", "int64"]
)
def test_the_network_gets_batches_in_the_dtype_of_the_job(
    model_files: Path, tmp_path: Path, dtype: str
) -> None:
    (tmp_path / "kwargs.py").write_text(f"kwargs = {{'dtype': {dtype!r}}}\n")
    keys = class_of("ChecksDtype", kwargs_file=str(tmp_path / "kwargs.py"), dtype=dtype)
    values = np.random.default_rng(2).integers(0, 100, (4, *PATCH, 1))
    runtime = load(model_files, **keys)
    for batch_dtype in ("uint8", "int16", "uint16", "uint32", "float32", ">i2", ">f4"):
        [outputs] = runtime(values.astype(batch_dtype))
        assert outputs.dtype == np.float32
        assert_close(outputs, np.repeat(values / 2, 3, axis=-1))


@pytest.mark.parametrize(
    ("dtype", "output_dtype"), [("float64", np.float64), ("float16", np.float32)]
)
@pytest.mark.parametrize("name", ["Net", "BuildsLayers", "functional"])
def test_layers_of_a_class_compute_in_the_dtype_of_the_job(
    model_files: Path, name: str, dtype: str, output_dtype: type
) -> None:
    runtime = load(model_files, **class_of(name, dtype=dtype))
    assert runtime(batch())[0].dtype == output_dtype
    assert {v.dtype for v in runtime._network._model.weights} == {dtype}  # type: ignore[attr-defined]
    assert keras.config.dtype_policy().name == "float32"


def test_an_integer_input_that_keras_would_wrap_is_refused(model_files: Path) -> None:
    keys = class_of("takes_bytes", dtype="int32")
    line = load_error(model_files, "expects uint8", "preprocessing_protected", **keys)
    assert line.startswith("model_config.dtype: int32")
    steps = Steps(preprocessing_protected=lambda x: tf.cast(x, tf.uint8))
    values = np.round(batch() * 100)
    assert_close(load(model_files, steps=steps, **keys)(values)[0], values * 2)


def test_complex_outputs_of_a_model_are_refused(model_files: Path) -> None:
    load_error(model_files, "complex64", "real numbers", **class_of("Complex"))


def test_the_error_for_another_dtype_than_that_of_a_saved_model_names_the_dtype_to_set(
    model_files: Path,
) -> None:
    line = load_error(model_files, "dtype: float32", **file_of("saved", dtype="float64"))
    assert line.startswith("model_config.dtype: float64")


def test_a_channels_last_network_with_one_channel_accepts_patches_without_channels(
    model_files: Path, expected: npt.NDArray[Any]
) -> None:
    for name in ("net.keras", "saved"):
        assert_close(load(model_files, PATCH, **file_of(name))(batch()[..., 0])[0], expected)


LAST_NETWORKS = {
    "keras": file_of("net.keras"),
    "h5": file_of("net.h5"),
    "exported": file_of("exported"),
    "saved": file_of("saved"),
    "json": {"type": "json", "json_file": "net.json", "checkpoint": "net.weights.h5"},
    "functional class": class_of("functional", checkpoint="net.weights.h5"),
    "subclass": class_of("Net", checkpoint="subclass.weights.h5"),
    "dynamic axes": file_of("dynamic.keras"),
    "dynamic axes, saved": file_of("dynamic"),
    "another patch": file_of("large.keras"),
}
"""One network with channels last, in every form."""


def predictions_of(
    folder: Path,
    shape: Item,
    output: Item,
    keys: dict[str, Any],
    steps: Steps | None = None,
) -> npt.NDArray[Any]:
    """Return what the batcher gets for `batch()`, channels first."""
    model = config(folder, shape, model_output_shape=list(output), **keys)
    runtime = load_runtime(model, steps or Steps(), 1, ItemShapes.of(model, len(PATCH)))
    inputs = batch().transpose(0, 3, 1, 2)
    return runtime(inputs if len(shape) > len(PATCH) else inputs[:, 0])[0]


@pytest.mark.parametrize("shape", [(*PATCH, 1), (1, *PATCH), PATCH])
@pytest.mark.parametrize("name", LAST_NETWORKS)
def test_a_network_with_channels_last_runs_whichever_way_its_shapes_are_written(
    model_files: Path, expected: npt.NDArray[Any], name: str, shape: Item
) -> None:
    for output in ((*PATCH, 3), (3, *PATCH)):
        outputs = predictions_of(model_files, shape, output, LAST_NETWORKS[name])
        assert_close(outputs, expected.transpose(0, 3, 1, 2))
        assert outputs.flags.c_contiguous


@pytest.mark.parametrize("shape", [(*PATCH, 1), (1, *PATCH), PATCH])
@pytest.mark.parametrize("name", ["Swaps", "swapping"])
def test_a_network_with_channels_first_runs_whichever_way_its_shapes_are_written(
    model_files: Path, nets: dict[str, Any], name: str, shape: Item
) -> None:
    """Like one of `data_format` channels_first, which TensorFlow supports on GPUs only."""
    outputs = predictions_of(model_files, shape, (3, *PATCH), class_of(name))
    assert_close(
        outputs, np.repeat(batch().transpose(0, 3, 1, 2), 3, axis=1) * [[[1]], [[2]], [[3]]]
    )


def test_the_moves_are_a_part_of_the_graph(model_files: Path) -> None:
    keys = LAST_NETWORKS["keras"]
    model = config(model_files, (1, *PATCH), model_output_shape=[3, *PATCH], **keys)
    runtime = load_runtime(model, Steps(), 1, ItemShapes.of(model, len(PATCH)))
    runtime(batch().transpose(0, 3, 1, 2))
    graph = runtime._traced[1]  # type: ignore[attr-defined]
    assert [tuple(t.shape) for t in graph.inputs[:1]] == [(4, 1, *PATCH)]
    assert tuple(graph.structured_outputs[0].shape) == (4, 3, *PATCH)


def test_several_inputs_are_the_last_axis_of_a_network_with_channels_last(
    model_files: Path,
) -> None:
    values = batch((2, *PATCH))
    for shape, join_dim in (((1, *PATCH), 1), ((*PATCH, 1), 3)):
        keys = class_of("sums_channels", join_dim=join_dim)
        model = config(model_files, shape, model_output_shape=list(PATCH), **keys)
        runtime = load_runtime(model, Steps(), 1, ItemShapes.of(model, len(PATCH), inputs=2))
        assert_close(runtime(values)[0], values.sum(1))


def test_slices_of_a_volume_are_the_last_axis_of_a_2d_network(
    model_files: Path, nets: dict[str, Any]
) -> None:
    values = batch((2, *PATCH))[:, [0, 1, 0]]
    for shape, lost_dim, count in (((3, *PATCH), 0, 3), ((1, *PATCH), 0, 1)):
        keys = class_of("sums_channels", lost_dim=lost_dim)
        model = config(model_files, shape, model_output_shape=[1, *PATCH], **keys)
        (model_files / "slices.py").write_text(f"kwargs = {{'count': {count}}}\n")
        model = model.model_copy(update={"kwargs_file": str(model_files / "slices.py")})
        runtime = load_runtime(model, Steps(), 1, ItemShapes.of(model, 3))
        [outputs] = runtime(values[:, :count])
        assert_close(outputs.reshape(4, *PATCH), values[:, :count].sum(1))


def test_the_error_for_another_patch_than_that_of_the_network_names_the_shape_to_set(
    model_files: Path,
) -> None:
    for name in ("net.keras", "saved"):
        for shape, expected in (((1, 4, 4), [1, 8, 8]), ((4, 4, 1), [8, 8, 1])):
            model = config(model_files, shape, model_output_shape=[3, 4, 4], **file_of(name))
            with pytest.raises(ModelError) as caught:
                load_runtime(model, Steps(), 1, ItemShapes.of(model, 2))(np.zeros((4, 1, 4, 4)))
            assert caught.value.code is ErrorCode.MODEL_UNUSABLE
            fragments = ("(any, 8, 8, 1)", f"set model_input_shape: {expected}")
            assert_contains(str(caught.value), *fragments)


@pytest.mark.parametrize(
    ("precision", "expected"), [(None, False), ("float32", False), ("tf32", True)]
)
def test_each_batch_runs_with_the_precision_of_its_job(
    model_files: Path, precision: str | None, expected: bool
) -> None:
    """A program that uses chunkq keeps its setting."""
    settings, during = tf.config.experimental, []

    def record(batch: Any) -> Any:
        during.append(settings.tensor_float_32_execution_enabled())
        return batch

    model = config(model_files, **file_of("net.keras"))
    model = model.model_copy(update={"precision": precision})  # tf32 needs a GPU
    runtime = load_runtime(model, Steps(preprocessing_protected=record), 1)
    original = settings.tensor_float_32_execution_enabled()
    try:
        settings.enable_tensor_float_32_execution(not expected)
        runtime(batch())
        assert settings.tensor_float_32_execution_enabled() is not expected
    finally:
        settings.enable_tensor_float_32_execution(original)
    assert during == [expected]


def test_protected_steps_can_move_the_channels(
    model_files: Path, expected: npt.NDArray[Any], tmp_path: Path
) -> None:
    (tmp_path / "steps.py").write_text(
        "import tensorflow as tf\n"
        "def preprocessing_protected(x):\n"
        "    assert x.numpy().shape == (4, 1, 8, 8), x.shape\n"
        "    assert x.dtype == tf.float32\n"
        "    return tf.transpose(x, [0, 2, 3, 1])\n"
        "def postprocessing_protected(y):\n"
        "    return tf.transpose(y, [0, 3, 1, 2])\n"
    )
    steps = Steps.load(str(tmp_path / "steps.py"))
    for keys in (file_of("net.keras"), file_of("saved"), class_of("Net", checkpoint="bare")):
        outputs = load(model_files, (1, *PATCH), steps, **keys)(batch().transpose(0, 3, 1, 2))[0]
        assert_close(outputs, expected.transpose(0, 3, 1, 2))


def test_a_class_is_built_for_the_output_shape_of_the_steps_before_it(
    model_files: Path, expected: npt.NDArray[Any]
) -> None:
    """The input shape after a step or with join_dim is unknown before the first batch."""
    keys = class_of("Net", checkpoint="subclass.weights.h5")
    steps = Steps(preprocessing=lambda x: x[..., None])
    runtime = load(model_files, PATCH, steps, **keys)  # the batcher runs that step
    assert_close(runtime(batch())[0], expected)
    joined = load(model_files, (*PATCH, 1), join_dim=3, **class_of("Net"))
    assert joined(batch((*PATCH, 2)))[0].shape == (4, *PATCH, 3)


def test_results_share_memory_with_tensorflow_unless_a_step_can_modify_them(
    model_files: Path,
) -> None:
    [shared] = load(model_files, **file_of("net.keras"))(batch())
    assert not shared.flags.owndata
    steps = Steps(postprocessing=lambda y: y)
    copied = load(model_files, steps=steps, **file_of("net.keras"))(batch())[0]
    assert copied.flags.writeable
    np.testing.assert_array_equal(shared, copied)


def test_steps_can_return_numpy_arrays(model_files: Path, expected: npt.NDArray[Any]) -> None:
    steps = Steps(
        preprocessing_protected=lambda x: x.numpy(),
        postprocessing_protected=lambda y: y.numpy() + 1,
    )
    assert_close(load(model_files, steps=steps, **file_of("net.keras"))(batch())[0], expected + 1)


def test_a_graph_is_traced_for_every_batch_size(model_files: Path) -> None:
    runtime = load(model_files, **class_of("AddsBatchSize"))
    for count in (4, 2, 1, 4):
        assert_close(runtime(batch()[:count])[0], batch()[:count] + np.float32(count))


def test_a_list_with_one_output_is_accepted(model_files: Path) -> None:
    assert_close(load(model_files, **file_of("list_of_one.keras"))(batch())[0], batch())


def test_layers_that_normalize_with_statistics_of_the_patch_are_listed(model_files: Path) -> None:
    runtime = load(model_files, (*PATCH, 4), **class_of("norms"))
    assert runtime.tile_norms() == (
        "by_group (GroupNormalization)",
        "by_tile (LayerNormalization)",
        "inside (GroupNormalization)",
    )
    assert load(model_files, **file_of("net.keras")).tile_norms() == ()


def batcher_of(model_files: Path, steps: Steps, keys: dict[str, Any]) -> Batcher:
    """Return a batcher for patches without a channel axis and predictions of three channels."""
    model = config(model_files, PATCH, **keys, model_output_shape=[3, *PATCH])
    values = {"input": "/in.zarr", "output": "/out.zarr", "model_config": model.model_dump()}
    plan = JobPlan.of(parse_job(values), Volume((16, 16), "float32"))
    return Batcher(plan, plan.job.model, load_runtime(model, steps, 1), steps)


CHANNELS_FIRST = Steps(
    preprocessing_protected=lambda x: x[..., None],
    postprocessing_protected=lambda y: tf.transpose(y, [0, 3, 1, 2]),
)


def test_steps_around_a_network_with_channels_last_see_channels_first(
    model_files: Path, expected: npt.NDArray[Any]
) -> None:
    shapes = []

    def double(batch: Any) -> Any:
        shapes.append(tuple(batch.shape))
        return batch * 2

    steps = Steps(preprocessing_protected=lambda x: double(x) / 2, postprocessing_protected=double)
    for name in ("keras", "saved", "subclass"):
        outputs = predictions_of(model_files, (1, *PATCH), (3, *PATCH), LAST_NETWORKS[name], steps)
        assert_close(outputs, expected.transpose(0, 3, 1, 2) * 2)
    assert shapes == [(4, 1, *PATCH), (4, 3, *PATCH)] * 3


def test_a_step_that_moves_channels_behind_the_network_is_refused_unless_one_before_it_does(
    model_files: Path,
) -> None:
    move = CHANNELS_FIRST.postprocessing_protected
    with pytest.raises(ModelError) as caught:
        batcher_of(
            model_files, Steps(postprocessing_protected=move), file_of("net.keras")
        ).warm_up()
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    assert_contains(
        str(caught.value),
        [4, 8, 3, 8],
        [4, 3, 8, 8],
        "model_config.model_output_shape",
        "steps get channels first",
        "remove one of model_config.processing_steps",
    )
    batcher_of(model_files, CHANNELS_FIRST, class_of("Net")).warm_up()
    batcher_of(model_files, Steps(), file_of("net.keras")).warm_up()


def test_out_of_memory_halves_the_batch_size(
    model_files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorFlow retries a failed allocation for ten seconds before it raises the error."""
    batcher = batcher_of(model_files, CHANNELS_FIRST, class_of("ExhaustsMemory"))
    with caplog.at_level(logging.INFO, logger="chunkq.worker"):
        batcher.warm_up()
    assert batcher.size == 2
    [record] = caplog.records
    assert "out of memory" in record.getMessage()
    assert " 2 patches" in record.getMessage()


def test_only_failed_allocations_are_out_of_memory(model_files: Path) -> None:
    runtime, errors = load(model_files, **file_of("net.keras")), tf.errors
    message = "OOM when allocating tensor with shape[4,8] and type float on GPU:0 by allocator"
    for error, is_out_of_memory in (
        (errors.ResourceExhaustedError(None, None, message), True),
        (errors.ResourceExhaustedError(None, None, "the queue is full"), False),
        (errors.InternalError(None, None, "Dst tensor is not initialized."), True),
        (errors.InternalError(None, None, "cuDNN launch failure"), False),
        (errors.InvalidArgumentError(None, None, message), False),
        (ValueError("out of memory"), False),
        (MemoryError(), True),
    ):
        assert runtime.is_out_of_memory(error) is is_out_of_memory, error


# ---------------------------------------------------------------------- unusable networks


@pytest.mark.parametrize(
    ("keys", "fragments"),
    [
        (class_of("Nope"), ["model_config.class_name: ", "'Nope'", "Larger, Net"]),
        (class_of("no_network"), ["model_config.class_name: no_network of ", "int", "keras.Model"]),
        (class_of("Plain"), ["model_config.class_name: Plain of ", "keras.Model"]),
        (class_of("Raises"), ["KeyError", "[4, 8, 8, 1]", "mean"]),
        (class_of("two_inputs"), ["model_config.class_name: two_inputs of ", "2 inputs"]),
        (file_of("two_inputs.keras"), ["model_file: ", "two_inputs.keras ", "2 inputs"]),
        (file_of("two_inputs"), ["serving_default", "2 inputs (keras_tensor"]),
        (
            file_of("two_outputs.keras"),
            ["dict", "outputs['edge'] [", "outputs['mask'] [", "one tensor"],
        ),
        (file_of("two_outputs"), ["outputs['mask']", "outputs['edge']", "head: "]),
        (file_of("unsigned"), ["/unsigned ", "signature", "model.export(path)"]),
        (file_of("empty"), ["/empty ", "saved_model.pb"]),
        (file_of("saved/saved_model.pb"), ["SavedModel", "folder"]),
        (file_of("net.weights.h5"), ["only weights", "type: class or json"]),
        (file_of("weights.pt"), ["torch.save", "runtime: torch"]),
        (file_of("net.json"), ["Keras JSON file", "type: json and json_file"]),
        (file_of("nets.py"), ["not a .keras file", "model.save('name.keras')"]),
        (file_of("nowhere.keras"), ["model_config.model_file: ", "nowhere.keras cannot be read"]),
        ({"type": "json", "json_file": "layer.json"}, ["json_file: ", "ReLU", "keras.Model"]),
        ({"type": "json", "json_file": "nets.py"}, ["json_file: ", "model.to_json()"]),
        ({"type": "json", "json_file": "net.keras"}, ["a Keras file", "type: file"]),
        (file_of("net.keras", device="cuda"), ["model_config.device: cuda", "device: cpu"]),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_an_unusable_network_is_reported_in_one_line(
    model_files: Path, keys: dict[str, Any], fragments: list[str]
) -> None:
    load_error(model_files, *fragments, **keys)


@pytest.mark.parametrize(
    ("name", "checkpoint", "fragments"),
    [
        ("Net", "larger.weights.h5", ["does not fit the network", "2 of its weights"]),
        ("Net", "larger", ["does not fit the network", "2 of its weights (model/options/_kernel"]),
        ("Larger", "subclass.weights.h5", ["does not fit the network", "A total of 1 objects"]),
        ("Larger", "bare", ["does not fit the network"]),
        ("Net", "wider.weights.h5", ["does not fit the network"]),
        ("Larger", "net.h5", ["does not fit the network", "Layer count mismatch"]),
        ("Net", "weights.pt", ["torch.save", "runtime: torch"]),
        ("Net", "saved", ["SavedModel", "type: file", "model_file"]),
        ("Net", "empty", ["folder", "*.index"]),
        ("Net", "nets.py", ["Keras", "model.save_weights('name.weights.h5')"]),
        ("Net", "nowhere", ["cannot be read"]),
    ],
)
def test_an_unusable_checkpoint_is_reported_in_one_line(
    model_files: Path, name: str, checkpoint: str, fragments: list[str]
) -> None:
    line = load_error(model_files, *fragments, **class_of(name, checkpoint=checkpoint))
    assert line.startswith(f"model_config.checkpoint: {model_files / checkpoint} ")


def test_invalid_kwargs_are_reported_in_one_line(model_files: Path, tmp_path: Path) -> None:
    path = tmp_path / "kwargs.py"
    for text, fragments in (
        ("kwargs = {'wdth': 3}", ["model_config.class_name: ", "TypeError", "(wdth)"]),
        ("kwargs = [3]", ["model_config.kwargs_file: `kwargs` in ", "list", "dict"]),
        ("width = 3", ["model_config.kwargs_file: ", "'kwargs'", "width"]),
    ):
        path.write_text(text)
        load_error(model_files, *fragments, **class_of("Net", kwargs_file=str(path)))


def test_the_error_for_an_architecture_of_keras_2_explains_how_to_convert_it(
    model_files: Path, tmp_path: Path
) -> None:
    path = tmp_path / "keras_2.json"
    config = {"name": "sequential", "layers": []}
    values = {"class_name": "Sequential", "config": config, "keras_version": "2.15.0"}
    path.write_text(json.dumps(values))
    line = load_error(model_files, "2.15.0", keras.__version__, type="json", json_file=str(path))
    assert line.startswith(f"model_config.json_file: {path} ")
    assert line.endswith("write a SavedModel with model.export(path), and use type: file")


@pytest.mark.parametrize("package", ["keras", "tf_keras"])
def test_the_error_for_a_keras_file_of_keras_2_explains_how_to_convert_it(
    model_files: Path, tmp_path: Path, package: str
) -> None:
    path = tmp_path / "keras_2.keras"
    with zipfile.ZipFile(model_files / "net.keras") as source, zipfile.ZipFile(path, "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            if name == "config.json":
                names = {"module": f"{package}.src.engine.functional"}
                names["registered_name"] = "Functional"
                content = json.dumps(json.loads(content) | names).encode()
            copy.writestr(name, content)
    line = load_error(model_files, "Keras 2", keras.__version__, **file_of(str(path)))
    assert line.startswith(f"model_config.model_file: {path}: ")
    assert line.endswith("write a SavedModel with model.export(path), and use type: file")


def test_a_damaged_file_is_reported_in_one_line(model_files: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "saved_model.pb").write_bytes((model_files / "saved/saved_model.pb").read_bytes()[:99])
    load_error(model_files, f"model_config.model_file: {saved}: TensorFlow", **file_of(str(saved)))
    content = (model_files / "net.h5").read_bytes()
    (tmp_path / "net.h5").write_bytes(content[: len(content) // 2])
    load_error(
        model_files, f"model_config.model_file: {tmp_path}/net.h5", **file_of(f"{tmp_path}/net.h5")
    )
    index = (model_files / "bare.index").read_bytes()
    (tmp_path / "bare.index").write_bytes(index[: len(index) // 2])
    key = f"model_config.checkpoint: {tmp_path}/bare "
    load_error(model_files, key, "does not fit", **class_of("Net", checkpoint=f"{tmp_path}/bare"))


def test_a_closed_network_is_not_run(model_files: Path) -> None:
    runtime = load(model_files, **file_of("net.keras"))
    runtime.close()
    with pytest.raises(ModelError, match="closed") as caught:
        runtime(batch())
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE


# ------------------------------------------------------------------- settings of the process


def test_a_later_job_with_another_number_of_threads_logs_a_warning(
    model_files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(model_files, **file_of("net.keras"))(batch())
    assert caplog.records == []
    load_runtime(config(model_files, **file_of("net.keras")), Steps(), 3)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("threads: ")
    assert record.args == (1, 3)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Simulate a visible GPU before TensorFlow starts. Return the list of changed settings."""
    settings: list[tuple[Any, ...]] = []
    visible = ["gpu 0"]

    def set_visible(devices: list[str], kind: str) -> None:
        settings.append(("visible", *devices))
        visible[:] = devices

    fakes = {
        "list_physical_devices": lambda kind: ["gpu 0"],
        "get_visible_devices": lambda kind: list(visible),
        "set_visible_devices": set_visible,
        "experimental.set_memory_growth": lambda device, on: settings.append(
            ("growth", device, on)
        ),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(f"tensorflow.config.{name}", fake)
    return settings


def test_a_job_on_the_cpu_hides_the_gpus_and_one_on_a_gpu_enables_memory_growth(
    gpu: list[tuple[Any, ...]],
) -> None:
    configure = tensorflow_runtime._configure
    configure("cuda", None)
    assert gpu == [("growth", "gpu 0", True)]
    configure("cpu", None)
    assert gpu[1:] == [("visible",)]
    configure("cuda", None)
    assert gpu[2:] == [("visible", "gpu 0"), ("growth", "gpu 0", True)]


def test_a_job_on_a_gpu_after_one_on_the_cpu_is_an_error(
    gpu: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure = tensorflow_runtime._configure
    configure("cpu", None)

    def fail(devices: list[str], kind: str) -> None:
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr("tensorflow.config.set_visible_devices", fail)
    with pytest.raises(ModelError) as caught:
        configure("cuda", None)
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    line = str(caught.value)
    assert line.startswith("model_config.device: cuda")
    assert "device: cpu" in line
    assert "--job" in line
    configure("cpu", None)


LOAD_AND_RUN = """\
import sys
from chunkq_worker.runtimes.base import load_runtime
from chunkq_worker.steps import Steps
from chunkq.job.model_config import ModelConfig
model = ModelConfig(runtime="tensorflow", type="file", model_file=sys.argv[1],
                    model_input_shape=(8, 8, 1))
import numpy as np
from chunkq.errors import ModelError
try:
    runtime = load_runtime(model, Steps(), 2)
except ModelError as error:
    sys.exit(str(error))
assert runtime(np.zeros((4, 8, 8, 1)))[0].shape == (4, 8, 8, 3)
import os, keras, tensorflow as tf
threading = tf.config.threading
print(threading.get_intra_op_parallelism_threads(), threading.get_inter_op_parallelism_threads(),
      keras.backend.backend())
"""


def run_process(model_files: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Load and run a network in a new process with additional environment variables."""
    prefixes = ("TF_", "KERAS_BACKEND")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
    return subprocess.run(
        [sys.executable, "-c", LOAD_AND_RUN, str(model_files / "net.keras")],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_process_prints_no_log_and_uses_the_threads_of_the_job(model_files: Path) -> None:
    process = run_process(model_files)
    assert (process.returncode, process.stderr, process.stdout) == (0, "", "2 1 tensorflow\n")


def test_only_log_lines_of_tensorflow_are_removed_and_only_without_a_log_level(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_line = (
        b"I0000 00:00:1795241221.078388    8965 port.cc:153] oneDNN custom operations are on.\n"
    )
    with without_log_output():
        os.write(2, log_line + b"chunkq: message of another thread\n")
    assert capfd.readouterr().err == "chunkq: message of another thread\n"
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    with without_log_output():
        os.write(2, log_line)
    assert capfd.readouterr().err == log_line.decode()


def test_another_keras_backend_is_an_error(model_files: Path) -> None:
    [line] = run_process(model_files, KERAS_BACKEND="jax").stderr.splitlines()
    assert line.startswith("model_config.runtime: tensorflow")
    assert " jax" in line
    assert "KERAS_BACKEND" in line


@pytest.mark.parametrize("missing", ["tensorflow", "keras"])
def test_the_error_for_missing_tensorflow_names_the_extra(
    model_files: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [name for name in sys.modules if "runtimes.tensorflow" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModelError, match=re.escape(install_command("tensorflow"))):
        load(model_files, **file_of("net.keras"))


# -------------------------------------------------------------------------------- jobs


def test_the_hash_of_a_folder_depends_on_the_names_and_contents_of_its_files(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "saved"
    (folder / "variables").mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"graph")
    (folder / "variables" / "data").write_bytes(b"weights")
    first = file_hash(str(folder))
    assert first == file_hash(str(folder))
    assert len(first) == 64
    (folder / "variables" / "data").write_bytes(b"Weights")
    second = file_hash(str(folder))
    (folder / "variables" / "data").write_bytes(b"weights")
    assert file_hash(str(folder)) == first
    (folder / "variables" / "data").rename(folder / "variables" / "date")
    third = file_hash(str(folder))
    assert len({first, second, third}) == 3
    with pytest.raises(FileNotFoundError):
        file_hash(str(tmp_path / "nothing"))


def test_the_hash_of_a_url_is_that_of_the_local_copy(
    model_files: Path, memory: Callable[[Path], str]
) -> None:
    for name in ("saved", "net.keras"):
        assert file_hash(memory(model_files / name)) == file_hash(str(model_files / name))
    with pytest.raises(FileNotFoundError):
        file_hash("memory://models/nothing")


def test_the_hash_of_a_checkpoint_includes_all_its_files(model_files: Path, tmp_path: Path) -> None:
    for path in model_files.glob("bare.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert file_hash(str(tmp_path / "bare")) == file_hash(str(model_files / "bare"))
    [data] = tmp_path.glob("bare.data-*")
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    assert file_hash(str(tmp_path / "bare")) != file_hash(str(model_files / "bare"))


def test_a_changed_saved_model_is_detected(model_files: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    fsspec.filesystem("file").get(str(model_files / "saved"), str(saved), recursive=True)
    write_zarr(tmp_path / "in.zarr", random_volume((16, 16)))
    model = {"runtime": "tensorflow", **file_of(str(saved)), "model_input_shape": list(PATCH)}
    values = {"input": f"{tmp_path}/in.zarr", "output": f"{tmp_path}/out.zarr"}
    job = load_job({**values, "model_config": model})
    record = JobRecord.create(job, [find_source(job.input[0])])
    assert record.changed_files() == []
    [data] = (saved / "variables").glob("variables.data-*")
    data.write_bytes(data.read_bytes() + b" ")
    assert record.changed_files() == ["model_config.model_file"]


CONV = """\
import torch

class Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv3d(1, 4, 3, padding=1)
        self.last = torch.nn.Conv3d(4, 3, 3, padding=1)

    def forward(self, x):
        return self.last(torch.relu(self.first(x / 100)))
"""
STEPS = """\
import os
import tensorflow as tf

def preprocessing(batch):
    with open(os.environ["COMMANDS"], "ab") as file, open("/proc/self/cmdline", "rb") as line:
        file.write(line.read().replace(bytes(1), b" ") + b"\\n")
    return batch

def postprocessing_protected(y):
    return tf.identity(y)
"""
SHAPE, CUBE = (20, 18, 14), (8, 8, 8)


def job_values(folder: Path, output: str, model: dict[str, Any]) -> dict[str, Any]:
    shapes = {"model_input_shape": [1, *CUBE], "model_output_shape": [3, *CUBE]}
    return {
        "input": str(folder / "in.zarr"),
        "output": str(folder / output),
        "inference_type": "sliding_window",
        "strides": [5, 6, 6],
        "weight_function": ["weight_gaussian"],
        "chunksize": [10, 9, 8],
        "storage_chunks": [5, 3, 4],
        "threads": 1,
        "model_config": shapes | {"max_batch_size": 4} | model,
    }


def write_network_twice(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write a network as a torch class and as a channels-last .keras file; return their keys."""
    names: dict[str, Any] = {"__name__": "conv"}
    exec(CONV, names)
    torch.manual_seed(1)
    module = names["Conv"]()
    (folder / "conv.py").write_text(CONV)
    torch.save(module.state_dict(), folder / "conv.pt")
    layers = keras.layers
    inputs = keras.Input((*CUBE, 1))
    x = layers.Conv3D(4, 3, padding="same", activation="relu")(layers.Rescaling(1 / 100)(inputs))
    model = keras.Model(inputs, layers.Conv3D(3, 3, padding="same")(x))
    weights = [module.first.weight, module.first.bias, module.last.weight, module.last.bias]
    values = [weight.detach().numpy() for weight in weights]
    model.set_weights([v.transpose(2, 3, 4, 1, 0) if v.ndim == 5 else v for v in values])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model.save(folder / "conv.keras")
    (folder / "steps.py").write_text(STEPS)
    torch_keys = {
        "runtime": "torch",
        "type": "class",
        "class_file": str(folder / "conv.py"),
        "class_name": "Conv",
        "checkpoint": str(folder / "conv.pt"),
    }
    keras_keys = {
        "runtime": "tensorflow",
        **file_of(str(folder / "conv.keras")),
        "model_input_shape": list(CUBE),
        "processing_steps": str(folder / "steps.py"),
    }
    return torch_keys, keras_keys


def test_a_job_with_two_workers_has_the_same_output_as_the_network_in_torch(
    tmp_path: Path,
) -> None:
    """Worker processes print no log of TensorFlow, which the user's file imports first.

    They are spawned, not forked. The steps need not move the channels of the network.
    """
    write_zarr(tmp_path / "in.zarr", random_volume(SHAPE), (8, 8, 8))
    torch_keys, keras_keys = write_network_twice(tmp_path)
    run_inline(job_values(tmp_path, "torch.zarr", torch_keys))
    workspace = Workspace(tmp_path, job_values(tmp_path, "out.zarr", keras_keys))
    workspace.write_job()
    workspace.call("produce", "job.json").ok()
    commands = tmp_path / "commands"
    arguments = ("work", "--burst", "--gpus", "none", "-w", "2")
    result = workspace.run(*arguments, COMMANDS=str(commands)).ok()
    workspace.call("finalize", "out.zarr").ok()
    assert all(text not in result.err for text in ("oneDNN", "absl", "I0000")), result.err
    output, expected = read_output(workspace.output), read_output(tmp_path / "torch.zarr")
    assert expected.std() > 0.1
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4)
    lines = set(commands.read_text().splitlines())
    assert {line.partition(" -m ")[2].split()[0] for line in lines} == {
        "chunkq_worker.worker_process"
    }


def test_a_class_with_all_four_steps_and_its_saved_model_have_the_same_output(
    tmp_path: Path,
) -> None:
    """The checkpoint of the class is loaded with the first batch."""
    write_zarr(tmp_path / "in.zarr", random_volume((24, 20)), (8, 8))
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "steps.py").write_text(
        "import numpy as np\n"
        "import tensorflow as tf\n"
        "def preprocessing(x):\n    assert type(x) is np.ndarray\n    return (x / 50)[:, :, ::-1]\n"
        "def preprocessing_protected(x):\n    return tf.transpose(x, [0, 2, 3, 1]) - 1\n"
        "def postprocessing_protected(y):\n    return tf.transpose(y, [0, 3, 1, 2]) * 3\n"
        "def postprocessing(y):\n    y += 1\n    return y[:, ::-1]\n"
    )
    names: dict[str, Any] = {"__name__": "nets"}
    exec(NETS, names)
    net = trained(names["Net"]())
    with warnings.catch_warnings(), without_log_output():
        warnings.simplefilter("ignore", DeprecationWarning)
        net.save_weights(tmp_path / "net.weights.h5")
        net.export(str(tmp_path / "saved"), verbose=False)
    model = {
        "runtime": "tensorflow",
        "model_input_shape": [1, *PATCH],
        "model_output_shape": [3, *PATCH],
        "max_batch_size": 4,
        "processing_steps": str(tmp_path / "steps.py"),
    }
    values = {"input": str(tmp_path / "in.zarr"), "chunksize": [8, 8], "threads": 1}
    outputs = []
    files = {"class_file": f"{tmp_path}/nets.py", "checkpoint": f"{tmp_path}/net.weights.h5"}
    for name, keys in (
        ("class", class_of("Net") | files),
        ("saved", file_of(f"{tmp_path}/saved")),
    ):
        job = {**values, "output": f"{tmp_path}/{name}.zarr", "model_config": model | keys}
        run_inline(job)
        outputs.append(read_output(tmp_path / f"{name}.zarr"))
    patch = random_volume((24, 20))[:8, :8].astype(np.float32)
    inputs = ((patch[None, None] / 50)[:, :, ::-1]).transpose(0, 2, 3, 1) - 1
    expected = (net.predict(inputs, verbose=0).transpose(0, 3, 1, 2) * 3 + 1)[:, ::-1]
    for output in outputs:
        np.testing.assert_allclose(output[:, :8, :8], expected[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-5)
