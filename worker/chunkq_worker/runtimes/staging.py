"""Copy batches to a device and results back while the device computes.

This module does all synchronization, for any `Accelerator`. Operations of two streams, or of a
stream and the host, are ordered only if one waits for an event of the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from chunkq_worker.runtimes.base import BatchFeed

SLOTS = 2
"""Buffers of a feed: one batch is computed while the next is written."""
WARM_UP_RUNS = 3
"""Runs before a capture. Compilers, TorchScript's included, are done after two."""
SIGNED_DTYPES = {torch.uint16: (torch.int16, torch.int32), torch.uint32: (torch.int32, torch.int64)}
"""Unsigned dtype -> signed dtype of the same bits, signed dtype that represents all values.

torch implements few operations for these unsigned dtypes.
"""
Stream = Any
Event = Any


class Accelerator(ABC):
    """A device with its own memory and streams of operations that run asynchronously.

    The operations of one stream run in order. An event marks a position in a stream.
    """

    @abstractmethod
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return uninitialized pinned host memory, for asynchronous copies."""

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return uninitialized device memory for use on the current stream."""

    @abstractmethod
    def stream(self) -> Stream:
        """Return a new stream."""

    @abstractmethod
    def current(self) -> Stream:
        """Return the stream that torch uses in this thread."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Enqueue a copy between pinned memory and device memory, without waiting for it.

        Device memory that is freed meanwhile is not reused before the copy is done.
        """

    @abstractmethod
    def record(self, stream: Stream) -> Event:
        """Return an event that completes when all operations enqueued so far are done."""

    @abstractmethod
    def wait_on_stream(self, stream: Stream, event: Event) -> None:
        """Make later operations of the stream wait for an event, without blocking the host."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Block until an event is complete. Safe in any thread."""

    @abstractmethod
    def capture(
        self, run: Callable[[torch.Tensor], Any], batch: torch.Tensor
    ) -> tuple[Callable[[], None], Any]:
        """Capture `run(batch)`. Return a function that replays it, and the output of `run`.

        A replay runs on the current stream. It reads the current contents of `batch` and writes to
        the same output tensor, which is uninitialized before the first replay.
        """

    @abstractmethod
    def free_bytes(self) -> int:
        """Return the bytes of device memory that were free when torch used the most of it."""

    def zeros(self, shape: Sequence[int]) -> torch.Tensor:
        """Return float32 zeros on the device, for the current stream."""
        return self.empty(shape, torch.float32).zero_()

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """Return a copy on the device, for the current stream. `host` can be reused at once."""
        staging = self.pinned(host.shape, host.dtype)
        staging.copy_(host)
        on_device = self.empty(host.shape, host.dtype)
        self.copy(on_device, staging, self.current())
        return on_device


class Cuda(Accelerator):
    """The current CUDA device. torch reuses freed pinned memory only after its copies are done."""

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
        self, run: Callable[[torch.Tensor], Any], batch: torch.Tensor
    ) -> tuple[Callable[[], None], Any]:
        current, side_stream = self.current(), self.stream()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(current):  # a failed capture does not restore it
                # Libraries create handles per stream at first use; a capture must not contain it.
                side_stream.wait_stream(current)
                with torch.cuda.stream(side_stream):
                    for _ in range(WARM_UP_RUNS):
                        run(batch)
                current.wait_stream(side_stream)
                # In other modes, another thread that waits for results would break the capture.
                with torch.cuda.graph(graph, stream=side_stream, capture_error_mode="thread_local"):
                    output = run(batch)
        except RuntimeError as error:
            if isinstance(error.__context__, torch.cuda.OutOfMemoryError):
                raise error.__context__ from None  # the first error is the cause
            raise
        return graph.replay, output

    @override
    def free_bytes(self) -> int:
        free_bytes, _ = torch.cuda.mem_get_info()
        return free_bytes + torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()


