"""Read, transform and predict the images of some rows of a list."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.errors import ErrorCode, ModelError
from chunkq.images.decoding import Decoded, Reserve
from chunkq.images.image_error import ImageError
from chunkq.images.image_spec import ImageSpec
from chunkq.images.transform import Placement, transform
from chunkq_worker.images.pixel_budget import BUDGET

Values = npt.NDArray[np.float32]
"""The input of a network for one image, (C, h, w)."""
Network = Callable[[Sequence[Values]], Sequence[npt.NDArray[Any]]]
"""Computes a batch: from images of one shape to one array (n, ...) per head. Raises ImageError if
it refuses the batch because of an image, and any other error if no image is the cause."""
WAITING_BATCHES = 4
"""An image waits for others of its shape until so many batches of later rows were read."""


@dataclass(frozen=True)
class RowInput:
    """An image to predict. `read` returns it decoded, or raises ImageError.

    `row` is the number of the row in the list. `read` is called in a thread of a pool. Its argument
    waits until the pixels of the image may be held; it is called once, before they are decoded.
    """

    row: int
    read: Callable[[Reserve], Decoded]


@dataclass(frozen=True)
class RowOutput:
    """What the network returned for a row: one array per head, without the axis of the batch."""

    row: int
    values: tuple[npt.NDArray[Any], ...]
    placement: Placement


@dataclass(frozen=True)
class FailedRow:
    """A row without a result."""

    row: int
    error: ImageError


@dataclass(frozen=True)
class _Ready:
    """A transformed image. `number` is its position among the inputs."""

    number: int
    row: int
    values: Values
    placement: Placement


Result = RowOutput | FailedRow


def run_rows(
    inputs: Iterable[RowInput],
    spec: ImageSpec,
    network: Network,
    *,
    max_batch_size: int,
    threads: int,
) -> Generator[Result, None, None]:
    """Yield the result of each input, in their order.

    Images are read and transformed in `threads` threads, a bounded number ahead of the network,
    which is called in the caller's thread. Images of one shape share a batch. Which ones depends
    only on the inputs, so the results do not depend on threads or on other chunks: a batch runs
    when it is full, when its first image has waited for `WAITING_BATCHES` batches of later images,
    or at the end. If the network refuses a batch, its images run one by one, and those that it
    still refuses are failed rows. So are images with an output that is not finite as float32.

    Raises what `read` and the network raise, except for ImageError.
    """
    done: dict[int, Result] = {}
    groups: dict[tuple[int, ...], list[_Ready]] = {}  # the one with the earliest row is the first
    following = 0

    def run(shape: tuple[int, ...]) -> None:
        batch = groups.pop(shape)
        results = _run_batch(batch, network)
        done.update(zip((one.number for one in batch), results, strict=True))

    def finished() -> Iterator[Result]:
        nonlocal following
        while following in done:
            yield done.pop(following)
            following += 1

    prepared = _prepared(inputs, spec, threads, ahead=threads + max_batch_size)
    for number, image in enumerate(prepared):
        if isinstance(image, FailedRow):
            done[number] = image
        else:
            group = groups.setdefault(image.values.shape, [])
            group.append(image)
            if len(group) == max_batch_size:
                run(image.values.shape)
        if groups:
            shape, group = next(iter(groups.items()))
            if number - group[0].number >= WAITING_BATCHES * max_batch_size:
                run(shape)
        yield from finished()
    for shape in list(groups):
        run(shape)
        yield from finished()


def _prepared(
    inputs: Iterable[RowInput], spec: ImageSpec, threads: int, ahead: int
) -> Iterator[_Ready | FailedRow]:
    """Yield the transformed images in the order of the inputs, at most `ahead` read in advance."""

    def prepare(number: int, one: RowInput) -> _Ready | FailedRow:
        try:
            with BUDGET.image() as reserve:
                values, placement = transform(one.read(reserve), spec)
        except ImageError as error:
            return FailedRow(one.row, error)
        return _Ready(number, one.row, values, placement)

    pending: deque[Future[_Ready | FailedRow]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="images")
    try:
        for number, one in enumerate(inputs):
            pending.append(pool.submit(prepare, number, one))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _run_batch(batch: Sequence[_Ready], network: Network) -> list[Result]:
    try:
        heads = [np.asarray(head) for head in network([one.values for one in batch])]
    except ImageError as error:
        if len(batch) == 1:
            return [FailedRow(batch[0].row, error)]
        return [result for one in batch for result in _run_batch([one], network)]
    for head in heads:
        if head.ndim == 0 or len(head) != len(batch):
            raise ModelError(
                f"the network returned shape {list(head.shape)} for a batch of {len(batch)} "
                "images; fix the network, which must keep the axis of the batch"
            )
    return [_result(one, tuple(head[n] for head in heads)) for n, one in enumerate(batch)]


def _result(image: _Ready, values: tuple[npt.NDArray[Any], ...]) -> Result:
    if all(map(_is_storable, values)):
        return RowOutput(image.row, values, image.placement)
    return FailedRow(
        image.row,
        ImageError(
            "predict",
            "the network returned NaN, infinity or a number beyond float32; fix the network or the "
            "image",
            code=ErrorCode.PREDICTION_INVALID,
        ),
    )


def _is_storable(values: npt.NDArray[Any]) -> bool:
    """Return whether all values are finite, also as float32, which is what tables have."""
    limit = np.finfo(np.float32).max
    return bool((np.abs(values) <= limit).all())  # False for NaN
