"""A picture of labels over a volume, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

Voxels = npt.NDArray[Any]
OPACITY = 0.5
DARKEST, BRIGHTEST = 1, 99
"""Percentiles of the input that become black and white."""
LEGEND_ENTRIES = 12
PIXELS_WANTED = 500
"""Width or height of the largest panel; the figure has 100 pixels an inch."""


def draw(volume: Voxels, labels: Voxels, at: Sequence[int] | None = None) -> Figure:
    """Draw labels (*S) over a volume (*S) of 1 to 4 axes; see `Prediction.plot`."""
    centre = _middle(labels) if at is None else tuple(at)
    if len(centre) != labels.ndim or any(
        not 0 <= c < n for c, n in zip(centre, labels.shape, strict=False)
    ):
        raise ValueError(f"at {list(centre)} is no voxel of a volume of shape {list(labels.shape)}")
    where = ""
    if labels.ndim == 4:
        where = f"{centre[0]}, "
        volume, labels, centre = volume[centre[0]], labels[centre[0]], centre[1:]
    if labels.ndim == 1:
        return _line(volume, labels)
    if labels.ndim == 2:
        return _panels([_Panel(volume, labels, "axis 1", "axis 0", "")])
    panels = []
    for axis in range(3):
        rows, columns = (a + bool(where) for a in range(3) if a != axis)
        shown = [":", ":", ":"]
        shown[axis] = str(centre[axis])
        panels.append(
            _Panel(
                np.take(volume, centre[axis], axis),
                np.take(labels, centre[axis], axis),
                f"axis {columns}",
                f"axis {rows}",
                f"[{where}{', '.join(shown)}]",
            )
        )
    return _panels(panels)


class _Panel(NamedTuple):
    """One plane to draw, (H, W), with the names of its axes."""

    volume: Voxels
    labels: Voxels
    x: str
    y: str
    title: str


def _middle(labels: Voxels) -> tuple[int, ...]:
    """Return the median along each axis of the labelled voxels; the centre where none is."""
    centre = []
    for axis, length in enumerate(labels.shape):
        others = tuple(a for a in range(labels.ndim) if a != axis)
        below = np.cumsum(np.count_nonzero(labels, axis=others))
        centre.append(int(np.searchsorted(below, below[-1] / 2)) if below[-1] else length // 2)
    return tuple(centre)


def _panels(panels: Sequence[_Panel]) -> Figure:
    """Draw planes side by side, a voxel as large in each."""
    longest = max(max(panel.labels.shape) for panel in panels)
    inches = PIXELS_WANTED / 100 / longest
    widths = [max(0.15 * longest, panel.labels.shape[1]) for panel in panels]
    tallest = max(0.25 * longest, *(panel.labels.shape[0] for panel in panels))
    figure = Figure(
        figsize=(sum(widths) * inches + 0.6 * len(panels), tallest * inches + 1.2),
        layout="constrained",
    )
    row = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    planes = [panel.volume.astype(np.float64) for panel in panels]
    shown = np.concatenate([plane[np.isfinite(plane)] for plane in planes])
    low, high = np.percentile(shown, [DARKEST, BRIGHTEST]) if shown.size else (0, 1)
    for axes, plane, panel in zip(row, planes, panels, strict=True):
        axes.imshow(plane, cmap="gray", vmin=low, vmax=max(high, low + 1e-12))
        axes.imshow(_coloured(panel.labels))
        _name(axes, panel.x, panel.y, panel.title)
    _legend(figure, [panel.labels for panel in panels])
    return figure


def _line(volume: Voxels, labels: Voxels) -> Figure:
    """Draw a 1-D volume, labelled stretches coloured behind it."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(len(volume)), volume, color="black", linewidth=1)
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1), len(labels)]
    for start, stop in pairwise(edges):
        if labels[start]:
            axes.axvspan(start - 0.5, stop - 0.5, color=_colour(labels[start]), linewidth=0)
    axes.margins(x=0)
    _name(axes, "axis 0", "input", "")
    _legend(figure, [labels])
    return figure


def _name(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)


def _colour(label: int) -> tuple[float, float, float, float]:
    """Return the colour of a label; those past the palette's end take the same ones again."""
    palette: Any = colormaps["tab10"]
    return to_rgba(palette((int(label) - 1) % palette.N), OPACITY)


def _coloured(labels: Voxels) -> Voxels:
    """Return labels (H, W) as colours (H, W, 4); label 0 is transparent."""
    present, places = np.unique(labels, return_inverse=True)
    colours = np.array([_colour(label) if label else (0.0,) * 4 for label in present])
    return colours[places.reshape(labels.shape)]


def _legend(figure: Figure, shown: Sequence[Voxels]) -> None:
    """Name the labels that are seen."""
    found = np.unique(np.concatenate([np.unique(labels) for labels in shown]))
    present = [int(label) for label in found if label]
    entries = [Patch(color=_colour(n), label=f"label {n}") for n in present[:LEGEND_ENTRIES]]
    if len(present) > LEGEND_ENTRIES:
        entries.append(Patch(alpha=0, label=f"and {len(present) - LEGEND_ENTRIES} more"))
    if entries:
        figure.legend(handles=entries, loc="outside lower center", ncols=min(6, len(entries)))
