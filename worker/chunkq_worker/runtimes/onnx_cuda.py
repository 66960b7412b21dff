"""ONNX Runtime on a GPU. Batches and results stay on the GPU as torch tensors."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq.blend.combine import Array
from chunkq.errors import ModelError
from chunkq.install_hint import install_command
from chunkq.job.model_config import ModelConfig
from chunkq_worker.runtimes import onnx_tensorrt
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.network_layout import NetworkLayout
from chunkq_worker.runtimes.onnx_graph import Graph
from chunkq_worker.runtimes.onnx_host import OnnxRuntime, open_graph
from chunkq_worker.runtimes.onnx_import import onnxruntime
from chunkq_worker.steps import Steps

if TYPE_CHECKING:
    import torch

CUDA = "CUDAExecutionProvider"
OPTIONS = {
    # A search by timing can choose another algorithm in the next worker and change bytes.
    "cudnn_conv_algo_search": "HEURISTIC",
    # The arrays of the blending need memory on the same device.
    "arena_extend_strategy": "kSameAsRequested",
}


def load(model: ModelConfig, steps: Steps, threads: int | None, shapes: ItemShapes) -> OnnxRuntime:
    """Load a graph with the CUDA provider, or raise ModelError if the provider is unavailable.

    Batches and results are in host memory if torch is not installed or cannot use the GPU.
    """
    if CUDA not in onnxruntime.get_available_providers():
        raise ModelError(
            "model_config.device: cuda, but the installed onnxruntime has no CUDA provider; "
            f"replace it ({_install()}) or set device: cpu"
        )
    free_bytes = _free_bytes()  # imports torch, whose CUDA libraries onnxruntime then shares
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        # It prints missing libraries to standard output, which is reserved for the command.
        with contextlib.redirect_stdout(io.StringIO()):
            preload()
    providers = [(CUDA, provider_options(model))]
    if model.provider == "tensorrt":
        providers.insert(0, onnx_tensorrt.provider(model))
    session, graph, layout = open_graph(model, steps, threads, shapes, providers)
    if CUDA not in session.get_providers():
        # ONNX Runtime only logs that its libraries failed to load.
        raise ModelError(
            "model_config.device: cuda, but onnxruntime cannot load its CUDA provider; "
            f"install CUDA and cuDNN for it ({_install()}) or set device: cpu"
        )
    if model.provider == "tensorrt":
        onnx_tensorrt.check_provider(session)
    if free_bytes is None:
        return OnnxRuntime(session, graph, model, steps, layout)
    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    return OnnxOnTorch(session, graph, model, steps, layout, device, free_bytes)


def provider_options(model: ModelConfig) -> dict[str, str]:
    """Return the options of the CUDA provider. By default, the provider allows TF32."""
    return OPTIONS | {"use_tf32": str(int(model.allows_tf32))}


def _free_bytes() -> int | None:
    """Return the free memory of the GPU in bytes, None if torch has no GPU or is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


class OnnxOnTorch(OnnxRuntime):
    """Runs a graph on the GPU. Inputs and outputs are torch tensors, bound by their addresses.

    `free_bytes` is the free memory of `device` before the graph was loaded.
    """

    def __init__(
        self,
        session: Any,
        graph: Graph,
        model: ModelConfig,
        steps: Steps,
        layout: NetworkLayout,
        device: torch.device,
        free_bytes: int,
    ) -> None:
        import torch

        from chunkq_worker.runtimes.staging import Cuda

        super().__init__(session, graph, model, steps, layout)
        self._torch, self._device = torch, device
        self._device_address = (device.type, device.index or 0)
        self._output_dtypes = tuple(map(np.dtype, graph.output_dtypes))
        self._output_shapes: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        self._initial_free_bytes = free_bytes
        self.accelerator = Cuda()

    @override
    def _cast(self, batch: Array) -> Array:
        tensor = batch if isinstance(batch, self._torch.Tensor) else self.to_device(batch)
        return tensor.to(getattr(self._torch, self._dtype.name))

    @override
    def _permute(self, array: Array, axes: tuple[int, ...]) -> Array:
        return array.permute(axes).contiguous()

    @override
    def _is_array(self, value: Any) -> bool:
        return isinstance(value, self._torch.Tensor)

    @override
    def _run_session(self, batch: Array) -> Sequence[Array]:
        batch = batch.contiguous()
        shape = tuple(batch.shape)
        if shape not in self._output_shapes:
            self._output_shapes[shape] = self._infer_output_shapes(batch)
        binding, outputs = self._bind(batch), []
        pairs = zip(self._output_shapes[shape], self._output_dtypes, strict=True)
        for name, (output_shape, dtype) in zip(self._graph.outputs, pairs, strict=True):
            output = self._torch.empty(
                output_shape, dtype=getattr(self._torch, dtype.name), device=self._device
            )
            binding.bind_output(
                name, *self._device_address, dtype.type, list(output_shape), output.data_ptr()
            )
            outputs.append(output)
        self._run_bound(binding)
        return outputs

    def _bind(self, batch: Array) -> Any:
        binding = self._session.io_binding()
        binding.bind_input(
            self._graph.input,
            *self._device_address,
            np.dtype(self._graph.dtype).type,
            list(batch.shape),
            batch.data_ptr(),
        )
        return binding

    def _run_bound(self, binding: Any) -> None:
        # torch fills the batch on its own stream; ONNX Runtime does not synchronize with it.
        self._torch.cuda.current_stream(self._device).synchronize()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def _infer_output_shapes(self, batch: Array) -> list[tuple[int, ...]]:
        """Run the graph once with outputs allocated by ONNX Runtime; return their shapes."""
        binding = self._bind(batch)
        for name in self._graph.outputs:
            binding.bind_output(name, *self._device_address)
        self._run_bound(binding)
        return [tuple(output.shape()) for output in binding.get_outputs()]

    @override
    def _as_float(self, outputs: Array) -> tuple[Array, str]:
        dtype = str(outputs.dtype).removeprefix("torch.")
        return outputs if outputs.dtype.is_floating_point else outputs.float(), dtype

    @override
    def to_device(self, array: npt.NDArray[Any]) -> Array:
        if array.dtype.kind == "u" and array.dtype.itemsize > 1:
            # As in the torch runtime: the next wider signed dtype can represent all values.
            array = array.astype(np.dtype(f"i{array.dtype.itemsize * 2}"))
        array = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
        return self._torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)

    @override
    def is_out_of_memory(self, error: BaseException) -> bool:
        from_torch = isinstance(error, self._torch.cuda.OutOfMemoryError)
        is_out_of_memory = from_torch or super().is_out_of_memory(error)
        if is_out_of_memory:
            self._torch.cuda.empty_cache()  # ONNX Runtime allocates on the same device
        return is_out_of_memory

    @override
    def device_bytes(self) -> int | None:
        # Neither allocator returns memory to the device, so the current use is the peak.
        return max(0, self._initial_free_bytes - self._torch.cuda.mem_get_info()[0])

    @override
    def close(self) -> None:
        super().close()
        self._torch.cuda.empty_cache()


def _install() -> str:
    return f"`pip uninstall onnxruntime && {install_command('onnx-gpu')}`"
