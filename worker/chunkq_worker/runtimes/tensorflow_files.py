"""Load TensorFlow and Keras networks from the files that a job names: one loader per type."""

from __future__ import annotations

import glob
import io
import json
import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
from typing_extensions import override

from chunkq.casts import Cast, cast_kind
from chunkq.errors import JobError, ModelError
from chunkq.job.fields import Dtype
from chunkq.job.model_config import ModelConfig
from chunkq.job.user_code import load_names
from chunkq_worker.created_values import file_values, values_of
from chunkq_worker.runtimes import hdf5_files, keras_config, saved_model_graph
from chunkq_worker.runtimes.classes import create_network, source_of
from chunkq_worker.runtimes.formats import format_of
from chunkq_worker.runtimes.stand_ins import describe, first_stand_in
from chunkq_worker.runtimes.tensorflow_import import h5py, keras, tf
from chunkq_worker.runtimes.tensorflow_reading import (
    content_of,
    local_copy,
    reason,
    suppressed_warnings,
    with_suffix,
)
from chunkq_worker.runtimes.tensorflow_weights import WEIGHTS, load_checkpoint
from chunkq_worker.runtimes.untrusted import untrusted
from chunkq_worker.steps import KEY

TILE_NORMS = ("GroupNormalization", "InstanceNormalization", "LayerNormalization")
SAVE_ADVICE = "save a network with one input, the batch, and one output, the prediction"


class Network(ABC):
    """A network that is called with a batch.

    `input_spec` is the (shape, dtype) that it declares, None if it declares none. Dynamic axes of
    the shape, which starts with the batch axis, are None. The shape is None if it is unknown.
    """

    input_spec: tuple[Sequence[int | None] | None, str] | None = None

    @abstractmethod
    def __call__(self, batch: Any) -> Any:
        """Return the output for a batch. The call is traced once per batch shape."""

    @abstractmethod
    def prepare(self, batch: Any) -> None:
        """Build the network for a batch before the first call, or raise ModelError."""

    def tile_norms(self) -> tuple[str, ...]:
        """Return the known layers that normalize with statistics of the current patch."""
        return ()

    def created_values(self) -> Sequence[tuple[str, Any]]:
        """Return values that code has set and no file contains; see `Runtime.created_values`."""
        return ()

    def recreated_values(self) -> Sequence[tuple[str, Any]]:
        """Return the same values of a second network."""
        return ()


class KerasNetwork(Network):
    """A Keras model in inference mode.

    `prepare` builds the model, which creates its variables, and then loads `checkpoint`. `dtype` is
    the dtype of layers that the model creates meanwhile, None for Keras's default. `recreate`
    creates the network again if code creates it. Its weights are those of a file if `is_saved`.
    """

    def __init__(
        self,
        model: Any,
        key: str,
        checkpoint: str | None = None,
        dtype: str | None = None,
        *,
        recreate: Callable[[], Network] | None = None,
        is_saved: bool = False,
    ) -> None:
        self._model, self._checkpoint, self._dtype = model, checkpoint, dtype
        self._recreate, self._is_saved = recreate, is_saved or checkpoint is not None
        self._built_for: tuple[Any, Any] | None = None
        inputs = getattr(model, "inputs", None) or ()
        if len(inputs) > 1:
            raise ModelError(f"{key} has {len(inputs)} inputs, expected 1; {SAVE_ADVICE}")
        if inputs:
            self.input_spec = (tuple(inputs[0].shape), str(inputs[0].dtype))

    @override
    def __call__(self, batch: Any) -> Any:
        if self.input_spec is not None:
            _check_integers(batch.dtype, self.input_spec[1])
        with default_dtype(self._dtype):
            return self._model(batch, training=False)

    @override
    def prepare(self, batch: Any) -> None:
        if self._built_for is not None:
            return
        if not self._model.built:
            self(batch[:1])
        if self._checkpoint is not None:
            load_checkpoint(self._model, self._checkpoint)
        self._built_for = (batch.shape, batch.dtype)

    @override
    def created_values(self) -> Sequence[tuple[str, Any]]:
        if self._recreate is None:
            return ()
        weights = () if self._is_saved else self._model.weights
        values = [(weight.path, weight.numpy()) for weight in weights]
        for layer in self._model._flatten_layers():
            values += values_of({k: v for k, v in vars(layer).items() if _is_plain(v)}, layer.name)
        values += file_values(vars(type(self._model)).get("call"))
        return values if any(not isinstance(value, float) for _, value in values) else ()

    @override
    def recreated_values(self) -> Sequence[tuple[str, Any]]:
        if self._recreate is None or self._built_for is None:
            return ()
        other = self._recreate()
        shape, dtype = self._built_for
        other.prepare(tf.zeros(shape, dtype))
        return other.created_values()

    @override
    def tile_norms(self) -> tuple[str, ...]:
        layers = self._model._flatten_layers(include_self=False)
        norms = [layer for layer in layers if _is_tile_norm(layer)]
        return tuple(f"{layer.name} ({type(layer).__name__})" for layer in norms)


