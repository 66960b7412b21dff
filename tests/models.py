"""One small network written down in every form that a job can name.

Each function below writes one form's files into a folder and returns the keys of `model_config`
that name them. The network takes a batch (N, 1, 8, 8, 8) of any dtype and gives (N, 3, 8, 8, 8):
its first step casts the batch to the weights' dtype and divides it by 100. Where a form fixes the
dtype of its input in the file, `dtype` is that.
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
"""Name of the file with the class; a whole pickled module refers to it."""
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
    """The network in inference mode, float32; always the same weights. Not to be changed."""
    names: dict[str, Any] = {"__name__": MODULE}
    exec(SOURCE, names)
    made: torch.nn.Module = names["SmallNet"](4)
    _fill(made)
    return made.eval()


def weights() -> dict[str, npt.NDArray[Any]]:
    """The weights by torch's names; a convolution's kernel is (out, in, *3 axes)."""
    return {name: value.numpy() for name, value in network().state_dict().items()}


def predict(batch: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """What the network gives for (N, 1, *P), computed by torch in float32."""
    module = network()
    with torch.inference_mode():
        found: npt.NDArray[np.float32] = module(torch.from_numpy(batch)).numpy()
    return found


def _fill(module: torch.nn.Module) -> None:
    """Set all weights, and statistics that a network in training mode would not use."""
    drawn = np.random.default_rng(5)
    for name, value in module.state_dict().items():
        if value.dtype.is_floating_point:
            spread = drawn.normal(0, 0.3, tuple(value.shape))
            values = 1 + spread**2 if "var" in name else spread
            value.copy_(torch.from_numpy(values))


def torch_class(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """A class, its arguments and a bare state_dict."""
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
    """The same class with a checkpoint as training with DataParallel leaves it."""
    keys = torch_class(folder)
    state = {f"module.{name}": value for name, value in network().state_dict().items()}
    torch.save({"epoch": 7, "state_dict": state}, folder / "nested.pt")
    return keys | {"checkpoint": str(folder / "nested.pt")}


def torch_file(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """The whole module, pickled; its class lies in a file beside it."""
    (folder / f"{MODULE}.py").write_text(SOURCE)
    with _importable(folder) as module:
        made = module.SmallNet(4)
        _fill(made)
        torch.save(made, folder / "whole.pt")
    return {
        "runtime": "torch",
        "type": "file",
        "model_file": str(folder / "whole.pt"),
        "trusted": True,
    }


def torchscript(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    (folder / f"{MODULE}.py").write_text(SOURCE)
    with _importable(folder) as module, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made = module.SmallNet(4)
        _fill(made)
        torch.jit.script(made).save(str(folder / "script.ts"))
    return {"runtime": "torch", "type": "torchscript", "ts_file": str(folder / "script.ts")}


def exported(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """A program of torch.export for batches of any size."""
    batch = torch.export.Dim("batch")
    example = torch.zeros((2, 1, *PATCH), dtype=getattr(torch, dtype))
    program = torch.export.export(network(), (example,), dynamic_shapes={"x": {0: batch}})
    path = folder / f"program-{dtype}.pt2"
    torch.export.save(program, path)
    return {"runtime": "torch", "type": "exported", "model_file": str(path)}


def onnx_file(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """An ONNX graph for batches of any size."""
    import onnx

    graph = onnx.load_from_string(_onnx_graph())
    # Its first node is a cast, which takes any type.
    given = graph.graph.input[0].type.tensor_type
    given.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    path = folder / f"graph-{dtype}.onnx"
    onnx.save(graph, path)
    return {"runtime": "onnx", "type": "file", "model_file": str(path)}


@cache
def _onnx_graph() -> bytes:
    """The graph, with an input of float16."""
    example = torch.zeros((2, 1, *PATCH), dtype=torch.float16)
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # of the exporter, to itself
            warnings.simplefilter("ignore", category)
        program = torch.onnx.export(
            network(),
            (example,),
            dynamo=True,
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    written: bytes = program.model_proto.SerializeToString()
    return written


@contextmanager
def _importable(folder: Path) -> Iterator[Any]:
    """The class's file as a module that can be pickled by reference; forgotten afterwards."""
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
    """A class of plain Python that reads its weights from a file beside it."""
    return _numpy(folder, "SmallNet", "kwargs = {'weights': 'weights.npz'}\n")


