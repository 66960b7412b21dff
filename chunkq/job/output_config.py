"""The keys of one named output of a job, and of what is made of every output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from chunkq.job.fields import MAX_INTEGER, Fill, Picks, Positive, Section, Shape, key_doc
from chunkq.plan.outputs import Activation, Combine
from chunkq.storage.codecs import DEFAULT_CODEC, MAX_LEVEL, Codec

NAME = re.compile(r"[A-Za-z0-9_-]+")
"""Name of an output: also the name of its image in a group."""
RESERVED = frozenset({"labels", "OME"})
"""Names that OME-Zarr gives a meaning in a group."""
NAME_PLACEHOLDER = "NAME"
"""Part of a key's path that stands for the name of an output."""
MAX_CLASSES, MAX_LEVELS = 1 << 16, 32

OutputDtype = Literal["float32", "float16", "uint8", "uint16", "int8", "int16"]


def _as_names(value: object) -> object:
    """Return outputs ordered by name. Raise PydanticCustomError if a name is invalid."""
    if not isinstance(value, Mapping):
        raise PydanticCustomError("outputs", "expected a mapping of names to outputs")
    if not value:
        raise PydanticCustomError("outputs", "expected at least one output")
    for name in value:
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in RESERVED:
            raise PydanticCustomError(
                "output_name",
                "{name} is no name of an output; use letters, digits, _ and -, and neither labels "
                "nor OME",
                {"name": repr(name)},
            )
    return {name: {} if value[name] is None else value[name] for name in sorted(value)}


def _as_range(value: object) -> object:
    """Return a range of values as a tuple. Raise PydanticCustomError if it is none."""
    bounds = tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(bounds) == 2 and all(map(_is_finite, bounds)) and bounds[0] < bounds[1]:
        return float(bounds[0]), float(bounds[1])
    raise PydanticCustomError("value_range", "expected [low, high] with low < high")


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < float("inf")  # type: ignore[arg-type]


def _as_scale(value: object) -> object:
    """Return factors as a tuple. Raise PydanticCustomError if they are none."""
    entries = tuple(value) if isinstance(value, (list, tuple)) else ()
    if entries and all(map(_is_factor, entries)):
        return entries
    raise PydanticCustomError(
        "factors", "expected one factor per spatial axis, an integer or a fraction such as '1/2'"
    )


def _is_factor(value: object) -> bool:
    if isinstance(value, str):
        match = re.fullmatch(r"([1-9]\d{0,11})(?:/([1-9]\d{0,11}))?", value)
        return match is not None and max(int(n) for n in match.groups("1")) <= MAX_INTEGER
    return type(value) is int and 0 < value <= MAX_INTEGER


def _as_classes(value: object) -> object:
    """Return classes as a number or a tuple of names. Raise PydanticCustomError otherwise."""
    names = tuple(value) if isinstance(value, (list, tuple)) else ()
    are_names = names and all(isinstance(n, str) and n.strip() for n in names)
    if are_names and len(set(names)) == len(names) <= MAX_CLASSES:
        return names
    if type(value) is int and 2 <= value <= MAX_CLASSES:
        return value
    raise PydanticCustomError(
        "classes",
        "expected the number of classes, from 2 on, a list of different names, or a file with one "
        "name per line",
    )


def _as_levels(value: object) -> object:
    if value == "auto" or (type(value) is int and 1 <= value <= MAX_LEVELS):
        return value
    raise PydanticCustomError("levels", "expected auto, or a number of levels from 1 to 32")


