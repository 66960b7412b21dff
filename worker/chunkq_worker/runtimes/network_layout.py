"""Find out whether a network takes channels first or last, and move the axes of its batches.

1. The declared shape of the network's input decides. A patch without a channel axis gets one where
   the network has it.
2. If both orders fit, and the declared shape is fixed at one end only, the channels are there.
3. If the network declares nothing that decides, the order in which the job writes the shape is
   tried first. The first order with which the network returns the declared output is used.
4. The output has the order that fits `model_output_shape`. If both fit, it has the order of the
   input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from chunkq.errors import ModelError
from chunkq.job.axis_order import FIRST, LAST, AxisOrder, WrittenOrders, channels_first, join, split
from chunkq.job.model_config import ModelConfig
from chunkq_worker.steps import KEY, Steps

Axes = tuple[int | None, ...]
"""Lengths of axes without the batch axis; None is any length."""
Permute = Callable[[Any, tuple[int, ...]], Any]
"""A framework's function that returns an array with its axes in another order."""


class Move(Enum):
    """How the axes of a batch change before or behind a network."""

    NONE = "none"
    TO_LAST = "the first axis of an item becomes the last"
    TO_FIRST = "the last axis of an item becomes the first"
    ADD_FIRST = "a first axis of length 1 is added to an item"
    ADD_LAST = "a last axis of length 1 is added to an item"
    DROP_FIRST = "the first axis of an item, of length 1, is removed"
    DROP_LAST = "the last axis of an item, of length 1, is removed"

    def apply(self, batch: Any, permute: Permute) -> Any:
        """Return a batch (N, *item) of any framework with its axes moved."""
        if self in _INDEX:
            return batch[_INDEX[self]]
        if self is Move.NONE:
            return batch
        return permute(batch, (0, *self.after(tuple(range(1, len(batch.shape))))))

    def after(self, item: Sequence[Any]) -> tuple[Any, ...]:
        """Return the shape of an item after the move."""
        shape, end = tuple(item), len(item) - 1
        return {
            Move.NONE: shape,
            Move.TO_LAST: (*shape[1:], *shape[:1]),
            Move.TO_FIRST: (*shape[end:], *shape[:end]),
            Move.ADD_FIRST: (1, *shape),
            Move.ADD_LAST: (*shape, 1),
            Move.DROP_FIRST: shape[1:],
            Move.DROP_LAST: shape[:end],
        }[self]

    def before(self, item: Sequence[Any]) -> tuple[Any, ...]:
        """Return the shape of an item before the move; the inverse of `after`."""
        return _INVERSE[self].after(item)


