"""Convert frozen dataclasses to JSON and back, with strict validation.

Fields may be dataclasses, tuples and mappings of them. Reading raises ValueError for a missing or
unknown key, a value of another type (a number in quotes, a fraction for an integer) and text that
is not valid Unicode. Nothing is coerced, except that an integer is a valid `float` and an array
is a valid tuple.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter
from pydantic_core import to_json

T = TypeVar("T")
CONFIG = ConfigDict(strict=True, extra="forbid", ser_json_inf_nan="constants")


def to_values(record: Any) -> dict[str, Any]:
    """Return a dataclass as a mapping of JSON values. Raises TypeError for values of other types.

    Unlike the other functions it needs no schema, which takes milliseconds to build for each class.
    """
    return {each.name: _value(getattr(record, each.name)) for each in fields(record)}


def from_values(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return the dataclass of decoded JSON values. Raise ValueError if they do not match it."""
    # In JSON mode, strict validation accepts arrays for tuples.
    record: T = _only(cls, to_json([values]))
    return record


def encode(record: Any) -> bytes:
    """Return a dataclass as JSON on one line, in UTF-8."""
    return _adapter(record.__class__).dump_json([record])[1:-1]


def decode(cls: type[T], text: str | bytes) -> T:
    """Return the dataclass of a JSON text. Raise ValueError if the text does not match it."""
    content = text.encode() if isinstance(text, str) else text
    record: T = _only(cls, b"[%b]" % content)
    return record


def _value(value: Any) -> Any:
    """Return a value of a field as a JSON value."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value.value if isinstance(value, Enum) else value)
    if isinstance(value, (tuple, list)):
        return [_value(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _value(each) for key, each in value.items()}
    if is_dataclass(value):
        return to_values(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _only(cls: Any, text: bytes) -> Any:
    """Return the dataclass in a JSON array of one."""
    [record] = _adapter(cls).validate_json(text)
    return record


@cache
def _adapter(cls: Any) -> TypeAdapter[list[Any]]:
    # Pydantic accepts a configuration for a list of dataclasses, but none for a dataclass.
    return TypeAdapter(list[cls], config=CONFIG)
