"""A network with several heads in every form that a job can name.

It maps a batch (N, 1, 6, 8) to `main` (N, 3, 6, 8), `edge` (N, 1, 6, 8) and `label`, integers
(N, 1, 6, 8). The values are exact in float32 for small integers. Each function below writes one
form and returns the keys of `model_config`, and the heads by the names that this form has for them.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tests.models import import_keras, save_keras

PATCH = (6, 8)
FACTORS = (1.0, 2.0, -1.0)
HEADS = ("main", "edge", "label")
Written = tuple[dict[str, Any], dict[str, str | int]]


def predict(batch: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.float32]]:
    """Return what the heads return for a batch, as float32."""
    x = batch.astype(np.float32)
    return {
        "main": np.concatenate([x * f for f in FACTORS], axis=1),
        "edge": x * x,
        "label": (x > 3).astype(np.float32),
    }


CONTAINERS = {
    "dict": "return {'main': main, 'edge': edge, 'label': label}",
    "tuple": "return main, edge, label",
    "list": "return [main, edge, label]",
    "dataclass": "return Data(main, edge, label)",
    "namedtuple": "return Named(main, edge, label)",
    "nested": "return {'main': (main, None), 'edge': [edge], 'label': label, 'loss': 0.5}",
}
TORCH = """\
import dataclasses, typing
import torch

@dataclasses.dataclass
class Data:
    main: typing.Any
    edge: typing.Any
    label: typing.Any

class Named(typing.NamedTuple):
    main: torch.Tensor
    edge: torch.Tensor
    label: torch.Tensor

class Net(torch.nn.Module):
    def forward(self, x):
        main = torch.cat([x * 1.0, x * 2.0, x * -1.0], dim=1)
        edge, label = x * x, (x > 3).to(torch.int64)
        {returned}
