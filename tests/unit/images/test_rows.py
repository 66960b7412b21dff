"""Rows of an image list through a network: batches, order, errors, bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from chunkq_worker.images.rows import WAITING_BATCHES, FailedRow, RowInput, RowOutput, run_rows
from hypothesis import given
from hypothesis import strategies as st

from chunkq.errors import ErrorCode, ModelError, StoreError
from chunkq.images.decoding import Reserve
from chunkq.images.image_error import ImageError
from chunkq.images.image_spec import ImageSpec
from chunkq.images.transform import transform

SPEC = ImageSpec(mode="L")


def image(value: int, shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    return np.full((*shape, 1), value, np.uint8)


def sums(batch: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    return [np.stack(batch).sum(axis=(1, 2, 3)), np.stack(batch)]


def missing() -> npt.NDArray[Any]:
    raise ImageError("read", "missing; fix the path", code=ErrorCode.IMAGE_MISSING)


def rows_of(*reads: Callable[[], npt.NDArray[Any]]) -> list[RowInput]:
    return [RowInput(10 + n, partial(unreserved, read)) for n, read in enumerate(reads)]


def unreserved(read: Callable[[], npt.NDArray[Any]], reserve: Reserve) -> npt.NDArray[Any]:
    return read()


shapes = st.sampled_from([(2, 3), (3, 2), (4, 4)])


@given(
    images=st.lists(st.none() | st.tuples(st.integers(0, 255), shapes), max_size=40),
    max_batch_size=st.integers(1, 5),
    threads=st.integers(1, 3),
)
def test_each_row_has_the_outputs_of_its_image_in_the_order_of_the_list(
    images: list[tuple[int, tuple[int, int]] | None], max_batch_size: int, threads: int
) -> None:
    reads = [missing if one is None else partial(image, *one) for one in images]
    sizes = []

    def network(batch: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        sizes.append(len(batch))
        return sums(batch)

    results = list(
        run_rows(rows_of(*reads), SPEC, network, max_batch_size=max_batch_size, threads=threads)
    )
    assert [one.row for one in results] == [10 + n for n in range(len(images))]
    assert max(sizes, default=1) <= max_batch_size
    assert sum(sizes) == sum(one is not None for one in images)
    for one, result in zip(images, results, strict=True):
        if one is None:
            assert isinstance(result, FailedRow)
            assert result.error.code is ErrorCode.IMAGE_MISSING
            continue
        values, placement = transform(image(*one), SPEC)
        assert isinstance(result, RowOutput)
        assert (result.values[0], result.placement) == (values.sum(), placement)
        np.testing.assert_array_equal(result.values[1], values)


def batches(images: Sequence[tuple[int, tuple[int, int]]], size: int, threads: int) -> list[Any]:
    """Return the values of the images of each batch."""
    calls = []

    def network(batch: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        calls.append([int(one.flat[0]) for one in batch])
        return sums(batch)

    inputs = rows_of(*[partial(image, *one) for one in images])
    list(run_rows(inputs, SPEC, network, max_batch_size=size, threads=threads))
    return calls


def test_batches_depend_on_the_rows_alone() -> None:
    rng = np.random.default_rng(0)
    kinds = [(2, 3), (3, 2), (4, 4)]
    images = [(n, kinds[rng.integers(3)]) for n in range(50)]
    assert batches(images, 4, 1) == batches(images, 4, 7)


def test_images_of_one_shape_share_a_batch() -> None:
    images = [(n, (2, 2 + n % 2)) for n in range(8)]
    assert batches(images, 4, 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_an_image_of_a_rare_shape_does_not_hold_back_the_rows_after_it() -> None:
    images = [(0, (9, 9)), *((n, (2, 2)) for n in range(1, 40))]
    calls = batches(images, 2, 1)
    assert calls.index([0]) == WAITING_BATCHES  # as many full batches have run before


def test_a_refused_batch_costs_only_the_images_that_the_network_refuses_alone() -> None:
    def network(batch: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        if any(one.flat[0] == 7 for one in batch):
            raise ImageError("predict", "refused", code=ErrorCode.IMAGE_UNSUITABLE)
        return sums(batch)

    inputs = rows_of(*[partial(image, n, (2, 2)) for n in (5, 7, 6)])
    first, second, third = run_rows(inputs, SPEC, network, max_batch_size=3, threads=1)
    assert isinstance(first, RowOutput)
    assert first.values[0] == 20
    assert isinstance(third, RowOutput)
    assert third.values[0] == 24
    assert isinstance(second, FailedRow)
    assert (second.error.stage, second.error.code) == ("predict", ErrorCode.IMAGE_UNSUITABLE)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39, -1e39])
def test_an_output_that_is_not_finite_is_an_error_of_its_row(value: float) -> None:
    def network(batch: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        head, other = (output.astype(np.float64) for output in sums(batch))
        other[1, 0, 0, 0] = value
        return [head, other]

    inputs = rows_of(*[partial(image, 3, (2, 2))] * 3)
    first, second, third = run_rows(inputs, SPEC, network, max_batch_size=3, threads=1)
    assert isinstance(first, RowOutput)
    assert isinstance(third, RowOutput)
    assert isinstance(second, FailedRow)
    assert second.error.code is ErrorCode.PREDICTION_INVALID


def test_an_image_that_the_transform_refuses_is_an_error_of_its_row() -> None:
    spec = ImageSpec(mode="L", crop=(3, 3))
    inputs = rows_of(partial(image, 1, (3, 4)), partial(image, 1, (2, 4)))
    first, second = run_rows(inputs, spec, sums, max_batch_size=4, threads=2)
    assert isinstance(first, RowOutput)
    assert isinstance(second, FailedRow)
    assert (second.error.stage, second.error.code) == ("transform", ErrorCode.IMAGE_UNSUITABLE)


def test_errors_that_no_image_causes_end_the_chunk() -> None:
    def down() -> npt.NDArray[Any]:
        raise StoreError("the server is down; try again")

    inputs = rows_of(partial(image, 1, (2, 2)), down, partial(image, 1, (2, 2)))
    with pytest.raises(StoreError):
        list(run_rows(inputs, SPEC, sums, max_batch_size=2, threads=2))

    def broken(_: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        raise ModelError("the network is broken; fix it")

    with pytest.raises(ModelError):
        list(run_rows(inputs[:1], SPEC, broken, max_batch_size=2, threads=2))


def test_a_network_that_drops_the_axis_of_the_batch_is_refused() -> None:
    inputs = rows_of(*[partial(image, 1, (2, 2))] * 2)
    with pytest.raises(ModelError) as error:
        list(run_rows(inputs, SPEC, lambda _: [np.zeros(3)], max_batch_size=2, threads=1))
    assert error.value.code is ErrorCode.MODEL_UNUSABLE


def test_images_are_read_a_bounded_number_ahead() -> None:
    lock, read, most = Lock(), 0, 0

    def counted() -> npt.NDArray[Any]:
        nonlocal read
        with lock:
            read += 1
        return image(1, (2, 2))

    def inputs() -> Iterator[RowInput]:
        yield from rows_of(*[counted] * 200)

    results = run_rows(inputs(), SPEC, sums, max_batch_size=4, threads=2)
    for done, _ in enumerate(results, start=1):
        most = max(most, read - done)
    assert read == 200
    assert most <= 2 * 4 + 2
