"""The key `input` of a job file: volumes, how they are accessed, and what is read of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Discriminator, Tag
from pydantic_core import PydanticCustomError

from chunkq.access import Access
from chunkq.job.fields import (
    Channels,
    Letters,
    Level,
    Orientation,
    Picks,
    Section,
    anonymous_doc,
    key_doc,
    requester_pays_doc,
)
from chunkq.storage.selection import Selection


class InputConfig(Section):
    """An input, how it is accessed, and what is read of it."""

    path: Annotated[
        str,
        key_doc(
            "Input and output",
            "Path or URL of the volume. `n5://` or `precomputed://` before it names its format.",
            example="volume.zarr",
            unit=None,
        ),
    ]
    axes: Annotated[
        Letters | None,
        key_doc(
            "Input and output",
            "Axes of the array, one letter of `t`, `c`, `z`, `y`, `x` per axis.",
            example="tczyx",
            unit=None,
            omitted="what the metadata say, else all axes are spatial",
            see="guides/inputs.md",
        ),
    ] = None
    level: Annotated[
        Level | None,
        key_doc(
            "Input and output",
            "Resolution level of a multiscale image, by number or by its name: the path of its "
            "dataset, or the key of its scale.",
            example=1,
            unit=None,
            omitted="0",
            see="guides/inputs.md",
        ),
    ] = None
    channels: Annotated[
        Channels | None,
        key_doc(
            "Input and output",
            "Channels in the order of the network: a list of indices and OME labels, one of them, "
            "or a half-open range.",
            example=[2, "DAPI"],
            unit=None,
            omitted="all",
            see="guides/inputs.md",
        ),
    ] = None
    time: Annotated[
        Picks | None,
        key_doc(
            "Input and output",
            "Time points: a list of indices, one index, or a half-open range.",
            example="0:10",
            unit=None,
            omitted="all",
            see="guides/inputs.md",
        ),
    ] = None
    order: Annotated[
        Letters | None,
        key_doc(
            "Input and output",
            "Letters of the spatial axes in the order in which the network, the lists of the job "
            "and the output have them.",
            example="zyx",
            unit=None,
            omitted="as in the array; z, y, x for N5 and precomputed volumes",
            see="guides/inputs.md",
        ),
    ] = None
    orientation: Annotated[
        Orientation | None,
        key_doc(
            "Input and output",
            "Directions in which x, y and z run in the network, the lists of the job and the "
            "output: `R` or `L`, `A` or `P`, `S` or `I`. For NIfTI.",
            example="RAS",
            unit=None,
            omitted="that of the file",
            see="guides/nifti.md",
        ),
    ] = None
    frames: Annotated[
        Picks | None,
        key_doc(
            "Input and output",
            "Frames of each video: a list of numbers, one number, or a half-open range with an "
            "optional step. Only for `inference_type` `image`.",
            example="0:10000:5",
            unit=None,
            omitted="all",
            see="guides/images.md",
        ),
    ] = None
    anonymous: Annotated[bool, anonymous_doc("Input and output")] = False
    requester_pays: Annotated[bool, requester_pays_doc("Input and output")] = False

    @property
    def access(self) -> Access:
        """How the path is accessed."""
        return Access(self.anonymous, self.requester_pays)

    @property
    def selection(self) -> Selection:
        """What is read of the array at the path."""
        return Selection(
            self.axes, self.level, self.channels, self.time, self.order, self.orientation
        )


def _kind_of_input(value: object) -> str:
    return "mapping" if isinstance(value, (dict, InputConfig)) else "path"


def _as_inputs(value: object) -> object:
    """Return one input or a list of inputs as a tuple."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise PydanticCustomError("inputs", "expected a list of at least 1 item")
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
    BeforeValidator(_as_inputs, json_schema_input_type=Input | tuple[Input, ...]),
]
