"""Shapes of one item of a batch, as a job declares them for its network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkq.job.axis_order import AxisOrder, WrittenOrders, channels_first
from chunkq.job.model_config import ModelConfig
from chunkq.plan.outputs import HeadName
from chunkq_worker.runtimes.axis_moves import Axes


@dataclass(frozen=True)
class HeadShapes:
    """Shapes of an item of one head of the network's output.

    `outputs` are the allowed shapes with channels first: as declared, and without axis `lost_dim`.
    They are empty if the job does not know the shape. `has_channels`: their first axis is the
    channel axis. `order` is the order of axes in the job, None without a channel axis, and
    `is_ambiguous` whether the shape can be read in both orders. `written` is the shape in the job.
    `follows_input`: an output of unknown shape that has as many axes as the input has its channels
    where the input has them.
    """

    head: HeadName
    outputs: tuple[tuple[int, ...], ...]
    has_channels: bool
    order: AxisOrder | None
    is_ambiguous: bool
    written: tuple[int, ...]
    follows_input: bool = False


@dataclass(frozen=True)
class ItemShapes:
    """Shapes of one item of a batch as a job declares them, with channels first.

    `input` is what the processing steps get; the axis of `join_dim` is None if the number of inputs
    is unknown. `has_channels`: its first axis is the channel axis. `can_move`: a network can have
    the first axis of the input as its channels, because it is that of the channels, of `lost_dim`
    or of `join_dim`, or has one slice. `order` is the order of axes in the job, and `written` the
    shape there. `heads` are the shapes of the results, one per head that the job's outputs name.
    """

    input: Axes
    has_channels: bool
    can_move: bool
    order: AxisOrder | None
    written: tuple[int, ...]
    heads: tuple[HeadShapes, ...]

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        rank: int | None = None,
        channels: int = 1,
        inputs: int | None = None,
        heads: Sequence[HeadName] = (None,),
        *,
        are_known: bool = True,
    ) -> ItemShapes:
        """Return the shapes for volumes of `rank` axes and `channels`; `inputs` are stacked.

        Without a rank, every entry of `model_input_shape` is an axis of the volume. Unless
        `are_known`, a head without a declared shape can have any; else it has that of the input.
        """
        rank = len(model.model_input_shape) if rank is None else rank
        models = [model.of_head(head) for head in heads]
        first = channels_first(models[0], rank, channels)
        shape: list[int | None] = list(first.model_input_shape)
        if first.join_dim is not None:
            axis = first.join_dim - 1
            shape[axis] = None if inputs is None else inputs * first.model_input_shape[axis]
        has_channels = len(shape) > rank
        return cls(
            input=tuple(shape),
            has_channels=has_channels,
            can_move=has_channels or shape[0] == 1 or 0 in (first.lost_dim, _index(first.join_dim)),
            order=WrittenOrders.of(models[0], rank, channels).input,
            written=model.model_input_shape,
            heads=tuple(
                _head_shapes(head, one, rank, channels, are_known=are_known)
                for head, one in zip(heads, models, strict=True)
            ),
        )

    @property
    def names(self) -> tuple[HeadName, ...]:
        """What names each head; None is the only array that the network returns."""
        return tuple(head.head for head in self.heads)


def _head_shapes(
    head: HeadName, model: ModelConfig, rank: int, channels: int, *, are_known: bool
) -> HeadShapes:
    """Return the shapes of a head; `model` declares the shape of this head alone."""
    outputs = output_shapes(channels_first(model, rank, channels), rank)
    orders = WrittenOrders.of(model, rank, channels)
    is_known = are_known or model.output_shape is not None
    return HeadShapes(
        head,
        outputs if is_known else (),
        len(outputs[0]) > rank,
        orders.output,
        orders.is_output_ambiguous,
        model.output_shape or model.model_input_shape,
    )


def output_shapes(model: ModelConfig, rank: int) -> tuple[tuple[int, ...], ...]:
    """Return the allowed shapes of an output item: as declared, and without axis `lost_dim`.

    The shapes of the model have channels first.
    """
    declared = model.output_shape or model.model_input_shape
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
