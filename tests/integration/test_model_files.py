"""Model files from untrusted sources run no code without `trusted: true`.

Each malicious file is effective: loaded with `trusted: true`, or by the library itself, it creates
the file `ran`. `make prove PART=oldest` runs these tests with the lowest versions of the libraries.
"""

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import pytest
import torch
from chunkq_worker.runtimes.base import Runtime, load_runtime
from chunkq_worker.runtimes.tensorflow_import import keras, tf
from chunkq_worker.steps import Steps
from onnx import TensorProto, helper, numpy_helper

from chunkq.errors import ErrorCode, ModelError
from chunkq.job.allowed_paths import ALLOW_VARIABLE
from chunkq.job.job_parsing import parse_job

SHAPE = (8, 8, 1)
Change = Callable[[str, bytes], bytes]


@pytest.fixture(autouse=True)
def ignore_library_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """Return the path of the file that malicious code creates."""
    return tmp_path / "ran"


def load(runtime: str, kind: str, **keys: Any) -> Runtime:
    job = {"input": "/in.zarr", "output": "/out.zarr"}
    values = {k: str(v) if isinstance(v, Path) else v for k, v in keys.items()}
    model = {"runtime": runtime, "type": kind, "model_input_shape": SHAPE, "max_batch_size": 2}
    return load_runtime(parse_job({**job, "model_config": model | values}).model, Steps(), 1)


def run(runtime: str, kind: str, **keys: Any) -> Any:
    return load(runtime, kind, **keys)(np.ones((2, *SHAPE), np.float32))[0]


def assert_rejected(
    runtime: str, kind: str, code: ErrorCode = ErrorCode.MODEL_UNTRUSTED, **keys: Any
) -> str:
    """Assert that loading and calling a network raises ModelError; return its line."""
    with pytest.raises(ModelError) as caught:
        run(runtime, kind, **keys)
    assert caught.value.code == code, str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class FolderCreator:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self._path,))


