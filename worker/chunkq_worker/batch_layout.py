"""Where the inputs of a job lie in an item of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from chunkq.job.model_config import ModelConfig


@dataclass(frozen=True)
class BatchLayout:
    """The shape of an item of a batch, and of the part of it that one input fills.

    item   shape of an item, without the axis of the batch
    part   shape of one input in it
    axis   axis of the item along which the inputs are stacked
    """

    item: tuple[int, ...]
    part: tuple[int, ...]
    axis: int

    @classmethod
    def of(cls, model: ModelConfig, inputs: int) -> BatchLayout:
        """Return the layout of a network that sees `inputs` arrays together.

        They are stacked along `join_dim`, whose length in `model_input_shape` is that of one input.
        Without it, several inputs are the channels of `model_input_shape`.
        """
        shape = model.model_input_shape
        if model.join_dim is None:
            part = shape if inputs == 1 else (shape[0] // inputs, *shape[1:])
            return cls(shape, part, 0)
        axis = model.join_dim - 1
        return cls((*shape[:axis], inputs * shape[axis], *shape[axis + 1 :]), shape, axis)

    def index(self, number: int) -> tuple[slice, ...]:
        """Return the slices that select input `number` in an item."""
        length = self.part[self.axis]
        return (
            *(slice(None) for _ in range(self.axis)),
            slice(number * length, (number + 1) * length),
        )
