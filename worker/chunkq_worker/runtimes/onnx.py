"""Networks as ONNX graphs, run by ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from chunkq.combine import Array
from chunkq.job import ModelConfig
from chunkq_worker.runtimes.base import Runtime
from chunkq_worker.runtimes.host_runtime import HostRuntime
from chunkq_worker.runtimes.onnx_file import open_session
from chunkq_worker.runtimes.onnx_graph import Graph
from chunkq_worker.runtimes.onnx_import import onnxruntime
from chunkq_worker.steps import Steps

TILE_NORMS = frozenset({"InstanceNormalization", "GroupNormalization"})
"""Operators that normalise by the mean and spread of the tile in front of them."""
OUT_OF_MEMORY = (
    "Failed to allocate memory",
    "is smaller than requested bytes",  # Available memory of ... : the arena's own limit
    "std::bad_alloc",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA failure 2: out of memory",
    "_STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
)
"""What ONNX Runtime's errors say when there is no memory, on the host or on the device."""
log = logging.getLogger("chunkq.worker")


class OnnxRuntime(HostRuntime):
    """A graph whose batches and results lie on the host.

    The graph itself may run on a GPU: what it takes and gives is then copied there and back.
    """

    def __init__(self, session: Any, graph: Graph, model: ModelConfig, steps: Steps) -> None:
        super().__init__(model, steps)
        self._session, self._graph = session, graph
        self.any_batch = bool(graph.axes) and graph.axes[0] is None

    @override
    def _run(self, inputs: Array) -> Array:
        self._graph.accept(tuple(inputs.shape), str(inputs.dtype).removeprefix("torch."))
        return self._run_session(inputs)

    def _run_session(self, inputs: Array) -> Array:
        """Return the graph's output for a batch that it accepts."""
        feed = {self._graph.input: np.ascontiguousarray(inputs)}
        return self._session.run([self._graph.output], feed)[0]

    @override
    def is_out_of_memory(self, error: BaseException) -> bool:
        # Bindings raise plain RuntimeErrors, everything else types of ONNX Runtime's own.
        of_theirs = type(error).__module__.startswith("onnxruntime")
        known = of_theirs or type(error) is RuntimeError
        return super().is_out_of_memory(error) or (
            known and any(words in str(error) for words in OUT_OF_MEMORY)
        )

    @override
    def tile_norms(self) -> tuple[str, ...]:
        tell = getattr(self._session, "get_provider_graph_assignment_info", None)
        if tell is None:  # an older ONNX Runtime
            return ()
        nodes = (node for part in tell() for node in part.get_nodes())
        return tuple(f"{n.name} ({n.op_type})" for n in nodes if n.op_type in TILE_NORMS)

    @override
    def close(self) -> None:
        self._session = None


def load(model: ModelConfig, steps: Steps, threads: int | None) -> Runtime:
    """Load the graph a job names; raises ModelError in one line.

    On device cuda, batches and results stay on the GPU as torch tensors, if torch with CUDA is
    installed.
    """
    if model.device == "cuda":
        from chunkq_worker.runtimes import onnx_cuda

        return onnx_cuda.load(model, steps, threads)
    session, graph = open_graph(model, steps, threads)
    return OnnxRuntime(session, graph, model, steps)


def open_graph(
    model: ModelConfig, steps: Steps, threads: int | None, providers: Sequence[Any] = ()
) -> tuple[Any, Graph]:
    """Return the session of a job's graph, and the graph held against what the job declares."""
    path = model.model_file or ""
    session = open_session(path, threads, providers)
    graph = Graph.of(session, path)
    graph.check(model, steps)
    running = ", ".join(session.get_providers())
    log.info("onnxruntime %s runs %s with %s", onnxruntime.__version__, path, running)
    return session, graph
