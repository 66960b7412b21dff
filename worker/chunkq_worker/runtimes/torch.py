"""The PyTorch runtime: batches are cast on the device, and results stay there."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from chunkq.blend.combine import Array
from chunkq.errors import ModelError
from chunkq.job.model_config import HALF_PRECISIONS, ModelConfig
from chunkq.plan.outputs import HeadName
from chunkq.system import buffers
from chunkq_worker.runtimes.base import BatchFeed, Runtime, not_real
from chunkq_worker.runtimes.cache_folder import use_compiler_cache
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.returned_values import HeadReader
from chunkq_worker.runtimes.staging import (
    Accelerator,
    Cuda,
    GraphReplay,
    SentBatch,
    StagedFeed,
)
from chunkq_worker.runtimes.torch_devices import device_errors
from chunkq_worker.runtimes.torch_files import (
    LOADERS,
    LoadedNetwork,
    created_values,
    recreated_values,
)
from chunkq_worker.runtimes.torch_norms import norm_input_watched
from chunkq_worker.runtimes.torch_objects import ObjectModule
from chunkq_worker.runtimes.torch_reading import is_torchscript_error, reason
from chunkq_worker.runtimes.torch_tf32 import tf32
from chunkq_worker.runtimes.torchscript_graph import is_repeatable
from chunkq_worker.runtimes.triton_import import hide_triton_after_tensorflow, is_triton_hidden
from chunkq_worker.steps import Steps
from chunkq_worker.value_watch import ValueWatch

OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA out of memory",  # from TorchScript, as a plain RuntimeError
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Parts of torch's RuntimeErrors that a failed allocation causes."""
CAPTURE_ERROR = re.compile(r"captur|CUDA ?[gG]raph")
DTYPE_ERROR = re.compile(r"type|not implemented for|Half|Float|scalar")
TILE_NORMS = ("InstanceNorm", "GroupNorm", "LayerNorm", "BatchNorm")
log = logging.getLogger("chunkq.worker")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class TorchRuntime(Runtime):
    """Runs a torch module in inference mode. The protected steps get torch tensors.

    The module is on the `accelerator`, or in host memory if that is None. `source` is the object of
    the caller from which it comes, if it is no file.
    """

    draws_from_known_states = True

    def __init__(
        self,
        loaded: LoadedNetwork,
        model: ModelConfig,
        steps: Steps,
        threads: int | None,
        accelerator: Accelerator | None = None,
        source: ObjectModule | None = None,
        heads: Sequence[HeadName] = (None,),
    ) -> None:
        self.device, self._steps, self._threads = model.device, steps, threads
        self._source = source
        self._model, self._limits, self._module = model, loaded.limits, loaded.module
        self._saved, self._notes = loaded.saved, loaded.notes
        self._dtype: torch.dtype = getattr(torch, model.dtype)
        self._reader = HeadReader(
            heads,
            torch.is_tensor,
            "tensor",
            has_step=steps.postprocessing_protected is not None,
        )
        # Compiled and captured networks are specialized for one batch size, exported ones can be.
        is_specialized = model.compile or model.cuda_graph or model.type == "exported"
        self.any_batch = not is_specialized
        if model.channels_last:
            for weight in self._module.parameters():
                if weight.dim() in CHANNELS_LAST:
                    weight.data = weight.data.contiguous(memory_format=CHANNELS_LAST[weight.dim()])
        has_steps = steps.preprocessing_protected or steps.postprocessing_protected
        self.is_repeatable = not has_steps and accelerator is None and is_repeatable(self._module)
        self._run = self._module
        if model.compile:
            with _compiler_context():
                # The batch size changes only if a batch does not fit in memory.
                self._run = torch.compile(self._module, dynamic=False)
        self.accelerator, self._graph_replay = accelerator, None
        if accelerator is not None:
            self._upload_stream = accelerator.stream()
            if model.cuda_graph:
                self._graph_replay = GraphReplay(accelerator, self._run_uncaptured)

    @override
    def __call__(self, batch: npt.NDArray[Any] | SentBatch | torch.Tensor) -> tuple[Array, ...]:
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)  # another job of this process can use another
        with (
            self._inference(),
            tf32(allowed=self._model.allows_tf32),
            device_errors(self.device),
        ):
            if isinstance(batch, SentBatch):
                inputs = batch.take(self._dtype)
            elif isinstance(batch, torch.Tensor):
                inputs = batch.to(self._dtype)
            else:
                inputs = self.to_device(batch).to(self._dtype)
            device = inputs.device
            if self._source is not None and inputs.is_inference():
                inputs = inputs.clone()  # outside of inference mode, such tensors are read-only
            if self._steps.preprocessing_protected is not None:
                inputs = self._steps.preprocessing_protected(inputs)
            if self._watch is not None:
                self._watch.receive(inputs)
            outputs = self._forward(inputs)
            if self._steps.postprocessing_protected is not None:
                is_tensor = isinstance(outputs, torch.Tensor)
                outputs = self._reader.from_step(self._steps.postprocessing_protected(outputs))
                if not is_tensor and self._graph_replay is not None:
                    # a replay overwrites what it returned before
                    outputs = tuple(output.clone() for output in outputs)
            self.unused_heads = self._reader.unused
            self.output_dtypes = tuple(map(_dtype_name, outputs))
            return tuple(self._as_float(output, device) for output in outputs)

    def _as_float(self, output: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the tensor of a head in a float dtype; raise ModelError if it cannot be used."""
        if output.device != device:
            raise _other_device(output.device, device)
        if output.is_complex():
            raise not_real("the network", _dtype_name(output))
        if output.dtype == torch.float64:
            return output
        # On an accelerator, the first kernel that reads low precision converts it.
        is_kept = self.accelerator is not None and output.dtype.is_floating_point
        return output if is_kept else output.float()

    def _forward(self, inputs: torch.Tensor) -> Any:
        """Run the network. Raise ModelError for an error that the job file causes."""
        if self._limits is not None:
            self._limits.check_batch(inputs.shape, inputs.dtype, self._model.max_batch_size)
        if self._model.channels_last:
            inputs = _to_channels_last(inputs)
        try:
            return (self._graph_replay or self._run_uncaptured)(inputs)
        except RuntimeError as error:
            if not self.is_out_of_memory(error) and (problem := self._explain(error, inputs)):
                raise ModelError(problem) from error
            if is_torchscript_error(error) and not self.is_out_of_memory(error):
                raise RuntimeError(reason(error)) from error
            raise

    def _run_uncaptured(self, inputs: torch.Tensor) -> Any:
        """Return the heads of the network, or what a step gets; see `HeadReader`."""
        is_half = self._model.precision in HALF_PRECISIONS
        if not is_half and not self._model.compile:
            return self._reader.from_network(self._run(inputs))
        with contextlib.ExitStack() as stack:
            if is_half:
                dtype = getattr(torch, str(self._model.precision))
                stack.enter_context(torch.autocast(self.device, dtype=dtype))
            if self._model.compile:
                stack.enter_context(_compiler_context())
            returned = self._run(inputs)
        return self._reader.from_network(returned)

    def _inference(self) -> contextlib.AbstractContextManager[Any]:
        return torch.inference_mode() if self._source is None else self._source.inference()

    def _explain(self, error: RuntimeError, inputs: torch.Tensor) -> str | None:
        """Return the message for an error that the job file causes, None for other errors."""
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return (
                "model_config.compile: torch.compile cannot compile this network "
                f"({reason(error)}); remove compile"
            )
        if self._graph_replay is not None and CAPTURE_ERROR.search(reason(error)):
            return (
                "model_config.cuda_graph: this network cannot be captured because it synchronizes "
                f"with the device or changes between batches ({reason(error)}); remove cuda_graph"
            )
        parameters = [p for p in self._module.parameters() if p.is_floating_point()]
        dtypes = sorted({_dtype_name(parameter) for parameter in parameters})
        input_dtype = _dtype_name(inputs)
        if dtypes and input_dtype not in dtypes and DTYPE_ERROR.search(reason(error)):
            return (
                f"model_config.dtype: {input_dtype}, but the parameters of the network are "
                f"{' and '.join(dtypes)} ({reason(error)}); set dtype: {dtypes[-1]}, or cast the "
                "input in the network"
            )
        return None

    @override
    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
        return torch.from_numpy(buffers.zeros(shape, dtype))

    @override
    def feed(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> BatchFeed:
        if self.accelerator is None:
            return BatchFeed(shape, dtype)
        return StagedFeed(self.accelerator, self._upload_stream, shape, dtype)

    @override
    def to_device(self, array: npt.NDArray[Any]) -> Array:
        if array.dtype.kind == "u" and array.dtype.itemsize in (2, 4):
            # torch implements few operations for these dtypes. The next wider signed dtype can
            # represent all values. uint64 has none; jobs with such an input are rejected.
            array = array.astype(np.dtype(f"i{array.dtype.itemsize * 2}"))
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if not array.flags.writeable or min(array.strides, default=0) < 0:
            array = array.copy()  # torch cannot share the views that some steps return
        tensor = torch.from_numpy(array)
        return tensor if self.accelerator is None else self.accelerator.to_device(tensor)

    @override
    def is_out_of_memory(self, error: BaseException) -> bool:
        is_out_of_memory = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (
            isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
        )
        if is_out_of_memory and self.device == "cuda":
            if self._graph_replay is not None:
                self._graph_replay.clear()
            torch.cuda.empty_cache()
        return is_out_of_memory

    @override
    def device_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    @override
    def tile_norms(self) -> tuple[str, ...]:
        layers = self._module.named_modules()
        names = [f"{name} ({_class_name(layer)})" for name, layer in layers if _is_tile_norm(layer)]
        graph = getattr(self._module, "graph", None)
        nodes = graph.nodes if isinstance(graph, torch.fx.Graph) else ()  # an exported program
        names += [f"{node.name} ({node.target})" for node in nodes if _is_tile_norm_node(node)]
        return tuple(names)

    @override
    def notes(self) -> Sequence[str]:
        return self._notes

    @override
    def created_values(self) -> Sequence[tuple[str, Any]]:
        return () if self._saved is None else created_values(self._module, self._saved)

    @override
    def recreated_values(self) -> Sequence[tuple[str, Any]]:
        return recreated_values(self._model, self._saved or frozenset())

    @override
    def refresh(self) -> None:
        if self._source is not None:
            self._source.refresh()

    @override
    @contextlib.contextmanager
    def watched_by(self, watch: ValueWatch) -> Iterator[None]:
        # Compiled and captured networks would contain the hooks.
        hooks = (
            norm_input_watched(self._module, watch) if self.any_batch else contextlib.nullcontext()
        )
        with super().watched_by(watch), hooks:
            yield

    @override
    def close(self) -> None:
        self._module = self._run = self._graph_replay = self._source = None
        if self.device == "cuda":
            torch.cuda.empty_cache()


def load(
    model: ModelConfig,
    steps: Steps,
    threads: int | None,
    shapes: ItemShapes,
    *,
    network: Any = None,
) -> Runtime:
    """Load the network that the job names, or use the module `network`; or raise ModelError."""
    if model.device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "model_config.device: cuda, but torch finds no CUDA device; start the worker on a GPU "
            "node or set device: cpu"
        )
    if model.compile and model.type == "torchscript":
        raise ModelError(
            "model_config.compile: unsupported for type: torchscript, which is compiled already; "
            "remove compile, or use type: class"
        )
    if model.compile:
        use_compiler_cache()  # torch reads the variable when the user's code imports its compiler
    source = None if network is None else ObjectModule(network, model)
    with device_errors(model.device):
        loaded = LOADERS[model.type](model) if source is None else LoadedNetwork(source.module)
    for note in loaded.notes:
        log.info(note)
    hide_triton_after_tensorflow()  # the user's code can import TensorFlow
    if model.compile and model.device == "cuda" and is_triton_hidden():
        raise ModelError(
            "model_config.compile: on a GPU, torch.compile requires triton, but this process "
            "imported tensorflow before triton; import triton before tensorflow, use another "
            "process, or remove compile"
        )
    accelerator = Cuda() if model.device == "cuda" else None
    return TorchRuntime(loaded, model, steps, threads, accelerator, source, shapes.names)


def _other_device(found: torch.device, expected: torch.device) -> ModelError:
    return ModelError(
        f"the network returned a tensor on the device {found}, expected {expected}; remove the "
        "device from its code, or set model_config.device"
    )


def _to_channels_last(batch: torch.Tensor) -> torch.Tensor:
    if batch.dim() not in CHANNELS_LAST:
        raise ModelError(
            f"model_config.channels_last: found a batch of shape {list(batch.shape)}, expected 4 "
            "or 5 axes, (N, C, *P); remove channels_last"
        )
    return batch.contiguous(memory_format=CHANNELS_LAST[batch.dim()])


@contextlib.contextmanager
def _compiler_context() -> Iterator[None]:
    """Suppress the deprecation warnings that torch.compile causes in torch itself."""
    hide_triton_after_tensorflow()  # a step can import TensorFlow
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _is_tile_norm(module: Any) -> bool:
    """Return whether a layer normalizes with statistics of the current patch."""
    name = _class_name(module)
    if name.startswith("LayerNorm"):
        return len(getattr(module, "normalized_shape", ())) > 1  # one axis: the channels
    # In inference mode, a layer with running statistics uses those.
    return name.startswith(TILE_NORMS) and getattr(module, "running_mean", None) is None


def _is_tile_norm_node(node: Any) -> bool:
    """Return whether a node of an exported program normalizes with statistics of the patch."""
    name = str(node.target).removeprefix("aten.").removeprefix("native_").partition(".")[0]
    if name in ("instance_norm", "batch_norm"):
        return len(node.args) > 5 and node.args[5] is True  # use_input_stats or training
    return name == "group_norm" or (name == "layer_norm" and len(node.args[1]) > 1)


def _class_name(module: Any) -> str:
    return getattr(module, "original_name", type(module).__name__)  # set by TorchScript


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
