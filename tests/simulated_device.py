"""A device in this process that does nothing before it has to, so that a missing wait shows.

Its memory is separate from the host's and holds rubbish at first. Every torch operation on it is
noted in a stream and done later: when the host waits for it, by default not before. A stream may
also be made to run as early as it can. Memory that nothing refers to is given out again at once,
as torch does where all are of one stream. So whatever nobody waits for is too late or too early in
each run, not once in a thousand.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from chunkq_worker.runtimes.staging import Accelerator
from torch.utils._pytree import tree_map

RUBBISH = 0x6B
"""Every byte of memory that nothing was written to: a large number in any dtype."""
Operation = Callable[[], object]


@dataclass(eq=False)
class SimulatedStream:
    """Operations still to be done, in order; an event among them is waited for."""

    early: bool = False
    noted: int = 0
    done: int = 0
    waiting: deque[Operation | SimulatedEvent] = field(default_factory=deque)


@dataclass(frozen=True)
class SimulatedEvent:
    """That the first `number` operations of a stream are done."""

    stream: SimulatedStream
    number: int

    @property
    def happened(self) -> bool:
        return self.stream.done >= self.number


class Block:
    """Bytes of the device's memory; they go back to its pool with the last tensor in them."""

    def __init__(self, size: int, pool: dict[int, list[torch.Tensor]]) -> None:
        self._pool = pool.setdefault(size, [])
        with torch.inference_mode(False):
            self.bytes = (
                self._pool.pop() if self._pool else torch.full((size,), RUBBISH, dtype=torch.uint8)
            )

    def __del__(self) -> None:
        self._pool.append(self.bytes)


class OnDevice(torch.Tensor):
    """A tensor in the device's memory. The host sees its shape, and its values never."""

    memory: torch.Tensor
    block: Block
    owner: SimulatedDevice

    @staticmethod
    def of(memory: torch.Tensor, block: Block, owner: SimulatedDevice) -> OnDevice:
        with torch.inference_mode(False):  # as views of it may be made in another mode
            made: OnDevice = torch.Tensor._make_wrapper_subclass(
                OnDevice,
                memory.shape,
                strides=memory.stride(),
                storage_offset=memory.storage_offset(),
                dtype=memory.dtype,
                device="meta",  # not the host's; torch knows no operations of its own for it
            )
        made.memory, made.block, made.owner = memory, block, owner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found: list[OnDevice] = []
        tree_map(lambda a: found.append(a) if isinstance(a, OnDevice) else None, (args, kwargs))
        return found[0].owner.dispatch(func, args, kwargs or {})


