"""Draw labels over a volume with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from chunkq.plan.label_colors import label_color

Voxels = npt.NDArray[Any]
LABEL_ALPHA = 0.5
BLACK_PERCENTILE, WHITE_PERCENTILE = 1, 99
"""Percentiles of the input that are drawn black and white."""
MAX_LEGEND_ENTRIES = 12
PANEL_PIXELS = 500
"""Length of the longest side of all panels; the figure has 100 pixels per inch."""


def draw(volume: Voxels, labels: Voxels, at: Sequence[int] | None = None) -> Figure:
    """Draw labels (*S) over a volume (*S) with 1 to 4 axes; see `Prediction.plot`."""
    center = _median_voxel(labels) if at is None else tuple(at)
    if len(center) != labels.ndim or any(
        not 0 <= c < n for c, n in zip(center, labels.shape, strict=False)
    ):
        raise ValueError(
            f"at: {list(center)} is not a voxel of a volume of shape {list(labels.shape)}; "
            "use one index per axis, within the shape"
        )
    prefix = ""
    if labels.ndim == 4:
        prefix = f"{center[0]}, "
        volume, labels, center = volume[center[0]], labels[center[0]], center[1:]
    if labels.ndim == 1:
        return _draw_line(volume, labels)
    if labels.ndim == 2:
        return _draw_panels([_Panel(volume, labels, "axis 1", "axis 0", "")])
    panels = []
    for axis in range(3):
        rows, columns = (a + bool(prefix) for a in range(3) if a != axis)
        indices = [":", ":", ":"]
        indices[axis] = str(center[axis])
        panels.append(
            _Panel(
                np.take(volume, center[axis], axis),
                np.take(labels, center[axis], axis),
                f"axis {columns}",
                f"axis {rows}",
                f"[{prefix}{', '.join(indices)}]",
            )
        )
    return _draw_panels(panels)


class _Panel(NamedTuple):
    """One plane (H, W) to draw, with the names of its axes."""

    volume: Voxels
    labels: Voxels
    x: str
    y: str
    title: str


def _median_voxel(labels: Voxels) -> tuple[int, ...]:
    """Return the median position of the labeled voxels; the center of the volume if none is."""
    center = []
    for axis, length in enumerate(labels.shape):
        others = tuple(a for a in range(labels.ndim) if a != axis)
        below = np.cumsum(np.count_nonzero(labels, axis=others))
        center.append(int(np.searchsorted(below, below[-1] / 2)) if below[-1] else length // 2)
    return tuple(center)


def row_of_panels(shapes: Sequence[tuple[int, int]]) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels for planes (H, W) side by side, a voxel as large in each."""
    longest = max(map(max, shapes))
    inches = PANEL_PIXELS / 100 / longest
    widths = [max(0.15 * longest, width) for _, width in shapes]
    tallest = max(0.25 * longest, *(height for height, _ in shapes))
    figure = Figure(
        figsize=(sum(widths) * inches + 0.6 * len(shapes), tallest * inches + 1.2),
        layout="constrained",
    )
    return figure, list(figure.subplots(1, len(shapes), squeeze=False, width_ratios=widths)[0])


def _draw_panels(panels: Sequence[_Panel]) -> Figure:
    """Draw planes side by side, with the same size of a voxel in each."""
    figure, row = row_of_panels([(p.labels.shape[0], p.labels.shape[1]) for p in panels])
    planes = [panel.volume.astype(np.float64) for panel in panels]
    finite = np.concatenate([plane[np.isfinite(plane)] for plane in planes])
    percentiles = [BLACK_PERCENTILE, WHITE_PERCENTILE]
    low, high = np.percentile(finite, percentiles) if finite.size else (0, 1)
    for axes, plane, panel in zip(row, planes, panels, strict=True):
        axes.imshow(plane, cmap="gray", vmin=low, vmax=max(high, low + 1e-12))
        axes.imshow(_colored(panel.labels))
        set_labels(axes, panel.x, panel.y, panel.title)
    _legend(figure, [panel.labels for panel in panels])
    return figure


def _draw_line(volume: Voxels, labels: Voxels) -> Figure:
    """Draw a 1-D volume as a line over the colors of its labels."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(len(volume)), volume, color="black", linewidth=1)
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1), len(labels)]
    for start, stop in pairwise(edges):
        if labels[start]:
            axes.axvspan(start - 0.5, stop - 0.5, color=_color(labels[start]), linewidth=0)
    axes.margins(x=0)
    set_labels(axes, "axis 0", "input", "")
    _legend(figure, [labels])
    return figure


def set_labels(axes: Axes, x: str, y: str, title: str) -> None:
    """Set the names of the axes of a panel, and its title."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)


def _color(label: int) -> tuple[float, float, float, float]:
    """Return the color of a label; colors repeat after the end of the palette."""
    red, green, blue = (part / 255 for part in label_color(int(label)))
    return red, green, blue, LABEL_ALPHA


def _colored(labels: Voxels) -> Voxels:
    """Return the RGBA colors (H, W, 4) of labels (H, W); label 0 is transparent."""
    present, inverse = np.unique(labels, return_inverse=True)
    colors = np.array([_color(label) if label else (0.0,) * 4 for label in present])
    return colors[inverse.reshape(labels.shape)]


def _legend(figure: Figure, drawn: Sequence[Voxels]) -> None:
    """Add a legend of the labels that are drawn; no legend if there are none."""
    labels = np.unique(np.concatenate([np.unique(plane) for plane in drawn]))
    present = [int(label) for label in labels if label]
    entries = [Patch(color=_color(n), label=f"label {n}") for n in present[:MAX_LEGEND_ENTRIES]]
    if len(present) > MAX_LEGEND_ENTRIES:
        entries.append(Patch(alpha=0, label=f"and {len(present) - MAX_LEGEND_ENTRIES} more"))
    if entries:
        figure.legend(handles=entries, loc="outside lower center", ncols=min(6, len(entries)))
