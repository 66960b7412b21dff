"""The order of the axes in which a job writes the shapes of its network.

chunkq computes with channels first. Networks of Keras take channels last, so the shapes of a job
with runtime `tensorflow` or `onnx` can have the channel axis at either end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from chunkq.job.model_config import ModelConfig
from chunkq.plan.volume import Volume

EITHER_ORDER = ("tensorflow", "onnx")
"""Runtimes whose networks and shapes can have channels first or last."""


class AxisOrder(Enum):
    """Where the channel axis of a shape is."""

    FIRST = "first"
    LAST = "last"


FIRST, LAST = AxisOrder.FIRST, AxisOrder.LAST


@dataclass(frozen=True, slots=True)
class WrittenOrders:
    """Orders in which `model_input_shape` and `model_output_shape` are written.

    An order is None for a shape without a channel axis and for a missing one. `is_ambiguous`: the
    input can be read in both orders, with different patches. `is_output_ambiguous`: the output
    can, with the patch that was read.
    """

    input: AxisOrder | None
    output: AxisOrder | None
    is_ambiguous: bool = False
    is_output_ambiguous: bool = False

    @classmethod
    def of(cls, model: ModelConfig, rank: int, channels: int = 1) -> WrittenOrders:
        """Read the shapes of a network for volumes of `rank` axes and `channels` channels.

        The channel axis of the input is the end whose length is `channels`. The one of the output
        is the end without which the output can be centered in the input patch. If that holds for
        both ends, the one without which the output has the size of the input patch is used, else
        the one of the input, else the first. Of several heads, the orders are those of the first.
        """
        if isinstance(model.model_output_shape, dict):
            return cls.of(model.of_head(next(iter(model.model_output_shape))), rank, channels)
        shape, output = model.model_input_shape, model.output_shape
        lengths = {len(shape), len(output or shape)}
        if model.runtime not in EITHER_ORDER or not lengths <= {rank, rank + 1}:
            return cls(_default(shape, rank), _default(output, rank))
        pairs = [
            (order, output_order)
            for order in _input_orders(shape, rank, channels)
            for output_order in _output_orders(model, rank, order)
        ]
        if not pairs:
            order = _input_orders(shape, rank, channels)[0]
            return cls(order, _default(output, rank))
        same_size = [(one, o) for one, o in pairs if _has_size(output, o, split(shape, one)[1])]
        chosen = same_size or pairs
        chosen = [pair for pair in chosen if None in pair or pair[0] is pair[1]] or chosen
        patches = {split(shape, order)[1] for order, _ in chosen}
        order, output_order = chosen[0]
        others = {split(output, other) for one, other in pairs if one is order} if output else ()
        return cls(order, output_order, len(patches) > 1, len(others) > 1)


def input_channels(model: ModelConfig, volume: Volume) -> int:
    """Return the number of channels that the inputs of a volume have for a network.

    Inputs that `join_dim` stacks have theirs each; other inputs are together the channels.
    """
    return volume.channels if model.join_dim is not None else volume.channels * volume.inputs


def declared_channels(model: ModelConfig, rank: int, possible: Sequence[int]) -> int:
    """Return the number of channels that `model_input_shape` declares for `rank` spatial axes.

    If they can be first or last, the first `possible` number that is at one end decides.
    """
    shape = model.model_input_shape
    if len(shape) <= rank:
        return 1
    ends = (shape[0], shape[-1]) if model.runtime in EITHER_ORDER else shape[:1]
    return next((number for number in possible if number in ends), shape[0])


def split(shape: Sequence[int], order: AxisOrder | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the channel axis, empty without one, and the spatial axes of a shape."""
    shape = tuple(shape)
    if order is None:
        return (), shape
    return (shape[:1], shape[1:]) if order is FIRST else (shape[-1:], shape[:-1])


def join(channels: Sequence[int], patch: Sequence[int], order: AxisOrder | None) -> tuple[int, ...]:
    """Return the shape with these parts; see `split`."""
    return (*patch, *channels) if order is LAST else (*channels, *patch)


def channels_first(model: ModelConfig, rank: int, channels: int = 1) -> ModelConfig:
    """Return a network's keys with both shapes, `lost_dim` and `join_dim` for channels first.

    `rank` is the number of spatial axes of the volume, `channels` its number of channels.
    """
    if isinstance(model.model_output_shape, dict):
        heads = model.model_output_shape
        firsts = {head: channels_first(model.of_head(head), rank, channels) for head in heads}
        shapes = {head: first.output_shape for head, first in firsts.items()}
        return next(iter(firsts.values())).model_copy(update={"model_output_shape": shapes})
    orders = WrittenOrders.of(model, rank, channels)
    changes: dict[str, Any] = {}
    if orders.input is LAST:
        length = len(model.model_input_shape)
        changes["model_input_shape"] = join(*split(model.model_input_shape, LAST), FIRST)
        for key, first in (("lost_dim", 0), ("join_dim", 1)):
            axis = getattr(model, key)
            if axis is not None and first <= axis < length + first:
                changes[key] = (axis - first + 1) % length + first
    if orders.output is LAST and model.output_shape is not None:
        changes["model_output_shape"] = join(*split(model.output_shape, LAST), FIRST)
    return model.model_copy(update=changes) if changes else model


def order_problems(model: ModelConfig, rank: int, channels: int = 1) -> list[str]:
    """Return one line if the order of the shapes is undecided, because both give valid patches."""
    if not WrittenOrders.of(model, rank, channels).is_ambiguous:
        return []
    shape = model.model_input_shape
    return [
        f"model_config.model_input_shape: {list(shape)} has its channel axis first or last; set "
        f"the patch without it, {list(shape[1:])} or {list(shape[:-1])}"
    ]


def _default(shape: Sequence[int] | None, rank: int) -> AxisOrder | None:
    return FIRST if shape is not None and len(shape) > rank else None


def _input_orders(shape: Sequence[int], rank: int, channels: int = 1) -> list[AxisOrder | None]:
    if len(shape) == rank:
        return [None]
    ends = ((FIRST, shape[0]), (LAST, shape[-1]))
    return [order for order, length in ends if length == channels] or [FIRST]


def _output_orders(model: ModelConfig, rank: int, order: AxisOrder | None) -> list[Any]:
    """Return the orders in which the output fits the input patch that `order` gives."""
    output = model.output_shape
    if output is None:
        return [None]
    patch = split(model.model_input_shape, order)[1]
    lost = model.lost_dim
    if lost is not None and order is FIRST:
        lost -= 1
    orders = (None,) if len(output) == rank else (FIRST, LAST)
    return [o for o in orders if _is_centered(split(output, o)[1], patch, lost)]


def _has_size(output: Sequence[int] | None, order: AxisOrder | None, patch: Sequence[int]) -> bool:
    return output is not None and split(output, order)[1] == patch


def _is_centered(output: Sequence[int], patch: Sequence[int], lost: int | None) -> bool:
    pairs = enumerate(zip(output, patch, strict=True))
    return all(q == 1 if a == lost else q <= p and (p - q) % 2 == 0 for a, (q, p) in pairs)
