"""ONNX Runtime on a GPU, with batches and results that stay there as torch tensors."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq.combine import Array
from chunkq.errors import ModelError
from chunkq.job import ModelConfig
from chunkq_worker.runtimes.onnx import OnnxRuntime, open_graph
from chunkq_worker.runtimes.onnx_graph import Graph
from chunkq_worker.runtimes.onnx_import import onnxruntime
from chunkq_worker.steps import Steps

if TYPE_CHECKING:
    import torch

CUDA = "CUDAExecutionProvider"
INSTALL = "pip uninstall onnxruntime && pip install 'chunkq[onnx-gpu]'"
PROVIDERS = (
    (
        CUDA,
        {
            # A search by timing may choose otherwise in the next worker, and so change bytes.
            "cudnn_conv_algo_search": "HEURISTIC",
            # The blending's memory is on the same device.
            "arena_extend_strategy": "kSameAsRequested",
        },
    ),
)


def load(model: ModelConfig, steps: Steps, threads: int | None) -> OnnxRuntime:
    """Load a graph with the CUDA provider; raises ModelError in one line where that is not there.

    Without a torch that sees the GPU, batches and results lie on the host.
    """
    if CUDA not in onnxruntime.get_available_providers():
        raise ModelError(
            "model_config.device: cuda, but the onnxruntime installed here has no CUDA provider; "
            f"replace it ({INSTALL}) or set device: cpu"
        )
    free = _free_bytes()  # imports torch, which brings libraries of CUDA that both then share
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        # It prints what it misses; standard output belongs to the command.
        with contextlib.redirect_stdout(io.StringIO()):
            preload()
    session, graph = open_graph(model, steps, threads, PROVIDERS)
    if CUDA not in session.get_providers():
        # ONNX Runtime merely logs that its libraries did not load.
        raise ModelError(
            "model_config.device: cuda, but onnxruntime cannot load its CUDA provider here; "
            f"install CUDA and cuDNN for it ({INSTALL}) or set device: cpu"
        )
    if free is None:
        return OnnxRuntime(session, graph, model, steps)
    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    return OnnxOnTorch(session, graph, model, steps, device, free)


def _free_bytes() -> int | None:
    """Return what is free on the GPU, None where no torch sees one."""
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


class OnnxOnTorch(OnnxRuntime):
    """A graph on the GPU between torch tensors, bound to it by their addresses.

    `free` are the bytes that were free on `device` before the graph was loaded.
    """

    def __init__(
        self,
        session: Any,
        graph: Graph,
        model: ModelConfig,
        steps: Steps,
        device: torch.device,
        free: int,
    ) -> None:
        import torch

        super().__init__(session, graph, model, steps)
        self._torch, self._device = torch, device
        self._where = (device.type, device.index or 0)
        self._output_dtype = np.dtype(graph.output_dtype)
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._free_at_first = free

    @override
    def _cast(self, batch: npt.NDArray[Any]) -> Array:
        tensor: torch.Tensor = self.to_device(batch)
        return tensor.to(getattr(self._torch, self._dtype.name))

    @override
    def _run_session(self, given: Array) -> Array:
        given = given.contiguous()
        shape = tuple(given.shape)
        if shape not in self._shapes:
            self._shapes[shape] = self._find_shape(given)
        outputs = self._torch.empty(
            self._shapes[shape],
            dtype=getattr(self._torch, self._output_dtype.name),
            device=self._device,
        )
        binding = self._bind(given)
        binding.bind_output(
            self._graph.output,
            *self._where,
            self._output_dtype.type,
            list(outputs.shape),
            outputs.data_ptr(),
        )
        self._run_bound(binding)
        return outputs

    def _bind(self, given: Array) -> Any:
        binding = self._session.io_binding()
        binding.bind_input(
            self._graph.input,
            *self._where,
            np.dtype(self._graph.dtype).type,
            list(given.shape),
            given.data_ptr(),
        )
        return binding

    def _run_bound(self, binding: Any) -> None:
        # torch fills the batch on a stream of its own, of which ONNX Runtime knows nothing.
        self._torch.cuda.current_stream(self._device).synchronize()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def _find_shape(self, given: Array) -> tuple[int, ...]:
        """Learn the shape of what comes out from one run that leaves its memory to the runtime."""
        binding = self._bind(given)
        binding.bind_output(self._graph.output, *self._where)
        self._run_bound(binding)
        [outputs] = binding.get_outputs()
        return tuple(outputs.shape())

    @override
    def _as_float(self, outputs: Array) -> Array:
        return outputs if outputs.dtype == self._torch.float64 else outputs.float()

    @override
    def zeros(self, shape: tuple[int, ...]) -> Array:
        return self._torch.zeros(shape, dtype=self._torch.float32, device=self._device)

    @override
    def to_device(self, array: npt.NDArray[Any]) -> Array:
        if array.dtype.kind == "u" and array.dtype.itemsize > 1:
            # As in the torch runtime: the next wider signed type holds the same values.
            array = array.astype(np.dtype(f"i{array.dtype.itemsize * 2}"))
        array = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
        return self._torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)

    @override
    def is_out_of_memory(self, error: BaseException) -> bool:
        of_torch = isinstance(error, self._torch.cuda.OutOfMemoryError)
        found = of_torch or super().is_out_of_memory(error)
        if found:
            self._torch.cuda.empty_cache()  # both allocators draw on one device
        return found

    @override
    def device_bytes(self) -> int | None:
        # Neither allocator gives back what it holds, so what is taken now is the most there was.
        return max(0, self._free_at_first - self._torch.cuda.mem_get_info()[0])

    @override
    def close(self) -> None:
        super().close()
        self._torch.cuda.empty_cache()
