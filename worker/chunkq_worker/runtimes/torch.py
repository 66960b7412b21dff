"""Networks of PyTorch: batches cast and moved to the device, results left there."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from chunkq import buffers
from chunkq.combine import Array
from chunkq.errors import ModelError
from chunkq.job import ModelConfig
from chunkq_worker.runtimes.base import BatchFeed, Fetched, Runtime, not_one_array
from chunkq_worker.runtimes.staging import (
    Accelerator,
    Cuda,
    GraphReplay,
    SentBatch,
    StagedFeed,
    fetch,
)
from chunkq_worker.runtimes.torch_files import LOADERS, LoadedNetwork, reason
from chunkq_worker.runtimes.triton_import import hide_triton_after_tensorflow, is_triton_hidden
from chunkq_worker.steps import Steps

OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA out of memory",  # TorchScript raises it as any other error
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What torch's errors say that a lack of memory causes, besides those of a type for it."""
OF_CAPTURES = re.compile(r"captur|CUDA ?[gG]raph")
OF_DTYPES = re.compile(r"type|not implemented for|Half|Float|scalar")
TILE_NORMS = ("InstanceNorm", "GroupNorm", "LayerNorm", "BatchNorm")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class TorchRuntime(Runtime):
    """A torch module in inference mode. Protected steps are given torch tensors.

    The module lies on the `accelerator`, or, if that is None, in the host's memory.
    """

    def __init__(
        self,
        loaded: LoadedNetwork,
        model: ModelConfig,
        steps: Steps,
        threads: int | None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.device, self._steps, self._threads = model.device, steps, threads
        self._model, self._limits, self._module = model, loaded.limits, loaded.module
        self._dtype: torch.dtype = getattr(torch, model.dtype)
        # An exported program may have been traced for one size, a compiled or captured one is
        # made for it.
        one_size = model.compile or model.cuda_graph or model.type == "exported"
        self.any_batch = not one_size
        if model.channels_last:
            for value in self._module.parameters():
                if value.dim() in CHANNELS_LAST:
                    value.data = value.data.contiguous(memory_format=CHANNELS_LAST[value.dim()])
        self._run = self._module
        if model.compile:
            with _as_compilers_are():
                # The batch size never changes but when memory is short.
                self._run = torch.compile(self._module, dynamic=False)
        self._accelerator, self._replayed = accelerator, None
        if accelerator is not None:
            self._way_in, self._way_out = accelerator.stream(), accelerator.stream()
            if model.cuda_graph:
                self._replayed = GraphReplay(accelerator, self._run_uncaptured)

    @override
    def __call__(self, batch: npt.NDArray[Any] | SentBatch) -> Array:
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)  # another job of this process has its own
        with torch.inference_mode():
            if isinstance(batch, SentBatch):
                given = batch.take(self._dtype)
            else:
                given = self.to_device(batch).to(self._dtype)
            if self._steps.preprocessing_protected is not None:
                given = self._steps.preprocessing_protected(given)
            outputs = self._forward(given)
            if not isinstance(outputs, torch.Tensor):
                raise not_one_array(outputs, "tensor")
            if self._steps.postprocessing_protected is not None:
                outputs = self._steps.postprocessing_protected(outputs)
            return outputs if outputs.dtype == torch.float64 else outputs.float()

    def _forward(self, given: torch.Tensor) -> Any:
        """Run the network; raises ModelError where the job, not the batch, is the cause."""
        if self._limits is not None:
            self._limits.accept(given.shape, given.dtype, self._model.max_batch_size)
        if self._model.channels_last:
            given = _channels_last(given)
        try:
            return (self._replayed or self._run_uncaptured)(given)
        except RuntimeError as error:
            if not self.is_out_of_memory(error) and (line := self._explained(error, given)):
                raise ModelError(line) from error
            raise

    def _run_uncaptured(self, given: torch.Tensor) -> Any:
        with self._around():
            return self._run(given)

    @contextlib.contextmanager
    def _around(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._model.autocast is not None:
                dtype = getattr(torch, self._model.autocast)
                stack.enter_context(torch.autocast(self.device, dtype=dtype))
            if self._model.compile:
                stack.enter_context(_as_compilers_are())
            yield

    def _explained(self, error: RuntimeError, given: torch.Tensor) -> str | None:
        """Return the line for an error that follows from what the job file says."""
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return (
                f"model_config.compile: torch.compile cannot compile this network here "
                f"({reason(error)}); leave compile out"
            )
        if self._replayed is not None and OF_CAPTURES.search(reason(error)):
            return (
                "model_config.cuda_graph: this network cannot be captured: it waits for the "
                f"device or changes between batches ({reason(error)}); leave cuda_graph out"
            )
        own = sorted({_name(p) for p in self._module.parameters() if p.is_floating_point()})
        if own and _name(given) not in own and OF_DTYPES.search(reason(error)):
            return (
                f"model_config.dtype: the network's parameters are {' and '.join(own)} and it was "
                f"given {_name(given)} ({reason(error)}); set dtype: {own[-1]}, or let the "
                "network convert what it is given"
            )
        return None

    @override
    def zeros(self, shape: tuple[int, ...]) -> Array:
        if self._accelerator is None:
            return torch.from_numpy(buffers.zeros(shape, np.float32))
        return self._accelerator.empty(shape, torch.float32).zero_()

    @override
    def feed(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> BatchFeed:
        if self._accelerator is None:
            return BatchFeed(shape, dtype)
        return StagedFeed(self._accelerator, self._way_in, shape, dtype)

    @override
    def fetch(self, arrays: Sequence[Array]) -> Fetched | None:
        if self._accelerator is None:
            return None
        return fetch(self._accelerator, self._way_out, arrays)

    @override
    def to_device(self, array: npt.NDArray[Any]) -> Array:
        if array.dtype.kind == "u" and array.dtype.itemsize in (2, 4):
            # torch knows few operations on wide unsigned integers; the next wider signed one
            # holds the same values. (uint64 has none; as an input it is refused with the job.)
            array = array.astype(np.dtype(f"i{array.dtype.itemsize * 2}"))
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()  # steps give views that torch cannot share
        tensor = torch.from_numpy(array)
        return tensor if self._accelerator is None else self._accelerator.to_device(tensor)

    @override
    def is_out_of_memory(self, error: BaseException) -> bool:
        known = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (
            isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
        )
        if known and self.device == "cuda":
            if self._replayed is not None:
                self._replayed.clear()
            torch.cuda.empty_cache()
        return known

    @override
    def device_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    @override
    def tile_norms(self) -> tuple[str, ...]:
        modules = self._module.named_modules()
        found = [f"{name} ({_kind(part)})" for name, part in modules if _is_tile_norm(part)]
        graph = getattr(self._module, "graph", None)
        nodes = graph.nodes if isinstance(graph, torch.fx.Graph) else ()  # an exported program
        found += [f"{node.name} ({node.target})" for node in nodes if _is_tile_norm_node(node)]
        return tuple(found)

    @override
    def close(self) -> None:
        self._module = self._run = self._replayed = None
        if self.device == "cuda":
            torch.cuda.empty_cache()


def load(model: ModelConfig, steps: Steps, threads: int | None) -> Runtime:
    """Load the network a job names; raises ModelError in one line."""
    if model.device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "model_config.device: cuda, but this worker sees no CUDA device; start it on a GPU "
            "node or set device: cpu"
        )
    if model.compile and model.type == "torchscript":
        raise ModelError(
            "model_config.compile: TorchScript is compiled already; leave compile out, or use "
            "type: class"
        )
    if model.autocast is not None and model.dtype not in ("float32", model.autocast):
        raise ModelError(
            f"model_config.autocast: {model.autocast} is for networks in float32, this one's dtype "
            f"is {model.dtype}; set dtype: float32 or leave autocast out"
        )
    loaded = LOADERS[model.type](model)
    hide_triton_after_tensorflow()  # the network's own file may have imported TensorFlow
    if model.compile and model.device == "cuda" and is_triton_hidden():
        raise ModelError(
            "model_config.compile: on a GPU, torch.compile needs triton, and this process imported "
            "tensorflow before triton; import triton before tensorflow, use another process, or "
            "leave compile out"
        )
    accelerator = Cuda() if model.device == "cuda" else None
    return TorchRuntime(loaded, model, steps, threads, accelerator)


def _channels_last(given: torch.Tensor) -> torch.Tensor:
    if given.dim() not in CHANNELS_LAST:
        raise ModelError(
            f"model_config.channels_last: the network is given {list(given.shape)}; only batches "
            "of 4 or 5 axes, (N, C, *P), have channels; leave channels_last out"
        )
    return given.contiguous(memory_format=CHANNELS_LAST[given.dim()])


@contextlib.contextmanager
def _as_compilers_are() -> Iterator[None]:
    """Let the compiler's own modules use what torch calls deprecated."""
    hide_triton_after_tensorflow()  # a step may have imported TensorFlow
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _is_tile_norm(module: Any) -> bool:
    """Tell whether a layer takes its statistics from the tile that is in front of it."""
    kind = _kind(module)
    if kind.startswith("LayerNorm"):
        return len(getattr(module, "normalized_shape", ())) > 1  # else over the channels alone
    # With running statistics, a layer in inference mode uses those.
    return kind.startswith(TILE_NORMS) and getattr(module, "running_mean", None) is None


def _is_tile_norm_node(node: Any) -> bool:
    kind = str(node.target).removeprefix("aten.").removeprefix("native_").partition(".")[0]
    if kind in ("instance_norm", "batch_norm"):
        return len(node.args) > 5 and node.args[5] is True  # by what it is given
    return kind == "group_norm" or (kind == "layer_norm" and len(node.args[1]) > 1)


def _kind(module: Any) -> str:
    return getattr(module, "original_name", type(module).__name__)  # TorchScript's name for it


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