_INDEX: dict[Move, Any] = {
    Move.ADD_FIRST: (slice(None), None),
    Move.ADD_LAST: (..., None),
    Move.DROP_FIRST: (slice(None), 0),
    Move.DROP_LAST: (..., 0),
}
_INVERSE = {
    Move.NONE: Move.NONE,
    Move.TO_LAST: Move.TO_FIRST,
    Move.TO_FIRST: Move.TO_LAST,
    Move.ADD_FIRST: Move.DROP_FIRST,
    Move.ADD_LAST: Move.DROP_LAST,
    Move.DROP_FIRST: Move.ADD_FIRST,
    Move.DROP_LAST: Move.ADD_LAST,
}


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
        cls, model: ModelConfig, rank: int | None = None, inputs: int | None = None
    ) -> ItemShapes:
        """Return the shapes for volumes of `rank` axes, of which `inputs` are stacked.

        Without a rank, every entry of `model_input_shape` is an axis of the volume.
        """
        rank = len(model.model_input_shape) if rank is None else rank
        first = channels_first(model, rank)
        shape: list[int | None] = list(first.model_input_shape)
        if first.join_dim is not None:
            shape[first.join_dim - 1] = inputs
        has_channels = len(shape) > rank
        outputs = output_shapes(first, rank)
        return cls(
            input=tuple(shape),
            outputs=outputs,
            has_channels=has_channels,
            has_output_channels=len(outputs[0]) > rank,
            can_move=has_channels or shape[0] == 1 or 0 in (first.lost_dim, _index(first.join_dim)),
            written=WrittenOrders.of(model, rank),
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


class NetworkLayout:
    """The order of the axes of one network. The processing steps around it see channels first.

    `axes` is the declared shape of the network's input without the batch axis, None if unknown. If
    a step before the network moves the channels to the end itself, the steps after it get the
    network's output unchanged.
    """

    def __init__(self, shapes: ItemShapes, axes: Axes | None, steps: Steps) -> None:
        self.shapes, self.axes = shapes, axes
        self._has_steps_after = (steps.postprocessing, steps.postprocessing_protected) != (
            None,
            None,
        )

    def input_moves(self, item: Axes) -> list[Move]:
        """Return the moves to try for an item, the likeliest first.

        If none fits the declared shape, its patch is not compared, because some networks accept
        other patches. Raise ModelError if both orders fit a network that declares all axes.
        """
        moves = self._fitting_moves(item) or self._nearly_fitting_moves(item) or [Move.NONE]
        if self.axes is None or not {Move.NONE, Move.TO_LAST} <= set(moves):
            return moves
        is_fixed = (self.axes[0] is not None, self.axes[-1] is not None)
        if all(is_fixed) and _is_cube(item):
            raise ModelError(
                f"model_config.model_input_shape: {list(self.shapes.written_shapes[0])} fits the "
                f"network with channels first and with channels last, because all axes of its "
                f"input have {item[0]} entries; use another patch size"
            )
        if is_fixed[0] != is_fixed[1]:
            return [Move.NONE if is_fixed[0] else Move.TO_LAST]
        return moves

    def _fitting_moves(self, item: Axes) -> list[Move]:
        axes = self.axes
        return [m for m in self._possible(item) if axes is None or _matches(m.after(item), axes)]

    def _nearly_fitting_moves(self, item: Axes) -> list[Move]:
        """Return the moves after which the number of axes and of channels fit the network."""
        moves, axes = [], self.axes or ()
        for move in self._possible(item):
            target = move.after(item)
            end = -1 if move in (Move.TO_LAST, Move.ADD_LAST) else 0
            is_patch = move is Move.NONE and not self.shapes.has_channels
            if len(target) == len(axes) and (is_patch or axes[end] in (None, target[end])):
                moves.append(move)
        return moves

    def _possible(self, item: Axes) -> Iterator[Move]:
        """Yield the moves that keep the meaning of each axis, in the order in which to try them."""
        shapes = self.shapes
        if not _matches(item, shapes.input):  # a step has changed the batch for the network
            yield Move.NONE
            if self.axes is not None:
                yield Move.TO_LAST
            return
        moves = [Move.NONE, Move.TO_LAST] if shapes.can_move else [Move.NONE]
        yield from reversed(moves) if shapes.written.input is LAST else moves
        if not shapes.has_channels:
            yield from (Move.ADD_FIRST, Move.ADD_LAST)

    def choose(
        self,
        moves: Sequence[Move],
        attempt: Callable[[Move], Axes],
        *,
        is_final: Callable[[BaseException], bool],
        reset: Callable[[], None] = lambda: None,
    ) -> Move:
        """Return the first move with which the network returns a declared output, else the first.

        `attempt` calls the network and returns the shape of an output item. `reset` is called after
        an attempt without success. Errors that are final are raised.
        """
        if len(moves) == 1:
            return moves[0]
        for move in moves:
            try:
                if self.output_fits(attempt(move)):
                    return move
            except Exception as error:  # of any class: the network got another order than it takes
                if is_final(error):
                    raise
            reset()
        return moves[0]

    def output_fits(self, output: Axes) -> bool:
        """Return whether an output item can be the declared one; a step can still change it."""
        return self._has_steps_after or bool(self._fitting_outputs(output))

    def output_move(self, item: Axes, move: Move, output: Axes) -> Move:
        """Return the move behind the network for an output item.

        `item` is that of the batch before `move`. Unknown lengths of the output are None. Raise
        ModelError if the order is undecided.
        """
        order = self._order(item, move)
        if self._has_steps_after:
            return self._move_before_steps(item, order, output)
        fitting = self._fitting_outputs(output)
        if not fitting:
            return Move.NONE  # the batcher reports the shape
        self._check_reading(order, output)
        if {Move.NONE, Move.TO_FIRST} <= set(fitting):
            return Move.TO_FIRST if order is LAST else Move.NONE
        return fitting[0]

    def _fitting_outputs(self, output: Axes) -> list[Move]:
        moves = [Move.NONE, Move.TO_FIRST]
        if not self.shapes.has_output_channels:
            moves = [Move.NONE, Move.DROP_LAST, Move.DROP_FIRST]
        return [
            move
            for move in moves
            if any(_matches(output, move.before(shape)) for shape in self.shapes.outputs)
        ]

    def _move_before_steps(self, item: Axes, order: AxisOrder | None, output: Axes) -> Move:
        """Return the move of an output that steps get, which can have any number of channels."""
        if self._is_moved_by_step(item):
            return Move.NONE
        has_channels = self.shapes.has_output_channels
        patches = [shape[1:] if has_channels else shape for shape in self.shapes.outputs]
        if not has_channels and any(_matches(output, (*patch, 1)) for patch in patches):
            return Move.DROP_LAST
        if not any(len(output) == len(patch) + 1 for patch in patches):
            return Move.NONE
        fits_first = any(_matches(output[1:], patch) for patch in patches)
        fits_last = any(_matches(output[:-1], patch) for patch in patches)
        if fits_first != fits_last:
            return Move.TO_FIRST if fits_last else Move.NONE
        if order is LAST and _is_cube(output):
            raise ModelError(
                f"{KEY}: the steps after the network get channels first, but an output of shape "
                f"{list(output)} does not show whether they expect that; use another patch size, "
                "or remove these steps"
            )
        return Move.TO_FIRST if order is LAST else Move.NONE

    def _is_moved_by_step(self, item: Axes) -> bool:
        """Return whether a step has moved the channels to the end, or added them there."""
        shapes = self.shapes
        if _matches(item, shapes.input):
            return False
        moves = [Move.TO_LAST] if shapes.has_channels else [Move.TO_LAST, Move.ADD_LAST]
        return any(_matches(item, move.after(shapes.input)) for move in moves)

    def _order(self, item: Axes, move: Move) -> AxisOrder | None:
        """Return the order of the axes with which the network is called, None if it is unknown."""
        if move in (Move.TO_LAST, Move.ADD_LAST) or self._is_moved_by_step(item):
            return LAST
        has_channels = self.shapes.has_channels and _matches(item, self.shapes.input)
        return FIRST if move is Move.ADD_FIRST or has_channels else None

    def _check_reading(self, order: AxisOrder | None, output: Axes) -> None:
        """Raise ModelError if the order of the network contradicts how its output shape was read.

        This can only happen if the written shape can be read in both orders.
        """
        written, shape = self.shapes.written, self.shapes.written_shapes[1]
        if not written.is_output_ambiguous or not _matches(output, shape):
            return
        if order is written.output or (order is None and written.output is FIRST):
            return
        first = join(*split(shape, LAST), FIRST)
        raise ModelError(
            f"model_config.model_output_shape: {list(shape)} can have its channels first or last; "
            f"set it to {list(first)} if there are {shape[-1]}"
        )

    def input_problem(self, expects: str, batch: Axes) -> str | None:
        """Return the message for a declared shape that does not fit the network, else None.

        `expects` is the subject and verb for the network's declared shape `batch`.
        """
        shapes, declared = self.shapes, self.shapes.written_shapes[0]
        if self.axes is None or self._fitting_moves(shapes.input):
            return None
        key, advice = f"model_config.model_input_shape: {list(declared)}", self.shape_to_set()
        printed = format_axes(batch)
        if advice is not None:
            return (
                f"{key}, but {expects} {printed}; set model_input_shape: {advice}, or export it "
                "with dynamic axes"
            )
        lengths = f"{len(self.axes)} entries" if None in self.axes else list(self.axes)
        return (
            f"{key} results in batches of {len(shapes.input) + 1} axes, but {expects} "
            f"{len(batch)}, {printed}; set model_input_shape: {lengths}"
        )

    def shape_to_set(self) -> list[int] | None:
        """Return the shape for the job that fits the network, None if the number of axes differs.

        The axis of `join_dim` stays 1.
        """
        item, axes = self.shapes.input, self.axes or ()
        same_length = [m for m in self._possible(item) if len(m.after(item)) == len(axes)]
        if not same_length:
            return None
        move = (self._nearly_fitting_moves(item) or same_length)[0]
        lengths = [n if a is None else a for a, n in zip(axes, move.after(item), strict=True)]
        fitting = [
            1 if declared is None else n
            for n, declared in zip(move.before(lengths), item, strict=True)
        ]
        is_last = self.shapes.written.input is LAST
        return list(Move.TO_LAST.after(fitting)) if is_last else fitting


def format_axes(axes: Axes) -> str:
    """Return axes as `(any, 1, 64, 64)`."""
    return f"({', '.join('any' if n is None else str(n) for n in axes)})"


def _index(axis: int | None) -> int | None:
    """Return the index in an item of an axis of a batch."""
    return None if axis is None else axis - 1


def _is_cube(item: Axes) -> bool:
    """Return whether all axes have one length above 1, so that their order is not visible."""
    return len(set(item)) == 1 and item[0] not in (None, 1)


def _matches(item: Axes, shape: Axes) -> bool:
    """Return whether two shapes can be the same; None is any length."""
    pairs = zip(item, shape, strict=False)
    return len(item) == len(shape) and all(a == b or None in (a, b) for a, b in pairs)
