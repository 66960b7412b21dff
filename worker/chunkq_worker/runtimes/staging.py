"""Batches to a device and results back, copied beside what it computes.

Who waits for whom is decided here, for any `Accelerator`. Between two streams, and between a
stream and the host, nothing is in order unless one waits for an event of the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from chunkq_worker.runtimes.base import BatchFeed, Fetched

SLOTS = 2
"""One batch is computed while the next is written: each needs memory of its own."""
WARM_UPS = 3
"""Runs before a capture: a compiler, or TorchScript's, is done after two."""
WIDER = {torch.uint16: (torch.int16, torch.int32), torch.uint32: (torch.int32, torch.int64)}
"""Wide unsigned integers, of which torch knows few operations: the same bits, the same values."""
Stream = Any
Event = Any


class Accelerator(ABC):
    """A device beside the host: memory, and streams of operations that it runs by itself.

    The operations of one stream run one after the other. An event is a place in a stream.
    """

    @abstractmethod
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return host memory, its values undefined, that the device copies by itself."""

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return memory of the device, its values undefined, for the current stream to use."""

    @abstractmethod
    def stream(self) -> Stream:
        """Return a new stream."""

    @abstractmethod
    def current(self) -> Stream:
        """Return the stream that torch's operations of this thread join."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Have the stream copy between pinned memory and the device; returns at once.

        The device's memory is kept for the copy even if nothing refers to it any more.
        """

    @abstractmethod
    def record(self, stream: Stream) -> Event:
        """Return the event that all operations given to the stream so far are done."""

    @abstractmethod
    def wait_on_stream(self, stream: Stream, event: Event) -> None:
        """Have the stream's later operations wait for an event; returns at once."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Return when an event has happened. Any thread may call it."""

    @abstractmethod
    def capture(
        self, run: Callable[[torch.Tensor], Any], given: torch.Tensor
    ) -> tuple[Callable[[], None], Any]:
        """Return what repeats `run(given)` on the current stream, and what `run` returned.

        A repetition reads and writes the same memory: what lies in `given` then, and the returned
        tensor, which holds nothing before the first repetition.
        """

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """Return a copy of a host tensor for the current stream; the host's is free at once."""
        between = self.pinned(host.shape, host.dtype)
        between.copy_(host)
        placed = self.empty(host.shape, host.dtype)
        self.copy(placed, between, self.current())
        return placed


class Cuda(Accelerator):
    """The current CUDA device. Freed pinned memory is kept by torch until its copies are done."""

    @override
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    @override
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device="cuda")

    @override
    def stream(self) -> Stream:
        return torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @override
    def current(self) -> Stream:
        return torch.cuda.current_stream()

    @override
    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        for tensor in (target, source):
            if tensor.is_cuda:
                tensor.record_stream(stream)

    @override
    def record(self, stream: Stream) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    @override
    def wait_on_stream(self, stream: Stream, event: Event) -> None:
        stream.wait_event(event)

    @override
    def wait(self, event: Event) -> None:
        event.synchronize()

    @override
    def capture(
        self, run: Callable[[torch.Tensor], Any], given: torch.Tensor
    ) -> tuple[Callable[[], None], Any]:
        here, aside = self.current(), self.stream()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(here):  # which a capture that fails does not go back to
                # Libraries make handles for each stream at first use, not to be captured.
                aside.wait_stream(here)
                with torch.cuda.stream(aside):
                    for _ in range(WARM_UPS):
                        run(given)
                here.wait_stream(aside)
                # Other threads wait for results meanwhile, which breaks a capture in other modes.
                with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                    returned = run(given)
        except RuntimeError as error:
            if isinstance(error.__context__, torch.cuda.OutOfMemoryError):
                raise error.__context__ from None  # the error hides what broke the capture
            raise
        return graph.replay, returned


