"""What plans and reports say of an output: what is stored, its range, its classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chunkq.plan.outputs import OutputSpec

MAX_NAMES = 12
"""Names of classes that are printed."""


def output_values(output: OutputSpec) -> dict[str, Any]:
    """Return what an output stores as JSON values; `range` is None for floats and labels."""
    values = output.value_range
    return {
        "name": output.name,
        "combine": output.combine,
        "dtype": str(output.dtype),
        "range": None if values is None else [values.low, values.high],
        "scale": None if values is None else values.scale,
        "offset": None if values is None else values.offset,
        "classes": list(output.class_names),
    }


def range_text(output: OutputSpec) -> str:
    """Return which values the integers of an output stand for, '' for other outputs."""
    values = output.value_range
    return "" if values is None else f" for values from {values.low:.6g} to {values.high:.6g}"


def stored_text(values: Mapping[str, Any]) -> str:
    """Return `output_values` as text: `tissue: soft, uint8, classes: background, grey`."""
    text = f"{values['combine']}, {values['dtype']}"
    if values["name"]:
        text = f"{values['name']}: {text}"
    if values["range"] is not None:
        low, high = values["range"]
        text += f" for values from {low:.6g} to {high:.6g}"
    if values["classes"]:
        text += f", classes: {names_text(values['classes'])}"
    return text


def names_text(names: Sequence[str]) -> str:
    """Return the names of classes, the first ones if there are many."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