def _as_codec(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class CodecConfig(Section):
    """How storage chunks are compressed."""

    name: Annotated[
        Literal["lz4", "zstd", "none"],
        key_doc("Outputs", "Codec of the storage chunks.", example="zstd", unit=None),
    ]
    level: Annotated[
        Annotated[int, Field(ge=1, le=MAX_LEVEL)] | None,
        key_doc(
            "Outputs",
            "Level of Blosc, from 1 to 9; a higher one takes more time and less space. Not for "
            "`none`.",
            example=5,
            unit=None,
            omitted="5 for `lz4`, 1 for `zstd`",
        ),
    ] = None


Levels = Annotated[
    int | Literal["auto"],
    BeforeValidator(_as_levels, json_schema_input_type=Positive | Literal["auto"]),
]


class PyramidConfig(Section):
    """The resolution levels of the outputs."""

    levels: Annotated[
        Levels,
        key_doc(
            "Outputs",
            "Number of levels, the full resolution included. `auto`: until every axis fits into "
            "one storage chunk.",
            example=5,
            unit="levels",
        ),
    ] = "auto"
    method: Annotated[
        Literal["mean", "mode", "nearest"] | None,
        key_doc(
            "Outputs",
            "What a voxel of a level is of those of the level before: their mean, the most "
            "frequent of them, or the first.",
            example="nearest",
            unit=None,
            omitted="`mode` for labels, else `mean`",
        ),
    ] = None


Classes = Annotated[
    int | tuple[str, ...],
    BeforeValidator(_as_classes, json_schema_input_type=int | tuple[str, ...] | str),
]
ValueRange = Annotated[tuple[float, float], BeforeValidator(_as_range)]
Scale = Annotated[tuple[int | str, ...], BeforeValidator(_as_scale)]
CodecKey = Annotated[
    CodecConfig, BeforeValidator(_as_codec, json_schema_input_type=str | CodecConfig)
]


class OutputConfig(Section):
    """One named output: what of the network's predictions is stored, and how."""

    head: Annotated[
        str | int | None,
        key_doc(
            "Outputs",
            "Key or index of the output in the tuple, list, dict or dataclass that the network "
            "returns.",
            example="distance",
            unit=None,
            omitted="the network returns one array",
        ),
    ] = None
    channels: Annotated[
        Picks | None,
        key_doc(
            "Outputs",
            "Channels of what the network returns: a list of indices, one index, or a half-open "
            "range. `activation` is applied to these channels alone.",
            example="0:3",
            unit=None,
            omitted="all",
        ),
    ] = None
    combine: Annotated[
        Combine,
        key_doc(
            "Outputs",
            "How overlapping predictions become one value, as the key `combine` of a job with one "
            "output.",
            example="soft",
            unit=None,
            see="concepts.md#combination",
        ),
    ] = "weighted_avg"
    activation: Annotated[
        Activation,
        key_doc(
            "Outputs",
            "Function that is applied to each prediction before predictions are combined.",
            example="softmax",
            unit=None,
        ),
    ] = "none"
    activation_after: Annotated[
        Activation | None,
        key_doc(
            "Outputs",
            "Function that is applied to the averages. Only for `combine` `weighted_avg`.",
            example="softmax",
            unit=None,
            omitted="none",
        ),
    ] = None
    output_dtype: Annotated[
        OutputDtype | None,
        key_doc(
            "Outputs",
            "Dtype of the output. Integers store the values of `range`. Not for labels.",
            example="uint8",
            unit=None,
            omitted="`float32`; for labels `uint8`, for more than 256 classes `uint16`",
        ),
    ] = None
    range: Annotated[
        ValueRange | None,
        key_doc(
            "Outputs",
            "Values that become the smallest and the largest integer of an integer `output_dtype`.",
            example=[0, 20],
            unit="value of the prediction",
            omitted="[0, 1] after softmax and sigmoid; else required for an integer dtype",
        ),
    ] = None
    scale: Annotated[
        Scale | None,
        key_doc(
            "Outputs",
            "Voxels of the input per voxel of the output along each axis, for networks whose "
            "output has another resolution; a fraction such as `1/2` for a finer one.",
            example=[1, 2, 2],
            unit="voxels",
            omitted="1",
        ),
    ] = None
    fill_value: Annotated[
        Fill | None,
        key_doc(
            "Outputs",
            "Value where there is no prediction, as the key `fill_value` of the job.",
            example=-1,
            unit="value of the output",
            omitted="that of the job",
            see="guides/empty-space.md",
        ),
    ] = None
    classes: Annotated[
        Classes | None,
        key_doc(
            "Outputs",
            "Number or names of the classes, as the key `classes` of a job with one output.",
            example=["background", "grey", "white"],
            unit="classes",
            omitted="one class per channel",
        ),
    ] = None
    storage_chunks: Annotated[
        Shape | None,
        key_doc(
            "Outputs",
            "Size of the Zarr chunks of the output along each axis, in its own voxels. A block is "
            "a whole number of them.",
            example=[64, 64, 64],
            unit="voxels of the output",
            omitted="that of the job",
        ),
    ] = None
    storage_shards: Annotated[
        Shape | None,
        key_doc(
            "Outputs",
            "Size of the Zarr shards along each axis, in voxels of the output.",
            example=[256, 256, 256],
            unit="voxels of the output",
            omitted="that of the job",
        ),
    ] = None
    codec: Annotated[
        CodecKey | None,
        key_doc(
            "Outputs",
            "How the storage chunks are compressed: `lz4`, `zstd`, `none`, or a mapping with name "
            "and level.",
            example="zstd",
            unit=None,
            omitted="that of the job",
        ),
    ] = None

    @property
    def factors(self) -> tuple[Fraction, ...] | None:
        """Voxels of the input per voxel of the output along each axis; None if not set."""
        return None if self.scale is None else tuple(map(Fraction, self.scale))


def codec_of(config: CodecConfig | None) -> Codec:
    """Return the codec of an output; by default LZ4."""
    return DEFAULT_CODEC if config is None else Codec(config.name, config.level)


Outputs = Annotated[dict[str, OutputConfig], BeforeValidator(_as_names)]


def class_count(classes: int | tuple[str, ...] | None) -> int | None:
    """Return the number of classes, None if a job has none."""
    return len(classes) if isinstance(classes, tuple) else classes


def class_names(classes: int | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of classes; empty without any."""
    return classes if isinstance(classes, tuple) else ()
