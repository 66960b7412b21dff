"""Names of the units of axes."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

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
