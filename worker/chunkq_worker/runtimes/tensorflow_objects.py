"""Keras models and TensorFlow functions that a caller passes as objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

from typing_extensions import override

from chunkq.errors import ErrorCode, ModelError
from chunkq.job.fields import Dtype
from chunkq.job.model_config import ModelConfig
from chunkq_worker.runtimes.tensorflow_files import KerasNetwork, Network
from chunkq_worker.runtimes.tensorflow_import import keras


class FunctionNetwork(Network):
    """A function of a batch of tensors."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    @override
    def __call__(self, batch: Any) -> Any:
        return self._function(batch)

    @override
    def prepare(self, batch: Any) -> None:
        """Do nothing: the caller has built the function."""


def object_network(network: Any, model: ModelConfig) -> Network:
    """Return the network of an object. Its variables are used as they are at each batch.

    Raise ModelError for a Keras model whose weights the first batch would create.
    """
    key = f"model: {model.class_name}"
    if not getattr(network, "built", True):
        raise ModelError(
            f"{key} is not built, and the first batch would create random weights; call it on one "
            "batch and load its weights first",
            code=ErrorCode.MODEL_RANDOM,
        )
    if isinstance(network, keras.Model):
        return KerasNetwork(network, key, is_saved=True)
    if hasattr(network, "layers"):  # a model of Keras 2
        return FunctionNetwork(lambda batch: network(batch, training=False))
    return FunctionNetwork(network)


def keras_defaults(network: Any) -> dict[str, Any]:
    """Return the keys `device` and `dtype` of `model_config` that match a Keras model."""
    defaults: dict[str, Any] = {}
    weights = getattr(network, "weights", None) or ()
    devices = [str(getattr(getattr(w, "value", w), "device", "")) for w in weights]
    if any("GPU" in device for device in devices):
        defaults["device"] = "cuda"
    inputs = getattr(network, "inputs", None) or ()
    dtype = str(getattr(inputs[0], "dtype", "")) if inputs else ""
    if dtype in get_args(Dtype):
        defaults["dtype"] = dtype
    return defaults


def weights_of(network: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of the weights of a Keras model, or of a TensorFlow module."""
    weights = getattr(network, "weights", None) or getattr(network, "variables", None) or ()
    for number, weight in enumerate(weights):
        yield str(number), weight.numpy().tobytes()
