from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkq.geometry.padding import PadMode, source_indices, source_range
from tests.strategies import PAD_MODES

MODES = st.sampled_from(PAD_MODES)


def padded_by_numpy(start: int, stop: int, size: int, mode: PadMode) -> list[int]:
    before, after = max(0, -start), max(0, stop - size)
    pad: Any = np.pad
    value = {"constant_values": -1} if mode == "constant" else {}
    wide = pad(np.arange(size), (before, after), mode=mode, **value)
    return [int(i) for i in wide[start + before : stop + before]]


@settings(max_examples=500)
@given(st.integers(1, 6), st.integers(-25, 25), st.integers(0, 25), MODES)
def test_every_window_equals_the_padding_of_numpy_for_any_pad_width(
    size: int, start: int, length: int, mode: PadMode
) -> None:
    indices = source_indices(start, start + length, size, mode)
    assert indices.tolist() == padded_by_numpy(start, start + length, size, mode)
    assert indices.dtype == np.int64


@pytest.mark.parametrize(
    ("mode", "expected"),
    [  # window [-4, 7) of an axis of 3 voxels
        ("constant", [-1, -1, -1, -1, 0, 1, 2, -1, -1, -1, -1]),
        ("edge", [0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2]),
        ("reflect", [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2]),  # period 4: 0 1 2 1
        ("symmetric", [2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0]),  # period 6: 0 1 2 2 1 0
    ],
)
def test_indices_of_each_mode_computed_by_hand(mode: PadMode, expected: list[int]) -> None:
    assert source_indices(-4, 7, 3, mode).tolist() == expected


@pytest.mark.parametrize("mode", ["reflect", "symmetric", "edge"])
def test_the_padding_of_a_single_voxel_repeats_it(mode: PadMode) -> None:
    assert source_indices(-3, 4, 1, mode).tolist() == [0] * 7


@given(st.integers(1, 9), st.sampled_from(("reflect", "symmetric")), st.integers(-(10**12), 10**12))
def test_mirrored_padding_is_periodic(size: int, mode: PadMode, far: int) -> None:
    period = 2 * size - (2 if mode == "reflect" and size > 1 else 0)
    near = source_indices(0, period, size, mode)
    assert source_indices(far * period, (far + 1) * period, size, mode).tolist() == near.tolist()


@settings(max_examples=500)
@given(
    st.integers(1, 6),
    MODES,
    st.lists(st.tuples(st.integers(-20, 5), st.integers(0, 30)), min_size=1, max_size=5),
)
def test_the_source_range_is_the_smallest_that_holds_all_source_indices(
    size: int, mode: PadMode, windows: list[tuple[int, int]]
) -> None:
    # Each window intersects the axis, like that of every kept patch, or is empty.
    starts = [min(start, size - 1) for start, _ in windows]
    stops = [
        max(1, start + length) if length else start
        for start, (_, length) in zip(starts, windows, strict=True)
    ]
    low, high = source_range(np.array(starts), np.array(stops), size, mode)
    for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        if start == stop:
            assert low[number] == high[number]
            continue
        indices = source_indices(start, stop, size, mode)
        indices = indices[indices >= 0]
        assert (low[number], high[number]) == (indices.min(), indices.max() + 1)
