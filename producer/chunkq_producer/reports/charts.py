"""Plots of a report as SVG elements, drawn with matplotlib."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from chunkq.timing.timing import TIME_PARTS, Timing
from chunkq.units import PREFIXES, seconds, si
from chunkq_producer.reports.job_report import JobReport
from chunkq_producer.reports.rows import STAGE_LABELS, bytes_labels

if TYPE_CHECKING:
    from chunkq.images.scores import Accuracy

FIGURE_WIDTH = 8.0
"""Inches."""
MAX_BARS = 64
"""Workers in a plot; of more workers, an evenly spaced selection by utilization is plotted."""
MAX_NAMED_LABELS, MAX_NUMBERED_LABELS = 60, 15
"""Labels of a confusion matrix up to which it shows their names, and the numbers of images."""
MAX_LABEL_LENGTH = 24
"""Characters of a label beside a confusion matrix."""
BLUE = "#0072B2"
COLORS = {
    "compute": BLUE,
    "load": "#CC79A7",
    "read": "#E69F00",
    "write": "#009E73",
    "finalize": "#56B4E9",
    "downsample": "#F0E442",
    "other": "#8a8a8a",
    "idle": "#d9d9d9",
}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "chunkq",
    "font.family": ["sans-serif"],
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.axisbelow": True,
}
TIME_UNITS = ((172800.0, 86400.0, "days"), (7200.0, 3600.0, "h"), (180.0, 60.0, "min"))


def style() -> AbstractContextManager[None]:
    """Return a context that applies the style of the plots."""
    return rc_context(STYLE)


def speed_chart(timing: Timing, unit: str = "patches") -> Markup:
    """Plot over time the speed, the workers at work and the devices that compute."""
    timeline = timing.timeline
    scale, name = _time_unit(timing.work_seconds)
    edges = np.arange(len(timeline.workers) + 1) * timeline.bin_seconds / scale
    figure = Figure(figsize=(FIGURE_WIDTH, 4.2), layout="constrained")
    speed, workers = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    speed.stairs(timeline.patches_per_second, edges, fill=True, color=BLUE)
    highest = max(timeline.patches_per_second)
    factor, prefix = next((p for p in PREFIXES if highest >= p[0]), (1.0, ""))
    speed.yaxis.set_major_locator(MaxNLocator(5))
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / factor:g}"))
    speed.set_ylim(bottom=0)
    speed.set_ylabel(f"{prefix}{unit}/s")
    workers.stairs(timeline.workers, edges, fill=True, color="#d9d9d9", label="at work")
    workers.stairs(timeline.computing, edges, fill=True, color=BLUE, label="computing")
    workers.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    workers.set_ylim(0, 1.05 * max(1.0, *timeline.workers))
    workers.set_ylabel("workers")
    workers.set_xlabel(f"time since the first chunk started ({name})")
    workers.set_xlim(0, edges[-1])
    figure.legend(
        *workers.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False
    )
    return _svg(
        figure,
        f"Speed over {seconds(timing.work_seconds)}: on average "
        f"{si(timing.patches_per_second, 'patches/s')}, at most "
        f"{si(highest, 'patches/s')}. Below: number of workers at work and of computing devices.",
    )


def time_share_chart(report: JobReport) -> Markup:
    """Plot the time shares of each worker, the least busy one on top."""
    labels = report.labels()
    ordered = sorted(report.timing.workers.items(), key=lambda item: item[1].device_busy_share)
    if len(ordered) > MAX_BARS:
        ordered = [ordered[int(n)] for n in np.linspace(0, len(ordered) - 1, MAX_BARS)]
    rows = np.arange(len(ordered))
    figure = Figure(figsize=(FIGURE_WIDTH, 1.1 + 0.17 * max(2, len(rows))), layout="constrained")
    axes = figure.subplots()
    offsets = np.zeros(len(rows))
    for stage in TIME_PARTS:
        widths = np.array([100 * worker.shares[stage] for _, worker in ordered])
        if widths.max() >= 0.05:
            axes.barh(rows, widths, 0.8, offsets, color=COLORS[stage], label=STAGE_LABELS[stage])
        offsets += widths
    axes.set_yticks(rows, [labels[name] for name, _ in ordered], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the worker's time (%)")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    shares = report.timing.worker_time_shares
    summary = ", ".join(
        f"{STAGE_LABELS[stage]} {share:.0%}" for stage, share in shares.items() if share
    )
    return _svg(figure, f"Time shares of each worker. All workers together: {summary}.")


def duration_chart(timing: Timing) -> Markup:
    """Plot a histogram of the time per chunk, without waiting for the device and loading."""
    durations, median = timing.durations, timing.stragglers.median
    figure = Figure(figsize=(FIGURE_WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.stairs(durations.counts, durations.edges, fill=True, color=BLUE)
    axes.set_xscale("log")
    low, high = durations.edges[0], durations.edges[-1]
    axes.axvline(median, color="black", linewidth=1, label=f"median {seconds(median)}")
    axes.set_xlim(low, high)
    ticks = _log_ticks(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if min(durations.counts) == 0 and max(durations.counts) > 1000:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, 2 * max(durations.counts))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value, "").strip()))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylabel("chunks")
    axes.set_xlabel("time per chunk, without waiting for device and network (s)")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    quantiles = durations.quantiles["own"]
    return _svg(
        figure,
        f"Time per chunk: from {seconds(quantiles['0'])} to {seconds(quantiles['1'])}, median "
        f"{seconds(quantiles['0.5'])}, 99% at most {seconds(quantiles['0.99'])}.",
    )


def bytes_chart(timing: Timing) -> Markup:
    """Plot the measured and the planned bytes of input, output, pieces and pyramids."""
    labels = bytes_labels(timing)
    rows = np.arange(len(labels))
    measured = [timing.bytes[key] for key in labels]
    planned = [timing.planned_bytes[key] for key in labels]
    figure = Figure(figsize=(FIGURE_WIDTH, 2.3), layout="constrained")
    axes = figure.subplots()
    axes.barh(rows - 0.18, measured, 0.34, color=BLUE, label="measured")
    axes.barh(rows + 0.18, planned, 0.34, color="#d9d9d9", label="planned")
    axes.set_yticks(rows, list(labels.values()))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("bytes of uncompressed voxels")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value, "B")))
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    summary = "; ".join(
        f"{label} {si(timing.bytes[key], 'B')} of {si(timing.planned_bytes[key], 'B')}"
        for key, label in labels.items()
    )
    return _svg(figure, f"Measured and planned bytes: {summary}.")


def confusion_chart(accuracy: Accuracy) -> Markup:
    """Plot the confusion matrix: the share of each true label that was predicted as each label."""
    counts = accuracy.counts.astype(np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    labels, size = accuracy.labels, len(accuracy.labels)
    side = min(FIGURE_WIDTH, 2.5 + 0.35 * size)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, shrink=0.7, label="share of the true label")
    axes.set_xlabel("predicted label")
    axes.set_ylabel("true label")
    if size <= MAX_NAMED_LABELS:
        names = [_shorten(label) for label in labels]
        axes.set_xticks(range(size), names, rotation=90, parse_math=False)
        axes.set_yticks(range(size), names, parse_math=False)
    if size <= MAX_NUMBERED_LABELS:
        for (row, column), number in np.ndenumerate(accuracy.counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{number}", ha="center", va="center", color=color)
    with warnings.catch_warnings():
        # The reader of the page draws the names, in a font of its own.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        return _svg(figure, f"Confusion matrix of {size} labels")


def _shorten(label: str) -> str:
    """Return a label of at most `MAX_LABEL_LENGTH` characters."""
    return label if len(label) <= MAX_LABEL_LENGTH else f"{label[: MAX_LABEL_LENGTH - 1]}…"


def _svg(figure: Figure, alt: str) -> Markup:
    """Return a figure as an SVG element with an alternative text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # not needed inside an HTML page
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1))


def _time_unit(span: float) -> tuple[float, str]:
    """Return the length (s) and the name of the unit for an axis of `span` seconds."""
    for min_span, unit, name in TIME_UNITS:
        if span >= min_span:
            return unit, name
    return 1.0, "s"


def _log_ticks(low: float, high: float) -> Sequence[float]:
    """Return about four to ten round numbers between `low` and `high`."""
    powers = range(-4, 8)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), np.arange(1, 10, 0.1)):
        ticks = [round(f * 10.0**p, 6) for p in powers for f in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            return inside[:: 1 + len(inside) // 10]
    return [float(f"{value:.3g}") for value in np.geomspace(low, high, 4)]
