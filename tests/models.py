"""One small network in every form that a job can name.

Each function below writes the files of one form into a folder and returns the keys of
`model_config` for them. The network converts a batch (N, 1, 8, 8, 8) of any dtype to
(N, 3, 8, 8, 8). It first casts the batch to the dtype of its weights and divides it by 100.
`dtype` is the input dtype of forms whose file fixes it.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

PATCH = (8, 8, 8)
CHANNELS = 3
MODULE = "small_net"
"""Module that defines the class; a pickled module refers to it by this name."""
SOURCE = '''\
"""A small network for volumes: 447 parameters."""
import torch


class SmallNet(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first = torch.nn.Conv3d(1, width, 3, padding=1)
        self.norm = torch.nn.BatchNorm3d(width)
        self.drop = torch.nn.Dropout(0.5)
        self.last = torch.nn.Conv3d(width, 3, 3, padding=1)

    def forward(self, x):
        x = x.to(self.first.weight.dtype) / 100
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))
'''
DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64")
SHAPES: dict[str, Any] = {
    "model_input_shape": [1, *PATCH],
    "model_output_shape": [CHANNELS, *PATCH],
}


@cache
def network() -> torch.nn.Module:
    """Return the network in inference mode, float32, with fixed weights. Do not modify it."""
    names: dict[str, Any] = {"__name__": MODULE}
    exec(SOURCE, names)
    module: torch.nn.Module = names["SmallNet"](4)
    _set_weights(module)
    return module.eval()


def weights() -> dict[str, npt.NDArray[Any]]:
    """Return the weights by their names in torch. Kernels are (out, in, *3 axes)."""
    return {name: value.numpy() for name, value in network().state_dict().items()}


def predict(batch: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the output of the network for (N, 1, *P), computed by torch in float32."""
    module = network()
    with torch.inference_mode():
        output: npt.NDArray[np.float32] = module(torch.from_numpy(batch)).numpy()
    return output


def _set_weights(module: torch.nn.Module) -> None:
    """Set all weights and the running statistics, which only inference mode uses."""
    rng = np.random.default_rng(5)
    for name, tensor in module.state_dict().items():
        if tensor.dtype.is_floating_point:
            noise = rng.normal(0, 0.3, tuple(tensor.shape))
            values = 1 + noise**2 if "var" in name else noise
            tensor.copy_(torch.from_numpy(values))


