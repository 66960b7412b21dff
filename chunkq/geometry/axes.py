"""Axes of an image: name, kind, size, and position in physical space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

AxisKind = Literal["space", "channel", "time"]
SPATIAL_NAMES = ("z", "y", "x")
"""Default names of the last spatial axes."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of an array.

    `size` is in voxels. `scale` is the size of a voxel and `translation` the position of the first
    voxel, both in `unit`.
    """

    name: str
    kind: AxisKind
    size: int
    unit: str | None = None
    scale: float = 1.0
    translation: float = 0.0


def plain_axes(shape: Sequence[int]) -> tuple[Axis, ...]:
    """Return spatial axes for an array without metadata: voxel size 1, position 0, no unit.

    The last three are called z, y and x, those before `dim_0`, `dim_1`, ….
    """
    rank = len(shape)
    names = [*(f"dim_{n}" for n in range(rank - 3)), *SPATIAL_NAMES[max(0, 3 - rank) :]]
    return tuple(Axis(name, "space", size) for name, size in zip(names, shape, strict=True))


def channel_axis(size: int) -> Axis:
    """Return the channel axis of an output."""
    return Axis("c", "channel", size)


def as_spatial(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Return the axes as spatial ones. If one of them is not, all get the default names."""
    if all(axis.kind == "space" for axis in axes):
        return axes
    plain = plain_axes([axis.size for axis in axes])
    return tuple(
        replace(axis, name=default.name, kind="space")
        for axis, default in zip(axes, plain, strict=True)
    )
