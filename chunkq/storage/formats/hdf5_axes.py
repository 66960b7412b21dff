"""What describes the axes of an HDF5 dataset: axistags, labels, dimension scales or NeXus."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from chunkq.geometry.axes import Axis, kind_of_name, named_axes
from chunkq.geometry.axis_units import unit_name

AXISTAGS = "axistags"
"""Attribute in which vigra and ilastik describe the axes, as JSON."""
SIGNAL = "signal"
"""Attribute of NeXus with the name of the dataset in a group that is its data."""
NEXUS_AXES = "axes"
"""Attribute of NeXus with the names of the axes of this dataset, `.` for one without a name."""
ELEMENT_SIZE = "element_size_um"
"""Attribute with the size of a voxel in micrometers along the spatial axes."""
ELEMENT_START = "element_start_um"
"""Attribute with the position of the first voxel in micrometers along the spatial axes."""
MAX_COORDINATES = 1 << 20
"""Length up to which the coordinates of a dimension scale are read."""
TOLERANCE = 1e-3
"""Relative deviation of a step up to which coordinates are evenly spaced."""


def described_axes(dataset: Any) -> tuple[tuple[Axis, ...], str]:
    """Return the axes of an `h5py.Dataset`, and what names them; empty if nothing does."""
    names, source = _names(dataset)
    rank = len(dataset.shape)
    scales, starts = [1.0] * rank, [0.0] * rank
    units: list[str | None] = [None] * rank
    spacings = [_coordinates(dataset, number) for number in range(rank)]
    for number, spacing in enumerate(spacings):
        if spacing is not None:
            scales[number], starts[number], units[number] = spacing
    spatial = [n for n, name in enumerate(names) if kind_of_name(name or "") == "space"]
    sizes = _element_size(dataset, len(spatial))
    for number, size in zip(spatial, sizes, strict=False):
        scales[number], units[number] = size, "micrometer"
    if sizes:
        for number, start in zip(
            spatial, _numbers(dataset, ELEMENT_START, len(spatial)), strict=False
        ):
            starts[number] = start
    return named_axes(names, dataset.shape, scales, starts, units), source


def attribute_text(item: Any, name: str) -> str:
    """Return an attribute that is one text; empty if it is missing or another one."""
    try:
        texts = _texts(item.attrs.get(name))
    except (OSError, TypeError, ValueError):  # of a type that h5py does not read
        return ""
    return texts[0] if len(texts) == 1 else ""


def _texts(value: Any) -> list[str]:
    """Return the texts of an attribute; empty if it has other values."""
    if value is None:
        return []
    entries = [value] if isinstance(value, (str, bytes)) else np.ravel(value).tolist()
    texts = [e.decode(errors="replace") if isinstance(e, bytes) else e for e in entries]
    return texts if all(isinstance(text, str) for text in texts) else []


def _nexus_names(dataset: Any) -> list[str | None]:
    """Return the names of the axes of a signal of NeXus; empty if it is none."""
    if dataset.name is None:  # it is in no group
        return []
    group = dataset.parent
    if attribute_text(group, SIGNAL) != str(dataset.name).rpartition("/")[2]:
        return []
    names = _texts(group.attrs.get(NEXUS_AXES))
    if len(names) != len(dataset.shape):
        return []
    return [None if name in ("", ".") else name for name in names]


def _names(dataset: Any) -> tuple[Sequence[str | None], str]:
    rank = len(dataset.shape)
    tags = _axistags(dataset.attrs.get(AXISTAGS))
    if len(tags) == rank and any(tags):
        return tags, AXISTAGS
    labels = [dimension.label or None for dimension in dataset.dims]
    if any(labels):
        return labels, "DIMENSION_LABELS"
    scales = [_scale_name(dimension) for dimension in dataset.dims]
    if any(scales):
        return scales, "dimension scales"
    names = _nexus_names(dataset)
    return (names, "NeXus axes") if any(names) else (scales, "")


def _axistags(text: Any) -> list[str | None]:
    """Return the keys of the axes in vigra's JSON; empty if there are none."""
    try:
        axes = json.loads(text)["axes"]
        return [
            str(axis["key"]) if axis.get("key") not in (None, "?", "") else None for axis in axes
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []


def _scale_name(dimension: Any) -> str | None:
    return str(dimension[0].name).rpartition("/")[2] or None if len(dimension) else None


def _coordinates(dataset: Any, number: int) -> tuple[float, float, str | None] | None:
    """Return step, start and unit of an axis from its coordinates, if they are evenly spaced."""
    size = dataset.shape[number]
    scale = _scale(dataset, number) if 2 <= size <= MAX_COORDINATES else None
    if (
        scale is None
        or scale.shape != (size,)
        or scale.dtype.kind not in "iuf"
        or scale.is_virtual
        or scale.external
    ):
        return None
    positions = np.asarray(scale[()], np.float64)
    steps = np.diff(positions)
    is_even = np.isfinite(positions).all() and np.allclose(steps, steps[0], rtol=TOLERANCE, atol=0)
    if not is_even or steps[0] <= 0:
        return None
    step = float(positions[-1] - positions[0]) / (size - 1)
    unit = scale.attrs.get("units")
    text = unit.decode(errors="replace") if isinstance(unit, bytes) else unit
    return step, float(positions[0]), unit_name(text if isinstance(text, str) else "")


def _scale(dataset: Any, number: int) -> Any:
    """Return the dataset with the coordinates of an axis, None without one."""
    dimension = dataset.dims[number]
    if len(dimension):
        return dimension[0]
    names = _nexus_names(dataset)
    name = names[number] if names else None
    if name is None or "/" in name:
        return None
    # A link could lead into another file.
    is_own = type(dataset.parent.get(name, getlink=True)).__name__ == "HardLink"
    item = dataset.parent[name] if is_own else None
    return item if hasattr(item, "dtype") else None


def _element_size(dataset: Any, count: int) -> list[float]:
    """Return the sizes of voxels along `count` spatial axes; empty if there are not so many."""
    sizes = _numbers(dataset, ELEMENT_SIZE, count)
    return sizes if all(size > 0 for size in sizes) else []


def _numbers(dataset: Any, name: str, count: int) -> list[float]:
    """Return an attribute of `count` finite numbers; empty if it is another one."""
    try:
        numbers = [float(number) for number in np.ravel(dataset.attrs[name])]
    except (KeyError, TypeError, ValueError):
        return []
    return numbers if len(numbers) == count and all(map(np.isfinite, numbers)) else []