class SavedNetwork(Network):
    """The serving signature of a SavedModel."""

    def __init__(self, loaded: Any, key: str) -> None:
        self._loaded = loaded  # keeps the variables alive; the signature does not
        signatures = loaded.signatures
        name = "serving_default" if "serving_default" in signatures else next(iter(signatures), "")
        if not name:
            raise ModelError(
                f"{key} has no serving signature; save it with model.export(path), or with the "
                "argument signatures of tf.saved_model.save"
            )
        self._signature = signatures[name]
        inputs = self._signature.structured_input_signature[1]
        if len(inputs) != 1:
            listed = ", ".join(sorted(inputs)) or "none"
            raise ModelError(
                f"{key}: signature {name} has {len(inputs)} inputs ({listed}), expected 1; "
                f"{SAVE_ADVICE}"
            )
        [(self._input, spec)] = inputs.items()
        shape = None if spec.shape.rank is None else tuple(spec.shape)
        self.input_spec = (shape, spec.dtype.name)

    @override
    def prepare(self, batch: Any) -> None:
        """Do nothing: the model is complete after loading."""

    @override
    def __call__(self, batch: Any) -> Any:
        shape, dtype = self.input_spec or (None, "")
        if batch.dtype.name != dtype:
            raise _other_dtype(batch.dtype.name, dtype)
        if not tf.TensorShape(shape).is_compatible_with(batch.shape):
            raise ValueError("its serving signature expects another shape")
        return self._signature(**{self._input: batch})


def _check_integers(dtype: Any, declared: str) -> None:
    """Raise ModelError if Keras would wrap values when it casts a batch to the declared dtype."""
    is_integer = declared.startswith(("int", "uint", "bool"))
    if is_integer and cast_kind(dtype.as_numpy_dtype, declared) is not Cast.EXACT:
        raise _other_dtype(dtype.name, declared)


def _other_dtype(dtype: str, declared: str) -> ModelError:
    advice = f"set dtype: {declared}"
    if declared not in get_args(Dtype):
        advice = f"cast the batch in preprocessing_protected of {KEY}"
    return ModelError(f"model_config.dtype: {dtype}, but the network expects {declared}; {advice}")


def load_class(model: ModelConfig) -> Network:
    """Create the user's model in the job's dtype. `prepare` loads its checkpoint."""
    dtype = model.dtype if model.dtype.startswith("float") else None
    with default_dtype(dtype):
        network = create_network(model)
    key = source_of(model)
    if not isinstance(network, keras.Model):
        is_keras_2 = type(network).__module__.startswith("tf_keras")
        raise ModelError(
            f"{key} returned {type(network).__name__}, expected a keras.Model"
            + (" of Keras 3; export this Keras 2 model as SavedModel" if is_keras_2 else "")
        )
    return KerasNetwork(network, key, model.checkpoint, dtype, recreate=lambda: load_class(model))


def load_file(model: ModelConfig) -> Network:
    """Load a whole network: a .keras file, an HDF5 file or the folder of a SavedModel."""
    path = model.model_file or ""
    key = f"model_config.model_file: {path}"
    with local_copy(path, key) as local:
        if os.path.isdir(local):
            return _saved_model(local, key, model)
        content = content_of(local, key)
        name = format_of(content)
        if name not in ("keras", "keras_h5"):
            raise ModelError(f"{key} is {_describe_format(local, content)}")
        suffix = ".keras" if name == "keras" else ".h5"
        with (
            with_suffix(local, suffix) as file,
            _one_line_errors(key, "the network"),
            suppressed_warnings(),
        ):
            objects = _custom_objects(model)
            config, external = _read_config(content, name)
            if config is None:
                raise ModelError(
                    f"{key} contains only weights; use type: class or json with it as checkpoint, "
                    "or save the network with model.save('name.keras')"
                )
            if not model.trusted:
                _check_safe(config, objects, path)
                if external is not None:
                    raise untrusted(path, f"keeps {external} in another file")
            network = keras.models.load_model(
                file, objects, compile=False, safe_mode=not model.trusted
            )
    recreate = None if model.class_file is None else lambda: load_file(model)
    return KerasNetwork(network, key, recreate=recreate, is_saved=True)


def load_json(model: ModelConfig) -> Network:
    """Create a network from its architecture. Its weights are random without a checkpoint."""
    path = model.json_file or ""
    key = f"model_config.json_file: {path}"
    with local_copy(path, key) as local:
        content = content_of(local, key)
    name = format_of(content)
    if name != "keras_json":
        problem = "not a Keras JSON file; create one with model.to_json()"
        raise ModelError(f"{key} is {describe(content) or problem}")
    config = json.loads(content)
    # Only Keras 3 writes the module of a class.
    if "module" not in config:
        raise ModelError(f"{key} {_written_by_keras_2(config.get('keras_version', '2'))}")
    with _one_line_errors(key, "the architecture"), suppressed_warnings():
        objects = _custom_objects(model)
        if not model.trusted:
            _check_safe(config, objects, path)
        network = keras.saving.deserialize_keras_object(
            config, objects, safe_mode=not model.trusted
        )
    if not isinstance(network, keras.Model):
        raise ModelError(
            f"{key} describes a {type(network).__name__}, expected a keras.Model; create the file "
            "with model.to_json()"
        )
    return KerasNetwork(network, key, model.checkpoint, recreate=lambda: load_json(model))


