"""Validate the inputs and outputs of an ONNX graph against `model_config`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from chunkq.errors import ModelError
from chunkq.job.model_config import ModelConfig
from chunkq.plan.outputs import HeadName
from chunkq_worker.runtimes.axis_moves import format_axes
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.network_layout import NetworkLayout
from chunkq_worker.runtimes.returned_values import listed, missing_head
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
HEAD_ADVICE = "name those to use as head of the outputs, or export the network with one output"


@dataclass(frozen=True)
class Graph:
    """The single input of a graph, and the outputs that are read.

    `dtype` and `axes` describe the input, batch axis first. An axis is its fixed length, or None
    if the length is dynamic. `axes` is empty if the graph does not declare a shape. `outputs` and
    `output_dtypes` are those of the heads, or of all outputs if a step gets them, and `unused` the
    names of all other outputs.
    """

    path: str
    input: str
    outputs: tuple[str, ...]
    dtype: str
    axes: tuple[int | None, ...]
    output_dtypes: tuple[str, ...]
    unused: tuple[str, ...] = ()

    @classmethod
    def from_session(
        cls, session: Any, path: str, heads: Sequence[HeadName] = (None,), *, has_step: bool = False
    ) -> Self:
        """Read the input and the outputs of a session's graph.

        A head names an output, or is its number; None is the only output. With `has_step`, heads
        are those of the step that gets all outputs. Raise ModelError for another number of inputs
        or outputs, for a missing head, and for unsupported types.
        """
        key = f"model_config.model_file: {path}"
        node_in = _single(session.get_inputs(), f"{key} has", "inputs")
        nodes_out = session.get_outputs()
        takes_all = has_step and tuple(heads) != (None,)
        used = nodes_out if takes_all else [_output(nodes_out, head, key) for head in heads]
        if node_in.type not in DTYPES:
            raise ModelError(
                f"{key}: input {node_in.name!r} has dtype {_dtype_name(node_in.type)}, expected "
                f"one of {', '.join(DTYPES.values())}; export the network with one of these"
            )
        output_dtypes = DTYPES | EXTRA_OUTPUT_DTYPES
        for node in used:
            if node.type not in output_dtypes:
                raise ModelError(
                    f"{key}: output {node.name!r} has type {_dtype_name(node.type)}, expected a "
                    f"tensor of numbers; {EXPORT_ADVICE}"
                )
        names = tuple(node.name for node in used)
        return cls(
            path,
            node_in.name,
            names,
            DTYPES[node_in.type],
            tuple(n if isinstance(n, int) and n > 0 else None for n in node_in.shape),
            tuple(output_dtypes[node.type] for node in used),
            tuple(node.name for node in nodes_out if node.name not in names),
        )

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


def _output(nodes: Sequence[Any], head: HeadName, key: str) -> Any:
    """Return the output node of a head, or raise ModelError."""
    if head is None:
        return _single(nodes, f"{key} has", "outputs", HEAD_ADVICE)
    for number, node in enumerate(nodes):
        if head in (number, node.name):
            return node
    names = listed([node.name for node in nodes])
    raise missing_head(
        f"no head {head!r} in {key.removeprefix('model_config.model_file: ')}, which has the "
        f"outputs {names}; use one of these, or its number, as head"
    )


def _single(nodes: Sequence[Any], subject: str, plural: str, advice: str = EXPORT_ADVICE) -> Any:
    """Return the only node, or raise ModelError."""
    if len(nodes) != 1:
        names = ", ".join(node.name for node in nodes) or "none"
        raise ModelError(f"{subject} {len(nodes)} {plural} ({names}), expected 1; {advice}")
    return nodes[0]


def _dtype_name(kind: str) -> str:
    return kind.removeprefix("tensor(").removesuffix(")") if kind.startswith("tensor(") else kind
