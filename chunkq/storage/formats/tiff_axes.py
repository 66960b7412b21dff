"""What describes the axes of a TIFF image: OME-XML, ImageJ's metadata, or the tags of its pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chunkq.geometry.axes import Axis, kind_of_name, named_axes
from chunkq.geometry.axis_units import METERS, unit_factor, unit_name

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

NAME_OF_LETTER: Mapping[str, str | None] = {"S": "c", "I": None, "Q": None}
"""tifffile's letter of an axis -> its name; None if nothing is known of it. Others are names in
lower case."""
SPATIAL_LETTERS = frozenset("zyx")
PAGE_LETTERS = frozenset("YXIQ")
"""tifffile's letters of axes that every file with several pages has."""
NAMED_BY = {"ome": "OME-TIFF metadata", "imagej": "ImageJ metadata", "shaped": "tifffile metadata"}
"""tifffile's kind of a series -> what names its axes. Others are the kind itself."""
RESOLUTION_UNITS = {
    2: "inch",
    3: "centimeter",
    4: "millimeter",
    5: "micrometer",
}
"""Value of the tag ResolutionUnit -> unit in which pixels are counted."""
PRINTED = 1200 / 0.0254
"""Pixels per meter up to which a resolution in inches or centimetres is that of a screen or of
paper."""


@dataclass(frozen=True)
class Spacing:
    """Step and start along an axis, in a unit."""

    scale: float = 1.0
    translation: float = 0.0
    unit: str | None = None


@dataclass(frozen=True)
class ImageMetadata:
    """What the metadata of a file say of the axes, by their names, and of the channels."""

    spacings: Mapping[str, Spacing] = field(default_factory=dict)
    labels: tuple[str, ...] = ()


def axis_names(letters: str) -> list[str | None]:
    """Return names of axes from tifffile's letters. An unknown spatial axis has none.

    If one of the spatial axes has another name than z, y and x, none has a name.
    """
    names = [NAME_OF_LETTER.get(letter, letter.lower()) for letter in letters]
    spatial = {name for name in names if name is not None and kind_of_name(name) == "space"}
    if spatial <= SPATIAL_LETTERS:
        return names
    return [name if name is not None and kind_of_name(name) != "space" else None for name in names]


def described_axes(letters: str, shape: Sequence[int], metadata: ImageMetadata) -> tuple[Axis, ...]:
    """Return the axes of an image from tifffile's letters, with the spacings of its metadata."""
    names = axis_names(letters)
    spacings = [metadata.spacings.get(name or "", Spacing()) for name in names]
    return named_axes(
        names,
        shape,
        [spacing.scale for spacing in spacings],
        [spacing.translation for spacing in spacings],
        [spacing.unit for spacing in spacings],
    )


def named_by(kind: str, letters: str) -> str:
    """Return what names the axes of a series of tifffile; empty if nothing does."""
    if kind in ("ome", "imagej"):
        return NAMED_BY[kind]
    if set(letters) <= PAGE_LETTERS:
        return ""
    if set(letters) <= PAGE_LETTERS | {"S"}:
        return "TIFF tags"
    return NAMED_BY.get(kind, f"{kind} metadata of the TIFF file")


def image_metadata(file: Any, kind: str, series_name: str = "") -> ImageMetadata:
    """Return what a `TiffFile` says of the axes of its first series, which has this kind."""
    if kind == "ome":
        return _ome_metadata(file.ome_metadata, series_name)
    if kind == "imagej":
        return ImageMetadata(_imagej_spacings(file), _imagej_labels(file))
    return ImageMetadata(_tag_spacings(file.pages[0].tags))


def level_axes(axes: Sequence[Axis], shape: Sequence[int]) -> tuple[Axis, ...]:
    """Return the axes of a resolution level of this shape. Level 0 has `axes`.

    Each level covers the same extent, so the first voxel of a coarser one lies further inside.
    """
    coarser = []
    for axis, size in zip(axes, shape, strict=True):
        factor = axis.size / size
        if abs(axis.size - round(factor) * size) < max(1, round(factor)):
            factor = max(1, round(factor))  # the last voxel was cut off or completed
        start = axis.translation + (factor - 1) / 2 * axis.scale
        scale = axis.scale * factor
        coarser.append(Axis(axis.name, axis.kind, size, axis.unit, scale, start))
    return tuple(coarser)