def torch_class(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write a class, its kwargs and a state_dict."""
    (folder / f"{MODULE}.py").write_text(SOURCE)
    (folder / "kwargs.py").write_text("kwargs = {'width': 4}\n")
    torch.save(network().state_dict(), folder / "bare.pt")
    return {
        "runtime": "torch",
        "type": "class",
        "class_file": str(folder / f"{MODULE}.py"),
        "class_name": "SmallNet",
        "kwargs_file": str(folder / "kwargs.py"),
        "checkpoint": str(folder / "bare.pt"),
    }


def torch_nested(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write the same class with a checkpoint of training with DataParallel."""
    keys = torch_class(folder)
    state = {f"module.{name}": value for name, value in network().state_dict().items()}
    torch.save({"epoch": 7, "state_dict": state}, folder / "nested.pt")
    return keys | {"checkpoint": str(folder / "nested.pt")}


def torch_file(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Pickle the module. Its class is defined in a file in the same folder."""
    (folder / f"{MODULE}.py").write_text(SOURCE)
    with _imported(folder) as small_net:
        module = small_net.SmallNet(4)
        _set_weights(module)
        torch.save(module, folder / "pickled.pt")
    return {
        "runtime": "torch",
        "type": "file",
        "model_file": str(folder / "pickled.pt"),
        "trusted": True,
    }


def torchscript(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write a scripted module."""
    (folder / f"{MODULE}.py").write_text(SOURCE)
    with _imported(folder) as small_net, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = small_net.SmallNet(4)
        _set_weights(module)
        torch.jit.script(module).save(str(folder / "script.ts"))
    return {"runtime": "torch", "type": "torchscript", "ts_file": str(folder / "script.ts")}


def exported(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write a torch.export program for batches of any size."""
    batch = torch.export.Dim("batch")
    example = torch.zeros((2, 1, *PATCH), dtype=getattr(torch, dtype))
    program = torch.export.export(network(), (example,), dynamic_shapes={"x": {0: batch}})
    path = folder / f"program-{dtype}.pt2"
    torch.export.save(program, path)
    return {"runtime": "torch", "type": "exported", "model_file": str(path)}


def onnx_file(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write an ONNX graph for batches of any size."""
    import onnx

    model = onnx.load_from_string(_onnx_model())
    # The first node is a cast, which accepts any dtype.
    input_type = model.graph.input[0].type.tensor_type
    input_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    path = folder / f"graph-{dtype}.onnx"
    onnx.save(model, path)
    return {"runtime": "onnx", "type": "file", "model_file": str(path)}


@cache
def _onnx_model() -> bytes:
    """Return the serialized model with a float16 input."""
    example = torch.zeros((2, 1, *PATCH), dtype=torch.float16)
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # raised in the exporter itself
            warnings.simplefilter("ignore", category)
        program = torch.onnx.export(
            network(),
            (example,),
            dynamo=True,
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


@contextmanager
def _imported(folder: Path) -> Iterator[Any]:
    """Import the file of the class inside a `with` block, so that instances can be pickled."""
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(MODULE)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(MODULE, None)


NUMPY_SOURCE = '''\
"""The small network for volumes in NumPy, as a class and as a function."""
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent


def convolve(x, kernel, bias):
    x = np.pad(x, [(0, 0), (0, 0), *[(1, 1)] * 3])
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3, 3), axis=(2, 3, 4))
    y = np.tensordot(windows, kernel, axes=([1, 5, 6, 7], [1, 2, 3, 4]))
    return np.moveaxis(y + bias, -1, 1)


class SmallNet:
    def __init__(self, weights):
        self.weights = dict(np.load(FOLDER / weights))

    def __call__(self, batch):
        return predict(batch, self.weights)


def predict(batch, weights):
    shape = (1, -1, 1, 1, 1)
    x = batch.astype(np.float32) / 100
    x = convolve(x, weights["first.weight"], weights["first.bias"])
    x = x - weights["norm.running_mean"].reshape(shape)
    x = x / np.sqrt(weights["norm.running_var"] + 1e-5).reshape(shape)
    x = x * weights["norm.weight"].reshape(shape) + weights["norm.bias"].reshape(shape)
    return convolve(np.maximum(x, 0), weights["last.weight"], weights["last.bias"])
'''


def numpy_class(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write a class that reads its weights from a file in its folder."""
    return _numpy(folder, "SmallNet", "kwargs = {'weights': 'weights.npz'}\n")


def numpy_function(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write a function with the weights as kwargs."""
    path = str(folder / "weights.npz")
    return _numpy(
        folder, "predict", f"import numpy\nkwargs = {{'weights': numpy.load({path!r})}}\n"
    )


def _numpy(folder: Path, name: str, kwargs: str) -> dict[str, Any]:
    (folder / "numpy_net.py").write_text(NUMPY_SOURCE)
    (folder / "numpy_kwargs.py").write_text(kwargs)
    np.savez(folder / "weights.npz", **weights())
    return {
        "runtime": "numpy",
        "type": "class",
        "class_file": str(folder / "numpy_net.py"),
        "class_name": name,
        "kwargs_file": str(folder / "numpy_kwargs.py"),
    }


# The functions named keras_* write the same network in Keras, with the weights of `weights()`.


KERAS_SOURCE = '''\
"""A small network for volumes in Keras: channels first outside, channels last inside."""
import keras


class SmallNet(keras.Model):
    def __init__(self, width: int, **more):
        super().__init__(**more)
        self.scale = keras.layers.Rescaling(1 / 100)
        self.channels_last = keras.layers.Permute((2, 3, 4, 1))
        self.first = keras.layers.Conv3D(width, 3, padding="same", name="first")
        self.norm = keras.layers.BatchNormalization(epsilon=1e-5, name="norm")
        self.drop = keras.layers.Dropout(0.5)
        self.last = keras.layers.Conv3D(3, 3, padding="same", name="last")
        self.channels_first = keras.layers.Permute((4, 1, 2, 3))

    def call(self, x):
        x = self.norm(self.first(self.channels_last(self.scale(x))))
        return self.channels_first(self.last(self.drop(keras.ops.relu(x))))
'''


def keras_class(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write a subclass of keras.Model, its kwargs and its weights."""
    (folder / "keras_net.py").write_text(KERAS_SOURCE)
    (folder / "keras_kwargs.py").write_text("kwargs = {'width': 4}\n")
    import_keras()
    names: dict[str, Any] = {"__name__": "keras_net"}
    exec(KERAS_SOURCE, names)
    model = names["SmallNet"](4)
    model(np.zeros((1, 1, *PATCH), np.float32))
    save_keras(_with_weights(model).save_weights, folder / "class.weights.h5")
    return {
        "runtime": "tensorflow",
        "type": "class",
        "class_file": str(folder / "keras_net.py"),
        "class_name": "SmallNet",
        "kwargs_file": str(folder / "keras_kwargs.py"),
        "checkpoint": str(folder / "class.weights.h5"),
    }


def keras_file(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write a .keras file."""
    save_keras(keras_network(dtype).save, folder / "network.keras")
    return {"runtime": "tensorflow", "type": "file", "model_file": str(folder / "network.keras")}


def keras_h5(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write an HDF5 file, the format before .keras."""
    save_keras(keras_network(dtype).save, folder / "network.h5")
    return {"runtime": "tensorflow", "type": "file", "model_file": str(folder / "network.h5")}


def keras_saved_model(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write a SavedModel, which accepts only this dtype."""
    model, path = keras_network(dtype), folder / f"saved-{dtype}"
    save_keras(lambda name: model.export(name, verbose=False), path)
    return {"runtime": "tensorflow", "type": "file", "model_file": str(path)}


def keras_json(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write an architecture as JSON and its weights."""
    model = keras_network(dtype)
    (folder / "network.json").write_text(model.to_json())
    save_keras(model.save_weights, folder / "json.weights.h5")
    return {
        "runtime": "tensorflow",
        "type": "json",
        "json_file": str(folder / "network.json"),
        "checkpoint": str(folder / "json.weights.h5"),
    }


@cache
def keras_network(dtype: str = "float32") -> Any:
    """Return a functional model with an input (N, 1, *P) of this dtype. Do not modify it."""
    keras = import_keras()
    layers = keras.layers
    inputs = keras.Input((1, *PATCH), dtype=dtype, name="volume")
    x = layers.Permute((2, 3, 4, 1))(layers.Rescaling(1 / 100)(inputs))
    x = layers.Conv3D(4, 3, padding="same", name="first")(x)
    x = layers.ReLU()(layers.BatchNormalization(epsilon=1e-5, name="norm")(x))
    x = layers.Conv3D(CHANNELS, 3, padding="same", name="last")(layers.Dropout(0.5)(x))
    return _with_weights(keras.Model(inputs, layers.Permute((4, 1, 2, 3))(x)))


def import_keras() -> Any:
    """Import Keras as workers do. Set one thread, which works only before TensorFlow starts."""
    from chunkq_worker.runtimes.tensorflow_import import keras, tf

    with suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(1)
    return keras


def _with_weights(model: Any) -> Any:
    """Set the weights of a Keras model to those of torch. Its kernels are (*3 axes, in, out)."""
    values = weights()
    for name in ("first", "last"):
        kernel = values[f"{name}.weight"].transpose(2, 3, 4, 1, 0)
        model.get_layer(name).set_weights([kernel, values[f"{name}.bias"]])
    names = ("weight", "bias", "running_mean", "running_var")
    model.get_layer("norm").set_weights([values[f"norm.{name}"] for name in names])
    return model


def save_keras(save: Callable[[str], Any], path: Path) -> None:
    from chunkq_worker.runtimes.tensorflow_import import without_log_output

    with warnings.catch_warnings(), without_log_output():
        for category in (DeprecationWarning, FutureWarning):  # raised in Keras itself
            warnings.simplefilter("ignore", category)
        save(str(path))


# ------------------------------------------------------------------------------- all forms


@dataclass(frozen=True)
class Form:
    """One form of the network. `name` is its function in this module.

    `within` is the largest absolute difference from torch in float32 for an exact dtype.
    `casts`: the weights are cast to the job's dtype, which lowers the precision of results.
    `fixed`: the file declares the input dtype and accepts no other.
    """

    name: str
    runtime: str
    tolerance: float
    dtypes: tuple[str, ...]
    casts: bool = False
    fixed: bool = False

    def __str__(self) -> str:
        return self.name


WITHOUT_BFLOAT16 = tuple(dtype for dtype in DTYPES if dtype != "bfloat16")
"""Dtypes of the runtimes whose arrays are NumPy arrays."""
LOW_PRECISION_TOLERANCE = {"float16": 1e-2, "bfloat16": 4e-2}
FORMS = (
    Form("torch_class", "torch", 1e-6, DTYPES, casts=True),
    Form("torch_nested", "torch", 1e-6, DTYPES, casts=True),
    Form("torch_file", "torch", 1e-6, DTYPES, casts=True),
    Form("torchscript", "torch", 1e-6, DTYPES),
    Form("exported", "torch", 1e-6, DTYPES, fixed=True),
    Form("onnx_file", "onnx", 1e-4, WITHOUT_BFLOAT16, fixed=True),
    Form("keras_class", "tensorflow", 1e-4, WITHOUT_BFLOAT16, casts=True),
    Form("keras_file", "tensorflow", 1e-4, WITHOUT_BFLOAT16),
    Form("keras_h5", "tensorflow", 1e-4, WITHOUT_BFLOAT16),
    Form("keras_saved_model", "tensorflow", 1e-4, WITHOUT_BFLOAT16, fixed=True),
    Form("keras_json", "tensorflow", 1e-4, WITHOUT_BFLOAT16),
    Form("numpy_class", "numpy", 1e-5, WITHOUT_BFLOAT16),
    Form("numpy_function", "numpy", 1e-5, WITHOUT_BFLOAT16),
)


@cache
def keys_of(form: Form, dtype: str, make_folder: Callable[[str], Path]) -> dict[str, Any]:
    """Return the keys of `model_config` for a form. Its files are written once per session."""
    write: Callable[[Path, str], dict[str, Any]] = globals()[form.name]
    return {**write(make_folder(form.name), dtype), **SHAPES, "dtype": dtype}
