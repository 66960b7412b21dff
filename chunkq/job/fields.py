"""Types of the fields of a job file, what each key means, and the base class of its sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)

from chunkq.access import Access

Group = Literal[
    "Input and output",
    "Patches",
    "Combination",
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


InferenceType = Literal["patch", "sliding_window", "crop_margin"]


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


Classes = Annotated[int, Field(ge=2, le=1 << 16)]


NonNegative = Annotated[int, Field(ge=0, le=MAX_INTEGER)]


Offset = Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]


Shape = Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


Widths = Annotated[tuple[NonNegative, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


Offsets = Annotated[tuple[tuple[Offset, ...], ...], BeforeValidator(_as_nested_tuple)]


Names = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    BeforeValidator(_as_tuple_of_names, json_schema_input_type=str | tuple[str, ...]),
]


class Section(BaseModel):
    """Section of the job file: immutable, without unknown keys and type conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class InputConfig(Section):
    """An input, and how it is accessed."""

    path: str
    anonymous: bool = False
    requester_pays: bool = False

    @property
    def access(self) -> Access:
        """How the path is accessed."""
        return Access(self.anonymous, self.requester_pays)


def _kind_of_input(value: object) -> str:
    return "mapping" if isinstance(value, (dict, InputConfig)) else "path"


def _as_inputs(value: object) -> object:
    """Return one input or a list of inputs as a tuple."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_as_path, value))
    return (_as_path(value),) if isinstance(value, (str, dict, InputConfig)) else value


def _as_path(value: object) -> object:
    """Return the path of a mapping that has nothing else."""
    return value["path"] if isinstance(value, dict) and set(value) == {"path"} else value


Input = Annotated[
    Annotated[str, Tag("path")] | Annotated[InputConfig, Tag("mapping")],
    Discriminator(_kind_of_input),
]


Inputs = Annotated[
    tuple[Input, ...],
    Field(min_length=1),
    BeforeValidator(_as_inputs, json_schema_input_type=Input | tuple[Input, ...]),
]
