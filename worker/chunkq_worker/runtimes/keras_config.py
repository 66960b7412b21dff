"""Check a Keras configuration for parts that run code or read other files.

Keras's `safe_mode` depends on its version and on the file format: `.h5` files ignored it before
3.11.3. These rules do not depend on either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

CODE = MappingProxyType(
    {
        "Lambda": "a Lambda layer, which runs Python code",
        "__lambda__": "a Python function as bytecode",
        "TorchModuleWrapper": "a TorchModuleWrapper, which unpickles a PyTorch module",
        "TFSMLayer": "a TFSMLayer, which loads another SavedModel",
        "JaxLayer": "a JaxLayer, which runs Python code",
        "FlaxLayer": "a FlaxLayer, which runs Python code",
        "__typespec__": "a type that Keras imports by its module's name",
    }
)
"""Class name -> what the object does."""
DATA = frozenset(
    {"__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__"}
)
"""Class names that stand for plain values."""
FILES = ("vocabulary", "idf_weights")
"""Keys of lookup layers; a string there is the path or URL of a file."""
FUNCTIONS = ("activations", "constraints", "initializers", "losses", "metrics", "regularizers")
NAMESPACES = (*FUNCTIONS, "dtype_policies", "layers", "models", "optimizers", "quantizers")
MODULE = re.compile(rf"keras(\.src)?(\.({'|'.join([*NAMESPACES, 'ops'])})(\.\w+)*)?")
"""Modules of Keras that hold what networks are made of."""


class UnknownObjectError(Exception):
    """Neither Keras nor the user's class_file defines an object; the argument is its name."""


def unsafe_part(config: Any, own: Mapping[str, Any]) -> str | None:
    """Return what in a parsed configuration runs code or reads other files; None if nothing does.

    `own` holds the objects of the user's class_file, by name. Raises UnknownObjectError for a
    class or function that is in neither.
    """
    for values in _mappings(config):
        for key in FILES:
            if isinstance(values.get(key), str):
                return f"holds a layer that reads the file {values[key]!r}"
        name = values.get("class_name")
        if "class_name" in values and "config" in values and name not in DATA:
            if not isinstance(name, str):
                return "holds an object whose class has no name"
            if (problem := _unsafe_object(name, values, own)) is not None:
                return problem
    return None


def _mappings(config: Any) -> Iterator[dict[str, Any]]:
    waiting = [config]
    while waiting:
        values = waiting.pop()
        if isinstance(values, dict):
            yield values
            waiting.extend(values.values())
        elif isinstance(values, list):
            waiting.extend(values)


def _unsafe_object(name: str, values: dict[str, Any], own: Mapping[str, Any]) -> str | None:
    module, registered = values.get("module"), values.get("registered_name", name)
    for known in (name, registered):
        if isinstance(known, str) and known.rpartition(">")[2] in CODE:
            return f"holds {CODE[known.rpartition('>')[2]]}"
    if name == "function":
        function = values["config"]
        if not isinstance(function, str):
            return "holds a function without a name"
        return None if _own_object(function, own) else _unsafe_function(function, module)
    found = _own_object(name if module is None else registered, own)
    if found is None:
        return _unsafe_class(name, module)
    return None if _is_class(found) else f"calls {name} of class_file"


def _own_object(name: Any, own: Mapping[str, Any]) -> Any:
    """Return the object that Keras takes for a name before its own ones, or None."""
    return own.get(name) or _keras("saving").get_registered_object(name)


def _unsafe_function(name: str, module: Any) -> str | None:
    if module in (None, "builtins"):
        if any(callable(getattr(_keras(space), name, None)) for space in FUNCTIONS):
            return None
        raise UnknownObjectError(name)
    if not _is_of_keras(module):
        raise UnknownObjectError(name)
    space = module.removeprefix("keras.").removeprefix("src.").partition(".")[0]
    if space in (*FUNCTIONS, "ops"):
        return None
    return f"names the function {module}.{name}"


def _unsafe_class(name: str, module: Any) -> str | None:
    if module is None:  # the format of Keras 2
        spaces = [_keras(space) for space in NAMESPACES]
        if name == "Functional" or any(_is_class(getattr(s, name, None)) for s in spaces):
            return None
        raise UnknownObjectError(name)
    if not _is_of_keras(module):
        raise UnknownObjectError(name)
    if MODULE.fullmatch(module) is None:
        return f"names {module}.{name}, which is no part of a network"
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:
        raise UnknownObjectError(name) from None
    if found is None:
        raise UnknownObjectError(name)
    return None if _is_class(found) else f"names {module}.{name}, which is no part of a network"


def _is_of_keras(module: Any) -> bool:
    return isinstance(module, str) and (module == "keras" or module.startswith("keras."))


def _is_class(value: Any) -> bool:
    """Tell whether Keras makes an object by `from_config`, not by a call with the file's values."""
    return isinstance(value, type) and hasattr(value, "from_config")


def _keras(namespace: str) -> Any:
    return import_module(f"keras.{namespace}")
