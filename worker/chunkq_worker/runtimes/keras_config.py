"""Check a Keras configuration for parts that run code or read other files.

`safe_mode` of Keras depends on its version and on the file format: releases before 3.11.3 ignored
it for `.h5` files. This check depends on neither.
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
        "__typespec__": "a type that Keras imports by its module name",
    }
)
"""Class name -> description of an object that runs code."""
DATA = frozenset(
    {"__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__"}
)
"""Class names of serialized plain values."""
FILES = ("vocabulary", "idf_weights")
"""Keys of lookup layers whose value, if a string, is the path or URL of a file."""
FUNCTIONS = ("activations", "constraints", "initializers", "losses", "metrics", "regularizers")
NAMESPACES = (*FUNCTIONS, "dtype_policies", "layers", "models", "optimizers", "quantizers")
MODULE = re.compile(rf"keras(\.src)?(\.({'|'.join([*NAMESPACES, 'ops'])})(\.\w+)*)?")
"""Keras modules that define parts of networks."""

KERAS_2 = ("keras.engine.", "keras.src.engine.")
"""Modules of Keras 2 that Keras 3 does not have."""


class UnknownObjectError(Exception):
    """Neither Keras nor class_file defines an object. The argument is its name."""


def unsafe_part(config: Any, custom_objects: Mapping[str, Any]) -> str | None:
    """Return a description of a part that runs code or reads other files, None if there is none.

    `config` is a parsed configuration, `custom_objects` the objects of class_file by name. Raise
    UnknownObjectError for a class or function that neither Keras nor class_file defines.
    """
    for values in _mappings(config):
        for key in FILES:
            if isinstance(values.get(key), str):
                return f"contains a layer that reads the file {values[key]!r}"
        name = values.get("class_name")
        if "class_name" in values and "config" in values and name not in DATA:
            if not isinstance(name, str):
                return "contains an object whose class has no name"
            if (problem := _unsafe_object(name, values, custom_objects)) is not None:
                return problem
    return None


def _mappings(config: Any) -> Iterator[dict[str, Any]]:
    """Yield all mappings of a nested configuration."""
    pending = [config]
    while pending:
        values = pending.pop()
        if isinstance(values, dict):
            yield values
            pending.extend(values.values())
        elif isinstance(values, list):
            pending.extend(values)


def _unsafe_object(
    name: str, values: dict[str, Any], custom_objects: Mapping[str, Any]
) -> str | None:
    module, registered_name = values.get("module"), values.get("registered_name", name)
    for candidate in (name, registered_name):
        if isinstance(candidate, str) and candidate.rpartition(">")[2] in CODE:
            return f"contains {CODE[candidate.rpartition('>')[2]]}"
    if name == "function":
        function = values["config"]
        if not isinstance(function, str):
            return "contains a function without a name"
        is_custom = _custom_object(function, custom_objects)
        return None if is_custom else _unsafe_function(function, module)
    custom = _custom_object(name if module is None else registered_name, custom_objects)
    if custom is None:
        return _unsafe_class(name, module)
    return None if _is_class(custom) else f"calls {name} of class_file"


def _custom_object(name: Any, custom_objects: Mapping[str, Any]) -> Any:
    """Return the custom or registered object that Keras prefers for a name, or None."""
    return custom_objects.get(name) or _keras("saving").get_registered_object(name)


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
    if not _is_of_keras(module) or module.startswith(KERAS_2):
        raise UnknownObjectError(name)
    if MODULE.fullmatch(module) is None:
        return f"names {module}.{name}, which is not a part of a network"
    try:
        value = getattr(import_module(module), name, None)
    except ImportError:
        raise UnknownObjectError(name) from None
    if value is None:
        raise UnknownObjectError(name)
    return None if _is_class(value) else f"names {module}.{name}, which is not a part of a network"


def _is_of_keras(module: Any) -> bool:
    return isinstance(module, str) and (module == "keras" or module.startswith("keras."))


def _is_class(value: Any) -> bool:
    """Return whether Keras creates an object with `from_config`, not by calling it."""
    return isinstance(value, type) and hasattr(value, "from_config")


def _keras(namespace: str) -> Any:
    return import_module(f"keras.{namespace}")
