"""Create networks from the user's Python code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from chunkq.errors import JobError, ModelError
from chunkq.job.model_config import ModelConfig
from chunkq.job.user_code import load_names, one_line, select_name, sibling_imports
from chunkq.paths import read_bytes
from chunkq_worker.runtimes.formats import USES, format_of

CLASS_FILE = "model_config.class_file"


def create_network(model: ModelConfig) -> Any:
    """Call `class_name` of `class_file` with the kwargs of `kwargs_file`; return the result.

    Raise ModelError if the code or its arguments are unusable.
    """
    definition, kwargs = load_definition(model)
    return instantiate(definition, kwargs, model)


def load_definition(model: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """Return `class_name` of `class_file` and the kwargs of `kwargs_file`, or raise ModelError."""
    path, name = model.class_file or "", model.class_name or ""
    try:
        definition = select_name(_names(path), name, path, "model_config.class_name")
        return definition, _kwargs(model.kwargs_file)
    except JobError as error:
        raise ModelError(str(error)) from error


def instantiate(
    definition: Callable[..., Any], kwargs: Mapping[str, Any], model: ModelConfig
) -> Any:
    """Call the definition with the kwargs. Raise ModelError if it raises."""
    try:
        with sibling_imports(model.class_file or ""):
            return definition(**kwargs)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"model_config.class_name: {model.class_name}(**kwargs) raised "
            f"{one_line(error)[:300]}; fix the class or its kwargs {sorted(kwargs)}"
        ) from error


def _names(path: str) -> dict[str, Any]:
    try:
        return load_names(path, CLASS_FILE)
    except JobError as error:
        other = _other_format(path)
        raise ModelError(f"{CLASS_FILE}: {path} is {other}" if other else str(error)) from error


def _other_format(path: str) -> str | None:
    """Return the format of a model file and the keys to use it with, None if it is unknown."""
    try:
        name = format_of(read_bytes(path))
    except OSError:
        return None
    return None if name is None else USES[name]


def _kwargs(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    key = "model_config.kwargs_file"
    kwargs = select_name(load_names(path, key), "kwargs", path, key)
    if not isinstance(kwargs, dict):
        raise ModelError(f"{key}: `kwargs` in {path} is {type(kwargs).__name__}; expected a dict")
    return kwargs
