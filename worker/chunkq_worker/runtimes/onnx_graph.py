"""Validate the inputs and outputs of an ONNX graph against `model_config`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from chunkq.errors import ModelError
from chunkq.job.model_config import ModelConfig
from chunkq_worker.runtimes.axis_moves import format_axes
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.network_layout import NetworkLayout
from chunkq_worker.steps import Steps

DTYPES: MappingProxyType[str, str] = MappingProxyType(
    {
        "tensor(float16)": "float16",
        "tensor(float)": "float32",
        "tensor(double)": "float64",
        "tensor(int8)": "int8",
        "tensor(int16)": "int16",
        "tensor(int32)": "int32",
        "tensor(int64)": "int64",
    }
)
"""ONNX Runtime's type names -> the dtypes that a job can declare."""
EXTRA_OUTPUT_DTYPES = MappingProxyType(
    {f"tensor({name})": name for name in ("bool", "uint8", "uint16", "uint32", "uint64")}
)
"""Additional types that only the output can have."""
EXPORT_ADVICE = "export the network with one input, the batch, and one output, the prediction"


@dataclass(frozen=True)
class Graph:
    """The single input and the single output of a graph.

    `dtype` and `axes` describe the input, batch axis first. An axis is its fixed length, or None
    if the length is dynamic. `axes` is empty if the graph does not declare a shape.
    """

    path: str
    input: str
    output: str
    dtype: str
    axes: tuple[int | None, ...]
    output_dtype: str

    @classmethod
    def from_session(cls, session: Any, path: str) -> Self:
        """Read the input and output of a session's graph. Raise ModelError unless it has one each.

        Raise ModelError also for an input or output of an unsupported type.
        """
        key = f"model_config.model_file: {path}"
        node_in = _single(session.get_inputs(), f"{key} has", "inputs")
        node_out = _single(session.get_outputs(), f"{key} has", "outputs")
        if node_in.type not in DTYPES:
            raise ModelError(
                f"{key}: input {node_in.name!r} has dtype {_dtype_name(node_in.type)}, expected "
                f"one of {', '.join(DTYPES.values())}; export the network with one of these"
            )
        output_dtypes = DTYPES | EXTRA_OUTPUT_DTYPES
        if node_out.type not in output_dtypes:
            raise ModelError(
                f"{key}: output {node_out.name!r} has type {_dtype_name(node_out.type)}, expected "
                f"a tensor of numbers; {EXPORT_ADVICE}"
            )
        axes = tuple(n if isinstance(n, int) and n > 0 else None for n in node_in.shape)
        dtypes = DTYPES[node_in.type], output_dtypes[node_out.type]
        return cls(path, node_in.name, node_out.name, dtypes[0], axes, dtypes[1])

    def layout(self, shapes: ItemShapes, steps: Steps) -> NetworkLayout:
        """Return the layout of the graph's batches for the shapes of a job."""
        return NetworkLayout(shapes, self.axes[1:] if self.axes else None, steps)

    def check_config(self, model: ModelConfig, steps: Steps, layout: NetworkLayout) -> None:
        """Validate the declared dtype and shape against the graph.

        A dtype or shape that a processing step can change is not checked. Raise ModelError with
        the value to set.
        """
        expects = f"input {self.input!r} of {self.path} expects"
        if steps.preprocessing_protected is None and model.dtype != self.dtype:
            raise ModelError(
                f"model_config.dtype: {model.dtype}, but {expects} {self.dtype}; set dtype: "
                f"{self.dtype}"
            )
        if not self.axes:
            return
        has_step = (steps.preprocessing, steps.preprocessing_protected) != (None, None)
        problem = None if has_step else layout.input_problem(expects, self.axes)
        if problem is not None:
            raise ModelError(problem)
        batch_size = self.axes[0]
        if batch_size is not None and batch_size != model.max_batch_size:
            raise ModelError(
                f"model_config.max_batch_size: {model.max_batch_size}, but {expects} batches of "
                f"exactly {batch_size}; set max_batch_size: {batch_size}, or export it with a "
                "dynamic batch axis"
            )

    def check_batch(self, shape: Sequence[int], dtype: str) -> None:
        """Raise ModelError if the graph cannot process a batch of this shape and dtype."""
        pairs = list(zip(self.axes, shape, strict=False))
        differs = [length is not None and length != size for length, size in pairs]
        same_rank = len(self.axes) in (0, len(shape))
        if same_rank and dtype == self.dtype and not any(differs):
            return
        advice = "set processing_steps that return the expected batch"
        if same_rank and dtype == self.dtype and not any(differs[1:]):
            # The batcher halves batches that do not fit in memory.
            advice = "its batch size is fixed; export it with a dynamic batch axis"
        raise ModelError(
            f"model_config.model_file: input {self.input!r} of {self.path} expects {self.dtype} "
            f"{format_axes(self.axes)}, found {dtype} {format_axes(shape)}; {advice}"
        )


def _single(nodes: Sequence[Any], subject: str, plural: str) -> Any:
    """Return the only node, or raise ModelError."""
    if len(nodes) != 1:
        names = ", ".join(node.name for node in nodes) or "none"
        raise ModelError(f"{subject} {len(nodes)} {plural} ({names}), expected 1; {EXPORT_ADVICE}")
    return nodes[0]


def _dtype_name(kind: str) -> str:
    return kind.removeprefix("tensor(").removesuffix(")") if kind.startswith("tensor(") else kind