def rewrite_zip(path: Path, change: Change, **extra: bytes) -> Path:
    """Copy a zip file with changed and additional members."""
    copy = path.with_name(f"changed-{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, content in extra.items():
            new.writestr(name, content)
    return copy


# ------------------------------------------------------------------------------- Keras


def with_lambda(path: Path) -> Any:
    """Return a network that creates the file when it is called."""
    # eval inserts the path as a literal, which Keras serializes with the function.
    create_file = eval(f"lambda x: (open({str(path)!r}, 'w').close(), x)[1]")
    layers = [keras.Input(SHAPE), keras.layers.Lambda(create_file, output_shape=SHAPE)]
    return keras.Sequential(layers)


@pytest.mark.parametrize("suffix", ["h5", "keras", "json"])
def test_a_lambda_layer_runs_only_if_its_file_is_trusted(
    tmp_path: Path, ran: Path, suffix: str
) -> None:
    path = tmp_path / f"net.{suffix}"
    model = with_lambda(ran)
    path.write_text(model.to_json()) if suffix == "json" else model.save(path)
    ran.unlink(missing_ok=True)
    keys = {"json_file": path} if suffix == "json" else {"model_file": path}
    kind = "json" if suffix == "json" else "file"
    assert_rejected("tensorflow", kind, **keys)
    assert not ran.exists()
    run("tensorflow", kind, **keys, trusted=True)
    assert ran.exists()


def architecture(*layers: Any, shape: Any = (None, *SHAPE)) -> dict[str, Any]:
    """Return the configuration of a Sequential model of serialized layers."""
    input_layer = {
        "module": "keras.layers",
        "class_name": "InputLayer",
        "config": {"batch_shape": list(shape), "dtype": "float32", "name": "input"},
        "registered_name": None,
    }
    return {
        "module": "keras",
        "class_name": "Sequential",
        "config": {"name": "net", "trainable": True, "layers": [input_layer, *layers]},
        "registered_name": None,
        "build_config": {"input_shape": list(shape)},
    }


def layer(module: str | None, name: str, /, **config: Any) -> dict[str, Any]:
    return {"module": module, "class_name": name, "config": config, "registered_name": name}


def function(module: str, name: str) -> dict[str, Any]:
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


MODULES_AND_FILES = {
    "a class of any module": layer("subprocess", "Popen", args=["touch", "ran"]),
    "a registered name": layer("os", "system", command="touch ran") | {"registered_name": "x>y"},
    "a function of any module": layer(
        "keras.layers", "Activation", activation=function("os", "system")
    ),
    "a builtin": layer("keras.layers", "Activation", activation=function("builtins", "exec")),
    "a download": layer("keras.utils", "get_file", fname="ran", origin="file:///etc/hostname"),
    "the switch for unsafe files": layer("keras.config", "enable_unsafe_deserialization"),
    "a function that downloads": layer(
        "keras.layers", "Activation", activation=function("keras.utils", "get_file")
    ),
    "a named function with arguments": layer(
        "keras.layers",
        "Lambda",
        function=function("keras.utils", "get_file"),
        arguments={"origin": "file:///etc/hostname"},
    ),
    "a nested one": layer(
        "keras.layers", "TimeDistributed", layer=layer("os", "system", command="touch ran")
    ),
    "a vocabulary": layer("keras.layers", "StringLookup", vocabulary="/etc/hostname"),
    "a vocabulary of a URL": layer(
        "keras.layers", "TextVectorization", vocabulary="http://127.0.0.1:9/words"
    ),
    "another saved model": layer("keras.layers", "TFSMLayer", filepath="saved"),
    "a pickled module": layer("keras.layers", "TorchModuleWrapper", module="gASVIQ=="),
    "a module of Keras that loads": layer("keras.src.saving.saving_api", "load_model"),
    "a type": {
        "class_name": "__typespec__",
        "spec_name": "system",
        "module": "os",
        "config": ["touch ran"],
        "registered_name": None,
    },
    "Keras 2": {"class_name": "Lambda", "config": {"function": ["4wE=", None, None]}},
    "Keras 2, a function that is called": {
        "class_name": "get",
        "config": {"identifier": "Dense"},
    },
}

FROM_OTHER_MODULES = (
    "a class of any module",
    "a registered name",
    "a function of any module",
    "a builtin",
    "a nested one",
    "Keras 2, a function that is called",
)
"""Cases that could be custom objects of the user; the message names class_file."""


@pytest.mark.parametrize("form", ["json", "keras", "h5"])
@pytest.mark.parametrize("case", MODULES_AND_FILES)
def test_an_architecture_with_modules_functions_or_files_outside_of_keras_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = json.dumps(architecture(MODULES_AND_FILES[case]))
    path = tmp_path / f"net.{form}"
    if form == "json":
        path.write_text(config)
    elif form == "h5":
        with h5py.File(path, "w") as file:
            file.attrs["model_config"] = config
            file.create_group("model_weights")
    else:
        plain().save(path)
        path = rewrite_zip(path, lambda name, c: config.encode() if name == "config.json" else c)
    calls: list[str] = []
    for module, name in ((keras.models, "load_model"), (keras.saving, "deserialize_keras_object")):
        monkeypatch.setattr(module, name, lambda *args, **keys: calls.append("by Keras"))
    key = "json_file" if form == "json" else "model_file"
    with pytest.raises(ModelError) as caught:
        load("tensorflow", "json" if form == "json" else "file", **{key: path})
    assert calls == []  # which of these Keras itself rejects depends on its version
    expected = ErrorCode.MODEL_UNUSABLE if case in FROM_OTHER_MODULES else ErrorCode.MODEL_UNTRUSTED
    assert caught.value.code == expected, str(caught.value)
    assert "\n" not in str(caught.value)


def plain(*, operations: bool = True) -> Any:
    """Return a network of many safe layers; HDF5 files cannot contain `operations`."""
    inputs = keras.Input(SHAPE)
    initializer = keras.initializers.HeNormal(seed=1)
    x = keras.layers.Conv2D(3, 3, padding="same", kernel_initializer=initializer)(inputs)
    x = keras.layers.BatchNormalization()(keras.layers.Activation("gelu")(x))
    x = keras.layers.Conv2D(
        3, 1, activation=keras.activations.silu, kernel_regularizer=keras.regularizers.L2(0.1)
    )(x)
    x = keras.layers.concatenate([keras.layers.LeakyReLU()(x), inputs])
    inner = keras.Sequential([keras.layers.Dense(1), keras.layers.ReLU(max_value=6.0)])
    if operations:
        return keras.Model(inputs, inner(keras.ops.multiply(x, x)) + inputs)
    return keras.Model(inputs, keras.layers.Add()([inner(x), inputs]))


@pytest.mark.parametrize("suffix", ["h5", "keras", "json"])
def test_a_network_of_ordinary_layers_needs_no_trust(tmp_path: Path, suffix: str) -> None:
    model, path = plain(operations=suffix != "h5"), tmp_path / f"net.{suffix}"
    model.compile("adam", keras.losses.MeanSquaredError(), metrics=["mae"])
    if suffix == "json":
        path.write_text(model.to_json())
        model.save_weights(tmp_path / "net.weights.h5")
        keys = {"json_file": path, "checkpoint": tmp_path / "net.weights.h5"}
        outputs = run("tensorflow", "json", **keys)
    else:
        model.save(path)
        outputs = run("tensorflow", "file", model_file=path)
    expected = model(np.ones((2, *SHAPE), np.float32), training=False).numpy()
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-6)