class Slot:
    """Memory for one batch on both sides.

    `sent` is when its copy to the device is done; `taken`, when the device has read that copy.
    """

    def __init__(self, accelerator: Accelerator, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.host = accelerator.pinned(shape, dtype).zero_()
        self.array: npt.NDArray[Any] = self.host.numpy()
        self.device = accelerator.empty(shape, dtype)
        # What had this memory before may still be in use on the current stream.
        self.taken: Event = accelerator.record(accelerator.current())
        self.sent: Event | None = None


class SentBatch:
    """A batch on its way to the device, of `count` items; to be taken once."""

    def __init__(self, accelerator: Accelerator, slot: Slot, count: int) -> None:
        self._accelerator, self._slot, self._count = accelerator, slot, count

    def take(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the batch in a dtype and memory of its own, for the current stream."""
        accelerator, slot = self._accelerator, self._slot
        accelerator.wait_on_stream(accelerator.current(), slot.sent)
        given = as_signed(slot.device[: self._count]).to(dtype, copy=True)
        slot.taken = accelerator.record(accelerator.current())
        return given


class StagedFeed(BatchFeed):
    """Batches written into pinned memory in turn and copied on `stream`, ahead of their use."""

    ahead = True

    def __init__(
        self,
        accelerator: Accelerator,
        stream: Stream,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
    ) -> None:
        self._accelerator, self._stream = accelerator, stream
        self._slots = self._rotation(shape, np.dtype(dtype))
        self._others: dict[tuple[tuple[int, ...], np.dtype[Any]], list[Slot]] = {}

    @override
    def buffer(self) -> npt.NDArray[Any]:
        return self._next(self._slots).array

    @override
    def send(self, batch: npt.NDArray[Any]) -> SentBatch | npt.NDArray[Any]:
        slot = self._slots[-1]
        if not _is_start_of(batch, slot.array):  # steps made something else of it
            if not _has_tensor(batch.dtype) or len(batch) > len(slot.array):
                return batch.copy()  # as it may lie in memory that is written again
            key = (batch.shape[1:], batch.dtype)
            if key not in self._others:
                self._others[key] = self._rotation((len(slot.array), *key[0]), key[1])
            slot = self._next(self._others[key])
            slot.array[: len(batch)] = batch
        accelerator, count = self._accelerator, len(batch)
        accelerator.wait_on_stream(self._stream, slot.taken)
        accelerator.copy(slot.device[:count], slot.host[:count], self._stream)
        slot.sent = accelerator.record(self._stream)
        return SentBatch(accelerator, slot, count)

    def _rotation(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> list[Slot]:
        of_torch = torch.from_numpy(np.empty(0, dtype)).dtype
        return [Slot(self._accelerator, shape, of_torch) for _ in range(SLOTS)]

    def _next(self, slots: list[Slot]) -> Slot:
        """Return the slot whose turn it is, free to be written; it goes to the list's end."""
        slots.append(slots.pop(0))
        if slots[-1].sent is not None:
            self._accelerator.wait(slots[-1].sent)
        return slots[-1]


class GraphReplay:
    """A network captured once for each shape of batch, then repeated without being called."""

    def __init__(self, accelerator: Accelerator, run: Callable[[torch.Tensor], Any]) -> None:
        self._accelerator, self._run = accelerator, run
        self._captured: dict[Any, tuple[torch.Tensor, Callable[[], None], Any]] = {}

    def __call__(self, given: torch.Tensor) -> Any:
        """Return what the network gives, in memory of its own if it is a tensor."""
        key = (tuple(given.shape), given.dtype, given.stride())
        if key not in self._captured:
            fixed = torch.empty_like(given)
            fixed.copy_(given)
            self._captured[key] = (fixed, *self._accelerator.capture(self._run, fixed))
        fixed, replay, returned = self._captured[key]
        fixed.copy_(given)
        replay()
        return returned.clone() if isinstance(returned, torch.Tensor) else returned

    def clear(self) -> None:
        """Let go of what was captured, and of its memory."""
        self._captured.clear()


def fetch(accelerator: Accelerator, stream: Stream, arrays: Sequence[torch.Tensor]) -> Fetched:
    """Have `stream` copy results of the current stream to the host; returns what waits for them."""
    arrays = [array.contiguous() for array in arrays]
    accelerator.wait_on_stream(stream, accelerator.record(accelerator.current()))
    pinned = [accelerator.pinned(array.shape, array.dtype) for array in arrays]
    for target, source in zip(pinned, arrays, strict=True):
        accelerator.copy(target, source, stream)
    done = accelerator.record(stream)

    def fetched() -> list[npt.NDArray[Any]]:
        accelerator.wait(done)
        return [target.numpy() for target in pinned]

    return fetched


def as_signed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values in a dtype that torch has all operations for."""
    if tensor.dtype not in WIDER:
        return tensor
    bits, values = WIDER[tensor.dtype]
    return tensor.view(bits).to(values) & torch.iinfo(tensor.dtype).max


def _is_start_of(batch: npt.NDArray[Any], array: npt.NDArray[Any]) -> bool:
    """Tell whether a batch is the array's first items, as they lie in memory."""
    return (
        batch.ctypes.data == array.ctypes.data
        and batch.dtype == array.dtype
        and batch.shape[1:] == array.shape[1:]
        and batch.flags.c_contiguous
    )


def _has_tensor(dtype: np.dtype[Any]) -> bool:
    return dtype.isnative and dtype.kind in "biuf" and dtype != np.uint64 and dtype.itemsize <= 8