class SimulatedDevice(Accelerator):
    """The host's processor with memory and streams as a device has them.

    `early` makes copying streams run ahead of what computes, as far as nothing holds them back;
    otherwise they are as late as they can. `forget` makes the device miss every wait of that name,
    `hold` or `wait`: what code comes to that has none.
    """

    def __init__(self, *, early: bool = False, forget: str = "") -> None:
        self._early, self._forget = early, forget
        self._computing = SimulatedStream()
        self._streams = [self._computing]
        self._pool: dict[int, list[torch.Tensor]] = {}
        self._recorded: list[Operation] | None = None
        self._captured: list[Any] = []
        self._lock = threading.RLock()
        self.copies = 0

    # ------------------------------------------------------------- what an accelerator does

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        size = prod(shape) * dtype.itemsize
        return torch.full((size,), RUBBISH, dtype=torch.uint8).view(dtype).view(tuple(shape))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._made(torch.empty(tuple(shape), dtype=dtype, device="meta"))

    def stream(self) -> SimulatedStream:
        self._streams.append(SimulatedStream(self._early))
        return self._streams[-1]

    def current(self) -> SimulatedStream:
        return self._computing

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: SimulatedStream) -> None:
        self.copies += 1
        # The tensors, not only their bytes, so that the bytes are not given out meanwhile.
        self._note(lambda: _memory(target).copy_(_memory(source)), stream)

    def record(self, stream: SimulatedStream) -> SimulatedEvent:
        return SimulatedEvent(stream, stream.noted)

    def wait_on_stream(self, stream: SimulatedStream, event: SimulatedEvent) -> None:
        if self._forget != "hold":
            self._note(event, stream)

    def wait(self, event: SimulatedEvent) -> None:
        if self._forget != "wait":
            self._reach(event)

    def capture(
        self, run: Callable[[torch.Tensor], Any], given: torch.Tensor
    ) -> tuple[Callable[[], None], Any]:
        self._recorded = recorded = []
        try:
            returned = run(given)
        finally:
            self._recorded = None

        def replay() -> None:
            for operation in recorded:
                self._note(operation, self._computing)

        return replay, returned

    # --------------------------------------------------------------- what torch does on it

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Note one operation on tensors of which at least one lies here."""
        parts = func.decompose(*args, **kwargs)  # in inference mode torch has not done that yet
        if parts is not NotImplemented:
            return parts
        given, more = tree_map(_memory, (args, kwargs))
        returns = func._schema.returns
        if func is torch.ops.aten._local_scalar_dense.default or str(more.get("device")) == "cpu":
            return self._now(lambda: func(*given, **more))
        if func._schema.is_mutable:
            self._note(lambda: func(*given, **more), self._computing)
            return kwargs.get("out", args[0])
        if any(each.alias_info is not None for each in returns):  # a view: no value is read
            views = func(*given, **more)
            return tree_map(lambda view: OnDevice.of(view, args[0].block, self), views)
        shapes = func(*tree_map(_shape_only, given), **tree_map(_shape_only, more))
        made = tree_map(self._made, shapes)
        into = made.memory  # operations with several results are not needed so far
        self._note(lambda: into.copy_(func(*given, **more)), self._computing)
        return made

    def _made(self, like: torch.Tensor) -> OnDevice:
        block = Block(like.numel() * like.itemsize, self._pool)
        dense = torch.empty_like(like).stride()
        with torch.inference_mode(False):
            memory = block.bytes.view(like.dtype).as_strided(like.shape, dense)
        made = OnDevice.of(memory, block, self)
        if self._recorded is not None:
            self._captured.append(made)  # a capture's memory is its own for good
        return made

    def _now(self, operation: Callable[[], Any]) -> Any:
        """Wait for what is computed, then do an operation whose result is the host's."""
        if self._recorded is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        with self._lock:
            self._reach(self.record(self._computing))
            with torch.inference_mode():
                return operation()

    # ------------------------------------------------------------------------------- streams

    def _note(self, operation: Operation | SimulatedEvent, stream: SimulatedStream) -> None:
        if self._recorded is not None:
            if not isinstance(operation, SimulatedEvent):
                self._recorded.append(operation)
            return
        with self._lock:
            stream.waiting.append(operation)
            stream.noted += 1
            self._run_early()

    def _run_early(self) -> None:
        for stream in self._streams:
            while stream.early and stream.waiting:
                first = stream.waiting[0]
                if isinstance(first, SimulatedEvent) and not first.happened:
                    break
                self._step(stream)

    def _reach(self, event: SimulatedEvent) -> None:
        """Do as little as makes an event happen; then what runs early may go on."""
        with self._lock:
            self._do_until(event)
            self._run_early()

    def _do_until(self, event: SimulatedEvent) -> None:
        while not event.happened:
            self._step(event.stream)

    def _step(self, stream: SimulatedStream) -> None:
        first = stream.waiting.popleft()
        if isinstance(first, SimulatedEvent):
            self._do_until(first)
        else:
            with torch.inference_mode():
                first()
        stream.done += 1


def _memory(value: Any) -> Any:
    return value.memory if isinstance(value, OnDevice) else value


def _shape_only(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
