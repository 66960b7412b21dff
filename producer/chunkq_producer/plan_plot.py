"""A picture of a plan: its blocks, chunks and region in the volume, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from chunkq.blend.plot import LABEL_ALPHA, row_of_panels, set_labels
from chunkq.geometry.grids import AxisGeometry
from chunkq.plan.plan import Plan

MAX_LINES = 40
"""Lines that are drawn at most along one axis of a panel."""
MIN_SHARE = 0.15
"""Length of an axis relative to the longest one below which it is stretched."""
MAX_CELLS = 400
"""Cells of a layer that are drawn at most along one axis of a panel."""
VOLUME, CHUNKS, BLOCKS = "whitesmoke", "tab:blue", "dimgray"
STORAGE, REGION = "tab:green", "tab:red"


@dataclass(frozen=True)
class Layer:
    """Chunks to be drawn in a color of their own, such as those that are known to be empty.

    `chunks` is a bool array of the shape `Plan.index_bounds.shape`.
    """

    name: str
    color: str
    chunks: npt.NDArray[np.bool_]


def draw_plan(
    plan: Plan, names: Sequence[str], layers: Sequence[Layer] = (), chunks: str = "chunks to run"
) -> Figure:
    """Draw the blocks and chunks of a plan, seen along each axis.

    `chunks` is the name of the chunks that are in no layer.

    `names` has one name per spatial axis. A 3-D volume has three panels, one per pair of axes. Of a
    4-D volume the last three axes are drawn, a 2-D volume is one panel, a 1-D volume a bar.
    """
    pairs: list[tuple[int | None, int]] = [(None, 0)]
    if plan.rank > 1:
        last = range(max(0, plan.rank - 3), plan.rank)
        pairs = list(combinations(last, 2))
    shape = plan.volume.shape
    longest = max(shape)
    sizes = [(longest // 8 or 1 if y is None else shape[y], shape[x]) for y, x in pairs]
    figure, row = row_of_panels(sizes)
    for axes, (y, x), (height, width) in zip(row, pairs, sizes, strict=True):
        panel = _Panel(plan, axes, y, x)
        axes.set_xlim(0, width)
        axes.set_ylim(height if y is not None else 1, 0)
        is_narrow = min(height, width) < MIN_SHARE * longest
        axes.set_aspect("auto" if y is None or is_narrow else "equal")
        panel.draw(layers)
        set_labels(axes, names[x], "" if y is None else names[y], "")
        if y is None:
            axes.set_yticks([])
    drawn = [axis for pair in pairs for axis in pair if axis is not None]
    _legend(figure, plan, drawn, layers, chunks)
    return figure


class _Panel:
    """One panel of a plan, with the voxels of axis `x` to the right and those of `y` downwards.

    Without `y` it is a bar.
    """

    def __init__(self, plan: Plan, axes: Axes, y: int | None, x: int) -> None:
        self._plan, self._axes, self._y, self._x = plan, axes, y, x

    def draw(self, layers: Sequence[Layer]) -> None:
        """Draw the volume, the chunks that are tasks, layers, blocks and the region."""
        plan = self._plan
        self._fill((0,) * plan.rank, plan.volume.shape, facecolor=VOLUME, edgecolor="black")
        color = to_rgba(CHUNKS, LABEL_ALPHA / 2)
        for box in plan.active:  # disjoint boxes can overlap in a projection
            start = [_edge(axis, n) for axis, n in zip(plan.axes, box.start, strict=True)]
            stop = [_edge(axis, n) for axis, n in zip(plan.axes, box.stop, strict=True)]
            self._fill(start, stop, facecolor=color, edgecolor="none")
        for layer in layers:
            self._draw_layer(layer)
        self._lines(self._x, vertical=True)
        if self._y is not None:
            self._lines(self._y, vertical=False)
        self._storage_chunks()
        if plan.grid.region is not None:
            region = plan.region
            self._fill(
                region.start, region.stop, facecolor="none", edgecolor=REGION, linewidth=2, zorder=5
            )

    def _span(self, axis: int | None, start: Sequence[int], stop: Sequence[int]) -> tuple[int, int]:
        return (0, 1) if axis is None else (start[axis], stop[axis])

    def _fill(self, start: Sequence[int], stop: Sequence[int], **style: object) -> None:
        (left, right), (top, bottom) = (self._span(a, start, stop) for a in (self._x, self._y))
        self._axes.add_patch(
            Rectangle((left, top), right - left, bottom - top, clip_on=False, **style)  # type: ignore[arg-type]
        )

    def _lines(self, number: int, *, vertical: bool) -> None:
        """Draw the borders of blocks inside the region, every n-th if there are many."""
        axis, region = self._plan.axes[number], self._plan.region
        inner = [_edge(axis, n) for n in axis.numbers[1 :: line_step(axis)]]
        other = self._span(self._y if vertical else self._x, region.start, region.stop)
        self._segments(inner, other, vertical=vertical, color=BLOCKS, linewidth=0.8)

    def _storage_chunks(self) -> None:
        """Draw the borders of the storage chunks of one block."""
        plan = self._plan
        first = plan.chunk(plan.block_indices.start).block
        for axis, vertical in ((self._x, True), (self._y, False)):
            if axis is None:
                continue
            other = self._y if vertical else self._x
            low, high, step = first.start[axis], first.stop[axis], plan.storage_chunks[axis]
            step *= -(-(high - low) // (MAX_LINES * step))
            span = self._span(other, first.start, first.stop)
            inner = list(range(low + step, high, step))
            self._segments(inner, span, vertical=vertical, color=STORAGE, linewidth=0.6)

    def _segments(
        self, at: Sequence[int], span: tuple[int, int], *, vertical: bool, **style: object
    ) -> None:
        low, high = span
        lines = [((n, low), (n, high)) if vertical else ((low, n), (high, n)) for n in at]
        self._axes.add_collection(LineCollection(lines, **style), autolim=False)  # type: ignore[arg-type]

    def _draw_layer(self, layer: Layer) -> None:
        """Draw the chunks of a layer; a cell of the panel is drawn if it has one of them."""
        plan = self._plan
        bounds, kept = plan.index_bounds, [a for a in (self._y, self._x) if a is not None]
        others = tuple(a for a in range(plan.rank) if a not in kept)
        cells = np.atleast_2d(layer.chunks.any(axis=others))
        steps = [max(1, -(-n // MAX_CELLS)) for n in cells.shape]
        for n, step in enumerate(steps):
            cells = np.logical_or.reduceat(cells, np.arange(0, cells.shape[n], step), axis=n)
        edges = []
        for axis, step in zip((self._y, self._x), steps, strict=True):
            if axis is None:
                edges.append([0, 1])
                continue
            numbers = [*range(bounds.start[axis], bounds.stop[axis], step), bounds.stop[axis]]
            edges.append([_edge(plan.axes[axis], n) for n in numbers])
        colors = np.zeros((*cells.shape, 4))
        colors[cells] = _over_chunks(layer)
        self._axes.pcolormesh(edges[1], edges[0], colors)


def line_step(axis: AxisGeometry) -> int:
    """Return how many blocks lie between two lines that are drawn."""
    return max(1, -(-axis.blocks // MAX_LINES))


def _edge(axis: AxisGeometry, number: int) -> int:
    """Return the first voxel of a block, which need not lie in the region."""
    return min(max(0, axis.origin + number * axis.chunk), axis.volume)


def _over_chunks(layer: Layer) -> tuple[float, float, float, float]:
    """Return the color of a layer's chunks, the same in a panel and in the legend."""
    shares = zip(to_rgba(layer.color), to_rgba(VOLUME), strict=True)
    red, green, blue, _ = (LABEL_ALPHA * top + (1 - LABEL_ALPHA) * below for top, below in shares)
    return red, green, blue, 1.0


