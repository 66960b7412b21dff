"""What describes the axes of a Zarr array: an OME-Zarr image, or names of dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chunkq.geometry.axes import Axis, named_axes, plain_axes
from chunkq.storage.ome import (
    Dataset,
    MultiscaleImage,
    channel_labels,
    described_axes,
    first_image,
    read_axes,
)

NAMED_BY_OME = "OME-Zarr metadata"
PARENTS = 2
"""Groups above an array that are searched for an image of which it is a level."""
XARRAY_NAMES = "_ARRAY_DIMENSIONS"
"""Attribute in which xarray names the axes of a Zarr v2 array."""


class Level:
    """A level of an image, which describes the axes of its array."""

    def __init__(self, image: MultiscaleImage, dataset: Dataset, labels: tuple[str, ...]) -> None:
        self._image, self._dataset, self.labels = image, dataset, labels

    def axes(self, shape: Sequence[int]) -> tuple[Axis, ...]:
        """Return the axes of the array, which has this shape."""
        return read_axes(self._image, shape, self._dataset)

    def named_by(self, rank: int) -> str:
        """Return what names the axes of the array; empty if nothing does."""
        return "" if described_axes(self._image, rank) is None else NAMED_BY_OME


class NamedArray:
    """An array outside of images. Its axes can have names."""

    labels: tuple[str, ...] = ()

    def __init__(self, names: Sequence[str | None] | None, named_by: str) -> None:
        self._names, self._named_by = names, named_by

    def axes(self, shape: Sequence[int]) -> tuple[Axis, ...]:
        """Return the axes of the array, which has this shape."""
        if self._names is None or len(self._names) != len(shape):
            return plain_axes(shape)
        return named_axes(self._names, shape)

    def named_by(self, rank: int) -> str:
        """Return what names the axes of the array; empty if nothing does."""
        return self._named_by if self._names is not None and len(self._names) == rank else ""


def named_array(dimension_names: Any, attributes: Mapping[str, Any]) -> NamedArray:
    """Return an array with the names of Zarr v3, or of xarray in Zarr v2."""
    candidates = {
        "dimension_names": dimension_names,
        XARRAY_NAMES: attributes.get(XARRAY_NAMES),
    }
    for key, names in candidates.items():
        is_list = isinstance(names, (list, tuple)) and any(names)
        if is_list and all(name is None or isinstance(name, str) for name in names):
            return NamedArray(names, key)
    return NamedArray(None, "")


def level_of(path: str, attributes_of: Callable[[str], dict[str, Any] | None]) -> Level | None:
    """Return the level of an image that an array is, or None.

    `attributes_of` returns the attributes of a group, or None if there is no group at a path.
    """
    names: list[str] = []
    parent = path.rstrip("/")
    for _ in range(PARENTS):
        parent, _, name = parent.rpartition("/")
        if not parent or parent.endswith(":/"):
            return None
        names.insert(0, name)
        attributes = attributes_of(parent)
        if attributes is None:
            continue
        try:
            image = first_image(attributes)
        except ValueError:
            continue
        dataset = image.level("/".join(names)) if image else None
        if image is not None and dataset is not None:
            return Level(image, dataset, channel_labels(attributes))
    return None
