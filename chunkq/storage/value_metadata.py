"""Attributes that say what the stored values of an output mean: their range, or their labels."""

from __future__ import annotations

from typing import Any

from chunkq.plan.label_colors import label_color
from chunkq.plan.outputs import OutputSpec

MAX_COLORS = 256
"""Labels of which the color is stored; viewers choose those of others."""


def range_attributes(output: OutputSpec) -> dict[str, Any]:
    """Return `range`, `scale` and `offset` of values stored as integers; empty for others.

    A value is `stored * scale + offset`.
    """
    values = output.value_range
    if values is None:
        return {}
    return {
        "range": [values.low, values.high],
        "scale": values.scale,
        "offset": values.offset,
    }


def array_attributes(output: OutputSpec) -> dict[str, Any]:
    """Return attributes of an array that readers of the CF conventions, such as xarray, apply."""
    values = output.value_range
    if values is None:
        return {}
    return {"scale_factor": values.scale, "add_offset": values.offset}


def label_values(output: OutputSpec) -> dict[str, Any]:
    """Return OME-Zarr's `image-label` of an output with labels; empty for others.

    It has the color of each label, label 0 being transparent, and the names of the classes.
    """
    if not output.has_labels:
        return {}
    count = min(MAX_COLORS, max(2, output.channels))
    colors = [{"label-value": 0, "rgba": [0, 0, 0, 0]}]
    colors += [{"label-value": n, "rgba": [*label_color(n), 255]} for n in range(1, count)]
    label: dict[str, Any] = {"colors": colors}
    if output.class_names:
        label["properties"] = [
            {"label-value": n, "class": name} for n, name in enumerate(output.class_names)
        ]
    return label
