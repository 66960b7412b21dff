"""What an ONNX graph takes and gives, held against what a job declares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from chunkq.errors import ModelError
from chunkq.job import ModelConfig
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
"""ONNX Runtime's names of the types that a job can declare."""
ALSO_OUT = MappingProxyType(
    {f"tensor({name})": name for name in ("bool", "uint8", "uint16", "uint32", "uint64")}
)
"""Further types that a prediction may have."""
ALONE = "export the network so that it takes one batch and returns the prediction alone"


@dataclass(frozen=True)
class Graph:
    """The one input and the one output of a graph.

    `dtype` and `axes` are the input's, batch first: a length where it is fixed, None where it is
    free; no axes at all if the graph does not say.
    """

    path: str
    input: str
    output: str
    dtype: str
    axes: tuple[int | None, ...]
    output_dtype: str

    @classmethod
    def of(cls, session: Any, path: str) -> Self:
        """Describe a session's graph; raises ModelError where it has several ins or outs."""
        inputs, outputs = session.get_inputs(), session.get_outputs()
        where = f"model_config.model_file: {path}"
        for nodes, verb, what in ((inputs, "takes", "inputs"), (outputs, "gives", "outputs")):
            if len(nodes) != 1:
                names = ", ".join(node.name for node in nodes) or "none"
                raise ModelError(f"{where} {verb} {len(nodes)} {what} ({names}); {ALONE}")
        given, made = inputs[0], outputs[0]
        if given.type not in DTYPES:
            raise ModelError(
                f"{where}: input {given.name!r} takes {_bare(given.type)}; export the network "
                f"with an input of {', '.join(DTYPES.values())}"
            )
        kinds = DTYPES | ALSO_OUT
        if made.type not in kinds:
            raise ModelError(
                f"{where}: output {made.name!r} is {_bare(made.type)}; {ALONE}, as numbers"
            )
        axes = tuple(n if isinstance(n, int) and n > 0 else None for n in given.shape)
        return cls(path, given.name, made.name, DTYPES[given.type], axes, kinds[made.type])

    def check(self, model: ModelConfig, steps: Steps) -> None:
        """Hold the declaration against the graph, as far as no step stands between them.

        Raises ModelError in one line that says what to write.
        """
        takes = f"input {self.input!r} of {self.path} takes"
        if steps.preprocessing_protected is None and model.dtype != self.dtype:
            raise ModelError(
                f"model_config.dtype: {model.dtype}, but {takes} {self.dtype}; write dtype: "
                f"{self.dtype}"
            )
        if not self.axes:
            return
        if steps.preprocessing is None and steps.preprocessing_protected is None:
            self._check_item(model, takes)
        fixed = self.axes[0]
        if fixed is not None and fixed != model.max_batch_size:
            raise ModelError(
                f"model_config.max_batch_size: {model.max_batch_size}, but {takes} batches of "
                f"exactly {fixed}; write max_batch_size: {fixed}, or export it with a dynamic "
                "batch axis"
            )

    def _check_item(self, model: ModelConfig, takes: str) -> None:
        item, fixed = model.model_input_shape, self.axes[1:]
        declared = f"model_config.model_input_shape: {list(item)}"
        if len(item) != len(fixed):
            write = list(fixed) if None not in fixed else f"{len(fixed)} entries"
            raise ModelError(
                f"{declared} makes batches of {len(item) + 1} axes, but {takes} "
                f"{len(self.axes)}, {format_axes(self.axes)}; write model_input_shape: {write}"
            )
        joined = None if model.join_dim is None else model.join_dim - 1
        fits = [
            n is None or n == given or axis == joined
            for axis, (n, given) in enumerate(zip(fixed, item, strict=True))
        ]
        if not all(fits):
            write = [
                given if fine or n is None else n
                for n, given, fine in zip(fixed, item, fits, strict=True)
            ]
            raise ModelError(
                f"{declared}, but {takes} {format_axes(self.axes)}; "
                f"write model_input_shape: {write}, or export it with dynamic axes"
            )

    def accept(self, shape: Sequence[int], dtype: str) -> None:
        """Raise ModelError if the graph cannot take a batch of this shape and dtype."""
        sizes = list(zip(self.axes, shape, strict=False))
        wrong = [n is not None and n != given for n, given in sizes]
        right_rank = len(self.axes) in (0, len(shape))
        if right_rank and dtype == self.dtype and not any(wrong):
            return
        reason = "processing_steps must give that"
        if right_rank and dtype == self.dtype and not any(wrong[1:]):
            # The batcher halves what does not fit in memory.
            reason = "its batch size is fixed; export it with a dynamic batch axis"
        raise ModelError(
            f"model_config.model_file: input {self.input!r} of {self.path} takes {self.dtype} "
            f"{format_axes(self.axes)} but was given {dtype} {format_axes(shape)}; {reason}"
        )


def format_axes(axes: Sequence[int | None]) -> str:
    """Return axes as `(any, 1, 64, 64)`."""
    return f"({', '.join('any' if n is None else str(n) for n in axes)})"


def _bare(kind: str) -> str:
    return kind.removeprefix("tensor(").removesuffix(")") if kind.startswith("tensor(") else kind
