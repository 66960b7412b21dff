"""Values of a network that its code sets when it is created, and whether they are random.

A network without a checkpoint, or with values that its checkpoint lacks, is created a second time
in another random state. Different values mean that every worker would compute with other ones.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.errors import ErrorCode, ModelError
from chunkq.job.model_config import ModelConfig
from chunkq.job.user_modules import MODULE_PREFIX, UserModules
from chunkq_worker.random_state import other_random_state
from chunkq_worker.runtimes.base import Runtime

log = logging.getLogger("chunkq.worker")
RELATIVE_TOLERANCE = 1e-5
"""Difference that the arithmetic of an initialization can cause."""
MAX_ENTRIES = 1 << 12
"""Entries of a list or dict that are searched for values."""
Values = Sequence[tuple[str, Any]]
"""Names and values in a fixed order: arrays, floats, or None for one that is not set yet."""


def check_created_values(runtime: Runtime, model: ModelConfig) -> None:
    """Raise ModelError if the code of a loaded network sets random values."""
    values = runtime.created_values()
    if not values:
        return
    modules = UserModules()
    try:
        with modules.collect(), other_random_state():
            others = runtime.recreated_values()
    except Exception as error:  # code that can run only once per process
        log.debug("the network cannot be created a second time: %s", error)
        return
    modules.release()
    names = _differing(values, others)
    if not names:
        return
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    source, advice = _source_and_advice(model)
    raise ModelError(
        f"{source} {len(names)} values that the code of the network sets are random ({listed}), so "
        f"every worker would compute with other ones; {advice}, or set a fixed seed in the code",
        code=ErrorCode.MODEL_RANDOM,
    )


def _source_and_advice(model: ModelConfig) -> tuple[str, str]:
    """Return where the values of a network come from, and how to make them the same everywhere."""
    saved = model.checkpoint or model.model_file
    if saved is not None:
        key = "checkpoint" if model.checkpoint is not None else "model_file"
        return f"model_config.{key}: {saved} is incomplete:", "save them with the weights"
    if model.runtime == "numpy":
        file = "" if model.class_file is None else f"class_file: {model.class_file}"
        name = file or f"class_name: {model.class_name}"
        return f"model_config.{name}:", "load them from a file"
    return "model_config.checkpoint: missing:", "set checkpoint"


def values_of(owner: Any, name: str, depth: int = 4) -> Iterator[tuple[str, Any]]:
    """Yield the arrays, tensors and floats in an object, its containers and its user's objects."""
    if isinstance(owner, (float, np.floating, np.ndarray)) or _is_tensor(owner):
        yield name, owner
    elif depth and isinstance(owner, dict) and len(owner) <= MAX_ENTRIES:
        for key, value in owner.items():
            yield from values_of(value, f"{name}.{key}" if name else str(key), depth - 1)
    elif depth and isinstance(owner, (list, tuple)) and len(owner) <= MAX_ENTRIES:
        for number, value in enumerate(owner):
            yield from values_of(value, f"{name}.{number}", depth - 1)
    elif depth and type(owner).__module__.startswith(MODULE_PREFIX):
        yield from values_of(getattr(owner, "__dict__", {}), name, depth - 1)


def file_values(call: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values that a function of the user's file refers to: its globals and closure."""
    call = inspect.unwrap(call) if callable(call) else call
    if not str(getattr(call, "__module__", "")).startswith(MODULE_PREFIX):
        return
    yield from values_of([cell.cell_contents for cell in call.__closure__ or ()], "closure")
    names = getattr(call, "__globals__", {})
    yield from values_of({k: v for k, v in names.items() if not k.startswith("__")}, "")


def _is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor of torch or TensorFlow; they convert to NumPy."""
    return hasattr(value, "__array__") and hasattr(value, "shape") and hasattr(value, "dtype")


def _differing(values: Values, others: Values) -> list[str]:
    if len(values) != len(others):
        return [name for name, _ in values]
    pairs = zip(values, others, strict=True)
    return [name for (name, value), (_, other) in pairs if not _is_equal(value, other)]


def _is_equal(value: Any, other: Any) -> bool:
    if value is None or other is None:
        return False
    first, second = _as_numpy(value), _as_numpy(other)
    if first.shape != second.shape:
        return False
    if first.dtype.kind not in "biufc" or second.dtype.kind not in "biufc":
        return True
    return np.allclose(first, second, rtol=RELATIVE_TOLERANCE, atol=0, equal_nan=True)


def _as_numpy(value: Any) -> npt.NDArray[Any]:
    if hasattr(value, "detach"):  # torch; float64 also holds bfloat16
        value = value.detach().cpu()
        value = value.double().numpy() if value.dtype.is_floating_point else value.numpy()
    return np.asarray(value)
