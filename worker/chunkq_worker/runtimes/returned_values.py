"""Find the predictions in what a network returns: its only array, or the heads that a job names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from chunkq.errors import ErrorCode, ModelError
from chunkq.plan.outputs import HeadName
from chunkq_worker.steps import KEY

STEP = "postprocessing_protected"
NO_ARRAYS = (bool, int, float, complex, str, bytes)
MAX_LISTED = 6
"""Arrays that an error lists."""
NAME = "outputs"
"""Name of what the network returned, in errors."""


class HeadReader:
    """Reads the arrays of heads from what a network, or the step behind it, returns.

    heads      the heads to read; None is the only array, which has no name
    is_array   whether an object is an array of the framework
    kind       name of an array in errors
    has_step   whether a protected step gets what the network returns
    unused     heads of the last return value that are not read
    """

    def __init__(
        self,
        heads: Sequence[HeadName],
        is_array: Callable[[Any], bool],
        kind: str,
        *,
        has_step: bool,
    ) -> None:
        self.heads = tuple(heads)
        self.unused: tuple[HeadName, ...] = ()
        self._is_array, self._kind, self._has_step = is_array, kind, has_step

    def from_network(self, returned: Any) -> Any:
        """Return what follows the network gets: a tuple with the array of each head.

        If there is a protected step, it gets the only array, or all that the network returned if
        there are several or if heads have names. Raise ModelError if a head is missing.
        """
        if not self._has_step:
            return self.arrays(returned)
        if self.heads != (None,):
            return returned
        return prediction_in(returned, self._is_array, self._kind, has_step=True)

    def from_step(self, returned: Any) -> tuple[Any, ...]:
        """Return the array of each head from what the protected step returned."""
        if self.heads == (None,):
            return (returned,)
        return self.arrays(returned, f"{STEP} of {KEY}")

    def arrays(self, returned: Any, source: str = "the network") -> tuple[Any, ...]:
        """Return the array of each head. Raise ModelError if one is missing, or is no array."""
        if self.heads == (None,):
            return (prediction_in(returned, self._is_array, self._kind, has_step=False),)
        parts = heads_of(returned)
        self.unused = tuple(
            name
            for number, (name, part) in enumerate(parts.items())
            if not {name, _alias(returned, number)} & {*self.heads} and self._has_array(part)
        )
        return tuple(self._array(returned, parts, head, source) for head in self.heads)

    def _array(
        self, returned: Any, parts: Mapping[HeadName, Any], head: HeadName, source: str
    ) -> Any:
        if head is not None:
            names = {_alias(returned, number): name for number, name in enumerate(parts)}
            part = parts.get(head, parts.get(names.get(head)))
            if part is None:
                raise self._missing(returned, parts, head, source)
            returned, source = part, f"{source}, in head {head!r},"
        return prediction_in(returned, self._is_array, self._kind, has_step=False, source=source)

    def _has_array(self, part: Any) -> bool:
        return any(self._is_array(value) for _, value in _values(part, NAME))

    def _missing(
        self, returned: Any, parts: Mapping[HeadName, Any], head: HeadName, source: str
    ) -> ModelError:
        names = [name for name, part in parts.items() if self._has_array(part)]
        if names:
            problem = f"no head {head!r} in what {source} returned, which has {listed(names)}"
            return missing_head(f"{problem}; use one of these as head, or fix the network")
        problem = f"{source} returned {type(returned).__name__}, which has no head {head!r}"
        if self._is_array(returned):
            problem = f"{source} returned one {self._kind}, which has no head {head!r}"
            return missing_head(f"{problem}; remove head, or fix the network")
        return missing_head(f"{problem}; return a dict, tuple, list or dataclass of {self._kind}s")


def missing_head(problem: str) -> ModelError:
    """Return the error for a network without a head that an output names."""
    return ModelError(f"outputs: {problem}", code=ErrorCode.HEAD_MISSING)


def prediction_in(
    returned: Any,
    is_array: Callable[[Any], bool],
    kind: str,
    *,
    has_step: bool,
    source: str = "the network",
) -> Any:
    """Return the only array in what a network returned.

    It can be in tuples, lists, mappings and dataclasses, beside None, numbers and strings. Of
    several arrays a step picks one: with `has_step`, return all that the network returned. `kind`
    is the name of an array in errors, and `source` what returned it. Raise ModelError if there is
    no array, or if nothing picks one.
    """
    if is_array(returned):
        return returned
    values = dict(_values(returned, NAME))
    arrays = {name: value for name, value in values.items() if is_array(value)}
    if len(arrays) == 1 == len(values):
        return next(iter(arrays.values()))
    if has_step and arrays:
        return returned
    source = f"{source} returned {type(returned).__name__}"
    if not arrays:
        raise ModelError(
            f"{source}, expected one {kind}; wrap the network so that it returns the prediction"
        )
    shapes = [_describe(name, value) for name, value in values.items()]
    more = f", and {len(shapes) - MAX_LISTED} more" if len(shapes) > MAX_LISTED else ""
    head = next((head for head, part in heads_of(returned).items() if is_array(part)), None)
    remedy = "" if head is None else f"name one as head of an output, for example head: {head}, or "
    raise ModelError(
        f"{source} with {len(values)} values, {', '.join(shapes[:MAX_LISTED])}{more}; expected one "
        f"{kind}: {remedy}return the prediction in {STEP}({NAME}) of {KEY}, for example "
        f"{next(iter(arrays))}"
    )


def listed(heads: Sequence[HeadName]) -> str:
    """Return names of heads for a message: `'seg', 'edges' and 2`."""
    names = [repr(head) for head in heads]
    if len(names) > MAX_LISTED:
        names = [*names[:MAX_LISTED], f"{len(names) - MAX_LISTED} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def unused_note(unused: Sequence[HeadName]) -> list[str]:
    """Return a line that lists heads which the network returns and no output names."""
    if not unused:
        return []
    return [f"the network also returns {listed(unused)}, which no output names as head"]


def heads_of(returned: Any) -> dict[HeadName, Any]:
    """Return the parts of a return value by what names them as `head`; empty for an array.

    Keys name the parts of a mapping, fields those of a namedtuple or a dataclass, and numbers from
    0 those of another tuple or of a list.
    """
    if isinstance(returned, Mapping):
        return dict(returned)
    if isinstance(returned, tuple) and hasattr(returned, "_fields"):
        return {name: getattr(returned, name) for name in returned._fields}
    if isinstance(returned, (tuple, list)):
        return dict(enumerate(returned))
    if is_dataclass(returned) and not isinstance(returned, type):
        return {field.name: getattr(returned, field.name) for field in fields(returned)}
    return {}


def _alias(returned: Any, number: int) -> HeadName:
    """Return the other name of part `number`: its index in a namedtuple; None without one."""
    return number if isinstance(returned, tuple) and hasattr(returned, "_fields") else None


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
