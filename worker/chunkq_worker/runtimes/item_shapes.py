"""Shapes of one item of a batch, as a job declares them for its network."""

from __future__ import annotations

from dataclasses import dataclass

from chunkq.job.axis_order import WrittenOrders, channels_first
from chunkq.job.model_config import ModelConfig
from chunkq_worker.runtimes.axis_moves import Axes


@dataclass(frozen=True)
class ItemShapes:
    """Shapes of one item of a batch as a job declares them, with channels first.

    `input` is what the processing steps get; the axis of `join_dim` is None if the number of inputs
    is unknown. `outputs` are the allowed shapes of the result: as declared, and without axis
    `lost_dim`. `has_channels` and `has_output_channels`: their first axis is the channel axis.
    `can_move`: a network can have the first axis of the input as its channels, because it is that
    of the channels, of `lost_dim` or of `join_dim`, or has one slice. `written` are the orders in
    the job, and `written_shapes` the input and output shape there.
    """

    input: Axes
    outputs: tuple[tuple[int, ...], ...]
    has_channels: bool
    has_output_channels: bool
    can_move: bool
    written: WrittenOrders
    written_shapes: tuple[tuple[int, ...], tuple[int, ...]]

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        rank: int | None = None,
        channels: int = 1,
        inputs: int | None = None,
    ) -> ItemShapes:
        """Return the shapes for volumes of `rank` axes and `channels`; `inputs` are stacked.

        Without a rank, every entry of `model_input_shape` is an axis of the volume.
        """
        rank = len(model.model_input_shape) if rank is None else rank
        first = channels_first(model, rank, channels)
        shape: list[int | None] = list(first.model_input_shape)
        if first.join_dim is not None:
            axis = first.join_dim - 1
            shape[axis] = None if inputs is None else inputs * first.model_input_shape[axis]
        has_channels = len(shape) > rank
        outputs = output_shapes(first, rank)
        return cls(
            input=tuple(shape),
            outputs=outputs,
            has_channels=has_channels,
            has_output_channels=len(outputs[0]) > rank,
            can_move=has_channels or shape[0] == 1 or 0 in (first.lost_dim, _index(first.join_dim)),
            written=WrittenOrders.of(model, rank, channels),
            written_shapes=(
                model.model_input_shape,
                model.model_output_shape or model.model_input_shape,
            ),
        )


def output_shapes(model: ModelConfig, rank: int) -> tuple[tuple[int, ...], ...]:
    """Return the allowed shapes of an output item: as declared, and without axis `lost_dim`.

    The shapes of the model have channels first.
    """
    declared = model.model_output_shape or model.model_input_shape
    lost_axis = model.lost_axis(rank)
    if lost_axis is None:
        return (declared,)
    channels = declared[:-rank]
    full = (*channels, *model.output_patch(rank))
    axis = len(channels) + lost_axis
    return (full, full[:axis] + full[axis + 1 :])


def _index(axis: int | None) -> int | None:
    """Return the index in an item of an axis of a batch."""
    return None if axis is None else axis - 1