"""
NUMPY = TORCH.replace("import torch\n", "import numpy as np\n").replace("torch.Tensor", "object")
NUMPY = NUMPY.partition("class Net")[0] + (
    "CALLS = []\n\nclass Net:\n"
    "    def __call__(self, x):\n"
    "        CALLS.append(len(x))\n"
    "        main = np.concatenate([x * 1.0, x * 2.0, x * -1.0], axis=1)\n"
    "        edge, label = x * x, (x > 3).astype(np.int64)\n"
    "        {returned}\n"
)


def named(names: Any = HEADS) -> dict[str, str | int]:
    """Return the heads by the names that they have in a network."""
    return dict(zip(HEADS, names, strict=True))


def torch_class(folder: Path, container: str = "dict") -> Written:
    (folder / "heads_net.py").write_text(TORCH.replace("{returned}", CONTAINERS[container]))
    keys = {"runtime": "torch", "type": "class", "class_name": "Net"}
    names = range(3) if container in ("tuple", "list") else HEADS
    return keys | {"class_file": str(folder / "heads_net.py")}, named(names)


def numpy_class(folder: Path, container: str = "dict") -> Written:
    (folder / "heads_net.py").write_text(NUMPY.replace("{returned}", CONTAINERS[container]))
    keys = {"runtime": "numpy", "type": "class", "class_name": "Net"}
    names = range(3) if container in ("tuple", "list") else HEADS
    return keys | {"class_file": str(folder / "heads_net.py")}, named(names)


class Net(torch.nn.Module):
    """The network, for formats that contain it."""

    def __init__(self, container: str = "dict") -> None:
        super().__init__()
        self.container = container

    def forward(self, x: torch.Tensor) -> Any:
        main = torch.cat([x * 1.0, x * 2.0, x * -1.0], dim=1)
        edge, label = x * x, (x > 3).to(torch.int64)
        if self.container == "tuple":
            return main, edge, label
        return {"main": main, "edge": edge, "label": label}


def torchscript(folder: Path) -> Written:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        network = torch.jit.trace(Net(), torch.zeros(1, 1, *PATCH), strict=False)
        network.save(str(folder / "heads.ts"))
    keys = {"runtime": "torch", "type": "torchscript", "ts_file": str(folder / "heads.ts")}
    return keys, named()


def exported(folder: Path) -> Written:
    batch = torch.export.Dim("batch")
    example = (torch.zeros(2, 1, *PATCH),)
    program = torch.export.export(Net("tuple"), example, dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, folder / "heads.pt2")
    keys = {"runtime": "torch", "type": "exported", "model_file": str(folder / "heads.pt2")}
    return keys, named(range(3))


def onnx_file(folder: Path) -> Written:
    import onnx

    helper, kinds = onnx.helper, onnx.TensorProto
    batch = helper.make_tensor_value_info("x", kinds.FLOAT, ["n", 1, *PATCH])
    types = {"main": kinds.FLOAT, "edge": kinds.FLOAT, "label": kinds.INT64}
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()]
    factors = np.array(FACTORS, np.float32).reshape(1, 3, 1, 1)
    constants = {"f": factors, "three": np.array(3, np.float32)}
    nodes = [
        helper.make_node("Mul", ["x", "f"], ["main"]),
        helper.make_node("Mul", ["x", "x"], ["edge"]),
        helper.make_node("Greater", ["x", "three"], ["is_high"]),
        helper.make_node("Cast", ["is_high"], ["label"], to=kinds.INT64),
    ]
    initializers = [onnx.numpy_helper.from_array(v, name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "heads", [batch], outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "heads.onnx")
    keys = {"runtime": "onnx", "type": "file", "model_file": str(folder / "heads.onnx")}
    return keys, named()


def keras_file(folder: Path) -> Written:
    """Write a .keras file with channels last and without the head `label`."""
    keras = import_keras()
    inputs = keras.Input((*PATCH, 1), name="x")
    main = keras.layers.Conv2D(3, 1, use_bias=False, name="main")
    edge = keras.layers.Multiply(name="edge")
    model = keras.Model(inputs, {"main": main(inputs), "edge": edge([inputs, inputs])})
    main.set_weights([np.array(FACTORS, np.float32).reshape(1, 1, 1, 3)])
    save_keras(model.save, folder / "heads.keras")
    keys = {"runtime": "tensorflow", "type": "file", "model_file": str(folder / "heads.keras")}
    return keys, {"main": "main", "edge": "edge"}


def saved_model(folder: Path) -> Written:
    """Write a SavedModel, a function with channels first and integer labels."""
    import_keras()
    from chunkq_worker.runtimes.tensorflow_import import tf

    module = tf.Module()
    spec = tf.TensorSpec((None, 1, *PATCH), tf.float32, name="x")

    @tf.function(input_signature=[spec])  # type: ignore[untyped-decorator]
    def serve(x: Any) -> dict[str, Any]:
        main = tf.concat([x * factor for factor in FACTORS], axis=1)
        return {"main": main, "edge": x * x, "label": tf.cast(x > 3, tf.int64)}

    path = str(folder / "saved")
    tf.saved_model.save(module, path, signatures={"serving_default": serve})
    return {"runtime": "tensorflow", "type": "file", "model_file": path}, named()


@dataclass(frozen=True)
class HeadForm:
    """One form of the network."""

    name: str
    write: Callable[[Path], Written]

    def __str__(self) -> str:
        return self.name


@cache
def keys_of(form: HeadForm, make_folder: Callable[[str], Path]) -> Written:
    """Return the keys of `model_config` and the heads. Files are written once per session."""
    return form.write(make_folder("heads"))


def _form(name: str, write: Callable[..., Written], *arguments: Any) -> HeadForm:
    return HeadForm(name, lambda folder: write(folder, *arguments))


HEAD_FORMS = (
    *(_form(f"torch {one}", torch_class, one) for one in CONTAINERS),
    *(_form(f"numpy {one}", numpy_class, one) for one in CONTAINERS),
    _form("torchscript", torchscript),
    _form("exported", exported),
    _form("onnx", onnx_file),
    _form("keras", keras_file),
    _form("saved model", saved_model),
)
