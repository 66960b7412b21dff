"""Arithmetic on time intervals, held as two float64 arrays: starts (n,) and stops (n,), seconds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Intervals = tuple[Numbers, Numbers]
BATCH_SIZE = 1 << 16
"""Intervals processed in one array operation; bounds memory."""


def covered_seconds(starts: Numbers, stops: Numbers) -> float:
    """Return the length in seconds of the union of the intervals."""
    if not len(starts):
        return 0.0
    order = np.argsort(starts, kind="stable")
    begins, ends = starts[order], np.maximum.accumulate(stops[order])
    before = np.concatenate([begins[:1], ends[:-1]])
    return float(np.maximum(ends - np.maximum(begins, before), 0.0).sum())


def attribute_time(layers: Sequence[Intervals], low: float, high: float) -> list[float]:
    """Return how many seconds from `low` to `high` belong to each layer of intervals.

    Each moment belongs to the first layer that covers it. The last entry of the result counts the
    moments that no layer covers. The result adds up to `high - low`.
    """
    seconds = [0.0] * len(layers)
    attributed = 0.0
    cuts = _cuts(layers[-1][0], low, high)
    for begin, end in pairwise(cuts):
        starts, stops = np.empty(0), np.empty(0)
        covered = 0.0
        for number, layer in enumerate(layers):
            inside = (layer[0] < end) & (layer[1] > begin)
            starts = np.concatenate([starts, layer[0][inside].clip(begin, end)])
            stops = np.concatenate([stops, layer[1][inside].clip(begin, end)])
            with_layer = covered_seconds(starts, stops)
            seconds[number] += max(0.0, with_layer - covered)
            covered = max(covered, with_layer)
        attributed += covered
    return [*seconds, max(0.0, high - low - attributed)]


def _cuts(starts: Numbers, low: float, high: float) -> list[float]:
    """Return times from `low` to `high` between which about `BATCH_SIZE` intervals start."""
    inner = np.sort(starts)[BATCH_SIZE::BATCH_SIZE]
    return [low, *sorted({float(t) for t in inner if low < t < high}), high]


def max_overlap(starts: Numbers, stops: Numbers) -> int:
    """Return the largest number of intervals that contain the same moment.

    An interval does not contain its stop.
    """
    moments = np.concatenate([stops, starts])
    steps = np.repeat([-1, 1], [len(stops), len(starts)])
    order = np.argsort(moments, kind="stable")
    return int(steps[order].cumsum().max(initial=0))


def spread(starts: Numbers, stops: Numbers, amounts: Numbers, edges: Numbers) -> Numbers:
    """Return the amount per bin if each interval's amount is spread evenly over its length.

    `edges` (m,) are the edges of the bins; the result is (m-1,). It adds up to the amounts of the
    intervals that lie within the edges.
    """
    cumulative = np.zeros(len(edges))
    for low in range(0, len(starts), BATCH_SIZE):
        batch = slice(low, low + BATCH_SIZE)
        begins, totals = starts[batch], amounts[batch]
        lengths = np.maximum(stops[batch] - begins, 1e-9)
        for number, edge in enumerate(edges):
            cumulative[number] += float((((edge - begins) / lengths).clip(0.0, 1.0) * totals).sum())
        # An interval of length 0 at the last edge also counts.
        at_end = (begins >= edges[-1]) & (stops[batch] <= edges[-1])
        cumulative[-1] += float(totals[at_end].sum())
    return np.diff(cumulative)
