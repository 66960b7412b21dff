"""Names of the units of axes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from chunkq.geometry.axes import Axis

UNITS: MappingProxyType[str, str] = MappingProxyType(
    {
        "mm": "millimeter",
        "um": "micrometer",
        "µm": "micrometer",
        "μm": "micrometer",
        "micron": "micrometer",
        "microns": "micrometer",
        "nm": "nanometer",
        "cm": "centimeter",
        "m": "meter",
        "å": "angstrom",
        "s": "second",
        "sec": "second",
        "seconds": "second",
        "ms": "millisecond",
        "msec": "millisecond",
        "milliseconds": "millisecond",
        "us": "microsecond",
        "µs": "microsecond",
        "μs": "microsecond",
        "usec": "microsecond",
        "microseconds": "microsecond",
        "min": "minute",
        "minutes": "minute",
        "h": "hour",
        "hours": "hour",
    }
)
"""Short name of a unit in lower case -> its name in OME-Zarr."""
NO_UNITS = frozenset({"", "px", "pixel", "pixels", "voxel", "voxels", "unknown"})
"""Names in lower case that are no unit."""

METERS: Mapping[str, float] = MappingProxyType(
    {
        "angstrom": 1e-10,
        "nanometer": 1e-9,
        "micrometer": 1e-6,
        "millimeter": 1e-3,
        "centimeter": 1e-2,
        "meter": 1.0,
        "inch": 0.0254,
    }
)
"""Unit of length -> its size (m)."""
SECONDS: Mapping[str, float] = MappingProxyType(
    {
        "nanosecond": 1e-9,
        "microsecond": 1e-6,
        "millisecond": 1e-3,
        "second": 1.0,
        "minute": 60.0,
        "hour": 3600.0,
    }
)
"""Unit of time -> its size (s)."""


def unit_name(name: Any) -> str | None:
    """Return the name of a unit in OME-Zarr; None for none. An unknown name stays unchanged."""
    text = str(name or "").strip()
    return None if text.lower() in NO_UNITS else UNITS.get(text.lower(), text)


def voxel_sizes(axes: Sequence[Axis]) -> tuple[float, ...]:
    """Return the lengths of a voxel along axes in one unit; greater than 0.

    Units that are not all known are taken as equal, and a voxel size of 0 as 1.
    """
    sizes = [abs(axis.scale) or 1.0 for axis in axes]
    meters = [METERS.get(axis.unit or "", 0.0) for axis in axes]
    if len({axis.unit for axis in axes}) == 1 or not all(meters):
        return tuple(sizes)
    return tuple(size * meter for size, meter in zip(sizes, meters, strict=True))


def common_unit(
    units: Iterable[str | None], sizes: Mapping[str, float], supported: Collection[str]
) -> str | None:
    """Return the unit in which a format stores lengths or times; None if one unit is unknown.

    `supported` are the units of the format. It is the largest of them that is at most as large as
    each of `units`, or the smallest one.
    """
    known = {unit: sizes.get(unit or "") for unit in units}
    if not known or None in known.values():
        return None
    smallest = min(size for size in known.values() if size is not None)
    choices = sorted((sizes[unit], unit) for unit in supported if unit in sizes)
    fitting = [choice for choice in choices if choice[0] <= smallest * 1.001]
    return max(fitting, default=choices[0])[1]


def unit_factor(unit: str | None, target: str | None, sizes: Mapping[str, float]) -> float:
    """Return how many of the unit `target` a unit has; 1 if either is unknown."""
    size, target_size = sizes.get(unit or ""), sizes.get(target or "")
    if unit == target or not size or not target_size:
        return 1.0
    return float(f"{size / target_size:.12g}")  # 1e-6 / 1e-9 is less than 1000
