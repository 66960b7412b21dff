import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from chunkq.plan.value_range import PART_VALUES, ValueRange

DTYPES = ("uint8", "uint16", "int8", "int16")
dtypes = st.sampled_from(DTYPES)
ends = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
values = npst.arrays(
    np.float32, npst.array_shapes(max_dims=4), elements=st.floats(-2e6, 2e6, width=32)
)


@st.composite
def ranges(draw: st.DrawFn) -> ValueRange:
    low, high = sorted(draw(st.lists(ends, min_size=2, max_size=2, unique=True)))
    assume(high - low > 1e-30)  # float32 has no numbers between those of a smaller range
    return ValueRange(low, high, draw(dtypes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_a_range_are_the_smallest_and_the_largest_integer(dtype: str) -> None:
    info = np.iinfo(dtype)
    stored = ValueRange(-3.0, 20.0, dtype).stored(np.array([-3.0, 20.0, -4.0, 1e9], np.float32))
    assert stored.tolist() == [info.min, info.max, info.min, info.max]


@given(ranges(), values)
def test_a_stored_value_is_within_half_a_step_of_the_clipped_value(
    span: ValueRange, array: np.ndarray
) -> None:
    stored = span.stored(array)
    assert (stored.dtype, stored.shape) == (np.dtype(span.dtype), array.shape)
    exact = stored.astype(np.float64) * span.scale + span.offset
    error = np.abs(exact - np.clip(array.astype(np.float64), span.low, span.high))
    rounding = 1e-12 * (abs(span.low) + abs(span.high))
    assert error.max() <= span.scale / 2 + rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_halfway_between_two_integers_becomes_the_even_one(dtype: str) -> None:
    info = np.iinfo(dtype)
    span = ValueRange(0.0, float(int(info.max) - int(info.min)), dtype)
    halves = np.array([0.5, 1.5, 2.5, 3.5, 250.5], np.float32)
    assert (span.stored(halves).astype(int) - int(info.min)).tolist() == [0, 2, 2, 4, 250]


def test_a_large_array_is_converted_part_by_part_like_a_small_one() -> None:
    span = ValueRange(0.0, 1.0, "uint16")
    array = np.random.default_rng(0).random((3, 7, PART_VALUES // 16), np.float32)
    expected = np.rint(array.astype(np.float64) * 65535).astype(np.uint16)
    assert np.array_equal(span.stored(array), expected)
    assert np.array_equal(span.stored(array.reshape(-1)), expected.reshape(-1))
    assert np.array_equal(span.stored(array[:, ::2, 1:]), expected[:, ::2, 1:])


@given(ranges())
def test_the_values_of_all_integers_lie_in_the_range_and_are_stored_as_themselves(
    span: ValueRange,
) -> None:
    stored = np.unique(np.linspace(*(float(n) for n in _limits(span)), 999).astype(span.dtype))
    decoded = span.values(stored)
    assert decoded.dtype == np.float32
    # float32 has 24 significant bits, so a range far from 0 has fewer distinct values.
    if span.scale > 1e-6 * max(abs(span.low), abs(span.high)):
        assert np.array_equal(span.stored(decoded), stored)


def _limits(span: ValueRange) -> tuple[int, int]:
    info = np.iinfo(span.dtype)
    return int(info.min), int(info.max)