def test_a_model_file_cannot_call_the_imports_of_class_file(tmp_path: Path, ran: Path) -> None:
    """Keras calls any custom object that is not a layer with keywords from the file."""
    (tmp_path / "custom.py").write_text("from subprocess import Popen\n")
    config = architecture({"class_name": "Popen", "config": {"args": ["touch", str(ran)]}})
    (tmp_path / "net.json").write_text(json.dumps(config))
    keys = {"json_file": tmp_path / "net.json", "class_file": tmp_path / "custom.py"}
    assert_rejected("tensorflow", "json", **keys)
    assert not ran.exists()


def move_to_other_file(file: Path, outside: Path, method: str, name: str) -> None:
    """Move a dataset of an HDF5 file to another file and replace it with a reference."""
    with h5py.File(file, "r+") as weights:
        values = weights[name][...]
        del weights[name]
        with h5py.File(outside, "w") as other:
            other["secret"] = values
        if method == "link":
            weights[name] = h5py.ExternalLink(str(outside), "/secret")
        elif method == "virtual dataset":
            layout = h5py.VirtualLayout(values.shape, values.dtype)
            layout[...] = h5py.VirtualSource(str(outside), "secret", values.shape)
            weights.create_virtual_dataset(name, layout)
        else:
            outside.write_bytes(values.tobytes())
            parts = [(str(outside), 0, values.nbytes)]
            weights.create_dataset(name, values.shape, values.dtype, external=parts)


@pytest.mark.parametrize("method", ["link", "virtual dataset", "raw bytes"])
def test_hdf5_weights_in_another_file_are_rejected(tmp_path: Path, method: str) -> None:
    model = keras.Sequential([keras.Input(SHAPE), keras.layers.Dense(1, name="dense")])
    weights, network, zipped = (tmp_path / f"net{end}" for end in (".weights.h5", ".h5", ".keras"))
    for path, save in ((weights, model.save_weights), (network, model.save), (zipped, model.save)):
        save(path)
    with h5py.File(weights) as file:
        names: list[str] = []
        file.visititems(lambda n, item: names.append(n) if isinstance(item, h5py.Dataset) else None)
    dataset = next(n for n in names if n.endswith("/0"))
    move_to_other_file(weights, tmp_path / "secret", method, dataset)
    content = weights.read_bytes()
    zipped = rewrite_zip(zipped, lambda n, c: content if n == "model.weights.h5" else c)
    (tmp_path / "net.json").write_text(model.to_json())
    for checkpoint in (weights, zipped):
        keys = {"json_file": tmp_path / "net.json", "checkpoint": checkpoint}
        assert_rejected("tensorflow", "json", **keys)
    assert_rejected("tensorflow", "file", model_file=zipped)
    with h5py.File(network) as file:
        file["model_weights"].visititems(
            lambda n, item: (
                names.append(f"model_weights/{n}") if isinstance(item, h5py.Dataset) else None
            )
        )
    kernel = next(n for n in names if n.endswith("kernel"))
    move_to_other_file(network, tmp_path / "secret2", method, kernel)
    assert_rejected("tensorflow", "file", model_file=network)


