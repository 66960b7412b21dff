"""Arrays in mappings behave like arrays on the heap."""

from __future__ import annotations

import mmap
from typing import Any

import hypothesis.extra.numpy as arrays_of
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq.system import buffers

DTYPES = st.sampled_from(["<f4", "|u1", "<u2", "<f2", "|b1"]).map(np.dtype)
SHAPES = arrays_of.array_shapes(min_dims=1, max_dims=5, min_side=0)


@pytest.fixture(params=[1, 1 << 20], ids=["mapping", "heap"])
def large_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(buffers, "LARGE_BYTES", request.param)
    return int(request.param)


@pytest.mark.usefixtures("large_bytes")
def test_zeros_has_the_shape_dtype_and_flags_of_numpy_zeros() -> None:
    @given(SHAPES, DTYPES)
    def check(shape: tuple[int, ...], dtype: np.dtype) -> None:
        array = buffers.zeros(shape, dtype)
        assert (array.shape, array.dtype) == (shape, dtype)
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert not array.any()

    check()


@pytest.mark.usefixtures("large_bytes")
def test_copies_have_the_same_values_in_c_order() -> None:
    @given(arrays_of.arrays(np.dtype("u1"), SHAPES))
    def check(values: np.ndarray) -> None:
        transposed = values.T
        contiguous = buffers.contiguous(transposed)
        assert np.array_equal(contiguous, transposed)
        assert contiguous.flags.c_contiguous
        assert (contiguous is transposed) == transposed.flags.c_contiguous
        wider = buffers.cast(transposed, "<f4")
        assert wider.dtype == np.float32
        assert np.array_equal(wider, transposed)
        assert not np.shares_memory(wider, transposed)

    check()


@pytest.mark.usefixtures("large_bytes")
def test_an_array_that_does_not_fit_raises_memory_error() -> None:
    with pytest.raises(MemoryError):
        buffers.zeros((1 << 46,), np.uint8)


def owner(array: np.ndarray) -> object:
    """Return the object that owns the memory of an array, None for NumPy itself."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    base = array.base
    return base.obj if isinstance(base, memoryview) else base


def test_only_large_arrays_use_a_mapping_which_is_unmapped_with_them() -> None:
    assert owner(buffers.zeros((1023, 1024), np.uint8)) is None
    assert isinstance(owner(buffers.zeros((1024, 1024), np.uint8)), mmap.mmap)
    before = resident_bytes()
    array = buffers.zeros((64, 1024, 1024), np.uint8)
    array[...] = 1
    allocated = resident_bytes()
    del array
    after = resident_bytes()
    assert allocated - before > 60 << 20
    assert allocated - after > 60 << 20


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


class Storage:
    """Memory that NumPy can show but that does not say its size, such as a tensor."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array
        self.__array_interface__ = array.__array_interface__


@pytest.mark.parametrize("edge", [4, buffers.LARGE_BYTES])  # on the heap, in a mapping
def test_only_an_array_that_keeps_other_memory_is_copied_to_be_compact(edge: int) -> None:
    array = buffers.zeros((2, edge), np.float32)
    for same in (array, array.T, array.reshape(edge, 2), array[:], array[::-1]):
        assert buffers.compact(same) is same
    for view in (array[:1], array[:1].reshape(-1)[:], array[:, 1:]):
        copy = buffers.compact(view)
        assert not np.shares_memory(copy, array)
        assert buffers.compact(copy) is copy
        assert (copy.shape, copy.dtype) == (view.shape, view.dtype)
        assert (copy == view).all()


def test_an_array_over_memory_of_unknown_size_is_copied_to_be_compact() -> None:
    array = np.arange(4)
    shown = np.asarray(Storage(array))
    assert np.shares_memory(shown, array)
    assert not np.shares_memory(buffers.compact(shown), array)


@pytest.mark.parametrize(
    ("kilobytes", "huge_pages"),
    [
        (1024, 0),  # a huge page would be half empty
        (1638, 0),
        (1639, 1),  # a fifth of it is unused
        (2048, 1),
        (2049, 1),
        (3277, 2),
        (6144, 3),
    ],
)
def test_an_array_is_in_huge_pages_unless_the_last_one_is_mostly_unused(
    monkeypatch: pytest.MonkeyPatch, kilobytes: int, huge_pages: int
) -> None:
    sizes, advised = [], []

    class Mapping(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            sizes.append(len(self))
            advised.append(advice[1:])

    monkeypatch.setattr(mmap, "mmap", Mapping)
    array = buffers.zeros((kilobytes, 1024), np.uint8)
    assert advised == ([(0, huge_pages * buffers.HUGE_PAGE_BYTES)] if huge_pages else [])
    assert all(size % buffers.HUGE_PAGE_BYTES == 0 for size in sizes)
    assert array.nbytes == kilobytes * 1024
    assert buffers.compact(array) is array
    view = array[1:]
    assert buffers.compact(view) is not view


def test_a_kernel_that_refuses_huge_pages_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mapping(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Mapping)
    assert not buffers.zeros((buffers.HUGE_PAGE_BYTES,), np.uint8).any()
