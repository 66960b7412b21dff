"""An accelerator simulated on the CPU that makes every missing synchronization fail.

Device memory is separate from host memory and initially filled with UNINITIALIZED. Torch
operations on it are enqueued in a stream and run as late as possible: when the host waits for them.
Copying streams can also run as early as possible. Freed memory is reused at once, as torch does on
one stream. Code that forgets to wait therefore fails in every run.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from chunkq_worker.runtimes.staging import Accelerator
from torch.utils._pytree import tree_map

UNINITIALIZED = 0x6B
"""Every byte of uninitialized memory: a large number in any dtype."""
Operation = Callable[[], object]


@dataclass(eq=False)
class SimulatedStream:
    """A queue of operations. An event in the queue blocks it until the event is complete."""

    early: bool = False
    enqueued: int = 0
    done: int = 0
    queue: deque[Operation | SimulatedEvent] = field(default_factory=deque)


@dataclass(frozen=True)
class SimulatedEvent:
    """Complete when the first `number` operations of a stream are done."""

    stream: SimulatedStream
    number: int

    @property
    def is_complete(self) -> bool:
        return self.stream.done >= self.number


class Memory:
    """Device memory of `limit` bytes. Freed blocks are reused at once.

    The next `failures` allocations fail, as if something else used the memory.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit, self.used, self.peak, self.failures = limit, 0, 0, 0
        self._pools: dict[int, list[torch.Tensor]] = {}

    def allocate(self, size: int) -> torch.Tensor:
        is_full = self.limit is not None and self.used + size > self.limit
        if is_full or self.failures:
            self.failures = max(0, self.failures - 1)
            raise torch.cuda.OutOfMemoryError("simulated: out of memory")
        self.used += size
        self.peak = max(self.peak, self.used)
        pool = self._pools.setdefault(size, [])
        with torch.inference_mode(False):
            return pool.pop() if pool else _uninitialized(size)

    def free(self, size: int, memory: torch.Tensor) -> None:
        self.used -= size
        self._pools[size].append(memory)


class Block:
    """A block of device memory. It returns to the pool with the last tensor that uses it."""

    def __init__(self, size: int, memory: Memory) -> None:
        self.bytes = memory.allocate(size)
        weakref.finalize(self, memory.free, size, self.bytes)


@dataclass
class Counts:
    """What a device was asked to do.

    uploaded, downloaded   bytes of copies from and to pinned memory
    launches               operations enqueued in the compute stream, except copies and events
    done                   operations and events of any stream that have run
    synchronizations       operations that return a value to the host
    waits                  events for which the host waited
    """

    uploaded: int = 0
    downloaded: int = 0
    launches: int = 0
    done: int = 0
    synchronizations: int = 0
    waits: int = 0


class DeviceTensor(torch.Tensor):
    """A tensor in device memory. The host can read its shape but not its values."""

    memory: torch.Tensor
    block: Block
    owner: SimulatedDevice

    @staticmethod
    def create(memory: torch.Tensor, block: Block, owner: SimulatedDevice) -> DeviceTensor:
        with torch.inference_mode(False):  # views of it can be created in another mode
            tensor: DeviceTensor = torch.Tensor._make_wrapper_subclass(
                DeviceTensor,
                memory.shape,
                strides=memory.stride(),
                storage_offset=memory.storage_offset(),
                dtype=memory.dtype,
                device="meta",  # a device other than the CPU that computes nothing
            )
        tensor.memory, tensor.block, tensor.owner = memory, block, owner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors: list[DeviceTensor] = []
        tree_map(
            lambda a: tensors.append(a) if isinstance(a, DeviceTensor) else None, (args, kwargs)
        )
        return tensors[0].owner.dispatch(func, args, kwargs or {})