# --------------------------------------------------------------------- TensorFlow


class Writes(tf.Module):  # type: ignore[misc]
    """Performs an action, such as writing a file, when it is called."""

    def __init__(self, path: Path, action: str) -> None:
        super().__init__()
        self.path, self.action = str(path), action
        self.gain = tf.Variable(2.0)
        keys = tf.constant([1, 2])
        values = tf.lookup.KeyValueTensorInitializer(keys, tf.constant([3.0, 4.0]))
        self.table = tf.lookup.StaticHashTable(values, -1.0)

    @tf.function(input_signature=[tf.TensorSpec((None, *SHAPE))])
    def __call__(self, x: Any) -> Any:
        if self.action == "write":
            tf.io.write_file(self.path, "ran")
        elif self.action == "print":
            tf.print("ran", output_stream=f"file://{self.path}")
        elif self.action == "read":
            x += tf.cast(tf.strings.length(tf.io.read_file("/etc/hostname")), tf.float32)
        elif self.action == "python":
            x = tf.numpy_function(lambda v: v, [x], tf.float32)
            x.set_shape((None, *SHAPE))
        elif self.action == "inner":
            x = tf.while_loop(lambda i, y: i < 1, self._write, (0, x))[1]
        return x * self.gain + self.table.lookup(tf.constant(1))

    def _write(self, count: Any, x: Any) -> tuple[Any, Any]:
        tf.io.write_file(self.path, "ran")
        return count + 1, x


@pytest.mark.parametrize("action", ["write", "print", "read", "python", "inner"])
def test_a_saved_model_reaches_files_and_python_only_if_it_is_trusted(
    tmp_path: Path, ran: Path, action: str
) -> None:
    module = Writes(ran, action)
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures=module.__call__)
    assert_rejected("tensorflow", "file", model_file=tmp_path / "saved")
    assert not ran.exists()
    run("tensorflow", "file", model_file=tmp_path / "saved", trusted=True)
    assert ran.exists() == (action in ("write", "print", "inner"))


def test_an_initializer_of_a_saved_model_writes_a_file_only_if_it_is_trusted(
    tmp_path: Path, ran: Path
) -> None:
    """TensorFlow runs initializers when it loads a SavedModel."""

    class Resource(tf.saved_model.experimental.TrackableResource):  # type: ignore[misc]
        def _create_resource(self) -> Any:
            return tf.raw_ops.MutableHashTableV2(key_dtype=tf.int64, value_dtype=tf.int64)

        def _initialize(self) -> None:
            tf.io.write_file(str(ran), "ran")

        def _destroy_resource(self) -> None:
            pass

    module = Writes(ran, "nothing")
    module.resource = Resource()
    module.resource.resource_handle  # noqa: B018
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures=module.__call__)
    ran.unlink(missing_ok=True)
    assert_rejected("tensorflow", "file", model_file=tmp_path / "saved")
    assert not ran.exists()
    run("tensorflow", "file", model_file=tmp_path / "saved", trusted=True)
    assert ran.exists()


