"""Networks with random weights or random outputs are refused, however they are random."""

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker.predictor import Predictor
from chunkq_worker.random_state import other_random_state

from chunkq.errors import ErrorCode, ModelError
from chunkq.job.model_config import STOCHASTIC
from tests.harness.assertions import assert_contains
from tests.harness.volumes import write_zarr
from tests.harness.workspace import Workspace

PATCH = (8, 8)
VOLUME = np.random.default_rng(3).random((16, 16), np.float32)

TORCH = """\
import random
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

{top}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
{init}

    def forward(self, x):
{forward}
"""


def torch_class(folder: Path, init: str = "", forward: str = "", top: str = "") -> dict[str, Any]:
    """Write a class with these lines; return its keys, without a checkpoint."""
    code = TORCH.format(
        top=top,
        init="        " + (init or "pass"),
        forward="        " + (forward or "return self.conv(x)"),
    )
    (folder / "net.py").write_text(code)
    return {
        "runtime": "torch",
        "type": "class",
        "class_file": str(folder / "net.py"),
        "class_name": "Net",
    }


def with_checkpoint(folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """Save the state of an instance of the class; return the keys with it as checkpoint."""
    names: dict[str, Any] = {"__name__": "net"}
    exec((folder / "net.py").read_text(), names)
    torch.save(names["Net"]().state_dict(), folder / "net.pt")
    return keys | {"checkpoint": str(folder / "net.pt")}


def job_values(keys: dict[str, Any], **job: Any) -> dict[str, Any]:
    model = {"model_input_shape": [1, *PATCH], "max_batch_size": 4} | keys
    values = {"input": "/in.zarr", "output": "/out.zarr", "chunksize": [16, 16], "threads": 1}
    return values | {"model_config": model} | job


def predict(keys: dict[str, Any], volume: npt.NDArray[Any] = VOLUME, **job: Any) -> Any:
    with Predictor.from_config(job_values(keys, **job)) as predictor:
        return predictor.predict(volume).probabilities


def refused(keys: dict[str, Any], *fragments: str, volume: npt.NDArray[Any] = VOLUME) -> str:
    with pytest.raises(ModelError) as caught:
        predict(keys, volume)
    assert caught.value.code is ErrorCode.MODEL_RANDOM
    line = str(caught.value)
    assert "\n" not in line
    assert_contains(line, *fragments)
    return line


# -------------------------------------------------------------------------------- random values


@pytest.mark.parametrize(
    "type_", ["nn.Conv2d(1, 1, 3, padding=1)", "nn.LazyConv2d(1, 3, padding=1)"]
)
def test_a_class_without_a_checkpoint_is_refused_and_its_parameters_are_named(
    tmp_path: Path, type_: str
) -> None:
    keys = torch_class(tmp_path, f"self.conv = {type_}")
    refused(keys, "model_config.checkpoint: missing", "conv.weight", "conv.bias", "set checkpoint")


RANDOM_VALUES = {
    "buffer that is not saved": "self.register_buffer('b', torch.rand(3), persistent=False)",
    "tensor": "self.b = torch.rand(3)",
    "array": "self.b = np.random.rand(3)",
    "array of a generator": "self.b = np.random.default_rng().random(3)",
    "tensor in a list": "self.b = [torch.rand(3)]",
    "tensor in a dict": "self.b = {'w': (torch.rand(3), 1)}",
}


@pytest.mark.parametrize("init", RANDOM_VALUES.values(), ids=RANDOM_VALUES)
def test_random_values_that_a_checkpoint_lacks_are_refused(tmp_path: Path, init: str) -> None:
    keys = with_checkpoint(tmp_path, torch_class(tmp_path, init))
    refused(keys, "model_config.checkpoint: ", "incomplete: 1 values", "(b")


def test_a_random_global_of_the_file_is_refused(tmp_path: Path) -> None:
    forward = "return self.conv(x) * GAIN"
    keys = torch_class(tmp_path, forward=forward, top="GAIN = torch.rand(1)")
    refused(with_checkpoint(tmp_path, keys), "(GAIN)")


FIXED = {
    "seed in the class": {
        "init": "torch.manual_seed(3); self.conv = nn.Conv2d(1, 1, 3, padding=1)"
    },
    "seed in the file": {"top": "torch.manual_seed(3); np.random.seed(1); random.seed(1)"},
    "constants": {"init": "[nn.init.constant_(p, 0.1) for p in self.parameters()]"},
}


@pytest.mark.parametrize("parts", FIXED.values(), ids=FIXED)
def test_a_class_that_sets_fixed_values_needs_no_checkpoint(
    tmp_path: Path, parts: dict[str, str]
) -> None:
    keys = torch_class(tmp_path, **parts)
    np.testing.assert_array_equal(predict(keys), predict(keys))


FIXED_VALUES = {
    "positions": "self.register_buffer('p', torch.arange(9.0), persistent=False)",
    "start time": "self.start = time.time(); self.p = torch.arange(9.0)",
    "NaN": "self.p = torch.full((3,), float('nan'))",
    "names": "self.p = np.array(['a', 'b'])",
}


@pytest.mark.parametrize("init", FIXED_VALUES.values(), ids=FIXED_VALUES)
def test_fixed_values_that_a_checkpoint_lacks_are_accepted(tmp_path: Path, init: str) -> None:
    keys = with_checkpoint(tmp_path, torch_class(tmp_path, init))
    np.testing.assert_array_equal(predict(keys), predict(keys))


def test_a_complete_checkpoint_means_that_the_class_is_created_once(tmp_path: Path) -> None:
    keys = torch_class(tmp_path)
    log = tmp_path / "log"
    file = tmp_path / "net.py"
    keys = with_checkpoint(tmp_path, keys)
    count = f"with open({str(log)!r}, 'a') as file:\n    file.write('x')\n"
    file.write_text(f"{file.read_text()}\n{count}")
    predict(keys)
    assert log.read_text() == "x"


def test_the_random_states_of_the_process_are_restored() -> None:
    def numbers() -> tuple[float, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = numbers()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    with other_random_state():
        inside = numbers()
    assert numbers() == expected
    assert not set(inside) & set(expected)


NUMPY_VALUES = {
    "attribute": "class net:\n    def __init__(self): self.w = np.random.rand(2)\n"
    "    def __call__(self, x): return x * self.w[0]",
    "float": "class net:\n    def __init__(self): self.w = float(np.random.rand())\n"
    "    def __call__(self, x): return x * self.w",
    "global": "W = np.random.rand(2)\ndef net(x): return x * W[0]",
    "closure": "def f():\n    w = np.random.rand(2)\n    return lambda x: x * w[0]\nnet = f()",
    "object": "class Layer:\n    def __init__(self): self.w = np.random.rand(2)\n"
    "class net:\n    def __init__(self): self.layers = [Layer()]\n"
    "    def __call__(self, x): return x * self.layers[0].w[0]",
}


def numpy_keys(folder: Path, code: str) -> dict[str, Any]:
    (folder / "net.py").write_text(f"import numpy as np\n\n{code}\n")
    keys = {"runtime": "numpy", "type": "class", "class_name": "net", "model_input_shape": PATCH}
    return keys | {"class_file": str(folder / "net.py")}


@pytest.mark.parametrize("code", NUMPY_VALUES.values(), ids=NUMPY_VALUES)
def test_random_values_of_numpy_code_are_refused(tmp_path: Path, code: str) -> None:
    line = refused(numpy_keys(tmp_path, code), "model_config.class_file: ", "random")
    assert "checkpoint" not in line


@pytest.mark.parametrize("code", NUMPY_VALUES.values(), ids=NUMPY_VALUES)
def test_the_same_numpy_code_with_a_seed_is_accepted(tmp_path: Path, code: str) -> None:
    keys = numpy_keys(tmp_path, code.replace("np.random.rand", "np.random.RandomState(1).rand"))
    assert predict(keys) is not None


# ------------------------------------------------------------------------------- random outputs

FORWARD = {
    "dropout": "return functional.dropout(self.conv(x), 0.5)",
    "rare dropout": "return functional.dropout2d(x.repeat(1, 9, 1, 1), 0.1).sum(1, True)",
    "noise": "return self.conv(x) + 0.05 * torch.randn_like(x)",
    "Python's generator": "return self.conv(x) * random.random()",
    "NumPy's generator": "return self.conv(x) * np.random.rand()",
    "time": "return self.conv(x) * (time.time_ns() % 1000)",
    "layer in training mode": "return nn.Dropout(0.5).train()(self.conv(x))",
    "random NaN": "return self.conv(x) / functional.dropout(x, 0.5).sign().clamp(0, 1)",
    "counter": "self.n = getattr(self, 'n', 0) + 1; return self.conv(x) * self.n",
}


@pytest.mark.parametrize("forward", FORWARD.values(), ids=FORWARD)
def test_a_network_with_random_outputs_is_refused(tmp_path: Path, forward: str) -> None:
    keys = torch_class(tmp_path, forward=forward)
    if "clamp" in forward:
        with pytest.raises(ModelError) as caught:
            predict(with_checkpoint(tmp_path, keys), nan="zero")
        assert caught.value.code is ErrorCode.MODEL_RANDOM
        return
    refused(with_checkpoint(tmp_path, keys), "different outputs", "network.eval()", "stochastic")


ACCEPTED = {
    "rounding noise": "return self.conv(x) + 1e-5 * torch.randn_like(x)",
    "dropout that is off": "return functional.dropout(self.conv(x), 0.5, self.training)",
    "batch norm in training mode": "return nn.BatchNorm2d(1).train()(self.conv(x))",
    "a constant": "return torch.zeros_like(x)",
    "the same NaN": "return torch.where(x > 0.5, torch.nan, self.conv(x))",
}


@pytest.mark.filterwarnings("ignore:the network returns almost the same value, 0")
@pytest.mark.parametrize("forward", ACCEPTED.values(), ids=ACCEPTED)
def test_a_network_with_equal_outputs_is_accepted(tmp_path: Path, forward: str) -> None:
    keys = with_checkpoint(tmp_path, torch_class(tmp_path, forward=forward))
    assert predict(keys, nan="zero") is not None


def test_random_outputs_are_found_where_the_input_begins_with_zeros(tmp_path: Path) -> None:
    keys = torch_class(tmp_path, forward="return functional.dropout(x, 0.5)")
    volume = np.zeros((48, 16), np.float32)
    volume[40:] = VOLUME[:8]
    refused(with_checkpoint(tmp_path, keys), "different outputs", volume=volume)


def saved_in_training_mode(folder: Path, form: str) -> dict[str, Any]:
    module, path = torch.nn.Sequential(torch.nn.Dropout(0.5)).train(), folder / "net"
    if form == "exported":
        torch.export.save(torch.export.export(module, (torch.ones(4, 1, *PATCH),)), path)
        return {"type": "exported", "model_file": str(path)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module, torch.ones(2, 1, *PATCH), check_trace=False).save(str(path))
    return {"type": "torchscript", "ts_file": str(path)}


@pytest.mark.parametrize("form", ["traced", "exported"])
def test_a_file_that_keeps_its_dropout_is_refused(tmp_path: Path, form: str) -> None:
    keys = saved_in_training_mode(tmp_path, form) | {"runtime": "torch"}
    refused(keys, "different outputs", "network.eval()")


def test_a_pickled_module_in_training_mode_is_put_into_inference_mode(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(0.5)).train()
    torch.save(module, tmp_path / "net.pt")
    keys = {"runtime": "torch", "type": "file", "model_file": str(tmp_path / "net.pt")}
    result = predict(keys | {"trusted": True})
    np.testing.assert_array_equal(result[0], VOLUME)


def onnx_graph(path: Path, *nodes: Any) -> dict[str, Any]:
    from onnx import TensorProto, helper, numpy_helper, save

    ratio = numpy_helper.from_array(np.array(0.5, np.float32), "ratio")
    training = numpy_helper.from_array(np.array(True), "training")
    shape = ["n", 1, *PATCH]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph(list(nodes), "g", ends[:1], ends[1:], [ratio, training])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    save(model, path)
    return {"runtime": "onnx", "type": "file", "model_file": str(path)}


@pytest.mark.parametrize("name", ["Dropout", "RandomNormalLike", "RandomUniformLike", "seeded"])
def test_an_onnx_graph_with_random_nodes_is_refused(tmp_path: Path, name: str) -> None:
    from onnx import helper

    if name == "Dropout":
        nodes = [helper.make_node(name, ["x", "ratio", "training"], ["y"])]
    else:
        options = {"seed": 1.0} if name == "seeded" else {}
        kind = "RandomNormalLike" if name == "seeded" else name
        nodes = [
            helper.make_node(kind, ["x"], ["noise"], **options),
            helper.make_node("Add", ["x", "noise"], ["y"]),
        ]
    refused(onnx_graph(tmp_path / "net.onnx", *nodes), "different outputs")


KERAS = """\
import keras
import numpy as np
import tensorflow as tf
from keras import layers


class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1{init})
        self.dropout, self.noise = layers.Dropout(0.5), layers.GaussianNoise(0.5)

    def call(self, x):
        return self.dense({result})


class Noise(layers.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.gain = np.random.rand(3)

    def call(self, x):
        return x * self.gain[0]


def functional():
    inputs = keras.Input((8, 8, 1))
    return keras.Model(inputs, layers.Dense(1)(inputs))


def fixed():
    inputs = keras.Input((8, 8, 1))
    return keras.Model(inputs, layers.Dense(1, kernel_initializer="ones")(inputs))


def seeded():
    keras.utils.set_random_seed(3)
    return functional()


def with_noise():
    inputs = keras.Input((8, 8, 1))
    return keras.Model(inputs, Noise()(inputs))


def with_dropout():
    inputs = keras.Input((8, 8, 1))
    return keras.Model(inputs, layers.Dropout(0.5)(inputs, training=True))
"""


def keras_keys(folder: Path, name: str, init: str = "", result: str = "x") -> dict[str, Any]:
    (folder / "net.py").write_text(KERAS.format(init=init, result=result))
    keys = {"runtime": "tensorflow", "type": "class", "class_name": name}
    keys["class_file"] = str(folder / "net.py")
    return keys | {"model_input_shape": PATCH}


def keras_steps(folder: Path) -> dict[str, str]:
    """Write steps that add and remove the last axis of a network."""
    (folder / "steps.py").write_text(
        "def preprocessing_protected(x):\n    return x[..., None]\n\n"
        "def postprocessing_protected(y):\n    return y[..., 0]\n"
    )
    return {"processing_steps": str(folder / "steps.py")}


@pytest.mark.parametrize("name", ["Net", "functional", "fixed", "seeded", "with_noise"])
def test_a_keras_class_needs_a_checkpoint_unless_its_values_are_fixed(
    tmp_path: Path, name: str
) -> None:
    keys = keras_keys(tmp_path, name) | keras_steps(tmp_path)
    if name in ("fixed", "seeded"):
        np.testing.assert_array_equal(predict(keys), predict(keys))
    else:
        refused(keys, "model_config.checkpoint: missing", "random")


def test_keras_json_needs_a_checkpoint(tmp_path: Path) -> None:
    from chunkq_worker.runtimes.tensorflow_import import keras

    inputs = keras.Input((*PATCH, 1))
    network = keras.Model(inputs, keras.layers.Dense(1, name="head")(inputs))
    (tmp_path / "net.json").write_text(network.to_json())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network.save_weights(tmp_path / "net.weights.h5")
    keys = {"runtime": "tensorflow", "type": "json", "json_file": str(tmp_path / "net.json")}
    keys |= {"model_input_shape": PATCH} | keras_steps(tmp_path)  # type: ignore[dict-item]
    refused(keys, "model_config.checkpoint: missing", "head/kernel")
    complete = keys | {"checkpoint": str(tmp_path / "net.weights.h5")}
    np.testing.assert_array_equal(predict(complete), predict(complete))


def test_random_values_of_a_keras_layer_that_a_file_lacks_are_refused(tmp_path: Path) -> None:
    from chunkq_worker.runtimes.tensorflow_import import keras

    names: dict[str, Any] = {"__name__": "nets"}
    keys = keras_keys(tmp_path, "with_noise") | keras_steps(tmp_path)
    exec((tmp_path / "net.py").read_text(), names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names["with_noise"]().save(tmp_path / "net.keras")
    keras.backend.clear_session()
    keys |= {"type": "file", "model_file": str(tmp_path / "net.keras"), "class_name": None}
    refused({k: v for k, v in keys.items() if v is not None}, "model_file: ", "gain")


@pytest.mark.parametrize(
    "result",
    [
        "self.dropout(x, training=True)",
        "self.noise(x, training=True)",
        "x + tf.random.uniform(tf.shape(x))",
        "x + keras.random.normal((4, 8, 8, 1))",
    ],
)
def test_a_keras_network_with_random_outputs_is_refused(tmp_path: Path, result: str) -> None:
    fixed = ", kernel_initializer='ones'"
    keys = keras_keys(tmp_path, "Net", fixed, result) | keras_steps(tmp_path)
    refused(keys, "different outputs")


def test_dropout_of_a_functional_keras_model_is_off(tmp_path: Path) -> None:
    keys = keras_keys(tmp_path, "with_dropout") | keras_steps(tmp_path)
    np.testing.assert_array_equal(predict(keys)[0], VOLUME)


def test_a_saved_model_that_keeps_its_dropout_is_refused(tmp_path: Path) -> None:
    from chunkq_worker.runtimes.tensorflow_import import keras, without_log_output

    inputs = keras.Input((*PATCH, 1))
    network = keras.Model(inputs, keras.layers.Dropout(0.5)(inputs, training=True))
    with warnings.catch_warnings(), without_log_output():
        warnings.simplefilter("ignore")
        network.export(str(tmp_path / "saved"), verbose=False)
    keys = {"runtime": "tensorflow", "type": "file", "model_file": str(tmp_path / "saved")}
    refused(keys | {"model_input_shape": PATCH} | keras_steps(tmp_path), "different outputs")


NUMPY_OUTPUTS = {
    "legacy": "def net(x): return x * np.random.rand()",
    "generator": "rng = np.random.default_rng(1)\ndef net(x): return x * rng.random()",
    "own buffer": "out = np.empty((4, 8, 8), 'f4')\n"
    "def net(x):\n    out[:len(x)] = x * np.random.rand()\n    return out[:len(x)]",
}


@pytest.mark.parametrize("code", NUMPY_OUTPUTS.values(), ids=NUMPY_OUTPUTS)
def test_numpy_code_with_random_outputs_is_refused(tmp_path: Path, code: str) -> None:
    with pytest.raises(ModelError) as caught:
        predict(numpy_keys(tmp_path, code))
    assert caught.value.code is ErrorCode.MODEL_RANDOM


# ----------------------------------------------------------------------------------------- jobs


def workspace_with(folder: Path, volume: npt.NDArray[Any], keys: dict[str, Any]) -> Workspace:
    write_zarr(folder / "in.zarr", volume, (8, 8))
    values = job_values(keys) | {"input": "in.zarr", "output": "out.zarr", "allow_empty": True}
    workspace = Workspace(folder, values)
    workspace.write_job()
    return workspace


DROPOUT = "def net(x): return x * np.random.randint(0, 2, x.shape)"


def test_run_refuses_a_random_network_also_for_a_constant_volume(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, np.zeros((16, 16)), numpy_keys(tmp_path, DROPOUT))
    workspace.call("run", "job.json").refused(1, ErrorCode.MODEL_RANDOM, "stochastic: true")
    assert not workspace.output.exists()


def test_a_worker_refuses_a_random_network_that_no_run_has_checked(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, VOLUME, numpy_keys(tmp_path, DROPOUT))
    workspace.produce()
    result = workspace.work()
    assert result.code == 1
    assert_contains(result.err, "different outputs", "stochastic: true")
    assert workspace.done() == {}


def test_a_stochastic_job_runs_and_plan_and_report_name_it(tmp_path: Path) -> None:
    keys = numpy_keys(tmp_path, DROPOUT) | {"stochastic": True}
    workspace = workspace_with(tmp_path, VOLUME, keys)
    assert STOCHASTIC in workspace.call("plan", "job.json").ok().out
    assert json.loads(workspace.call("plan", "job.json", "--json").ok().out)["stochastic"] is True
    result = workspace.call("run", "job.json").ok()
    assert STOCHASTIC in result.out + result.err
    assert STOCHASTIC in " ".join(workspace.call("report", "out.zarr").ok().out.split())
    assert workspace.report()["stochastic"] is True


def test_random_weights_are_refused_in_a_stochastic_job(tmp_path: Path) -> None:
    refused(torch_class(tmp_path) | {"stochastic": True}, "model_config.checkpoint: missing")