def _legend(
    figure: Figure, plan: Plan, drawn: Sequence[int], layers: Sequence[Layer], chunks: str
) -> None:
    step = max(line_step(plan.axes[axis]) for axis in drawn)
    blocks = f"blocks of {_lengths(plan.chunksize)}"
    blocks += ", not all borders are drawn" if step > 1 else ""
    entries: list[Patch | Line2D] = [
        Patch(facecolor=VOLUME, edgecolor="black", label=f"volume {_lengths(plan.volume.shape)}"),
        Patch(color=to_rgba(CHUNKS, LABEL_ALPHA / 2), label=chunks),
        Line2D([], [], color=BLOCKS, linewidth=0.8, label=blocks),
        Line2D(
            [], [], color=STORAGE, linewidth=0.6,
            label=f"storage chunks of {_lengths(plan.storage_chunks)}, in one block",
        ),
    ]  # fmt: skip
    if plan.costs.chunks < plan.costs.blocks:
        label = "blocks without patches, predicted by the chunks beside them"
        entries.insert(1, Patch(facecolor=VOLUME, edgecolor="none", label=label))
    if plan.grid.region is not None:
        label = f"region {_lengths(plan.region.shape)}"
        entries.append(Patch(facecolor="none", edgecolor=REGION, linewidth=2, label=label))
    entries += [Patch(color=_over_chunks(layer), label=layer.name) for layer in layers]
    figure.legend(handles=entries, loc="outside lower center", ncols=2)


def _lengths(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
