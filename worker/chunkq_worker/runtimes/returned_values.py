"""Find the prediction in what a network returns: the only array in its containers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from chunkq.errors import ModelError
from chunkq_worker.steps import KEY

STEP = "postprocessing_protected"
NO_ARRAYS = (bool, int, float, complex, str, bytes)
MAX_LISTED = 6
"""Arrays that an error lists."""
NAME = "outputs"
"""Name of what the network returned, in errors."""


def prediction_in(
    returned: Any, is_array: Callable[[Any], bool], kind: str, *, has_step: bool
) -> Any:
    """Return the only array in what a network returned.

    It can be in tuples, lists, mappings and dataclasses, beside None, numbers and strings. Of
    several arrays a step picks one: with `has_step`, return all that the network returned. `kind`
    is the name of an array in errors. Raise ModelError if there is no array, or if nothing picks
    one.
    """
    if is_array(returned):
        return returned
    values = dict(_values(returned, NAME))
    arrays = {name: value for name, value in values.items() if is_array(value)}
    if len(arrays) == 1 == len(values):
        return next(iter(arrays.values()))
    if has_step and arrays:
        return returned
    source = f"the network returned {type(returned).__name__}"
    if not arrays:
        raise ModelError(
            f"{source}, expected one {kind}; wrap the network so that it returns the prediction"
        )
    shapes = [_describe(name, value) for name, value in values.items()]
    more = f", and {len(shapes) - MAX_LISTED} more" if len(shapes) > MAX_LISTED else ""
    raise ModelError(
        f"{source} with {len(values)} values, {', '.join(shapes[:MAX_LISTED])}{more}; expected one "
        f"{kind}: return the prediction in {STEP}({NAME}) of {KEY}, for example "
        f"{next(iter(arrays))}"
    )


def _values(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the arrays and unknown objects in a value, each with the expression that reads it."""
    if isinstance(value, Mapping):
        parts = [(f"{name}[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = [(f"{name}.{field}", getattr(value, field)) for field in value._fields]
    elif isinstance(value, (tuple, list)):
        parts = [(f"{name}[{number}]", part) for number, part in enumerate(value)]
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [(f"{name}.{f.name}", getattr(value, f.name)) for f in fields(value)]
    else:
        if value is not None and not isinstance(value, NO_ARRAYS):
            yield name, value
        return
    for part_name, part in parts:
        yield from _values(part, part_name)


def _describe(name: str, value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{name} {type(value).__name__ if shape is None else list(shape)}"