class SimulatedDevice(Accelerator):
    """A simulated accelerator with memory and streams.

    With `early`, copying streams run as early as events allow, otherwise as late as possible.
    `ignore` names a method, `wait_on_stream` or `wait`, that does nothing: it simulates code that
    forgets this synchronization. `memory_bytes` limits the memory.
    """

    def __init__(
        self, *, early: bool = False, ignore: str = "", memory_bytes: int | None = None
    ) -> None:
        self._early, self._ignore = early, ignore
        self._compute_stream = SimulatedStream()
        self._streams = [self._compute_stream]
        self.memory, self.counts = Memory(memory_bytes), Counts()
        self._captured_operations: list[Operation] | None = None
        self._captured_tensors: list[Any] = []
        self._lock = threading.RLock()

    # ------------------------------------------------------------ interface of Accelerator

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return _uninitialized(prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._allocate(torch.empty(tuple(shape), dtype=dtype, device="meta"))

    def stream(self) -> SimulatedStream:
        self._streams.append(SimulatedStream(self._early))
        return self._streams[-1]

    def current(self) -> SimulatedStream:
        return self._compute_stream

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: SimulatedStream) -> None:
        if isinstance(target, DeviceTensor):
            self.counts.uploaded += source.nbytes
        else:
            self.counts.downloaded += source.nbytes
        # The closure keeps the tensors alive, so that their memory is not reused meanwhile.
        self._enqueue(lambda: _memory(target).copy_(_memory(source)), stream)

    def record(self, stream: SimulatedStream) -> SimulatedEvent:
        return SimulatedEvent(stream, stream.enqueued)

    def wait_on_stream(self, stream: SimulatedStream, event: SimulatedEvent) -> None:
        if self._ignore != "wait_on_stream":
            self._enqueue(event, stream)

    def free_bytes(self) -> int:
        limit = self.memory.limit
        return 1 << 40 if limit is None else limit - self.memory.peak

    def wait(self, event: SimulatedEvent) -> None:
        self.counts.waits += 1
        if self._ignore != "wait":
            self._complete(event)

    def capture(
        self, run: Callable[[torch.Tensor], Any], batch: torch.Tensor
    ) -> tuple[Callable[[], None], Any]:
        self._captured_operations = operations = []
        try:
            output = run(batch)
        finally:
            self._captured_operations = None

        def replay() -> None:
            self.counts.launches += 1
            for operation in operations:
                self._enqueue(operation, self._compute_stream)

        return replay, output

    # ------------------------------------------------------------------- torch operations

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Enqueue one operation with at least one tensor on this device."""
        result = func.decompose(*args, **kwargs)  # torch does not decompose in inference mode
        if result is not NotImplemented:
            return result
        host_args, host_kwargs = tree_map(_memory, (args, kwargs))
        is_copy_to_host = str(host_kwargs.get("device")) == "cpu"
        if func is torch.ops.aten._local_scalar_dense.default or is_copy_to_host:
            return self._run_synchronously(lambda: func(*host_args, **host_kwargs))
        if func._schema.is_mutable:
            if _may_overlap(_memory(kwargs.get("out", args[0]))):
                raise RuntimeError("the threads of one kernel would write to the same memory")
            self.counts.launches += 1
            self._enqueue(lambda: func(*host_args, **host_kwargs), self._compute_stream)
            return kwargs.get("out", args[0])
        if any(r.alias_info is not None for r in func._schema.returns):  # a view reads no values
            views = func(*host_args, **host_kwargs)
            return tree_map(lambda view: DeviceTensor.create(view, args[0].block, self), views)
        output = tree_map(self._allocate, _shapes(func, host_args, host_kwargs))
        self.counts.launches += 1
        target = output.memory  # operations with several outputs are not supported
        self._enqueue(lambda: target.copy_(func(*host_args, **host_kwargs)), self._compute_stream)
        return output

    def _allocate(self, like: torch.Tensor) -> DeviceTensor:
        """Return an uninitialized tensor with the shape and dtype of `like`."""
        block = Block(like.numel() * like.itemsize, self.memory)
        dense_strides = torch.empty_like(like).stride()
        with torch.inference_mode(False):
            memory = block.bytes.view(like.dtype).as_strided(like.shape, dense_strides)
        tensor = DeviceTensor.create(memory, block, self)
        if self._captured_operations is not None:
            self._captured_tensors.append(tensor)  # memory of a capture is never reused
        return tensor

    def _run_synchronously(self, operation: Callable[[], Any]) -> Any:
        """Wait for the compute stream, then run an operation that returns a host value."""
        self.counts.synchronizations += 1
        if self._captured_operations is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        with self._lock:
            self._complete(self.record(self._compute_stream))
            with torch.inference_mode():
                return operation()

    # ------------------------------------------------------------------------------- streams

    def _enqueue(self, operation: Operation | SimulatedEvent, stream: SimulatedStream) -> None:
        if self._captured_operations is not None:
            if not isinstance(operation, SimulatedEvent):
                self._captured_operations.append(operation)
            return
        with self._lock:
            stream.queue.append(operation)
            stream.enqueued += 1
            self._run_early_streams()

    def _run_early_streams(self) -> None:
        for stream in self._streams:
            while stream.early and stream.queue:
                first = stream.queue[0]
                if isinstance(first, SimulatedEvent) and not first.is_complete:
                    break
                self._run_next(stream)

    def _complete(self, event: SimulatedEvent) -> None:
        """Run the operations that an event needs, then the early streams."""
        with self._lock:
            self._run_until(event)
            self._run_early_streams()

    def _run_until(self, event: SimulatedEvent) -> None:
        while not event.is_complete:
            self._run_next(event.stream)

    def _run_next(self, stream: SimulatedStream) -> None:
        first = stream.queue.popleft()
        if isinstance(first, SimulatedEvent):
            self._run_until(first)
        else:
            with torch.inference_mode():
                first()
        stream.done += 1
        self.counts.done += 1


def _may_overlap(tensor: torch.Tensor) -> bool:
    """Return whether two elements of a view can have the same address."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _uninitialized(size: int) -> torch.Tensor:
    return torch.full((size,), UNINITIALIZED, dtype=torch.uint8)


def _memory(value: Any) -> Any:
    return value.memory if isinstance(value, DeviceTensor) else value


_SHAPES: dict[tuple[Any, ...], Any] = {}


def _shapes(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return what an operation returns, on torch's device `meta`. Computed once per signature."""
    key = func, _signature(args), _signature(tuple(kwargs.items()))
    if key not in _SHAPES:
        _SHAPES[key] = func(*tree_map(_shape_only, args), **tree_map(_shape_only, kwargs))
    return _SHAPES[key]


def _signature(value: Any) -> Any:
    """Return a key that is equal for arguments of which operations return the same shapes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, (list, tuple)):
        return tuple(map(_signature, value))
    return type(value), value


def _shape_only(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
