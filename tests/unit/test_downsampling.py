from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from chunkq.blend.downsampling import downsample
from chunkq.plan.pyramid import Method
from tests.reference import reduce_cells

METHODS: tuple[Method, ...] = ("mean", "mode", "nearest")
DTYPES = ("uint8", "uint16", "int8", "int16", "uint32", "int32", "float16", "float32")


@st.composite
def arrays(draw: st.DrawFn) -> tuple[npt.NDArray[Any], tuple[int, ...]]:
    """An array with up to one leading axis, and factors along its spatial axes."""
    rank = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, 5)) for _ in range(rank))
    factors = tuple(draw(st.sampled_from([1, 2])) for _ in range(rank))
    lead = draw(st.sampled_from([(), (2,)]))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        elements: Any = st.one_of(st.integers(0, 3), st.integers(int(info.min), int(info.max)))
    else:
        # Sums of such values are exact in float64 in any order.
        elements = st.integers(-4000, 4000).map(lambda n: n / 8)
    return draw(hnp.arrays(dtype, lead + shape, elements=elements)), factors


@pytest.mark.parametrize("method", METHODS)
@given(case=arrays())
def test_a_reduction_equals_that_of_each_cell(
    case: tuple[npt.NDArray[Any], tuple[int, ...]], method: Method
) -> None:
    values, factors = case
    reduced = downsample(values, factors, method)
    assert reduced.dtype == values.dtype
    np.testing.assert_array_equal(reduced, reduce_cells(values, factors, method))


def test_means_of_integers_are_rounded_half_to_even() -> None:
    pairs = np.array([0, 1, 1, 2, 2, 3, 254, 255], np.uint8)
    assert downsample(pairs, (2,), "mean").tolist() == [0, 2, 2, 254]
    assert downsample(np.array([-1, -2, -1, 0], np.int8), (2,), "mean").tolist() == [-2, 0]


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int32", "uint32", "int64", "uint64", "float64"]
)
def test_means_of_extreme_values_do_not_overflow(dtype: str) -> None:
    limits: Any = np.finfo(dtype) if dtype == "float64" else np.iinfo(dtype)
    for value in (limits.min, limits.max):
        cells = np.full((2, 2, 2), value, dtype)
        assert downsample(cells, (2, 2, 2), "mean").item() == value


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_means_of_64_bits_are_exact(dtype: str) -> None:
    info = np.iinfo(dtype)
    values = np.random.default_rng(0).integers(info.min, info.max, (6, 8), dtype, endpoint=True)
    cells = values.reshape(3, 2, 4, 2).swapaxes(1, 2).reshape(12, 4).tolist()
    expected = [round(Fraction(sum(cell), 4)) for cell in cells]
    assert downsample(values, (2, 2), "mean").ravel().tolist() == expected


def test_equal_cells_keep_their_value() -> None:
    value = np.float32(0.1)
    for method in METHODS:
        reduced = downsample(np.full((3, 5, 4), value), (2, 2, 2), method)
        assert reduced.shape == (2, 3, 2)
        assert (reduced == value).all()


def test_the_mode_of_a_large_array_is_that_of_its_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (9, 10, 7), np.uint8)
    expected = downsample(labels, (2, 2, 2), "mode")
    monkeypatch.setattr("chunkq.blend.downsampling.SLAB_VOXELS", 1)
    np.testing.assert_array_equal(downsample(labels, (2, 2, 2), "mode"), expected)
