"""Axes of an image: name, kind, size, and position in physical space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import Literal

AxisKind = Literal["space", "channel", "time"]
SPATIAL_NAMES = ("z", "y", "x")
"""Default names of the last spatial axes."""
LETTERS = "tczyx"
"""Letters that name axes in a job file."""
KIND_OF_NAME: dict[str, AxisKind] = {
    **dict.fromkeys(("c", "ch", "channel", "channels", "band"), "channel"),
    **dict.fromkeys(("t", "time", "frame", "frames"), "time"),
}
"""Lower-case name of an axis -> kind. All others are spatial."""
COLOR_SIZES = (3, 4)
"""Sizes of an axis that can be colour."""
COLOR_RATIO = 16
"""Colour is suspected if the two axes of the picture are at least so many times as long."""


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


def kind_of_name(name: str) -> AxisKind:
    """Return the kind of an axis that has only a name."""
    return KIND_OF_NAME.get(name.lower(), "space")


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


def with_unique_names(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Return the axes with names that are unambiguous in an output.

    Names are ambiguous if two are equal, if one is empty, or if a spatial axis has the name of a
    channel or time axis. Then all spatial axes have the names of `plain_axes`, and the others t
    and c.
    """
    names = [axis.name for axis in axes]
    spatial = [axis for axis in axes if axis.kind == "space"]
    if len(set(names)) == len(names) and all(
        axis.name and kind_of_name(axis.name) == "space" for axis in spatial
    ):
        return tuple(axes)
    plain = iter(plain_axes([axis.size for axis in spatial]))
    defaults = {"channel": "c", "time": "t"}
    return tuple(replace(axis, name=defaults.get(axis.kind) or next(plain).name) for axis in axes)


def named_axes(
    names: Sequence[str | None],
    shape: Sequence[int],
    scales: Sequence[float] = (),
    translations: Sequence[float] = (),
    units: Sequence[str | None] = (),
) -> tuple[Axis, ...]:
    """Return axes from their names, which determine their kinds. None is no name.

    Spatial axes without names have those of `plain_axes`. `scales`, `translations` and `units` are
    empty or have one entry per axis.
    """
    kinds = [kind_of_name(name or "") for name in names]
    sizes = [size for size, kind in zip(shape, kinds, strict=True) if kind == "space"]
    defaults = iter(plain_axes(sizes))
    labels = [next(defaults).name if kind == "space" else "" for kind in kinds]
    rank = len(kinds)
    return with_unique_names(
        [
            Axis(name or label, kind, size, unit, scale, translation)
            for name, label, kind, size, unit, scale, translation in zip(
                names,
                labels,
                kinds,
                shape,
                units or [None] * rank,
                scales or [1.0] * rank,
                translations or [0.0] * rank,
                strict=True,
            )
        ]
    )


def lettered_axes(letters: str, axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Return axes named by letters of `LETTERS`, one per axis.

    An axis keeps its unit, scale and translation unless its kind changes.
    """
    renamed = []
    for letter, axis in zip(letters, axes, strict=True):
        kind = kind_of_name(letter)
        of_kind = axis if axis.kind == kind else Axis(letter, kind, axis.size)
        renamed.append(replace(of_kind, name=letter))
    return tuple(renamed)


def picked(axis: Axis, picks: Sequence[int]) -> Axis:
    """Return the axis with some of its positions.

    Positions that are not evenly spaced and ascending are numbered: scale 1, translation 0, no
    unit.
    """
    steps = {after - before for before, after in pairwise(picks)} or {1}
    step = steps.pop()
    if steps or step < 1:
        return Axis(axis.name, axis.kind, len(picks))
    return replace(
        axis,
        size=len(picks),
        scale=axis.scale * step,
        translation=axis.translation + picks[0] * axis.scale,
    )


def cropped(axis: Axis, start: int, stop: int) -> Axis:
    """Return the part `[start, stop)` of an axis."""
    return replace(axis, size=stop - start, translation=axis.translation + start * axis.scale)


def reduced(axis: Axis, size: int, factor: int | Fraction) -> Axis:
    """Return an axis of `size` voxels, each of which `factor` voxels of this axis become.

    The first voxel is in the middle of those that it is made of.
    """
    return replace(
        axis,
        size=size,
        scale=axis.scale * float(factor),
        translation=axis.translation + float((factor - 1) / 2) * axis.scale,
    )


def scaled(axis: Axis, factor: Fraction) -> Axis:
    """Return an axis with voxels of which each is `factor` of these long, from the same edge on."""
    return reduced(axis, ceil(axis.size / factor), factor)


def looks_like_color(shape: Sequence[int]) -> bool:
    """Return whether the last axis can be colour: 3 or 4 voxels beside two long axes."""
    if len(shape) < 3 or shape[-1] not in COLOR_SIZES:
        return False
    return min(shape[-3:-1]) >= COLOR_RATIO * shape[-1]


def starts_like_color(shape: Sequence[int]) -> bool:
    """Return whether the first axis can be colour: 3 or 4 voxels, and two long last axes."""
    if len(shape) < 3 or shape[0] not in COLOR_SIZES:
        return False
    return min(shape[-2:]) >= COLOR_RATIO * shape[0]


def color_letters(rank: int, *, first: bool) -> str:
    """Return the letters of `rank` axes of which the first or the last one is colour."""
    spatial = LETTERS.replace("c", "")[-(rank - 1) :]
    return f"c{spatial}" if first else f"{spatial}c"
