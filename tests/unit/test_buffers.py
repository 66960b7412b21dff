"""Large arrays lie in pages of their own and are otherwise like any."""

from __future__ import annotations

import mmap

import hypothesis.extra.numpy as arrays_of
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq import buffers

DTYPES = st.sampled_from(["<f4", "|u1", "<u2", "<f2", "|b1"]).map(np.dtype)
SHAPES = arrays_of.array_shapes(min_dims=1, max_dims=5, min_side=0)


@pytest.fixture(params=[1, 1 << 20], ids=["own-pages", "heap"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(buffers, "LARGE_BYTES", request.param)
    return int(request.param)


@pytest.mark.usefixtures("large")
def test_zeros_are_those_of_numpy() -> None:
    @given(SHAPES, DTYPES)
    def check(shape: tuple[int, ...], dtype: np.dtype) -> None:
        made = buffers.zeros(shape, dtype)
        assert (made.shape, made.dtype) == (shape, dtype)
        assert made.flags.c_contiguous
        assert made.flags.writeable
        assert not made.any()

    check()


@pytest.mark.usefixtures("large")
def test_copies_hold_the_same_values_in_c_order() -> None:
    @given(arrays_of.arrays(np.dtype("u1"), SHAPES))
    def check(values: np.ndarray) -> None:
        turned = values.T
        same = buffers.contiguous(turned)
        assert np.array_equal(same, turned)
        assert same.flags.c_contiguous
        assert (same is turned) == turned.flags.c_contiguous
        wider = buffers.cast(turned, "<f4")
        assert wider.dtype == np.float32
        assert np.array_equal(wider, turned)
        assert not np.shares_memory(wider, turned)

    check()


@pytest.mark.usefixtures("large")
def test_what_does_not_fit_is_a_lack_of_memory() -> None:
    with pytest.raises(MemoryError):
        buffers.zeros((1 << 46,), np.uint8)


def owner(array: np.ndarray) -> object:
    """What an array's memory belongs to."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    held = array.base
    return held.obj if isinstance(held, memoryview) else held


def test_only_large_arrays_have_a_mapping_and_it_goes_with_them() -> None:
    assert owner(buffers.zeros((1023, 1024), np.uint8)) is None
    assert isinstance(owner(buffers.zeros((1024, 1024), np.uint8)), mmap.mmap)
    mapped = {"before": resident()}
    array = buffers.zeros((64, 1024, 1024), np.uint8)
    array[...] = 1
    mapped["with"] = resident()
    del array
    mapped["after"] = resident()
    assert mapped["with"] - mapped["before"] > 60 << 20
    assert mapped["with"] - mapped["after"] > 60 << 20


def resident() -> int:
    """This process's resident memory, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE
