"""Errors of pydantic in a job file as lines for users: where, what is wrong, what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from chunkq.job import hints
from chunkq.job.cluster_config import DaskConfig, RayConfig
from chunkq.job.fields import BY_HEAD, ONE_SHAPE, Section
from chunkq.job.image_config import ImageConfig, PeaksConfig, TruthConfig
from chunkq.job.input_config import InputConfig
from chunkq.job.job_file import Job
from chunkq.job.mask_config import MaskConfig
from chunkq.job.model_config import ModelConfig
from chunkq.job.output_config import CodecConfig, OutputConfig, PyramidConfig
from chunkq.job.printed_value import printed_value

SECTIONS: Mapping[str, type[Section]] = MappingProxyType(
    {
        "": Job,
        "model_config": ModelConfig,
        "input": InputConfig,
        "mask": MaskConfig,
        "dask_config": DaskConfig,
        "ray_config": RayConfig,
        "outputs": OutputConfig,
        "image": ImageConfig,
        "truth": TruthConfig,
        "peaks": PeaksConfig,
        "pyramid": PyramidConfig,
        "codec": CodecConfig,
    }
)
"""Key of a section, '' for the top level -> its model."""


def _names(section: type[Section]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _key_of(location: Sequence[int | str]) -> tuple[str, str]:
    """Return the section and the key of a value of the job file."""
    names = [part for part in location if isinstance(part, str)]
    if names[:1] == ["outputs"]:
        del names[1:2]  # the name of an output
    is_inner = len(names) > 1 and names[0] in SECTIONS
    return (names[0], names[1]) if is_inner else ("", names[0] if names else "")


def _example(location: Sequence[int | str]) -> str:
    """Return `; use a value such as EXAMPLE` for a key, or ''."""
    example = _example_value(location)
    if isinstance(example, dict):
        return f"; `chunkq explain {_key_of(location)[1]}` has an example"
    return "" if example is None else f"; use a value such as {json.dumps(example)}"


def _example_value(location: Sequence[int | str]) -> object:
    section, key = _key_of(location)
    fields = SECTIONS[section].model_fields
    field = next((f for name, f in fields.items() if key == (f.alias or name)), None)
    return None if field is None or not field.examples else field.examples[0]


_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "model_type": "a mapping",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than_equal": "a number of at most {le}",
    "too_short": "a list of at least {min_length} item",
    "too_long": "a list of at most {max_length} items",
}
"""pydantic's error type -> the expected value."""
_LITERAL = re.compile(r"'[^']*'|\d+")
_REPLACED_KEYS = {"model_config.autocast": "precision"}
"""Key of an earlier version -> the key that has its values."""


def without_branches(
    location: tuple[int | str, ...], *, has_one_input: bool
) -> tuple[int | str, ...]:
    """Return pydantic's location of an error without the parts that name a branch of a union."""
    if location[:1] == ("input",):
        first = 1 if has_one_input else 2
        location = (*location[:first], *location[3:])
    fixed = 2 if location[:1] == ("outputs",) else 0  # an output can have any name
    branches = ("int", "float", ONE_SHAPE, BY_HEAD)
    rest = (part for part in location[fixed:] if part not in branches)
    return (*location[:fixed], *rest)


def error_line(error: Any) -> str:
    """Format one of pydantic's errors as `key.path: what is wrong; what to do`."""
    location = error["loc"]
    path = ".".join(map(str, location)) or "a key"
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    section, key = _key_of(location)
    if kind == "extra_forbidden":
        if path in _REPLACED_KEYS:
            return f"{path}: unknown key; did you mean {_REPLACED_KEYS[path]!r}?"
        names = {one: _names(model) for one, model in SECTIONS.items()}
        return f"{path}: unknown key{hints.key_hint(str(location[-1]), section, names)}"
    if kind == "missing":
        return f"{path}: missing; set it (`chunkq explain {path}` has an example)"
    printed = "no value" if value is None else printed_value(value)
    if kind == "literal_error":
        texts = _LITERAL.findall(str(context["expected"]))
        legal = [text.strip("'") if text.startswith("'") else int(text) for text in texts]
        hint = hints.value_hint(key, value, legal)
        problem = "missing value" if value is None else f"invalid value {printed}"
        return f"{path}: {problem}; expected one of {', '.join(map(repr, legal))}{hint}"
    if kind in _EXPECTED:
        expected = _EXPECTED[kind].format(**context)
        if path == "input" and kind == "tuple_type":
            expected = "a path, a mapping with path, or a list of them"
        return f"{path}: expected {expected}, found {printed}{_typed_hint(location, kind, value)}"
    message, hint = str(error["msg"]), ""
    if kind == "picks":
        hint = hints.picks_hint(value, has_labels=key == "channels")
    elif kind == "letters":
        hint = hints.letters_hint(value)
    elif kind == "classes" and isinstance(value, (str, float)):
        hint = hints.number_hint(value, is_integer=True)
    hint = hint or _example(location)
    return f"{path}: {message[0].lower()}{message[1:]}, found {printed}{hint}"


def _typed_hint(location: Sequence[int | str], kind: str, value: object) -> str:
    """Return what to do about a value of a wrong type or out of its range."""
    if kind == "bool_type":
        return hints.flag_hint(value) or ("; set one, or remove the key" if value is None else "")
    example = _example_value(location)
    is_of_integers = isinstance(example, list) and all(isinstance(n, int) for n in example)
    if kind == "tuple_type" and is_of_integers and (hint := hints.list_hint(value)):
        return hint
    if kind in ("int_type", "float_type") and isinstance(value, (str, float)):
        return hints.number_hint(value, is_integer=kind == "int_type") or _example(location)
    return _example(location)
