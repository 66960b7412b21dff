"""Read from a torch.export program which batches it accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from chunkq.errors import ModelError


@dataclass(frozen=True)
class Limits:
    """Dtype, shape and batch sizes of the single input of an exported program.

    `axes` are lengths, None for a dynamic one. Valid batch sizes are `low` to `high` inclusive;
    `high` is None if unlimited.
    """

    path: str
    dtype: torch.dtype
    axes: tuple[int | None, ...]
    low: int
    high: int | None

    @classmethod
    def from_program(cls, program: Any, path: str) -> Self:
        """Read the limits of a torch.export.ExportedProgram.

        Raise ModelError unless its only input is a tensor.
        """
        names = program.graph_signature.user_inputs
        inputs = [node.meta["val"] for node in program.graph.nodes if node.name in names]
        if len(names) != 1 or not isinstance(inputs[0], torch.Tensor) or not inputs[0].ndim:
            raise ModelError(
                f"model_config.model_file: {path} has {len(names)} inputs "
                f"({', '.join(map(str, names)) or 'none'}), expected 1; export a network whose "
                "only input is the batch"
            )
        batch = inputs[0]
        axes = tuple(n if isinstance(n, int) else None for n in batch.shape)
        low, high = axes[0] or 0, axes[0]
        if axes[0] is None:
            size_range = program.range_constraints.get(batch.shape[0].node.expr)
            if size_range is not None:
                # torch declares 2 as the minimum of every dynamic axis, but accepts 1.
                low = int(size_range.lower) if size_range.lower > 2 else 0
                high = int(size_range.upper) if size_range.upper < 1 << 31 else None
        return cls(path, batch.dtype, axes, low, high)

    def check_batch(self, shape: Sequence[int], dtype: torch.dtype, max_batch_size: int) -> None:
        """Raise ModelError unless the program accepts a batch of this shape and dtype.

        `max_batch_size` is the job's; a smaller batch was halved because memory was short.
        """
        if dtype != self.dtype:
            expected, actual = (str(d).removeprefix("torch.") for d in (self.dtype, dtype))
            raise ModelError(
                f"model_config.dtype: {self.path} was exported for {expected}, found {actual}; set "
                f"dtype: {expected}"
            )
        if len(shape) != len(self.axes) or any(
            length not in (None, size)
            for length, size in zip(self.axes[1:], shape[1:], strict=True)
        ):
            raise ModelError(
                f"model_config.model_input_shape: {self.path} was exported for batches of "
                f"{self._format_axes()}, and the job has batches of {list(shape)}, the batch size "
                "and model_input_shape; set model_input_shape to match, or export it again"
            )
        if shape[0] >= self.low and (self.high is None or shape[0] <= self.high):
            return
        sizes = f"{self.low} to {self.high}" if self.low else f"at most {self.high}"
        if self.high in (self.low, None):
            sizes = f"{self.low} or more" if self.high is None else f"exactly {self.high}"
        advice = f"set it to {self.high or self.low}, or "
        if shape[0] < max_batch_size:
            advice = "larger batches do not fit in memory, so "
        raise ModelError(
            f"model_config.max_batch_size: {self.path} was exported for batches of {sizes} "
            f"items, found {shape[0]}; {advice}export it for any size with dynamic_shapes"
        )

    def _format_axes(self) -> str:
        return f"[{', '.join('any' if n is None else str(n) for n in self.axes)}]"
