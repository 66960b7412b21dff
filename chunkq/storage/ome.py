"""Read the axes of an OME-Zarr image, and create the OME-Zarr metadata of an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from colorsys import hsv_to_rgb
from typing import Any

from pydantic import BaseModel, Field, FiniteFloat

from chunkq.geometry.axes import (
    LETTERS,
    Axis,
    AxisKind,
    kind_of_name,
    plain_axes,
    with_unique_names,
)

KIND_OF_TYPE: dict[str, AxisKind] = {"space": "space", "channel": "channel", "time": "time"}
"""OME-Zarr type of an axis -> kind."""
GOLDEN_RATIO = 0.618034
"""Step between the hues of classes, in turns: as different as possible for any number of them."""


class OmeAxis(BaseModel):
    """Entry of `axes`. Before version 0.4 it is the name alone."""

    name: str
    type: str | None = None
    unit: str | None = None

    @property
    def kind(self) -> AxisKind:
        """The kind of the axis; spatial if its type is unknown."""
        if self.type is None:
            return kind_of_name(self.name)
        return KIND_OF_TYPE.get(self.type, "space")


class Transformation(BaseModel):
    """Entry of `coordinateTransformations`. Types other than scale and translation are ignored."""

    type: str | None = None
    scale: tuple[FiniteFloat, ...] = ()
    translation: tuple[FiniteFloat, ...] = ()


Transformations = tuple[Transformation, ...]


class Dataset(BaseModel):
    """One resolution level of an image."""

    path: str
    transformations: Transformations = Field((), alias="coordinateTransformations")


class MultiscaleImage(BaseModel):
    """The parts of an OME-Zarr multiscale image that chunkq reads."""

    axes: tuple[OmeAxis | str, ...] = ()
    datasets: tuple[Dataset, ...] = ()
    transformations: Transformations = Field((), alias="coordinateTransformations")

    def level(self, name: int | str) -> Dataset | None:
        """Return a resolution level by its number or the path of its dataset, or None."""
        if isinstance(name, int):
            return self.datasets[name] if name < len(self.datasets) else None
        return next((level for level in self.datasets if level.path.strip("/") == name), None)


class OmeAttributes(BaseModel):
    """The parts of the attributes of a Zarr group that chunkq reads."""

    multiscales: tuple[MultiscaleImage, ...] = ()


def first_image(attributes: dict[str, Any]) -> MultiscaleImage | None:
    """Return the first multiscale image in the attributes of a Zarr group, or None.

    Raises ValueError if the metadata are invalid.
    """
    images = OmeAttributes.model_validate(attributes.get("ome") or attributes).multiscales
    return images[0] if images and images[0].datasets else None


def channel_labels(attributes: dict[str, Any]) -> tuple[str, ...]:
    """Return the labels of the channels in the attributes of a Zarr group; empty without any.

    A channel without a label has an empty one.
    """
    omero = (attributes.get("ome") or attributes).get("omero")
    channels = omero.get("channels") if isinstance(omero, dict) else None
    if not isinstance(channels, list):
        return ()
    return tuple(str(c.get("label") or "") if isinstance(c, dict) else "" for c in channels)


def described_axes(image: MultiscaleImage, rank: int) -> tuple[OmeAxis, ...] | None:
    """Return the axes that the metadata of an image name, or None.

    Before OME-Zarr 0.3, images had the five axes t, c, z, y, x and no metadata of them.
    """
    axes = image.axes or (tuple(LETTERS) if rank == len(LETTERS) else ())
    described = tuple(OmeAxis(name=a) if isinstance(a, str) else a for a in axes)
    return described if len(described) == rank else None


def read_axes(
    image: MultiscaleImage, shape: Sequence[int], level: Dataset | None = None
) -> tuple[Axis, ...]:
    """Return the axes of a level of an image, which has this shape; by default of level 0.

    The transformations of the level are followed by those of the image. Entries that are missing or
    have another length are those of `plain_axes`, and so are names that are ambiguous in an output.
    """
    rank, plain = len(shape), plain_axes(shape)
    scale, translation = [1.0] * rank, [0.0] * rank
    for transformation in (*(level or image.datasets[0]).transformations, *image.transformations):
        if transformation.type == "scale" and len(transformation.scale) == rank:
            factors = transformation.scale
            scale = [s * f for s, f in zip(scale, factors, strict=True)]
            translation = [t * f for t, f in zip(translation, factors, strict=True)]
        elif transformation.type == "translation" and len(transformation.translation) == rank:
            offsets = transformation.translation
            translation = [t + o for t, o in zip(translation, offsets, strict=True)]
    described = described_axes(image, rank)
    if described is None:
        described = tuple(OmeAxis(name=axis.name, type=axis.kind) for axis in plain)
    return with_unique_names(
        [
            Axis(axis.name, axis.kind, size, axis.unit, *numbers)
            for axis, size, *numbers in zip(described, shape, scale, translation, strict=True)
        ]
    )


def is_image(axes: Sequence[Axis]) -> bool:
    """Return whether OME-Zarr has images with these axes: two or three are spatial."""
    return sum(axis.kind == "space" for axis in axes) in (2, 3)


def label_metadata(names: Sequence[str], zarr_format: int) -> dict[str, Any]:
    """Return the group attributes of labels with these classes: their names and colors.

    The first class is transparent. The colors of neighboring classes differ in hue.
    """
    colors = [[0, 0, 0, 0]]
    for number in range(1, len(names)):
        rgb = hsv_to_rgb(number * GOLDEN_RATIO % 1, 0.75, 0.95)
        colors.append([*(round(255 * part) for part in rgb), 255])
    label: dict[str, Any] = {
        "colors": [{"label-value": n, "rgba": color} for n, color in enumerate(colors)],
        "properties": [{"label-value": n, "class": name} for n, name in enumerate(names)],
    }
    if zarr_format == 3:
        return {"ome": {"version": "0.5", "image-label": {"version": "0.5", **label}}}
    return {"image-label": {"version": "0.4", **label}}


def image_metadata(
    levels: Mapping[str, Sequence[Axis]], zarr_format: int, method: str | None = None
) -> dict[str, Any]:
    """Return the group attributes of an image, whose levels have these paths and axes.

    They are of OME-Zarr 0.5 for Zarr v3, of 0.4 for v2, and empty if OME-Zarr has no such image.
    `method` is how a level is made of the one before.
    """
    axes = next(iter(levels.values()))
    if not is_image(axes):
        return {}
    image: dict[str, Any] = {
        "axes": [
            {"name": axis.name, "type": axis.kind} | ({"unit": axis.unit} if axis.unit else {})
            for axis in axes
        ],
        "datasets": [
            {"path": path, "coordinateTransformations": _transformations(axes)}
            for path, axes in levels.items()
        ],
    }
    if method is not None:
        image["type"] = method
    if zarr_format == 3:
        return {"ome": {"version": "0.5", "multiscales": [image]}}
    return {"multiscales": [{"version": "0.4", **image}]}


def _transformations(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    transforms: list[dict[str, Any]] = [{"type": "scale", "scale": [axis.scale for axis in axes]}]
    translation = [axis.translation for axis in axes]
    if any(translation):
        transforms.append({"type": "translation", "translation": translation})
    return transforms
