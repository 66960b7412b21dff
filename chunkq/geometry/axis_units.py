"""Names of the units of axes."""

from __future__ import annotations

from collections.abc import Sequence
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


def unit_name(name: Any) -> str | None:
    """Return the name of a unit in OME-Zarr; None for none. An unknown name stays unchanged."""
    text = str(name or "").strip()
    return None if text.lower() in NO_UNITS else UNITS.get(text.lower(), text)


METERS: MappingProxyType[str, float] = MappingProxyType(
    {
        "angstrom": 1e-10,
        "nanometer": 1e-9,
        "micrometer": 1e-6,
        "millimeter": 1e-3,
        "centimeter": 1e-2,
        "meter": 1.0,
    }
)
"""Unit of length -> its length in meters."""


def voxel_sizes(axes: Sequence[Axis]) -> tuple[float, ...]:
    """Return the lengths of a voxel along axes in one unit; greater than 0.

    Units that are not all known are taken as equal, and a voxel size of 0 as 1.
    """
    factors = [METERS.get(axis.unit or "") for axis in axes]
    if len({axis.unit for axis in axes}) == 1 or None in factors:
        factors = [1.0] * len(axes)
    return tuple(
        (abs(axis.scale) or 1.0) * (factor or 1.0)
        for axis, factor in zip(axes, factors, strict=True)
    )
