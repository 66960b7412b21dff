"""Peaks of confidence maps, against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from chunkq.images.peaks import PeakSpec, find_peaks

Maps = npt.NDArray[Any]
LEVELS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
MAPS = arrays.arrays(
    np.float32, arrays.array_shapes(min_dims=3, max_dims=3, max_side=7), elements=LEVELS
)


def plateau(image: Maps, y: int, x: int) -> set[tuple[int, int]]:
    """Pixels connected to one by pixels of its value."""
    pixels, border = set(), {(y, x)}
    while border:
        pixels |= border
        border = {
            (v, u)
            for b, a in border
            for v in range(b - 1, b + 2)
            for u in range(a - 1, a + 2)
            if 0 <= v < image.shape[0] and 0 <= u < image.shape[1]
            if image[v, u] == image[y, x]
        } - pixels
    return pixels


def naive_maxima(maps: Maps, threshold: float) -> list[tuple[int, int, int]]:
    found = []
    for k, image in enumerate(maps):
        for y, x in np.ndindex(image.shape):
            pixels = plateau(image, y, x)
            around = [
                image[v, u]
                for b, a in pixels
                for v in range(max(0, b - 1), min(image.shape[0], b + 2))
                for u in range(max(0, a - 1), min(image.shape[1], a + 2))
                if (v, u) not in pixels
            ]
            is_first = (y, x) == min(pixels)
            if is_first and image[y, x] >= threshold and all(n < image[y, x] for n in around):
                found.append((k, y, x))
    return found


def naive_center(image: Maps, y: int, x: int) -> tuple[float, float]:
    total = sum_x = sum_y = 0.0
    for v in range(y - 2, y + 3):
        for u in range(x - 2, x + 3):
            if 0 <= v < image.shape[0] and 0 <= u < image.shape[1]:
                weight = float(image[v, u])
                total, sum_x, sum_y = total + weight, sum_x + u * weight, sum_y + v * weight
    return (sum_x / total, sum_y / total) if total else (x, y)


@given(MAPS, st.sampled_from([0.1, 0.3, 0.5]))
def test_every_plateau_above_its_surroundings_is_one_peak(maps: Maps, threshold: float) -> None:
    spec = PeakSpec(threshold, "none", multiple=True)
    peaks = find_peaks(maps, spec)
    found = [(k, int(y), int(x)) for k, (x, y) in zip(peaks.maps, peaks.points, strict=True)]
    assert found == naive_maxima(maps, threshold)
    assert peaks.scores.tolist() == [maps[index] for index in found]


@given(MAPS, st.booleans(), st.sampled_from([1.0, 2.0, 0.5]))
def test_refined_points_are_centers_of_mass(maps: Maps, multiple: bool, stride: float) -> None:
    rough = find_peaks(maps, PeakSpec(0.2, "none", multiple=multiple))
    refined = find_peaks(maps, PeakSpec(0.2, "integral", stride, multiple))
    expected = [
        naive_center(maps[k], int(y), int(x))
        for k, (x, y) in zip(rough.maps, rough.points, strict=True)
    ]
    assert refined.maps.tolist() == rough.maps.tolist()
    np.testing.assert_allclose(
        refined.points, np.array(expected).reshape(-1, 2) * stride, rtol=1e-6, atol=1e-6
    )


@given(MAPS)
def test_each_map_has_its_largest_value_as_its_only_peak(maps: Maps) -> None:
    peaks = find_peaks(maps, PeakSpec(0.3, "none"))
    expected = [k for k, image in enumerate(maps) if image.max() >= 0.3]
    assert peaks.maps.tolist() == expected
    for k, (x, y), score in zip(peaks.maps, peaks.points, peaks.scores, strict=True):
        assert score == maps[k, int(y), int(x)] == maps[k].max()


def test_a_value_equal_to_the_threshold_is_a_peak_and_nan_is_none() -> None:
    maps = np.zeros((2, 3, 3), np.float32)
    maps[0, 1, 1], maps[1, 0, 0] = 0.5, np.nan
    for multiple in (False, True):
        peaks = find_peaks(maps, PeakSpec(0.5, "integral", multiple=multiple))
        assert peaks.maps.tolist() == [0]
        assert peaks.points.tolist() == [[1.0, 1.0]]


def test_a_gaussian_is_found_within_a_hundredth_of_a_pixel() -> None:
    y, x = np.mgrid[:48, :64]
    center = (20.3, 31.8)
    sigma = 0.8  # the window of 5 x 5 holds nearly all of it
    maps = np.exp(-((x - center[0]) ** 2 + (y - center[1]) ** 2) / (2 * sigma**2))[None]
    peaks = find_peaks(maps.astype(np.float32), PeakSpec(0.2))
    assert peaks.points[0] == pytest.approx(center, abs=0.01)
