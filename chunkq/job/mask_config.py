"""The keys `mask` and `skip_empty` of a job file: where the network does not run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from chunkq.access import Access
from chunkq.job.fields import (
    Letters,
    Level,
    Orientation,
    Scales,
    Section,
    anonymous_doc,
    is_number,
    key_doc,
    requester_pays_doc,
)
from chunkq.storage.selection import Selection


class Below(Section):
    """Voxels below a value, as `skip_empty` names them."""

    below: Annotated[
        float,
        key_doc(
            "Empty space",
            "Patches are skipped if all their voxels are less than this.",
            example=12,
            unit="value of the input",
        ),
    ]


def _as_skip_empty(value: object) -> object:
    """Return a rule for empty patches. Raise PydanticCustomError if it is none."""
    if isinstance(value, Below) or value == "missing" or is_number(value):
        return value
    if isinstance(value, dict) and set(value) == {"below"} and is_number(value["below"]):
        return value
    raise PydanticCustomError("skip_empty", "expected a number, {below: NUMBER} or missing")


SkipEmpty = Annotated[float | Literal["missing"] | Below, BeforeValidator(_as_skip_empty)]


class MaskConfig(Section):
    """A mask: which voxels are inside, and how they correspond to the voxels of the input."""

    path: Annotated[
        str,
        key_doc(
            "Empty space",
            "Path or URL of the mask, in any format that an input can have.",
            example="mask.zarr",
            unit=None,
        ),
    ]
    axes: Annotated[
        Letters | None,
        key_doc(
            "Empty space",
            "Axes of the mask, one letter of `t`, `c`, `z`, `y`, `x` per axis.",
            example="zyx",
            unit=None,
            omitted="what the metadata say, else all axes are spatial",
        ),
    ] = None
    orientation: Annotated[
        Orientation | None,
        key_doc(
            "Empty space",
            "Directions in which x, y and z of a NIfTI mask run. As that of the input.",
            example="RAS",
            unit=None,
            omitted="that of the file",
            see="guides/nifti.md",
        ),
    ] = None
    level: Annotated[
        Level | None,
        key_doc(
            "Empty space",
            "Resolution level of an OME-Zarr mask, by number or by the path of its dataset.",
            example=3,
            unit=None,
            omitted="0",
        ),
    ] = None
    above: Annotated[
        float,
        key_doc(
            "Empty space",
            "Voxels of the mask are inside if their value is greater than this.",
            example=0.5,
            unit="value of the mask",
        ),
    ] = 0
    scale: Annotated[
        Scales | None,
        key_doc(
            "Empty space",
            "Voxels of the input per voxel of the mask along each axis. The first voxels of both "
            "then begin at the same point.",
            example=[8, 8, 8],
            unit="voxels",
            omitted="the ratio of the voxel sizes, with their positions; without them, that of the "
            "shapes, which must divide exactly",
        ),
    ] = None
    anonymous: Annotated[bool, anonymous_doc("Empty space")] = False
    requester_pays: Annotated[bool, requester_pays_doc("Empty space")] = False

    @property
    def access(self) -> Access:
        """How the path is accessed."""
        return Access(self.anonymous, self.requester_pays)

    @property
    def selection(self) -> Selection:
        """What is read of the array at the path."""
        return Selection(self.axes, self.level, orientation=self.orientation)


def _as_mask(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


Mask = Annotated[MaskConfig, BeforeValidator(_as_mask, json_schema_input_type=str | MaskConfig)]