def numpy_function(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """A function that takes the weights besides the batch."""
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


# The same network in Keras, in functions named keras_*, with the weights of `weights()`.


KERAS_SOURCE = '''\
"""The small network for volumes in Keras: channels first outside, last inside."""
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
    """A subclass of keras.Model, its arguments and its weights."""
    (folder / "keras_net.py").write_text(KERAS_SOURCE)
    (folder / "keras_kwargs.py").write_text("kwargs = {'width': 4}\n")
    _keras()
    names: dict[str, Any] = {"__name__": "keras_net"}
    exec(KERAS_SOURCE, names)
    made = names["SmallNet"](4)
    made(np.zeros((1, 1, *PATCH), np.float32))
    _save_keras(_filled(made).save_weights, folder / "class.weights.h5")
    return {
        "runtime": "tensorflow",
        "type": "class",
        "class_file": str(folder / "keras_net.py"),
        "class_name": "SmallNet",
        "kwargs_file": str(folder / "keras_kwargs.py"),
        "checkpoint": str(folder / "class.weights.h5"),
    }


def keras_file(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    _save_keras(keras_network(dtype).save, folder / "network.keras")
    return {"runtime": "tensorflow", "type": "file", "model_file": str(folder / "network.keras")}


def keras_h5(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """The form before .keras."""
    _save_keras(keras_network(dtype).save, folder / "network.h5")
    return {"runtime": "tensorflow", "type": "file", "model_file": str(folder / "network.h5")}


def keras_saved_model(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """A directory with graphs; it takes this dtype only."""
    made, path = keras_network(dtype), folder / f"saved-{dtype}"
    _save_keras(lambda name: made.export(name, verbose=False), path)
    return {"runtime": "tensorflow", "type": "file", "model_file": str(path)}


def keras_json(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """An architecture, and its weights beside it."""
    made = keras_network(dtype)
    (folder / "network.json").write_text(made.to_json())
    _save_keras(made.save_weights, folder / "json.weights.h5")
    return {
        "runtime": "tensorflow",
        "type": "json",
        "json_file": str(folder / "network.json"),
        "checkpoint": str(folder / "json.weights.h5"),
    }


@cache
def keras_network(dtype: str = "float32") -> Any:
    """The network as a functional model that takes (N, 1, *P) in this dtype; not to be changed."""
    keras = _keras()
    layers = keras.layers
    given = keras.Input((1, *PATCH), dtype=dtype, name="volume")
    x = layers.Permute((2, 3, 4, 1))(layers.Rescaling(1 / 100)(given))
    x = layers.Conv3D(4, 3, padding="same", name="first")(x)
    x = layers.ReLU()(layers.BatchNormalization(epsilon=1e-5, name="norm")(x))
    x = layers.Conv3D(CHANNELS, 3, padding="same", name="last")(layers.Dropout(0.5)(x))
    return _filled(keras.Model(given, layers.Permute((4, 1, 2, 3))(x)))


def _keras() -> Any:
    """Keras as workers import it, with one thread, which TensorFlow takes only before its start."""
    from chunkq_worker.runtimes.tensorflow_import import keras, tf

    with suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(1)
    return keras


def _filled(made: Any) -> Any:
    """Give a Keras model the weights of torch's; its kernels are (*3 axes, in, out)."""
    values = weights()
    for name in ("first", "last"):
        kernel = values[f"{name}.weight"].transpose(2, 3, 4, 1, 0)
        made.get_layer(name).set_weights([kernel, values[f"{name}.bias"]])
    names = ("weight", "bias", "running_mean", "running_var")
    made.get_layer("norm").set_weights([values[f"norm.{name}"] for name in names])
    return made


def _save_keras(save: Callable[[str], Any], path: Path) -> None:
    from chunkq_worker.runtimes.tensorflow_import import without_log_output

    with warnings.catch_warnings(), without_log_output():
        for category in (DeprecationWarning, FutureWarning):  # of Keras, to itself
            warnings.simplefilter("ignore", category)
        save(str(path))


# ------------------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Form:
    """One form: the name of its function here, and what may be asked of it.

    `within` is how far from torch in float32 its results may be where the dtype is exact;
    `casts`, whether the weights take the job's dtype, so that results are as coarse as that;
    `fixed`, whether the file says which dtype it takes, and takes no other.
    """

    name: str
    runtime: str
    within: float
    dtypes: tuple[str, ...]
    casts: bool = False
    fixed: bool = False

    def __str__(self) -> str:
        return self.name


WITHOUT_BFLOAT16 = tuple(dtype for dtype in DTYPES if dtype != "bfloat16")
"""NumPy has no bfloat16, and so neither has a runtime whose arrays are NumPy's."""
COARSE = {"float16": 1e-2, "bfloat16": 4e-2}
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
    """The keys of `model_config` for a form, its files written once per test session."""
    write: Callable[[Path, str], dict[str, Any]] = globals()[form.name]
    return {**write(make_folder(form.name), dtype), **SHAPES, "dtype": dtype}
