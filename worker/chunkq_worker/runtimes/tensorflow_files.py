"""Networks of TensorFlow and Keras out of the files that a job names: one loader per type."""

from __future__ import annotations

import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from typing_extensions import override

from chunkq.errors import JobError, ModelError
from chunkq.job import ModelConfig
from chunkq.userfile import load_names
from chunkq_worker.runtimes.classes import make
from chunkq_worker.runtimes.formats import USES, format_of
from chunkq_worker.runtimes.tensorflow_import import h5py, keras, tf
from chunkq_worker.runtimes.tensorflow_reading import (
    content_of,
    fetched,
    named,
    quiet,
    reason,
)
from chunkq_worker.runtimes.tensorflow_weights import load_weights

NORMS = ("GroupNormalization", "InstanceNormalization", "LayerNormalization")
ALONE = "a network takes one batch and gives the prediction alone"


class Network(ABC):
    """What is called with a batch; `takes` is a (shape, dtype) that it declares, or None."""

    takes: tuple[Sequence[int | None], str] | None = None

    @abstractmethod
    def __call__(self, given: Any) -> Any:
        """Return what the network makes of a tensor; traced once per shape."""

    @abstractmethod
    def prepare(self, given: Any) -> None:
        """See a batch before the first call; raises ModelError."""

    def tile_norms(self) -> tuple[str, ...]:
        """Return the layers that normalise by the tile's own statistics, as far as known."""
        return ()


class KerasNetwork(Network):
    """A Keras model, in inference mode.

    Its variables exist once it was built, which may need a batch; then come its weights. `dtype`
    is that of the layers it makes meanwhile; None for Keras's default.
    """

    def __init__(
        self, model: Any, key: str, checkpoint: str | None = None, dtype: str | None = None
    ) -> None:
        self._model, self._checkpoint, self._dtype = model, checkpoint, dtype
        self._ready = False
        inputs = getattr(model, "inputs", None) or ()
        if len(inputs) > 1:
            raise ModelError(f"{key} has {len(inputs)} inputs; {ALONE}")
        if inputs:
            self.takes = (tuple(inputs[0].shape), str(inputs[0].dtype))

    @override
    def __call__(self, given: Any) -> Any:
        with layers_of(self._dtype):
            return self._model(given, training=False)

    @override
    def prepare(self, given: Any) -> None:
        if self._ready:
            return
        if not self._model.built:
            self(given[:1])
        if self._checkpoint is not None:
            load_weights(self._model, self._checkpoint)
        self._ready = True

    @override
    def tile_norms(self) -> tuple[str, ...]:
        layers = self._model._flatten_layers(include_self=False)
        found = [(layer.name, type(layer).__name__) for layer in layers if _is_tile_norm(layer)]
        return tuple(f"{name} ({kind})" for name, kind in found)


class SavedNetwork(Network):
    """The serving signature of a SavedModel."""

    def __init__(self, loaded: Any, key: str) -> None:
        self._loaded = loaded  # its functions do not keep its variables alive
        signatures = loaded.signatures
        name = "serving_default" if "serving_default" in signatures else next(iter(signatures), "")
        if not name:
            raise ModelError(
                f"{key} has no serving signature; save it with model.export(path), or with "
                "signatures= given to tf.saved_model.save"
            )
        self._signature = signatures[name]
        inputs = self._signature.structured_input_signature[1]
        outputs = self._signature.structured_outputs
        for what, verb, names in (("inputs", "takes", inputs), ("outputs", "gives", outputs)):
            if len(names) != 1:
                listed = ", ".join(sorted(names)) or "none"
                raise ModelError(
                    f"{key}: signature {name} {verb} {len(names)} {what} ({listed}); {ALONE}"
                )
        [(self._input, spec)] = inputs.items()
        shape: Sequence[int | None] = (None,) if spec.shape.rank is None else tuple(spec.shape)
        self.takes = (shape, spec.dtype.name)

    @override
    def prepare(self, given: Any) -> None:
        """Nothing is left to do."""

    @override
    def __call__(self, given: Any) -> Any:
        shape, dtype = self.takes or ((), "")
        if given.dtype.name != dtype:
            raise ModelError(
                f"model_config.dtype: {given.dtype.name}, but the network takes {dtype}; write "
                f"dtype: {dtype}"
            )
        if len(shape) == given.shape.rank + 1 and shape[-1] == 1:
            given = given[..., None]  # as Keras's own models do
        if not tf.TensorShape(shape).is_compatible_with(given.shape) and shape != (None,):
            raise ValueError("its serving signature takes another shape")
        return self._signature(**{self._input: given})


def load_class(model: ModelConfig) -> Network:
    """Make the user's class in the job's dtype; the checkpoint waits for the first batch."""
    dtype = model.dtype if model.dtype.startswith("float") else None
    with layers_of(dtype):
        made = make(model)
    key = f"model_config.class_name: {model.class_name} of {model.class_file}"
    if not isinstance(made, keras.Model):
        old = type(made).__module__.startswith("tf_keras")
        raise ModelError(
            f"{key} gave {type(made).__name__}, which is no keras.Model"
            + (" of Keras 3 but one of Keras 2; export it as SavedModel" if old else "")
        )
    return KerasNetwork(made, key, model.checkpoint, dtype)