def save_with_tensorflow_1(folder: Path, created: Path | None, *, at_load: bool) -> Path:
    """Save a SavedModel that creates a file at load time or when it is called."""
    v1 = tf.compat.v1
    with v1.Graph().as_default(), v1.Session() as session:
        inputs = v1.placeholder(tf.float32, (None, *SHAPE))
        gain = v1.get_variable("gain", initializer=2.0)
        write = [tf.io.write_file(str(created), "ran")] if created else []
        with v1.control_dependencies([] if at_load else write):
            outputs = inputs * gain
        session.run(v1.global_variables_initializer())
        builder = v1.saved_model.Builder(str(folder))
        signature = v1.saved_model.predict_signature_def({"x": inputs}, {"y": outputs})
        main_op = v1.group(*write, name="start") if at_load else None
        builder.add_meta_graph_and_variables(
            session, ["serve"], {"serving_default": signature}, main_op=main_op
        )
        builder.save()
    return folder


@pytest.mark.parametrize("at_load", [False, True])
def test_a_saved_model_of_tensorflow_1_writes_a_file_only_if_it_is_trusted(
    tmp_path: Path, ran: Path, at_load: bool
) -> None:
    path = save_with_tensorflow_1(tmp_path / "saved", ran, at_load=at_load)
    assert_rejected("tensorflow", "file", model_file=path)
    assert not ran.exists()
    run("tensorflow", "file", model_file=path, trusted=True)
    assert ran.exists()


def test_ordinary_saved_models_need_no_trust(tmp_path: Path, ran: Path) -> None:
    module = Writes(ran, "nothing")
    tf.saved_model.save(module, str(tmp_path / "table"), signatures=module.__call__)
    assert run("tensorflow", "file", model_file=tmp_path / "table").max() == 5
    version_1 = save_with_tensorflow_1(tmp_path / "version_1", None, at_load=False)
    assert run("tensorflow", "file", model_file=version_1).max() == 2
    plain().export(str(tmp_path / "keras"), verbose=False)
    run("tensorflow", "file", model_file=tmp_path / "keras")


def test_a_tensorflow_checkpoint_contains_only_values(tmp_path: Path, ran: Path) -> None:
    """Functions of the checkpointed objects are not part of the checkpoint."""
    (tmp_path / "net.py").write_text(
        "import keras\n\ndef net():\n"
        "    return keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Dense(1)])\n"
    )
    model = keras.Sequential([keras.Input(SHAPE), keras.layers.Dense(1)])
    tf.train.Checkpoint(model=model, more=Writes(ran, "write")).write(str(tmp_path / "weights"))
    keys = {"class_file": tmp_path / "net.py", "class_name": "net"}
    outputs = run("tensorflow", "class", **keys, checkpoint=tmp_path / "weights")
    np.testing.assert_allclose(outputs, model(np.ones((2, *SHAPE), np.float32)), atol=1e-6)
    assert not ran.exists()


# -------------------------------------------------------------------------- PyTorch

SCRIPTS = '''\
import torch


class Saves(torch.nn.Module):
    def forward(self, x):
        torch.save(x, {path!r})
        return x


class Maps(torch.nn.Module):
    """Creates a file by mapping it into memory."""

    def forward(self, x):
        return x + torch.from_file({path!r}, shared=True, size=4).sum()


class SavesWhenLoaded(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = 2

    @torch.jit.export
    def __getstate__(self):
        return self.gain, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]):
        torch.save([state[0]], {path!r})
        self.gain = state[0]
        self.training = state[1]

    def forward(self, x):
        return x * self.gain


class Ordinary(torch.nn.Module):
    """Has an attribute with the name of an unsafe operator."""

    def __init__(self):
        super().__init__()
        self.save = [1, 2]
        self.net = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Dropout())

    def forward(self, x, count: int = 2):
        for _ in range(count):
            if x.shape[0] > 3:
                x = torch.nn.functional.interpolate(x, scale_factor=1.0, mode="bilinear")
        assert x.dim() == 4, "four axes"
        future = torch.jit.fork(torch.relu, x)
        return self.net(torch.jit.wait(future)).softmax(1) + len(self.save)
'''


