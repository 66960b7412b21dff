"""ONNX Runtime with batches and results in host memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from chunkq.blend.combine import Array
from chunkq.job.model_config import ModelConfig
from chunkq_worker.runtimes.axis_moves import Axes, Move
from chunkq_worker.runtimes.host_runtime import HostRuntime
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.network_layout import NetworkLayout
from chunkq_worker.runtimes.onnx_file import open_session
from chunkq_worker.runtimes.onnx_graph import Graph
from chunkq_worker.runtimes.onnx_import import onnxruntime
from chunkq_worker.steps import Steps

TILE_NORMS = frozenset({"InstanceNormalization", "GroupNormalization"})
"""Operators that normalize with the mean and variance of the current patch."""
OUT_OF_MEMORY = (
    "Failed to allocate memory",
    "is smaller than requested bytes",  # "Available memory of …": the limit of the arena
    "std::bad_alloc",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA failure 2: out of memory",
    "_STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
)
"""Parts of ONNX Runtime's messages for a failed allocation, on the host or on the device."""
log = logging.getLogger("chunkq.worker")


class OnnxRuntime(HostRuntime):
    """Runs a graph on batches in host memory; results are in host memory too.

    If the graph runs on a GPU, ONNX Runtime copies batches and results between host and GPU.
    """

    def __init__(
        self,
        session: Any,
        graph: Graph,
        model: ModelConfig,
        steps: Steps,
        layout: NetworkLayout,
    ) -> None:
        super().__init__(model, steps, layout.shapes)
        self._session, self._graph, self._layout = session, graph, layout
        self._reader.unused = graph.unused
        self._moves: dict[Axes, Move] = {}
        # TensorRT builds an engine, which takes minutes, for each new batch size.
        is_specialized = model.provider == "tensorrt"
        self.any_batch = bool(graph.axes) and graph.axes[0] is None and not is_specialized

    @override
    def _run(self, inputs: Array) -> Any:
        item: Axes = tuple(inputs.shape[1:])
        if item not in self._moves:
            self._moves[item] = self._layout.choose(
                self._layout.input_moves(item),
                lambda move: [tuple(o.shape[1:]) for o in self._run_moved(inputs, move)],
                is_final=self.is_out_of_memory,
            )
        move = self._moves[item]
        outputs = []
        for number, output in enumerate(self._run_moved(inputs, move)):
            shape = tuple(output.shape[1:])
            output_move = self._layout.output_move(item, move, shape, number)
            outputs.append(output_move.apply(output, self._permute))
        if self._steps.postprocessing_protected is None:
            return tuple(outputs)
        has_names = self._layout.shapes.names != (None,)
        return dict(zip(self._graph.outputs, outputs, strict=True)) if has_names else outputs[0]

    def _run_moved(self, inputs: Array, move: Move) -> Sequence[Array]:
        """Return the outputs that are read, with their axes in the order of the graph."""
        moved = move.apply(inputs, self._permute)
        self._graph.check_batch(tuple(moved.shape), str(moved.dtype).removeprefix("torch."))
        return self._run_session(moved)

    def _permute(self, array: Array, axes: tuple[int, ...]) -> Array:
        return np.ascontiguousarray(np.transpose(array, axes))

    def _run_session(self, inputs: Array) -> Sequence[Array]:
        """Return the outputs that are read for a batch that `Graph.check_batch` accepts."""
        feed = {self._graph.input: np.ascontiguousarray(inputs)}
        outputs: Sequence[Array] = self._session.run([*self._graph.outputs], feed)
        return outputs

    @override
    def is_out_of_memory(self, error: BaseException) -> bool:
        # Runs with I/O bindings raise RuntimeError, other runs raise classes of onnxruntime.
        from_onnxruntime = type(error).__module__.startswith("onnxruntime")
        can_match = from_onnxruntime or type(error) is RuntimeError
        return super().is_out_of_memory(error) or (
            can_match and any(text in str(error) for text in OUT_OF_MEMORY)
        )

    @override
    def tile_norms(self) -> tuple[str, ...]:
        assignment_info = getattr(self._session, "get_provider_graph_assignment_info", None)
        if assignment_info is None:  # an older ONNX Runtime
            return ()
        nodes = (node for subgraph in assignment_info() for node in subgraph.get_nodes())
        return tuple(f"{n.name} ({n.op_type})" for n in nodes if n.op_type in TILE_NORMS)

    @override
    def close(self) -> None:
        self._session = None


def open_graph(
    model: ModelConfig,
    steps: Steps,
    threads: int | None,
    shapes: ItemShapes,
    providers: Sequence[Any] = (),
) -> tuple[Any, Graph, NetworkLayout]:
    """Open the graph that the job names and validate it against `model_config`."""
    path = model.model_file or ""
    session = open_session(path, threads, providers)
    has_step = steps.postprocessing_protected is not None
    graph = Graph.from_session(session, path, shapes.names, has_step=has_step)
    layout = graph.layout(shapes, steps)
    graph.check_config(model, steps, layout)
    provider_names = ", ".join(session.get_providers())
    log.info("onnxruntime %s runs %s with %s", onnxruntime.__version__, path, provider_names)
    return session, graph, layout
