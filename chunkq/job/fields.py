"""Types of the fields of a job file, what each key means, and the base class of its sections."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from chunkq.geometry.axes import LETTERS
from chunkq.geometry.position_range import RANGE

Group = Literal[
    "Input and output",
    "Patches",
    "Empty space",
    "Combination",
    "Outputs",
    "Images",
    "Chunks and workers",
    "Network",
    "Batches",
    "Device and speed",
    "Cluster",
]
"""Heading under which the reference lists a key, in this order."""
UNIT, OMITTED, SEE, GROUP = "x-unit", "x-omitted", "x-see", "x-group"
"""Keywords of the JSON schema that hold the arguments of `key_doc`."""


def key_doc(
    group: Group,
    description: str,
    *,
    example: object,
    unit: str | None,
    omitted: str | None = None,
    see: str | None = None,
) -> Any:
    """Return the metadata of a key of the job file, for `Annotated`.

    The JSON schema, `chunkq explain` and the page reference/job-file.md are made of them.
    `omitted` is what applies without the key, where its default is None. `see` is a page below
    docs/, with an anchor. The first sentence of the description is shown in lists.
    """
    extra: dict[str, Any] = {GROUP: group, UNIT: unit}
    extra |= {} if omitted is None else {OMITTED: omitted}
    extra |= {} if see is None else {SEE: see}
    return Field(description=description, examples=[example], json_schema_extra=extra)


def anonymous_doc(group: Group) -> Any:
    """Return the metadata of a key `anonymous`."""
    return key_doc(
        group,
        "Whether to send no credentials. For `s3://` and `gs://`.",
        example=True,
        unit=None,
    )


def requester_pays_doc(group: Group) -> Any:
    """Return the metadata of a key `requester_pays`."""
    return key_doc(
        group,
        "Whether your account pays for the requests. For `s3://` and `gs://`.",
        example=True,
        unit=None,
    )


InferenceType = Literal["patch", "sliding_window", "crop_margin", "image"]


Dtype = Literal["float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64"]


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _as_nested_tuple(value: object) -> object:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


def _as_tuple_of_names(value: object) -> object:
    return (value,) if isinstance(value, str) else _as_tuple(value)


MAX_INTEGER = 1 << 40
"""Largest integer in a job file. Sums of several such lengths stay exact in 64-bit arithmetic."""


Positive = Annotated[int, Field(gt=0, le=MAX_INTEGER)]


NonNegative = Annotated[int, Field(ge=0, le=MAX_INTEGER)]


Offset = Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]


Shape = Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


ONE_SHAPE, BY_HEAD = "one shape", "shapes by head"
"""Tags of the branches of `OutputShape`."""


def _kind_of_output_shape(value: object) -> str:
    return BY_HEAD if isinstance(value, dict) else ONE_SHAPE


def _with_text_keys(value: object) -> object:
    """Return a mapping with texts as keys, as JSON has them."""
    return {str(key): one for key, one in value.items()} if isinstance(value, dict) else value


OutputShape = Annotated[
    Annotated[Shape, Tag(ONE_SHAPE)]
    | Annotated[
        dict[str, Shape],
        BeforeValidator(_with_text_keys),
        Field(min_length=1),
        Tag(BY_HEAD),
    ],
    Discriminator(_kind_of_output_shape),
]


Widths = Annotated[tuple[NonNegative, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


def _as_region(value: object) -> object:
    """Return a region as a tuple. Raise PydanticCustomError if it is none."""
    region = _as_nested_tuple(value)
    if isinstance(region, tuple) and region and all(map(_is_bounds, region)):
        return region
    raise PydanticCustomError(
        "region", "expected one entry per spatial axis, each [start, stop] or null"
    )


def _is_bounds(value: object) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(n is None or (type(n) is int and abs(n) <= MAX_INTEGER) for n in value)
    )


Bound = Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)] | None


Bounds = tuple[Bound, Bound] | None


Region = Annotated[tuple[Bounds, ...], Field(min_length=1), BeforeValidator(_as_region)]


def bounds_of(bounds: Bounds, size: int) -> tuple[int, int]:
    """Return the start and stop of the bounds along an axis of `size` voxels.

    Negative ones count from the end, null ones are the ends of the axis. They are not checked.
    """
    start, stop = bounds or (None, None)
    start, stop = 0 if start is None else start, size if stop is None else stop
    return start + size * (start < 0), stop + size * (stop < 0)


def printed_bounds(bounds: Bounds) -> str:
    """Return bounds as a job file has them."""
    return "null" if bounds is None else json.dumps(bounds)


Offsets = Annotated[tuple[tuple[Offset, ...], ...], BeforeValidator(_as_nested_tuple)]


Folders = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    Field(min_length=1, max_length=2),
    BeforeValidator(_as_tuple_of_names, json_schema_input_type=str | tuple[str, ...]),
]
Names = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    BeforeValidator(_as_tuple_of_names, json_schema_input_type=str | tuple[str, ...]),
]


class Section(BaseModel):
    """Section of the job file: immutable, without unknown keys and type conversions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), defer_build=True
    )