@pytest.fixture
def scripts(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load the classes from a file; torch.jit.script reads their source code."""
    from chunkq.job.user_code import load_names

    (tmp_path / "scripts.py").write_text(SCRIPTS.format(path=str(ran)))
    return load_names(str(tmp_path / "scripts.py"), "class_file")


@pytest.mark.parametrize("name", ["Saves", "Maps", "SavesWhenLoaded"])
def test_torchscript_reaches_files_only_if_it_is_trusted(
    tmp_path: Path, ran: Path, scripts: Any, name: str
) -> None:
    torch.jit.script(scripts[name]()).save(str(tmp_path / "net.ts"))
    assert_rejected("torch", "torchscript", ts_file=tmp_path / "net.ts")
    assert not ran.exists()
    run("torch", "torchscript", ts_file=tmp_path / "net.ts", trusted=True)
    assert ran.exists()


def test_torchscript_that_python_and_torch_read_differently_is_rejected(
    tmp_path: Path, ran: Path, scripts: Any
) -> None:
    """Of two members with one name, torch reads the first and Python the last."""
    torch.jit.script(scripts["Saves"]()).save(str(tmp_path / "net.ts"))
    with zipfile.ZipFile(tmp_path / "net.ts") as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".py")]
        code = archive.read(name).replace(b"torch.save", b"torch.relu")
    for duplicate in (name, name.upper().replace("NET/", "net/")):
        shutil.copy(tmp_path / "net.ts", tmp_path / "duplicate.ts")
        with zipfile.ZipFile(tmp_path / "duplicate.ts", "a") as archive:
            archive.writestr(duplicate, code)
        assert_rejected("torch", "torchscript", ts_file=tmp_path / "duplicate.ts")
    assert not ran.exists()
    torch.jit.script(scripts["Ordinary"]()).save(str(tmp_path / "commented.ts"))
    with zipfile.ZipFile(tmp_path / "commented.ts", "a") as archive:
        archive.comment = b"another end"
    assert_rejected("torch", "torchscript", ts_file=tmp_path / "commented.ts")


def test_ordinary_torchscript_needs_no_trust(tmp_path: Path, scripts: Any) -> None:
    module = scripts["Ordinary"]().eval()
    torch.jit.script(module).save(str(tmp_path / "net.ts"))
    outputs = run("torch", "torchscript", ts_file=tmp_path / "net.ts")
    expected = module(torch.ones(2, *SHAPE)).detach().numpy()
    np.testing.assert_allclose(np.asarray(outputs), expected, atol=1e-6)


def test_a_pickled_module_is_loaded_only_if_it_is_trusted(tmp_path: Path, ran: Path) -> None:
    torch.save({"model": torch.nn.ReLU(), "more": FolderCreator(ran)}, tmp_path / "net.pt")
    assert_rejected("torch", "file", model_file=tmp_path / "net.pt")
    assert not ran.exists()
    run("torch", "file", model_file=tmp_path / "net.pt", trusted=True)
    assert ran.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_a_pickled_object_is_never_unpickled(
    tmp_path: Path, ran: Path, zipped: bool
) -> None:
    (tmp_path / "net.py").write_text("from torch.nn import ReLU\n")
    torch.save(
        {"more": FolderCreator(ran)}, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped
    )
    keys = {"class_file": tmp_path / "net.py", "class_name": "ReLU"}
    assert_rejected("torch", "class", **keys, checkpoint=tmp_path / "net.pt")
    assert_rejected("torch", "class", **keys, checkpoint=tmp_path / "net.pt", trusted=True)
    assert not ran.exists()


class Halves(torch.nn.Module):
    """Its program has size expressions, and guards in newer releases of torch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 2)
        return torch.nn.functional.interpolate(half, scale_factor=2.0).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    sizes = {0: torch.export.Dim("batch"), 1: 2 * torch.export.Dim("height", min=2)}
    example = torch.zeros(3, *SHAPE)
    exported_program = torch.export.export(Halves(), (example,), dynamic_shapes={"x": sizes})
    torch.export.save(exported_program, path)
    return path


