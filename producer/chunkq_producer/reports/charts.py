"""The plots of a report, with matplotlib, as SVG to stand inside a page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from html import escape
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from chunkq.timing import STRAGGLER_FACTOR, STRAGGLER_SECONDS, WAITING_STAGES, Timing
from chunkq_producer.reports.job_report import JobReport
from chunkq_producer.reports.rows import BYTES, IN_FLIGHT_NOTE
from chunkq_producer.reports.units import PREFIXES, seconds, si

INCHES = 8.0
"""Width of every plot."""
BARS = 64
"""Workers shown one by one; of more, as many evenly from the least to the most busy."""
BLUE, GREY, RED = "#0072B2", "#8a8a8a", "#b3261e"
COLOURS = {
    "compute": BLUE,
    "load": "#CC79A7",
    "read": "#E69F00",
    "write": "#009E73",
    "finalize": "#56B4E9",
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
    """Return what all plots are to be made within."""
    return rc_context(STYLE)


def course(times: Timing) -> str:
    """Plot the speed over time, and how many workers were at work and computed."""
    found = times.timeline
    unit, name = _time_unit(times.work_seconds)
    edges = np.arange(len(found.workers) + 1) * found.bin_seconds / unit
    figure = Figure(figsize=(INCHES, 4.2), layout="constrained")
    speed, crew = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    speed.stairs(found.voxels_per_second, edges, fill=True, color=BLUE)
    highest = max(found.voxels_per_second)
    factor, prefix = next((p for p in PREFIXES if highest >= p[0]), (1.0, ""))
    speed.yaxis.set_major_locator(MaxNLocator(5))
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / factor:g}"))
    speed.set_ylim(bottom=0)
    speed.set_ylabel(f"{prefix}voxels/s")
    crew.stairs(found.workers, edges, fill=True, color="#d9d9d9", label="at work")
    crew.stairs(found.computing, edges, fill=True, color=BLUE, label="computing")
    crew.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    crew.set_ylim(0, 1.05 * max(1.0, *found.workers))
    crew.set_ylabel("workers")
    crew.set_xlabel(f"time since the first chunk was begun ({name})")
    crew.set_xlim(0, edges[-1])
    figure.legend(
        *crew.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False
    )
    return _svg(
        figure,
        f"Speed over {seconds(times.work_seconds)}: on average "
        f"{si(times.voxels_per_second, 'voxels/s')}, at most "
        f"{si(highest, 'voxels/s')}. Below it how many workers were at work "
        "and how many of their devices computed.",
    )


def shares(account: JobReport) -> str:
    """Plot what each worker's time went to, the least busy on top."""
    labels = account.labels()
    ordered = sorted(account.times.workers.items(), key=lambda item: item[1].device_busy_share)
    if len(ordered) > BARS:
        ordered = [ordered[int(n)] for n in np.linspace(0, len(ordered) - 1, BARS)]
    rows = np.arange(len(ordered))
    figure = Figure(figsize=(INCHES, 1.1 + 0.17 * max(2, len(rows))), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(rows))
    for holder in WAITING_STAGES:
        widths = np.array([100 * worker.shares[holder] for _, worker in ordered])
        if widths.max() >= 0.05:
            axes.barh(rows, widths, 0.8, left, color=COLOURS[holder], label=IN_FLIGHT_NOTE[holder])
        left += widths
    axes.set_yticks(rows, [labels[name] for name, _ in ordered], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the worker's time (%)")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    crew = account.times.worker_time_shares
    told = ", ".join(
        f"{IN_FLIGHT_NOTE[holder]} {share:.0%}" for holder, share in crew.items() if share
    )
    return _svg(figure, f"What each worker's time went to. All workers together: {told}.")


def durations(times: Timing) -> str:
    """Plot how long chunks took, without waiting for the device and loading the network."""
    found, median = times.durations, times.stragglers.median
    limit = max(median * STRAGGLER_FACTOR, median + STRAGGLER_SECONDS)
    figure = Figure(figsize=(INCHES, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.stairs(found.counts, found.edges, fill=True, color=BLUE)
    axes.set_xscale("log")
    low, high = found.edges[0], found.edges[-1]
    axes.axvline(median, color="black", linewidth=1, label=f"median {seconds(median)}")
    if times.stragglers.count:
        label = f"stragglers from {seconds(limit)}"
        axes.axvline(limit, color=RED, linewidth=1, linestyle="--", label=label)
    axes.set_xlim(low, high)
    ticks = _log_ticks(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if min(found.counts) == 0 and max(found.counts) > 1000:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, 2 * max(found.counts))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value, "").strip()))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylabel("chunks")
    axes.set_xlabel("time of a chunk, without waiting for device and network (s)")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    own = found.quantiles["own"]
    return _svg(
        figure,
        f"How long chunks took: from {seconds(own['0'])} to {seconds(own['1'])}, half of them at "
        f"most {seconds(own['0.5'])}, 99% at most {seconds(own['0.99'])}.",
    )


def moved(times: Timing) -> str:
    """Plot the bytes that were moved beside those planned."""
    rows = np.arange(len(BYTES))
    done = [times.bytes[key] for key in BYTES]
    planned = [times.planned_bytes[key] for key in BYTES]
    figure = Figure(figsize=(INCHES, 2.3), layout="constrained")
    axes = figure.subplots()
    axes.barh(rows - 0.18, done, 0.34, color=BLUE, label="measured")
    axes.barh(rows + 0.18, planned, 0.34, color="#d9d9d9", label="planned")
    axes.set_yticks(rows, list(BYTES.values()))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("bytes of uncompressed voxels")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value, "B")))
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    told = "; ".join(
        f"{label} {si(times.bytes[key], 'B')} of {si(times.planned_bytes[key], 'B')}"
        for key, label in BYTES.items()
    )
    return _svg(figure, f"Bytes moved, of those planned: {told}.")


def _svg(figure: Figure, alt: str) -> str:
    """Return a figure as an element of a page, with what it shows in words."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"\s*<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawn)  # a page needs none
    drawn = re.sub(r' (width|height)="[^"]*pt"', "", drawn, count=2)
    return drawn.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def _time_unit(span: float) -> tuple[float, str]:
    for least, unit, name in TIME_UNITS:
        if span >= least:
            return unit, name
    return 1.0, "s"


def _log_ticks(low: float, high: float) -> Sequence[float]:
    """Return round numbers between the ends, a handful of them."""
    powers = range(-4, 8)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), np.arange(1, 10, 0.1)):
        ticks = [round(f * 10.0**p, 6) for p in powers for f in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            return inside[:: 1 + len(inside) // 10]
    return [float(f"{value:.3g}") for value in np.geomspace(low, high, 4)]