LABEL = re.compile(r"(?=.*[^\W\d])[^:,\[\]]+")
"""Texts that can only be the name of a channel: neither an index nor a range or list of them."""


def _as_picks(value: object) -> object:
    """Return picks with a list as a tuple. Raise PydanticCustomError if they are none."""
    entries = _as_tuple(value)
    is_range = isinstance(entries, str) and RANGE.fullmatch(entries) is not None
    is_list = isinstance(entries, tuple) and all(map(_is_index_or_label, entries)) and entries
    if is_range or is_list or (_is_index_or_label(entries) and not isinstance(entries, str)):
        return entries
    raise PydanticCustomError("picks", "expected a list, an index, or a range such as '0:3'")


def _as_channels(value: object) -> object:
    """Return `_as_picks`, also of a single label that can be no number and no range."""
    if isinstance(value, str) and LABEL.fullmatch(value) and value.lower() != "all":
        return (value,)
    return _as_picks(value)


def _is_index_or_label(value: object) -> bool:
    is_index = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INTEGER
    return is_index or isinstance(value, str)


def _as_level(value: object) -> object:
    if _is_index_or_label(value) and value != "":
        return value
    raise PydanticCustomError("level", "expected the number or path of a level")


def _as_letters(value: object) -> object:
    is_text = isinstance(value, str) and 0 < len(value) == len(set(value)) and value.isascii()
    if is_text and set(str(value)) <= set(LETTERS):
        return value
    raise PydanticCustomError("letters", f"expected different letters of {LETTERS}")


Letters = Annotated[str, BeforeValidator(_as_letters)]


Level = Annotated[int | str, BeforeValidator(_as_level)]


def _as_orientation(value: object) -> object:
    pairs = [pair for letter in str(value) for pair in ("RL", "AP", "SI") if letter in pair]
    if isinstance(value, str) and len(value) == 3 and len(set(pairs)) == 3:
        return value
    raise PydanticCustomError(
        "orientation", "expected R or L, A or P, and S or I, in the order of x, y and z"
    )


Orientation = Annotated[str, BeforeValidator(_as_orientation)]


Picks = Annotated[int | str | tuple[int | str, ...], BeforeValidator(_as_picks)]
Channels = Annotated[int | str | tuple[int | str, ...], BeforeValidator(_as_channels)]


def is_number(value: object) -> bool:
    """Return whether a value is an integer or a float, and no boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


Fill = Annotated[float, Field(allow_inf_nan=False)]


def _as_scales(value: object) -> object:
    """Return numbers as a tuple. Raise PydanticCustomError if they are no positive numbers."""
    entries = _as_tuple(value)
    if isinstance(entries, tuple) and entries and all(map(_is_scale, entries)):
        return tuple(map(float, entries))
    raise PydanticCustomError("scales", "expected a list of positive numbers")


def _is_scale(value: object) -> bool:
    return isinstance(value, (int, float)) and is_number(value) and 0 < value <= MAX_INTEGER


Scales = Annotated[tuple[float, ...], BeforeValidator(_as_scales)]
