"""Networks that a caller passes as Python objects: the runtime and the keys that fit each."""

from __future__ import annotations

import hashlib
import importlib.util
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from chunkq.errors import ArgumentError, JobError, ModelError
from chunkq_worker.imported_classes import class_name, is_instance

STAND_IN = "chunkq_worker.runtimes.python_object"
"""Module whose file a job names in place of code that is an object."""
FILE_KEYS = (
    "type", "class_file", "class_name", "kwargs_file", "checkpoint", "model_file", "ts_file",
    "json_file", "trusted",
)  # fmt: skip
"""Keys of `model_config` that describe the file of a network."""
EXPECTED = (
    "expected the path of a model file, a torch.nn.Module, a Keras model, or a function of a batch "
    "of NumPy arrays"
)


@dataclass(frozen=True)
class NetworkObject:
    """A network, the runtime that runs it, its name in messages, and its `model_config` keys.

    `keys` are defaults. `token` distinguishes the objects of this and of all other processes.
    """

    network: Any
    runtime: str
    name: str
    keys: Mapping[str, Any]
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def model_config(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Return `model_config` with the caller's keys; raise JobError for keys of files."""
        if unused := [key for key in FILE_KEYS if keys.get(key) is not None]:
            raise JobError(
                [
                    f"model_config.{key}: unsupported for a network that is an object; remove it"
                    for key in unused
                ]
            )
        runtime = keys.get("runtime") or self.runtime
        if runtime != self.runtime:
            raise JobError(
                f"model_config.runtime: {runtime} cannot run {self.name}; remove it, or use "
                f"{self.runtime}"
            )
        set_keys = {key: value for key, value in keys.items() if value is not None}
        own = {"type": "class", "class_file": stand_in(), "class_name": self.name}
        return {**self.keys, **set_keys, "runtime": runtime, **own}

    def identity(self) -> str:
        """Return a hash that changes with the object and with its weights."""
        digest = hashlib.sha256(self.token.encode())
        for name, content in self._weights():
            digest.update(name.encode())
            digest.update(content)
        return digest.hexdigest()

    def _weights(self) -> Iterator[tuple[str, bytes]]:
        if self.runtime == "torch":
            from chunkq_worker.runtimes.torch_objects import weights_of
        elif self.runtime == "tensorflow":
            from chunkq_worker.runtimes.tensorflow_objects import weights_of
        else:
            return iter(())
        return weights_of(self.network)


def stand_in() -> str:
    """Return the path of the file that a job names in place of code that is an object."""
    spec = importlib.util.find_spec(STAND_IN)
    if spec is None or spec.origin is None:
        raise ModelError(f"model: chunkq is installed without {STAND_IN}; install it again")
    return spec.origin


def network_object(model: Any, runtime: str | None = None) -> NetworkObject:
    """Recognize a network that is no path. `runtime` chooses that of a function, else NumPy.

    Raise ArgumentError for other objects.
    """
    name = str(getattr(model, "__name__", type(model).__name__)).strip("<>")
    if isinstance(model, type):
        raise ArgumentError(
            f"model: found the class {name}, {EXPECTED}; pass an instance, {name}()"
        )
    if is_instance(model, "torch", "nn.Module", "jit.ScriptFunction"):
        from chunkq_worker.runtimes.torch_objects import module_defaults

        return NetworkObject(model, "torch", name, module_defaults(model))
    if is_instance(model, "keras", "Model", "Layer") or _is_tensorflow(model):
        from chunkq_worker.runtimes.tensorflow_objects import keras_defaults

        return NetworkObject(model, "tensorflow", name, keras_defaults(model))
    if not callable(model):
        hint = ""
        if isinstance(model, Mapping) and any(hasattr(v, "shape") for v in model.values()):
            hint = "; a state_dict has weights only: pass the network after load_state_dict"
        raise ArgumentError(f"model: found {class_name(model)}, {EXPECTED}{hint}")
    return NetworkObject(
        model, runtime if runtime in ("torch", "tensorflow") else "numpy", name, {}
    )


def _is_tensorflow(model: Any) -> bool:
    """Return whether an object is a module, a function or a SavedModel of TensorFlow or Keras 2."""
    return callable(model) and (
        is_instance(model, "tensorflow", "Module")
        or is_instance(model, "tf_keras", "Model")
        or type(model).__module__.startswith("tensorflow.")
    )
