"""Read the voxel size of an OME-Zarr image, and create the OME-Zarr metadata of an output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Space:
    """Voxel size, position of the first voxel and unit of an image, along each spatial axis."""

    scale: tuple[float, ...]
    translation: tuple[float, ...]
    units: tuple[str | None, ...]

    @classmethod
    def plain(cls, rank: int) -> Space:
        """Return the default: voxel size 1, position 0, no units."""
        return cls((1.0,) * rank, (0.0,) * rank, (None,) * rank)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Space:
        """Return the space from the JSON form of `dataclasses.asdict(space)`."""
        return cls(*(tuple(values[key]) for key in ("scale", "translation", "units")))


def first_image(attributes: dict[str, Any]) -> dict[str, Any] | None:
    """Return the first multiscale image in the attributes of a Zarr group, or None."""
    images = (attributes.get("ome") or attributes).get("multiscales")
    if not images or not images[0].get("datasets"):
        return None
    image: dict[str, Any] = images[0]
    return image


def read_space(image: dict[str, Any], rank: int) -> Space:
    """Return the space of level 0 of an image with `rank` spatial axes.

    Entries that are missing or have another length are those of `Space.plain`.
    """
    plain = Space.plain(rank)
    transforms = {"scale": plain.scale, "translation": plain.translation}
    for transformation in image["datasets"][0].get("coordinateTransformations", []):
        kind = transformation.get("type")
        values = tuple(float(x) for x in transformation.get(kind, ()))
        if kind in transforms and len(values) == rank:
            transforms[kind] = values
    units = tuple(
        axis.get("unit") if isinstance(axis, dict) else None for axis in image.get("axes", [])
    )
    if len(units) != rank:
        units = plain.units
    return Space(transforms["scale"], transforms["translation"], units)


def axis_names(rank: int, channel_axes: int) -> list[str] | None:
    """Return the axis names of an image, channels first, or None if OME-Zarr has no such image."""
    spatial = rank - channel_axes
    if spatial not in (2, 3):
        return None
    return ["c"] * channel_axes + ["z", "y", "x"][3 - spatial :]


def image_metadata(names: list[str], space: Space, zarr_format: int) -> dict[str, Any]:
    """Return the group attributes of a single-level image: OME-Zarr 0.5 for Zarr v3, 0.4 for v2."""
    channels = len(names) - len(space.scale)
    axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}] * channels
    for name, unit in zip(names[channels:], space.units, strict=True):
        axes.append({"name": name, "type": "space"} | ({"unit": unit} if unit else {}))
    transforms: list[dict[str, Any]] = [
        {"type": "scale", "scale": [1.0] * channels + [*space.scale]}
    ]
    if any(space.translation):
        translation = [0.0] * channels + [*space.translation]
        transforms.append({"type": "translation", "translation": translation})
    image: dict[str, Any] = {
        "axes": axes,
        "datasets": [{"path": "0", "coordinateTransformations": transforms}],
    }
    if zarr_format == 3:
        return {"ome": {"version": "0.5", "multiscales": [image]}}
    return {"multiscales": [{"version": "0.4", **image}]}
