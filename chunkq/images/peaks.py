"""Peaks of confidence maps: one keypoint per map, or one per animal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Maps = npt.NDArray[np.floating[Any]]
Refinement = Literal["integral", "none"]
WINDOW = 2
"""Pixels on each side of a peak whose center of mass refines it: a window of 5 x 5."""


@dataclass(frozen=True)
class PeakSpec:
    """The key `peaks` of a job.

    threshold   smallest value of a peak
    refinement  `integral`: the center of mass of the 5 x 5 pixels around the peak
    stride      pixels of the network's input per pixel of a map
    multiple    whether a map can have several peaks, one per animal
    """

    threshold: float = 0.2
    refinement: Refinement = "integral"
    stride: float = 1.0
    multiple: bool = False


@dataclass(frozen=True)
class Peaks:
    """Peaks of the maps of one image, by map and then from the top left.

    maps    number of the map of each peak, int32 (n,)
    points  (x, y) in pixels of the network's input, float32 (n, 2); integers are centers of pixels
    scores  values of the maps at the peaks before refinement, float32 (n,)
    """

    maps: npt.NDArray[np.int32]
    points: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]


def find_peaks(maps: Maps, spec: PeakSpec) -> Peaks:
    """Return the peaks of maps (K, h, w) of one image.

    Without `multiple`, each map has at most one peak: its largest value, the first one in C order,
    if it reaches the threshold. With it, each pixel that reaches the threshold and is larger than
    its 8 neighbors is one; connected pixels of one value that are larger than all around them, a
    plateau, are one peak at the first of them in C order. NaN is never a peak.

    `integral` adds the center of mass of the window around a peak, in which pixels outside of the
    map count as 0 and negative values as well.
    """
    maps = np.asarray(maps, np.float32)
    clean = np.where(np.isnan(maps), -np.inf, maps)
    positions = _local_maxima(clean, spec.threshold) if spec.multiple else _largest(clean, spec)
    points = positions[:, [2, 1]].astype(np.float64)
    if spec.refinement == "integral" and len(positions):
        points += _centers_of_mass(np.maximum(clean, 0), positions)
    return Peaks(
        positions[:, 0].astype(np.int32),
        (points * spec.stride).astype(np.float32),
        maps[tuple(positions.T)],
    )


def _largest(maps: Maps, spec: PeakSpec) -> npt.NDArray[np.intp]:
    """Return [map, row, column] of the largest value of each map that reaches the threshold."""
    flat = maps.reshape(len(maps), -1)
    best = flat.argmax(axis=1)
    numbers = np.arange(len(maps))
    reaches = flat[numbers, best] >= spec.threshold
    rows, columns = np.unravel_index(best, maps.shape[1:])
    positions: npt.NDArray[np.intp] = np.stack([numbers, rows, columns], axis=1)[reaches]
    return positions


def _local_maxima(maps: Maps, threshold: float) -> npt.NDArray[np.intp]:
    """Return [map, row, column] of the local maxima that reach the threshold, in C order."""
    _, height, width = maps.shape
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    shifts = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    around = np.full_like(maps, -np.inf)
    for y, x in shifts:
        np.maximum(around, padded[:, y : y + height, x : x + width], out=around)
    candidates = (maps >= around) & (maps >= threshold) & np.isfinite(maps)
    peaks = candidates & (maps > around)
    for start in np.argwhere(candidates & ~peaks):
        _mark_plateau(maps, candidates, peaks, tuple(start))
    return np.argwhere(peaks)


def _mark_plateau(
    maps: Maps, candidates: npt.NDArray[np.bool_], peaks: npt.NDArray[np.bool_], start: Any
) -> None:
    """Make the first pixel of a plateau a peak if all of its pixels are candidates.

    The pixels of the plateau are removed from the candidates, so that it is looked at once.
    """
    if not candidates[start]:
        return
    number, value = start[0], maps[start]
    height, width = maps.shape[1:]
    stack, seen, is_maximum = [start[1:]], {start[1:]}, True
    while stack:
        y, x = stack.pop()
        is_maximum &= bool(candidates[number, y, x])
        candidates[number, y, x] = False
        for v in range(max(0, y - 1), min(height, y + 2)):
            for u in range(max(0, x - 1), min(width, x + 2)):
                if (v, u) not in seen and maps[number, v, u] == value:
                    seen.add((v, u))
                    stack.append((v, u))
    peaks[start] = is_maximum


def _centers_of_mass(maps: Maps, found: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Return the offsets (x, y) of the centers of mass of the windows around peaks, (n, 2)."""
    size = 2 * WINDOW + 1
    padded = np.pad(maps.astype(np.float64), ((0, 0), (WINDOW, WINDOW), (WINDOW, WINDOW)))
    steps = np.arange(size)
    rows = found[:, 1, None, None] + steps[:, None]
    columns = found[:, 2, None, None] + steps
    windows = padded[found[:, 0, None, None], rows, columns]
    grid, total = steps - WINDOW, windows.sum(axis=(1, 2))
    total = np.where(total > 0, total, 1)
    x, y = (windows * grid).sum(axis=(1, 2)), (windows * grid[:, None]).sum(axis=(1, 2))
    return np.stack([x, y], axis=1) / total[:, None]