def _ome_metadata(xml: str, series_name: str) -> ImageMetadata:
    from xml.etree import ElementTree

    try:
        images = _children(ElementTree.fromstring(xml), "Image")
    except ElementTree.ParseError:
        return ImageMetadata()
    of_series = [image for image in images if series_name and image.get("Name") == series_name]
    for image in of_series or images:
        for pixels in _children(image, "Pixels"):
            channels = _children(pixels, "Channel")
            labels = tuple(str(channel.get("Name") or "") for channel in channels)
            return ImageMetadata(_ome_spacings(pixels), labels if any(labels) else ())
    return ImageMetadata()


def _ome_spacings(pixels: Element) -> dict[str, Spacing]:
    planes = _children(pixels, "Plane")
    first = planes[0].attrib if planes else {}
    spacings = {}
    for letter in "XYZ":
        unit = unit_name(pixels.get(f"PhysicalSize{letter}Unit", "µm"))
        size = _positive(pixels.get(f"PhysicalSize{letter}"))
        if size is None:
            continue
        position_unit = unit_name(first.get(f"Position{letter}Unit"))
        position = _number(first.get(f"Position{letter}"))
        start = 0.0
        if position is not None and {position_unit, unit} <= METERS.keys():
            start = position * unit_factor(position_unit, unit, METERS)
        spacings[letter.lower()] = Spacing(size, start, unit)
    step = _positive(pixels.get("TimeIncrement"))
    if step is not None:
        spacings["t"] = Spacing(step, 0.0, unit_name(pixels.get("TimeIncrementUnit", "s")))
    return spacings


def _imagej_spacings(file: Any) -> dict[str, Spacing]:
    metadata = file.imagej_metadata or {}
    text = str(metadata.get("unit") or "").replace("\\u00B5m", "µm")
    unit, spacings = unit_name(text), {}
    if unit is not None:
        for letter, tag in (("x", "XResolution"), ("y", "YResolution")):
            value = file.pages[0].tags.valueof(tag)
            if isinstance(value, tuple) and len(value) == 2 and all(value):
                spacings[letter] = Spacing(value[1] / value[0], 0.0, unit)
        step = _positive(metadata.get("spacing"))
        if step is not None:
            spacings["z"] = Spacing(step, 0.0, unit)
    interval = _positive(metadata.get("finterval"))
    if interval is not None:
        spacings["t"] = Spacing(interval, 0.0, unit_name(metadata.get("tunit") or "s"))
    return spacings


def _imagej_labels(file: Any) -> tuple[str, ...]:
    """Return the labels of the slices that are the names of channels; empty without such labels.

    They are if there are no other slices, or if they are the same for each of those.
    """
    metadata = file.imagej_metadata or {}
    labels = [str(label).partition("\n")[0].strip() for label in metadata.get("Labels") or ()]
    channels = int(metadata.get("channels", 0)) or len(labels)  # the fastest of the slices
    blocks = {tuple(labels[n : n + channels]) for n in range(0, len(labels), channels or 1)}
    return blocks.pop() if len(blocks) == 1 and any(labels) else ()


def _tag_spacings(tags: Any) -> dict[str, Spacing]:
    """Return the spacings of the resolution tags in micrometers, unless they are for printing."""
    counted_in = RESOLUTION_UNITS.get(tags.valueof("ResolutionUnit", 2))
    if counted_in is None:
        return {}
    spacings = {}
    for letter, tag in (("x", "XResolution"), ("y", "YResolution")):
        value = tags.valueof(tag)
        if not (isinstance(value, tuple) and len(value) == 2 and all(value)):
            return {}
        per_meter = value[0] / value[1] / METERS[counted_in]
        if counted_in in ("inch", "centimeter") and per_meter <= PRINTED * 1.001:
            return {}
        spacings[letter] = Spacing(1 / per_meter / METERS["micrometer"], 0.0, "micrometer")
    return spacings


def _children(element: Element, name: str) -> list[Element]:
    """Return the children of this name in any namespace."""
    return [child for child in element if child.tag.rpartition("}")[2] == name]


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _positive(text: Any) -> float | None:
    number = _number(text)
    return number if number is not None and 0 < number < float("inf") else None
