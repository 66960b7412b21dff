"""OME-Zarr metadata: which array of an image is read, and what an output says of its space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Space:
    """Where an image's voxels lie, per spatial axis: voxel size, first voxel's place, unit."""

    scale: tuple[float, ...]
    translation: tuple[float, ...]
    units: tuple[str | None, ...]

    @classmethod
    def plain(cls, rank: int) -> Space:
        """Return the space of an image of which nothing is known."""
        return cls((1.0,) * rank, (0.0,) * rank, (None,) * rank)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Space:
        """Invert `dataclasses.asdict` after a passage through JSON."""
        return cls(*(tuple(values[key]) for key in ("scale", "translation", "units")))


def first_image(attributes: dict[str, Any]) -> dict[str, Any] | None:
    """Return the first multiscale image that a group's attributes describe, or None."""
    images = (attributes.get("ome") or attributes).get("multiscales")
    if not images or not images[0].get("datasets"):
        return None
    image: dict[str, Any] = images[0]
    return image


def space_of(image: dict[str, Any], rank: int) -> Space:
    """Return the space of an image's level 0; what is missing or does not fit is plain."""
    plain = Space.plain(rank)
    found = {"scale": plain.scale, "translation": plain.translation}
    for transformation in image["datasets"][0].get("coordinateTransformations", []):
        kind = transformation.get("type")
        values = tuple(float(x) for x in transformation.get(kind, ()))
        if kind in found and len(values) == rank:
            found[kind] = values
    units = tuple(
        axis.get("unit") if isinstance(axis, dict) else None for axis in image.get("axes", [])
    )
    return Space(found["scale"], found["translation"], units if len(units) == rank else plain.units)


def axis_names(rank: int, channel_axes: int) -> list[str] | None:
    """Return the names of an image's axes, channels first, or None where OME-Zarr has none."""
    spatial = rank - channel_axes
    if spatial not in (2, 3):
        return None
    return ["c"] * channel_axes + ["z", "y", "x"][3 - spatial :]


def image_metadata(names: list[str], space: Space, zarr_format: int) -> dict[str, Any]:
    """Return the attributes of a one-level image: OME-Zarr 0.5 for Zarr v3, 0.4 for v2."""
    channels = len(names) - len(space.scale)
    axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}] * channels
    for name, unit in zip(names[channels:], space.units, strict=True):
        axes.append({"name": name, "type": "space"} | ({"unit": unit} if unit else {}))
    steps: list[dict[str, Any]] = [{"type": "scale", "scale": [1.0] * channels + [*space.scale]}]
    if any(space.translation):
        place = [0.0] * channels + [*space.translation]
        steps.append({"type": "translation", "translation": place})
    image: dict[str, Any] = {
        "axes": axes,
        "datasets": [{"path": "0", "coordinateTransformations": steps}],
    }
    if zarr_format == 3:
        return {"ome": {"version": "0.5", "multiscales": [image]}}
    return {"multiscales": [{"version": "0.4", **image}]}
