"""The ONNX runtime: ONNX graphs, executed by ONNX Runtime on the CPU or on a GPU."""

from __future__ import annotations

from chunkq.job.model_config import ModelConfig
from chunkq_worker.runtimes import onnx_cuda
from chunkq_worker.runtimes.base import Runtime
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.onnx_host import OnnxRuntime, open_graph
from chunkq_worker.steps import Steps


def load(model: ModelConfig, steps: Steps, threads: int | None, shapes: ItemShapes) -> Runtime:
    """Load the graph that the job names, or raise ModelError.

    On device `cuda`, batches and results stay on the GPU as torch tensors if torch with CUDA is
    installed.
    """
    if model.device == "cuda":
        return onnx_cuda.load(model, steps, threads, shapes)
    session, graph, layout = open_graph(model, steps, threads, shapes)
    return OnnxRuntime(session, graph, model, steps, layout)
