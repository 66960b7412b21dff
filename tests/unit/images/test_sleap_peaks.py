"""Peaks in confidence maps of sleap-nn, beside those that it finds itself.

`make parity` has written the maps and its peaks, see tests/parity/sleap_fixture.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from chunkq.images.peaks import PeakSpec, Refinement, find_peaks

Arrays = dict[str, npt.NDArray[Any]]
TOLERANCE = 0.01
"""Pixels of a map."""


@pytest.fixture(scope="module")
def sleap() -> Arrays:
    with np.load(Path(__file__).parents[2] / "fixtures" / "sleap-nn.npz") as file:
        return dict(file)


@pytest.mark.parametrize("refinement", ["integral", "none"])
def test_the_largest_values_are_where_sleap_nn_finds_them(
    sleap: Arrays, refinement: Refinement
) -> None:
    for number, maps in enumerate(sleap["one"]):
        peaks = find_peaks(maps, PeakSpec(threshold=0.2, refinement=refinement))
        expected = sleap[f"one {refinement}"][number]
        np.testing.assert_array_equal(peaks.maps, np.flatnonzero(np.isfinite(expected[:, 0])))
        np.testing.assert_allclose(peaks.points, expected[peaks.maps], rtol=0, atol=TOLERANCE)
        scores = sleap[f"one {refinement} scores"][number]
        np.testing.assert_array_equal(peaks.scores, scores[peaks.maps])


@pytest.mark.parametrize("refinement", ["integral", "none"])
def test_all_local_maxima_are_where_sleap_nn_finds_them(
    sleap: Arrays, refinement: Refinement
) -> None:
    expected = sleap[f"two {refinement}"]
    spec = PeakSpec(threshold=0.2, refinement=refinement, multiple=True)
    found = []
    for number, maps in enumerate(sleap["two"]):
        peaks = find_peaks(maps, spec)
        columns = (np.full(len(peaks.maps), number), peaks.maps, peaks.points, peaks.scores)
        found.append(np.column_stack(columns))
    rows = np.concatenate(found)
    assert len(rows) == len(expected)
    order = np.lexsort((rows[:, 4], rows[:, 1], rows[:, 0]))
    reference = np.lexsort((expected[:, 4], expected[:, 1], expected[:, 0]))
    np.testing.assert_allclose(rows[order], expected[reference], rtol=0, atol=TOLERANCE)
