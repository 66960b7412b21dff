"""The NumPy runtime: networks that are a class or a function of a Python file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq.blend.combine import Array
from chunkq.errors import ModelError
from chunkq.job.model_config import ModelConfig
from chunkq_worker.created_values import file_values, values_of
from chunkq_worker.runtimes.base import Runtime
from chunkq_worker.runtimes.classes import instantiate, load_definition, source_of
from chunkq_worker.runtimes.host_runtime import HostRuntime
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.thread_limit import ThreadLimit
from chunkq_worker.steps import Steps

Network = Callable[[npt.NDArray[Any]], Any]


class NumpyRuntime(HostRuntime):
    """Calls `network` with a batch (N, *model_input_shape); it returns (N, *model_output_shape).

    The batch is a writable array in C order. Its dtype is the job's unless the protected step
    returns another. The network may modify it. `limit` applies to the steps and the network.
    """

    any_batch = True
    draws_from_known_states = True

    def __init__(
        self,
        network: Network,
        model: ModelConfig,
        steps: Steps,
        shapes: ItemShapes,
        limit: ThreadLimit,
        *,
        is_object: bool = False,
    ) -> None:
        super().__init__(model, steps, shapes)
        self._is_object = is_object
        self._model = model
        self._network: Network | None = network
        self._limit = limit

    @override
    def __call__(self, batch: npt.NDArray[Any]) -> tuple[Array, ...]:
        with self._limit.applied():
            return super().__call__(batch)

    @override
    def _run(self, inputs: Array) -> Any:
        if self._network is None:
            raise ModelError("the network is closed")
        return self._reader.from_network(self._network(np.require(inputs, requirements=["C", "W"])))

    @override
    def created_values(self) -> Sequence[tuple[str, Any]]:
        if self._network is None or self._is_object:
            return []
        return _values(self._network)

    @override
    def recreated_values(self) -> Sequence[tuple[str, Any]]:
        return _values(_network(self._model))

    @override
    def close(self) -> None:
        self._network = None


def load(
    model: ModelConfig,
    steps: Steps,
    threads: int | None,
    shapes: ItemShapes,
    *,
    network: Any = None,
) -> Runtime:
    """Load the class or function that the job names, or use `network`; or raise ModelError."""
    limit = ThreadLimit(threads)
    if network is not None:
        _check_call(network, {}, f"model: {model.class_name}")
        return NumpyRuntime(network, model, steps, shapes, limit, is_object=True)
    with limit.applied():
        return NumpyRuntime(_network(model), model, steps, shapes, limit)


def _values(network: Network) -> list[tuple[str, Any]]:
    """Return the arrays and floats of an instance or a function, and of its file's names."""
    function: Any = network.func if isinstance(network, partial) else network
    call = function if inspect.isfunction(function) else vars(type(function)).get("__call__")
    return [*values_of(getattr(function, "__dict__", {}), ""), *file_values(call)]


def _network(model: ModelConfig) -> Network:
    """Return an instance of the class, or the function with the kwargs bound to it."""
    definition, kwargs = load_definition(model)
    key = source_of(model)
    if not callable(definition):
        raise ModelError(f"{key} is {type(definition).__name__}; expected a class or a function")
    if not isinstance(definition, type):
        _check_call(definition, kwargs, key)
        return partial(definition, **kwargs)
    network: Network = instantiate(definition, kwargs, model)
    if not callable(network):
        raise ModelError(
            f"{key} is a class whose instances are not callable; add __call__(self, batch)"
        )
    _check_call(network, {}, key)
    return network


def _check_call(network: Callable[..., Any], kwargs: Mapping[str, Any], key: str) -> None:
    """Raise ModelError unless the network can be called with one batch and the kwargs."""
    try:
        signature = inspect.signature(network)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind(None, **kwargs)
    except TypeError as error:
        names = f" and the kwargs {sorted(kwargs)}" if kwargs else ""
        is_file = key.startswith("model_config")
        raise ModelError(
            f"{key} cannot be called with one batch{names}: {error}; fix its parameters"
            + (" or kwargs_file" if is_file else "")
        ) from error
