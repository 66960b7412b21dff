"""What a program of torch.export says about the batches it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from chunkq.errors import ModelError


@dataclass(frozen=True)
class Limits:
    """The one input of an exported program: its dtype and axes, a batch's from `low` to `high`.

    An axis is None where its length is free; so is `high`.
    """

    path: str
    dtype: torch.dtype
    axes: tuple[int | None, ...]
    low: int
    high: int | None

    @classmethod
    def of(cls, program: Any, path: str) -> Self:
        """Read them from a torch.export.ExportedProgram; ModelError unless it takes one batch."""
        names = program.graph_signature.user_inputs
        inputs = [node.meta["val"] for node in program.graph.nodes if node.name in names]
        if len(names) != 1 or not isinstance(inputs[0], torch.Tensor) or not inputs[0].ndim:
            raise ModelError(
                f"model_config.model_file: {path} takes {len(names)} inputs "
                f"({', '.join(map(str, names)) or 'none'}); export a network that takes one batch"
            )
        given = inputs[0]
        axes = tuple(n if isinstance(n, int) else None for n in given.shape)
        low, high = axes[0] or 0, axes[0]
        if axes[0] is None:
            allowed = program.range_constraints.get(given.shape[0].node.expr)
            if allowed is not None:
                # torch calls every free axis 2 or more, and takes 1 all the same.
                low = int(allowed.lower) if allowed.lower > 2 else 0
                high = int(allowed.upper) if allowed.upper < 1 << 31 else None
        return cls(path, given.dtype, axes, low, high)

    def accept(self, shape: Sequence[int], dtype: torch.dtype, wanted: int) -> None:
        """Raise ModelError unless the program takes such a batch; the job wants `wanted` items."""
        if dtype != self.dtype:
            took, given = (str(d).removeprefix("torch.") for d in (self.dtype, dtype))
            raise ModelError(
                f"model_config.dtype: {self.path} was exported for {took}, not {given}; set "
                f"dtype: {took}"
            )
        if len(shape) != len(self.axes) or any(
            n not in (None, s) for n, s in zip(self.axes[1:], shape[1:], strict=True)
        ):
            raise ModelError(
                f"model_config.model_input_shape: {self.path} was exported for batches of "
                f"{self._shown()}, not {list(shape)}; set it accordingly or export it again"
            )
        if shape[0] >= self.low and (self.high is None or shape[0] <= self.high):
            return
        takes = f"{self.low} to {self.high}" if self.low else f"at most {self.high}"
        if self.high in (self.low, None):
            takes = f"{self.low} or more" if self.high is None else f"exactly {self.high}"
        advice = f"set it to {self.high or self.low}, or "
        if shape[0] < wanted:  # halved, so the job file asks for what it takes
            advice = "more do not fit in memory, so "
        raise ModelError(
            f"model_config.max_batch_size: {self.path} was exported for batches of {takes} "
            f"items, not {shape[0]}; {advice}export it for any size with dynamic_shapes"
        )

    def _shown(self) -> str:
        return f"[{', '.join('any' if n is None else str(n) for n in self.axes)}]"
