"""Networks of TensorFlow and Keras out of the files that a job names: one loader per type."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from typing_extensions import override

from chunkq.errors import JobError, ModelError
from chunkq.job import ModelConfig
from chunkq.user_code import load_names
from chunkq_worker.runtimes import hdf5_files, keras_config, saved_model_graph
from chunkq_worker.runtimes.classes import create_network
from chunkq_worker.runtimes.formats import USES, format_of
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
            load_checkpoint(self._model, self._checkpoint)
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
        made = create_network(model)
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
    with local_copy(path, key) as local:
        if os.path.isdir(local):
            return _saved_model(local, key, model)
        content = content_of(local, key)
        found = format_of(content)
        if found not in ("keras", "keras_h5"):
            raise ModelError(f"{key} is {_what_else(local, content, found)}")
        suffix = ".keras" if found == "keras" else ".h5"
        with (
            with_suffix(local, suffix) as file,
            _explained(key, "the network"),
            suppressed_warnings(),
        ):
            own = _own_objects(model)
            config, foreign = _parts(content, found)
            if config is None:
                raise ModelError(
                    f"{key} holds weights only; use type: class or json with it as checkpoint, or "
                    "save the network with model.save('name.keras')"
                )
            if not model.trusted:
                _expect_safe(config, own, path)
                if foreign is not None:
                    raise untrusted(path, f"keeps {foreign} in another file")
            loaded = keras.models.load_model(file, own, compile=False, safe_mode=not model.trusted)
    return KerasNetwork(loaded, key)


def load_json(model: ModelConfig) -> Network:
    """Make a network from its architecture; without a checkpoint its weights are random."""
    path = model.json_file or ""
    key = f"model_config.json_file: {path}"
    with local_copy(path, key) as local:
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
    with _explained(key, "the architecture"), suppressed_warnings():
        own = _own_objects(model)
        if not model.trusted:
            _expect_safe(values, own, path)
        made = keras.saving.deserialize_keras_object(values, own, safe_mode=not model.trusted)
    if not isinstance(made, keras.Model):
        raise ModelError(f"{key} describes a {type(made).__name__}, which is no keras.Model")
    return KerasNetwork(made, key, model.checkpoint)


def _parts(content: bytes, form: str) -> tuple[Any, str | None]:
    """Return a Keras file's configuration, if it holds one, and its weights outside of it."""
    if form == "keras":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            config = archive.read("config.json")
            with archive.open(WEIGHTS) as weights, h5py.File(weights) as file:
                return json.loads(config), hdf5_files.foreign_part(file)
    with h5py.File(io.BytesIO(content)) as file:
        written = file.attrs.get("model_config")
        return None if written is None else json.loads(written), hdf5_files.foreign_part(file)


def _expect_safe(config: Any, own: dict[str, Any], path: str) -> None:
    """Raise ModelError for an architecture that can run code or read other files."""
    if (part := keras_config.unsafe_part(config, own)) is not None:
        raise untrusted(path, part)


def _saved_model(path: str, key: str, model: ModelConfig) -> Network:
    if not os.path.exists(os.path.join(path, "saved_model.pb")):
        raise ModelError(f"{key} is a directory without saved_model.pb, so no SavedModel")
    with _explained(key, "the SavedModel"), suppressed_warnings():
        if not model.trusted and (part := saved_model_graph.unsafe_part(path)) is not None:
            raise untrusted(model.model_file or "", part)
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
    except keras_config.UnknownObjectError as error:
        raise ModelError(f"{key}: {_unknown(str(error))}") from error
    except Exception as error:
        if own := re.search(r"Could not locate (?:class|function) '(\w+)'", str(error)):
            hint = _unknown(own[1])
        else:
            hint = (
                f"TensorFlow {tf.__version__} with Keras {keras.__version__} cannot load {what} "
                f"({type(error).__name__}: {reason(error)}); save it again with these versions"
            )
        raise ModelError(f"{key}: {hint}") from error


def _unknown(name: str) -> str:
    return (
        f"it uses {name}, which Keras does not know; name the Python file that defines it as "
        "model_config.class_file, or use type: class"
    )


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