def _read_config(content: bytes, form: str) -> tuple[Any, str | None]:
    """Return the configuration of a Keras file and the name of a part in another file, or None."""
    if form == "keras":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            config = archive.read("config.json")
            with archive.open(WEIGHTS) as weights, h5py.File(weights) as file:
                return json.loads(config), hdf5_files.external_part(file)
    with h5py.File(io.BytesIO(content)) as file:
        config = file.attrs.get("model_config")
        return None if config is None else json.loads(config), hdf5_files.external_part(file)


def _check_safe(config: Any, objects: dict[str, Any], path: str) -> None:
    """Raise ModelError for an architecture that can run code or read other files."""
    if (part := keras_config.unsafe_part(config, objects)) is not None:
        raise untrusted(path, part)


def _saved_model(path: str, key: str, model: ModelConfig) -> Network:
    if not os.path.exists(os.path.join(path, "saved_model.pb")):
        raise ModelError(
            f"{key} is a folder without saved_model.pb; set it to the folder of a SavedModel"
        )
    parts = [os.path.join(path, "saved_model.pb"), *glob.glob(f"{glob.escape(path)}/variables/*")]
    if (problem := first_stand_in(parts)) is not None:
        raise ModelError(f"{key}: {problem}")
    with _one_line_errors(key, "the SavedModel"), suppressed_warnings():
        if not model.trusted and (part := saved_model_graph.unsafe_part(path)) is not None:
            raise untrusted(model.model_file or "", part)
        return SavedNetwork(tf.saved_model.load(path), key)


def _describe_format(path: str, content: bytes) -> str:
    """Return the format of a file that is not a Keras network, and advice."""
    if os.path.basename(path) == "saved_model.pb":
        return "a part of a SavedModel; set it to the folder that contains the file"
    if content[4:8] == b"TFL3":
        return "a TensorFlow Lite file, which is unsupported; use the file it was converted from"
    unknown = "not a .keras file, HDF5 file or SavedModel folder; use model.save('name.keras')"
    return describe(content) or unknown


def _custom_objects(model: ModelConfig) -> dict[str, Any]:
    """Return the layers and functions of class_file, to which a saved network can refer."""
    if model.class_file is None:
        return {}
    try:
        names = load_names(model.class_file, "model_config.class_file")
    except JobError as error:
        raise ModelError(str(error)) from error
    return {name: value for name, value in names.items() if callable(value)}


@contextmanager
def default_dtype(dtype: str | None) -> Iterator[None]:
    """Set the dtype of weights and computations of layers created inside a `with` block."""
    previous_policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype or previous_policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(previous_policy)


@contextmanager
def _one_line_errors(key: str, subject: str) -> Iterator[None]:
    """Convert errors of loading to ModelError with advice."""
    try:
        yield
    except ModelError:
        raise
    except keras_config.UnknownObjectError as error:
        raise ModelError(f"{key}: {_unknown_object(str(error))}") from error
    except Exception as error:
        if match := re.search(r"Could not locate (?:class|function) '(\w+)'", str(error)):
            problem = _unknown_object(match[1])
        else:
            problem = (
                f"TensorFlow {tf.__version__} with Keras {keras.__version__} cannot load {subject} "
                f"({type(error).__name__}: {reason(error)}); save it again with these versions"
            )
        raise ModelError(f"{key}: {problem}") from error


def _written_by_keras_2(version: str) -> str:
    return (
        f"was written by Keras {version}, which Keras {keras.__version__} cannot read; load it "
        "with Keras 2 (the package tf_keras), write a SavedModel with model.export(path), and use "
        "type: file"
    )


def _unknown_object(name: str) -> str:
    if name == "Functional":  # in another module since Keras 3
        return f"the file {_written_by_keras_2('2')}"
    return (
        f"unknown layer or function {name!r}; set model_config.class_file to the Python file that "
        "defines it, or use type: class"
    )


def _is_plain(value: Any) -> bool:
    """Return whether an attribute of a layer is an array, a tensor or a float, but no variable."""
    if isinstance(value, (keras.Variable, tf.Variable)):
        return False
    return isinstance(value, (float, np.ndarray)) or tf.is_tensor(value)


def _is_tile_norm(layer: Any) -> bool:
    """Return whether a layer normalizes with statistics of the current patch."""
    name = type(layer).__name__
    if name == "LayerNormalization":
        axis = getattr(layer, "axis", -1)
        return not isinstance(axis, int) and len(axis) > 1  # one axis: the channels
    return name in TILE_NORMS


LOADERS: MappingProxyType[str, Callable[[ModelConfig], Network]] = MappingProxyType(
    {"class": load_class, "file": load_file, "json": load_json}
)
"""Type -> loader. Loaders raise ModelError."""