def load_file(model: ModelConfig) -> Network:
    """Load a whole network: a .keras or HDF5 file, or a SavedModel's directory."""
    path = model.model_file or ""
    key = f"model_config.model_file: {path}"
    with fetched(path, key) as local:
        if os.path.isdir(local):
            return _saved_model(local, key)
        content = content_of(local, key)
        found = format_of(content)
        if found not in ("keras", "keras_h5"):
            raise ModelError(f"{key} is {_what_else(local, content, found)}")
        suffix = ".keras" if found == "keras" else ".h5"
        with named(local, suffix) as file, _explained(key, "the network"), quiet():
            if found == "keras_h5" and "model_config" not in h5py.File(io.BytesIO(content)).attrs:
                raise ModelError(
                    f"{key} holds weights only; use type: class or json with it as checkpoint, or "
                    "save the network with model.save('name.keras')"
                )
            loaded = keras.models.load_model(
                file, _own_objects(model), compile=False, safe_mode=not model.trusted
            )
    return KerasNetwork(loaded, key)


def load_json(model: ModelConfig) -> Network:
    """Make a network from its architecture; without a checkpoint its weights are random."""
    path = model.json_file or ""
    key = f"model_config.json_file: {path}"
    with fetched(path, key) as local:
        content = content_of(local, key)
    found = format_of(content)
    if found != "keras_json":
        what = USES[found] if found else "no architecture; write one with model.to_json()"
        raise ModelError(f"{key} is {what}")
    values = json.loads(content)
    # Keras 3 alone says where a class is to be found.
    if "module" not in values:
        raise ModelError(
            f"{key} was written by Keras {values.get('keras_version', '2')}, which Keras "
            f"{keras.__version__} cannot read; load it with Keras 2 (the package tf_keras), write "
            "a SavedModel with model.export(path), and use type: file"
        )
    with _explained(key, "the architecture"), quiet():
        made = keras.saving.deserialize_keras_object(
            values, _own_objects(model), safe_mode=not model.trusted
        )
    if not isinstance(made, keras.Model):
        raise ModelError(f"{key} describes a {type(made).__name__}, which is no keras.Model")
    return KerasNetwork(made, key, model.checkpoint)


def _saved_model(path: str, key: str) -> Network:
    if not os.path.exists(os.path.join(path, "saved_model.pb")):
        raise ModelError(f"{key} is a directory without saved_model.pb, so no SavedModel")
    with _explained(key, "the SavedModel"), quiet():
        return SavedNetwork(tf.saved_model.load(path), key)


def _what_else(path: str, content: bytes, found: str | None) -> str:
    if os.path.basename(path) == "saved_model.pb":
        return "a part of a SavedModel; name the directory that it lies in"
    if found is not None:
        return USES[found]
    if content[4:8] == b"TFL3":
        return "a TensorFlow Lite file, which is not for chunkq; name what it was converted from"
    return "no .keras or HDF5 file and no directory of a SavedModel; use model.save('name.keras')"


def _own_objects(model: ModelConfig) -> dict[str, Any]:
    """Return the user's own layers and functions that a saved network may refer to."""
    if model.class_file is None:
        return {}
    try:
        names = load_names(model.class_file, "model_config.class_file")
    except JobError as error:
        raise ModelError(str(error)) from error
    return {name: value for name, value in names.items() if callable(value)}


@contextmanager
def layers_of(dtype: str | None) -> Iterator[None]:
    """Have Keras make layers that compute in this dtype and hold their weights in it."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype or before)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


@contextmanager
def _explained(key: str, what: str) -> Iterator[None]:
    """Turn what loading raises into one line that says what to do."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        said = str(error)
        if "safe_mode" in said or "unsafe" in said:
            hint = (
                "it holds a Lambda layer or other Python code, which can do anything when it is "
                "loaded; set model_config.trusted: true if you know where it comes from"
            )
        elif own := re.search(r"Could not locate (?:class|function) '(\w+)'", said):
            hint = (
                f"it uses {own[1]}, which Keras does not know; name the Python file that defines "
                "it as model_config.class_file, or use type: class"
            )
        else:
            hint = (
                f"TensorFlow {tf.__version__} with Keras {keras.__version__} cannot load {what} "
                f"({type(error).__name__}: {reason(error)}); save it again with these versions"
            )
        raise ModelError(f"{key}: {hint}") from error


def _is_tile_norm(layer: Any) -> bool:
    kind = type(layer).__name__
    if kind == "LayerNormalization":
        axis = getattr(layer, "axis", -1)
        return not isinstance(axis, int) and len(axis) > 1  # else over the channels alone
    return kind in NORMS


LOADERS: MappingProxyType[str, Callable[[ModelConfig], Network]] = MappingProxyType(
    {"class": load_class, "file": load_file, "json": load_json}
)
"""Type -> loader; each raises ModelError in one line."""
