"""Plot how busy devices are by number of workers, for each chunk size and queue, with limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK, GRID = "#222222", "#dddddd"
STYLES = {
    "rq": ("#d1495b", "-", 13),
    "dask": ("#00798c", "--", 9),
    "ray": ("#e09f1f", ":", 5.5),
}
"""Color, line and marker size; sizes differ so that overlapping markers are all visible."""
MARKS = {
    "device": "o",
    "queue": "s",
    "enqueueing": "p",
    "store bandwidth": "v",
    "store reads": "<",
    "store writes": ">",
    "commits": "D",
    "worker's link": "P",
    "worker's codec": "X",
    "depth": "^",
    "sealing": "*",
}


@dataclass(frozen=True)
class Point:
    """Busy share of the devices for a number of workers, and the limit."""

    executor: str
    chunk: int
    workers: int
    busy: float
    limit: str


def picture(points: Sequence[Point], path: Path) -> None:
    """Draw a panel for each chunk size; write them as one PNG."""
    chunks = sorted({point.chunk for point in points})
    figure = Figure(figsize=(2 + 4 * len(chunks), 5), layout="constrained")
    panels = figure.subplots(1, len(chunks), sharey=True, squeeze=False)[0]
    for axes, chunk in zip(panels, chunks, strict=True):
        _panel(axes, [point for point in points if point.chunk == chunk])
        axes.set_title(f"chunksize {chunk}³")
    panels[0].set_ylabel("share of the time a device computes")
    executors = [name for name in STYLES if any(p.executor == name for p in points)]
    limits = [name for name in MARKS if any(p.limit == name for p in points)]
    handles = [Line2D([], [], color=STYLES[n][0], ls=STYLES[n][1], lw=2.2) for n in executors]
    handles += [Line2D([], [], marker=MARKS[n], markersize=8, color=INK, ls="") for n in limits]
    labels = [*executors, *(f"limit: {name}" for name in limits)]
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
    figure.suptitle("Busy share of devices, simulated; markers show the limit")
    figure.savefig(path, dpi=110)


def _panel(axes: Axes, points: Sequence[Point]) -> None:
    for executor, (color, line, size) in STYLES.items():
        selected = sorted((p for p in points if p.executor == executor), key=lambda p: p.workers)
        x, y = [p.workers for p in selected], [p.busy for p in selected]
        axes.plot(x, y, line, color=color, lw=2.2)
        for point in selected:
            axes.plot(
                point.workers, point.busy, MARKS[point.limit],
                color=color, markersize=size, markeredgecolor="white", clip_on=False, zorder=3,
            )  # fmt: skip
    workers = sorted({point.workers for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(workers, [str(n) for n in workers])
    axes.minorticks_off()
    axes.set_xlabel("workers, one device each")
    axes.set_ylim(0, 1.05)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
