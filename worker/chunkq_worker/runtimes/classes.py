"""Create networks from the user's Python code, or from a class of an installed package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib import import_module
from typing import Any

from chunkq.errors import JobError, ModelError
from chunkq.job.model_config import ModelConfig
from chunkq.job.user_code import load_names, one_line, select_name, sibling_imports
from chunkq.paths import read_bytes
from chunkq_worker.runtimes.formats import USES, format_of
from chunkq_worker.runtimes.stand_ins import stand_in

CLASS_FILE = "model_config.class_file"
CLASS_NAME = "model_config.class_name"


def create_network(model: ModelConfig) -> Any:
    """Call the class or function that the job names with the kwargs of `kwargs_file`.

    Raise ModelError if the code or its arguments are unusable.
    """
    definition, kwargs = load_definition(model)
    return instantiate(definition, kwargs, model)


def load_definition(model: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """Return the class or function that the job names and the kwargs of `kwargs_file`.

    The name is one of `class_file`, or of an installed package. Raise ModelError if a file or the
    name is unusable.
    """
    if model.class_package is None:
        path, name = model.class_file or "", model.class_name or ""
        definition = _name_of_file(path, name, CLASS_FILE, CLASS_NAME)
    else:
        definition = _name_of_package(model.class_name or "", model.class_package)
    return definition, _kwargs(model.kwargs_file)


def source_of(model: ModelConfig) -> str:
    """Return the key, the class or function, and the file that defines it, for messages."""
    file = "" if model.class_file is None else f" of {model.class_file}"
    return f"{CLASS_NAME}: {model.class_name}{file}"


def instantiate(
    definition: Callable[..., Any], kwargs: Mapping[str, Any], model: ModelConfig
) -> Any:
    """Call the definition with the kwargs. Raise ModelError if it raises."""
    try:
        with nullcontext() if model.class_file is None else sibling_imports(model.class_file):
            return definition(**kwargs)
    except (Exception, SystemExit) as error:
        hint = (
            f"fix the class or its arguments ({', '.join(sorted(kwargs))}) in kwargs_file"
            if kwargs
            else "fix the class, or set its arguments in model_config.kwargs_file"
        )
        raise ModelError(
            f"{CLASS_NAME}: {model.class_name}(**kwargs) raised {one_line(error)[:300]}; {hint}"
        ) from error


def _name_of_file(path: str, name: str, file_key: str, name_key: str) -> Any:
    """Return a name of a Python file. Raise ModelError if the file is unusable or lacks it."""
    try:
        return select_name(load_names(path, file_key), name, path, name_key)
    except JobError as error:
        other = _other_format(path)  # the error reply of a server can be valid Python
        raise ModelError(f"{file_key}: {path} is {other}" if other else str(error)) from error


def _other_format(path: str) -> str | None:
    """Return what a file is that contains no Python code, and what to do; None if unknown."""
    try:
        content = read_bytes(path)
    except OSError:
        return None
    name = format_of(content)
    return stand_in(content) if name is None else USES[name]


def _name_of_package(full_name: str, package: str) -> Any:
    """Import a class or function of an installed package, or raise ModelError."""
    module, _, name = full_name.rpartition(".")
    key = f"{CLASS_NAME}: {full_name}"
    try:
        imported = import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            problem = f"the package {package} is not installed; install it, or set class_file"
        elif f"{module}.".startswith(f"{error.name}."):
            problem = f"{package} has no module {error.name}; fix the name"
        else:  # a dependency of the package
            problem = f"{module} requires {error.name}, which is not installed; install it"
        raise ModelError(f"{key}: {problem}") from error
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"{key}: importing {module} raised {one_line(error)[:300]}; fix the installation"
        ) from error
    if not hasattr(imported, name):
        raise ModelError(f"{key}: {module} has no {name!r}; fix the name")
    return getattr(imported, name)


def _kwargs(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    key = "model_config.kwargs_file"
    kwargs = _name_of_file(path, "kwargs", key, key)
    if not isinstance(kwargs, dict):
        raise ModelError(f"{key}: `kwargs` in {path} is {type(kwargs).__name__}; expected a dict")
    return kwargs
