"""Spans of time as pairs of arrays, starts (n,) and stops (n,) in seconds: float64 arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Intervals = tuple[Numbers, Numbers]
SLAB = 1 << 16
"""Spans looked at together; bounds memory."""


def covered_seconds(starts: Numbers, stops: Numbers) -> float:
    """Return for how long at least one span lasts."""
    if not len(starts):
        return 0.0
    order = np.argsort(starts, kind="stable")
    begins, ends = starts[order], np.maximum.accumulate(stops[order])
    before = np.concatenate([begins[:1], ends[:-1]])
    return float(np.maximum(ends - np.maximum(begins, before), 0.0).sum())


def attribute_time(layers: Sequence[Intervals], low: float, high: float) -> list[float]:
    """Share out the time from `low` to `high`: each moment to the first layer that covers it.

    Returns the seconds of each layer, and last those that none covers; they add up to
    `high - low`.
    """
    seconds = [0.0] * len(layers)
    whole = 0.0
    cuts = _cuts(layers[-1][0], low, high)
    for begin, end in pairwise(cuts):
        starts, stops = np.empty(0), np.empty(0)
        before = 0.0
        for number, layer in enumerate(layers):
            inside = (layer[0] < end) & (layer[1] > begin)
            starts = np.concatenate([starts, layer[0][inside].clip(begin, end)])
            stops = np.concatenate([stops, layer[1][inside].clip(begin, end)])
            now = covered_seconds(starts, stops)
            seconds[number] += max(0.0, now - before)
            before = max(before, now)
        whole += before
    return [*seconds, max(0.0, high - low - whole)]


def _cuts(starts: Numbers, low: float, high: float) -> list[float]:
    """Cut the time into stretches in which about `SLAB` spans start."""
    inner = np.sort(starts)[SLAB::SLAB]
    return [low, *(float(t) for t in np.unique(inner) if low < t < high), high]


def max_overlap(starts: Numbers, stops: Numbers) -> int:
    """Return how many spans last at the same moment, at most; a span ends before one begins."""
    moments = np.concatenate([stops, starts])
    steps = np.repeat([-1, 1], [len(stops), len(starts)])
    order = np.argsort(moments, kind="stable")
    return int(steps[order].cumsum().max(initial=0))


def spread(starts: Numbers, stops: Numbers, amounts: Numbers, edges: Numbers) -> Numbers:
    """Spread each span's amount evenly over it; return what falls between the edges (m,) -> (m-1,).

    The result adds up to the amounts of the spans that lie within the edges.
    """
    until = np.zeros(len(edges))
    for low in range(0, len(starts), SLAB):
        part = slice(low, low + SLAB)
        begins, totals = starts[part], amounts[part]
        lengths = np.maximum(stops[part] - begins, 1e-9)
        for number, edge in enumerate(edges):
            until[number] += float((((edge - begins) / lengths).clip(0.0, 1.0) * totals).sum())
        # One without length at the last edge has passed it, too.
        late = (begins >= edges[-1]) & (stops[part] <= edges[-1])
        until[-1] += float(totals[late].sum())
    return np.diff(until)