@pytest.fixture
def program(tmp_path: Path, exported: Path) -> Path:
    return Path(shutil.copy(exported, tmp_path))


def change_program(path: Path, change: Callable[[Any], None]) -> Path:
    """Copy a .pt2 file with a changed program."""

    def apply(name: str, content: bytes) -> bytes:
        if not name.endswith(("models/model.json", "serialized_exported_program.json")):
            return content
        values = json.loads(content)
        change(values)
        return json.dumps(values).encode()

    return rewrite_zip(path, apply)


def mappings_with(key: str, value: Any) -> Iterator[dict[str, Any]]:
    """Yield the mappings of a JSON value that have the key."""
    if isinstance(value, dict):
        if key in value:
            yield value
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from mappings_with(key, item)


def test_an_ordinary_program_needs_no_trust(program: Path) -> None:
    assert run("torch", "exported", model_file=program).shape == (2, *SHAPE)


@pytest.mark.parametrize("part", ["size", "name", "target", "guard", "argument", "tree"])
def test_a_program_with_code_is_loaded_only_if_it_is_trusted(
    program: Path, ran: Path, part: str
) -> None:
    """Some releases of torch evaluate these texts. The file is rejected with all releases."""
    code = f"__import__('pathlib').Path({str(ran)!r}).touch()"

    def change(values: Any) -> None:
        graph = values["graph_module"]["graph"]
        if part == "size":
            for size in mappings_with("expr_str", values):
                size["expr_str"] = code
        elif part == "name":
            name = graph["inputs"][0]["as_tensor"]["name"]
            name_with_code = f"{name}={code}"
            graph["inputs"][0]["as_tensor"]["name"] = name_with_code
            graph["tensor_values"][name_with_code] = graph["tensor_values"].pop(name)
        elif part == "target":
            graph["nodes"][0]["target"] = "torch.hub.load"
        elif part == "argument":
            graph["nodes"][0]["target"] = "torch.ops.aten.from_file.default"
        elif part == "guard":
            values["guards_code"] = [code]
        else:
            signature = values["graph_module"]["module_call_graph"][0]["signature"]
            signature["in_spec"] = signature["in_spec"].replace("builtins.tuple", code, 1)

    path = change_program(program, change)
    assert_rejected("torch", "exported", model_file=path)
    assert not ran.exists()
    if part == "size":  # all releases of torch evaluate it
        with pytest.raises(ModelError):
            run("torch", "exported", model_file=path, trusted=True)
        assert ran.exists()


def test_a_program_with_a_library_is_not_loaded_without_trust(program: Path) -> None:
    extra = {"net/data/aotinductor/model/code.so": b"x"}
    path = rewrite_zip(program, lambda name, content: content, **extra)
    assert_rejected("torch", "exported", model_file=path)


# ------------------------------------------------------------------------------ ONNX


def onnx_model(weights: str | None, path: Path) -> Path:
    """Write a model that adds a constant, stored in the file `weights` if that is not None."""
    gain = numpy_helper.from_array(np.full(SHAPE, 2, np.float32), "gain")
    if weights is not None:
        gain.ClearField("raw_data")
        gain.data_location = TensorProto.EXTERNAL
        gain.external_data.add(key="location", value=weights)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", *SHAPE]) for n in "xy"]
    node = helper.make_node("Add", ["x", "gain"], ["y"])
    graph = helper.make_graph([node], "net", values[:1], values[1:], [gain])
    operators = [helper.make_opsetid("", 17)]
    content = helper.make_model(graph, opset_imports=operators, ir_version=8)
    path.write_bytes(content.SerializeToString())
    return path