class Slot:
    """Pinned memory and device memory for one batch.

    `sent` is the event after the copy to the device, `consumed` the one after the last read there.
    """

    def __init__(self, accelerator: Accelerator, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.host = accelerator.pinned(shape, dtype).zero_()
        self.array: npt.NDArray[Any] = self.host.numpy()
        self.device = accelerator.empty(shape, dtype)
        # The current stream may still use the previous contents of this memory.
        self.consumed: Event = accelerator.record(accelerator.current())
        self.sent: Event | None = None


class SentBatch:
    """A batch of `count` items whose copy to the device is enqueued. It can be taken once."""

    def __init__(self, accelerator: Accelerator, slot: Slot, count: int) -> None:
        self._accelerator, self._slot, self._count = accelerator, slot, count

    def take(self, dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of the batch in a dtype, for the current stream."""
        accelerator, slot = self._accelerator, self._slot
        accelerator.wait_on_stream(accelerator.current(), slot.sent)
        batch = as_signed(slot.device[: self._count]).to(dtype, copy=True)
        slot.consumed = accelerator.record(accelerator.current())
        return batch


class StagedFeed(BatchFeed):
    """Alternates between pinned buffers and copies batches to the device on `stream`."""

    double_buffered = True

    def __init__(
        self,
        accelerator: Accelerator,
        stream: Stream,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
    ) -> None:
        self._accelerator, self._stream = accelerator, stream
        self._slots = self._create_slots(shape, np.dtype(dtype))
        self._slots_by_shape: dict[tuple[tuple[int, ...], np.dtype[Any]], list[Slot]] = {}

    @override
    def buffer(self) -> npt.NDArray[Any]:
        return self._next(self._slots).array

    @override
    def send(self, batch: npt.NDArray[Any]) -> SentBatch | npt.NDArray[Any]:
        slot = self._slots[-1]
        if not _is_prefix(batch, slot.array):  # a step returned another array
            if not _has_torch_dtype(batch.dtype) or len(batch) > len(slot.array):
                return batch.copy()  # its memory can be overwritten by the next batch
            key = (batch.shape[1:], batch.dtype)
            if key not in self._slots_by_shape:
                self._slots_by_shape[key] = self._create_slots((len(slot.array), *key[0]), key[1])
            slot = self._next(self._slots_by_shape[key])
            slot.array[: len(batch)] = batch
        accelerator, count = self._accelerator, len(batch)
        accelerator.wait_on_stream(self._stream, slot.consumed)
        accelerator.copy(slot.device[:count], slot.host[:count], self._stream)
        slot.sent = accelerator.record(self._stream)
        return SentBatch(accelerator, slot, count)

    def _create_slots(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> list[Slot]:
        torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        return [Slot(self._accelerator, shape, torch_dtype) for _ in range(SLOTS)]

    def _next(self, slots: list[Slot]) -> Slot:
        """Return the least recently used slot, ready for writing, and move it to the end."""
        slots.append(slots.pop(0))
        if slots[-1].sent is not None:
            self._accelerator.wait(slots[-1].sent)
        return slots[-1]


class GraphReplay:
    """Captures a network once per shape of batch and replays it for later batches."""

    def __init__(self, accelerator: Accelerator, run: Callable[[torch.Tensor], Any]) -> None:
        self._accelerator, self._run = accelerator, run
        self._captured: dict[Any, tuple[torch.Tensor, Callable[[], None], Any]] = {}

    def __call__(self, batch: torch.Tensor) -> Any:
        """Return the output of the network, copied if it is a tensor or a tuple of tensors."""
        key = (tuple(batch.shape), batch.dtype, batch.stride())
        if key not in self._captured:
            static_batch = torch.empty_like(batch)
            static_batch.copy_(batch)
            self._captured[key] = (
                static_batch,
                *self._accelerator.capture(self._run, static_batch),
            )
        static_batch, replay, output = self._captured[key]
        static_batch.copy_(batch)
        replay()
        if isinstance(output, torch.Tensor):
            return output.clone()
        is_plain = type(output) is tuple and all(map(torch.is_tensor, output))
        return tuple(tensor.clone() for tensor in output) if is_plain else output

    def clear(self) -> None:
        """Release all captures and their memory."""
        self._captured.clear()


class PendingResults:
    """Results that are being copied to the host; `done` is the event after the last copy."""

    def __init__(self, accelerator: Accelerator, pinned: list[torch.Tensor], done: Event) -> None:
        self._accelerator, self._pinned, self.done = accelerator, pinned, done

    def wait(self) -> list[npt.NDArray[Any]]:
        """Wait for the copies and return the results. Safe in any thread."""
        self._accelerator.wait(self.done)
        return [target.numpy() for target in self._pinned]


def fetch(
    accelerator: Accelerator, stream: Stream, arrays: Sequence[torch.Tensor]
) -> PendingResults:
    """Enqueue copies of results of the current stream to the host, on `stream`."""
    arrays = [array.contiguous() for array in arrays]
    accelerator.wait_on_stream(stream, accelerator.record(accelerator.current()))
    pinned = [accelerator.pinned(array.shape, array.dtype) for array in arrays]
    for target, source in zip(pinned, arrays, strict=True):
        accelerator.copy(target, source, stream)
    return PendingResults(accelerator, pinned, accelerator.record(stream))


def as_signed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values in a dtype for which torch implements all operations."""
    if tensor.dtype not in SIGNED_DTYPES:
        return tensor
    bits, values = SIGNED_DTYPES[tensor.dtype]
    return tensor.view(bits).to(values) & torch.iinfo(tensor.dtype).max


def _is_prefix(batch: npt.NDArray[Any], array: npt.NDArray[Any]) -> bool:
    """Return whether a batch is a contiguous view of the first items of the array."""
    return (
        batch.ctypes.data == array.ctypes.data
        and batch.dtype == array.dtype
        and batch.shape[1:] == array.shape[1:]
        and batch.flags.c_contiguous
    )


def _has_torch_dtype(dtype: np.dtype[Any]) -> bool:
    return dtype.isnative and dtype.kind in "biuf" and dtype != np.uint64 and dtype.itemsize <= 8