def test_onnx_weights_outside_the_folder_of_the_model_are_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    secret = np.full(SHAPE, 3, np.float32).tobytes()
    for path in (tmp_path / "secret", folder / "weights"):
        path.write_bytes(secret)
    assert run("onnx", "file", model_file=onnx_model(None, folder / "single.onnx")).max() == 3
    assert run("onnx", "file", model_file=onnx_model("weights", folder / "two.onnx")).max() == 4
    for location in ("../secret", str(tmp_path / "secret"), "x/../../secret", "..\\secret"):
        path = onnx_model(location, folder / "out.onnx")
        for trusted in (False, True):
            assert_rejected("onnx", "file", model_file=path, trusted=trusted)


def linked(tmp_path: Path, content: bytes | None) -> Path:
    """Write a model whose weights are a link to a file outside of its folder."""
    for name in ("model", "blobs"):
        (tmp_path / name).mkdir()
    if content is not None:
        (tmp_path / "blobs" / "b").write_bytes(content)
    (tmp_path / "model" / "weights").symlink_to("../blobs/b")
    return onnx_model("weights", tmp_path / "model" / "net.onnx")


def test_onnx_weights_behind_a_link_out_of_the_folder_are_read(tmp_path: Path) -> None:
    path = linked(tmp_path, np.full(SHAPE, 3, np.float32).tobytes())
    assert run("onnx", "file", model_file=path).max() == 4


def test_a_worker_with_allowed_paths_follows_such_a_link_only_below_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = linked(tmp_path, np.full(SHAPE, 3, np.float32).tobytes())
    monkeypatch.setenv(ALLOW_VARIABLE, f"{tmp_path}/model")
    line = assert_rejected("onnx", "file", code=ErrorCode.PATH_NOT_ALLOWED, model_file=path)
    assert f"a link to {tmp_path}/blobs/b" in line
    monkeypatch.setenv(ALLOW_VARIABLE, f"{tmp_path}/model\n{tmp_path}/blobs")
    assert run("onnx", "file", model_file=path).max() == 4


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "missing"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (bytes(3), "damaged"),
        (b"", "damaged"),
    ],
    ids=["missing", "pointer", "cut off", "empty"],
)
def test_unusable_onnx_weights_behind_a_link_are_reported(
    tmp_path: Path, content: bytes | None, word: str
) -> None:
    path = linked(tmp_path, content)
    line = assert_rejected("onnx", "file", code=ErrorCode.MODEL_UNUSABLE, model_file=path)
    assert word in line
    assert "weights in another file" in line


def test_onnx_weights_of_a_model_from_a_url_are_not_read_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(np.full(SHAPE, 3, np.float32).tobytes())
    content = onnx_model("weights", tmp_path / "two.onnx").read_bytes()
    fsspec.filesystem("memory").pipe_file("/two.onnx", content)
    url = "memory://two.onnx"
    assert_rejected("onnx", "file", code=ErrorCode.MODEL_UNUSABLE, model_file=url)


def test_external_onnx_weights_in_nodes_and_subgraphs_are_rejected(tmp_path: Path) -> None:
    """Constants and branches contain tensors, too."""
    (tmp_path / "model").mkdir()
    path = onnx_model(None, tmp_path / "model" / "net.onnx")
    tensor = numpy_helper.from_array(np.zeros(1, np.float32), "c")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    info = helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])
    branch = helper.make_graph([constant], "branch", [], [info])
    choice = helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch)
    for node in (constant, choice):
        model = onnx.load(path)
        model.graph.node.append(node)
        changed = tmp_path / "model" / "changed.onnx"
        changed.write_bytes(model.SerializeToString())
        assert_rejected("onnx", "file", model_file=changed)


def test_an_operator_of_another_library_is_rejected(tmp_path: Path) -> None:
    path = onnx_model(None, tmp_path / "net.onnx")
    model = onnx.load(path)
    model.graph.node[0].domain = "custom"
    model.opset_import.append(helper.make_opsetid("custom", 1))
    path.write_bytes(model.SerializeToString())
    assert_rejected("onnx", "file", code=ErrorCode.MODEL_UNUSABLE, model_file=path)
