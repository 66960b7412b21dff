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

from chunkq.errors import ModelError
from chunkq.job.axis_order import FIRST, LAST, AxisOrder, join, split
from chunkq_worker.runtimes.axis_moves import Axes, Move, format_axes, matches
from chunkq_worker.runtimes.item_shapes import HeadShapes, ItemShapes
from chunkq_worker.steps import KEY, Steps


class NetworkLayout:
    """The order of the axes of one network. The processing steps around it see channels first.

    `axes` is the declared shape of the network's input without the batch axis, None if unknown. If
    a step before the network moves the channels to the end itself, the steps after it get the
    network's output unchanged.
    """

    def __init__(self, shapes: ItemShapes, axes: Axes | None, steps: Steps) -> None:
        self.shapes, self.axes = shapes, axes
        before = (steps.preprocessing, steps.preprocessing_protected)
        after = (steps.postprocessing, steps.postprocessing_protected)
        self._has_steps_before, self._has_steps_after = before != (None,) * 2, after != (None,) * 2

    def input_moves(self, item: Axes) -> list[Move]:
        """Return the moves to try for an item, the likeliest first.

        If none fits the declared shape, its patch is not compared, because some networks accept
        other patches. Raise ModelError if both orders fit and nothing decides.
        """
        moves = self._fitting_moves(item) or self._nearly_fitting_moves(item) or [Move.NONE]
        if self.axes is None or not {Move.NONE, Move.TO_LAST} <= set(moves):
            return moves
        is_fixed = (self.axes[0] is not None, self.axes[-1] is not None)
        if _is_cube(item) and (all(is_fixed) or self._has_steps_before):
            raise ModelError(
                f"model_config.model_input_shape: {list(self.shapes.written)} does not "
                "show whether the network gets channels first or last, because all axes of its "
                f"input have {item[0]} entries; use another patch size"
            )
        if is_fixed[0] != is_fixed[1]:
            return [Move.NONE if is_fixed[0] else Move.TO_LAST]
        return moves

    def _fitting_moves(self, item: Axes) -> list[Move]:
        axes = self.axes
        return [m for m in self._possible(item) if axes is None or matches(m.after(item), axes)]

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
        if not matches(item, shapes.input):  # a step has changed the batch for the network
            yield Move.NONE
            if self.axes is not None and not self._is_moved_by_step(item):
                yield Move.TO_LAST
            return
        moves = [Move.NONE, Move.TO_LAST] if shapes.can_move else [Move.NONE]
        yield from reversed(moves) if shapes.order is LAST else moves
        if not shapes.has_channels:
            yield from (Move.ADD_FIRST, Move.ADD_LAST)

    def choose(
        self,
        moves: Sequence[Move],
        attempt: Callable[[Move], Sequence[Axes]],
        *,
        is_final: Callable[[BaseException], bool],
        reset: Callable[[], None] = lambda: None,
    ) -> Move:
        """Return the first move with which the network returns a declared output.

        Without one, return the first with which it does not fail if steps can change the output,
        else the first. `attempt` calls the network and returns the shape of an item of each head,
        or if steps follow, of each array that the network returned. `reset` is called after an
        attempt without success. Errors that are final are raised.
        """
        if len(moves) == 1:
            return moves[0]
        successful = []
        for move in moves:
            try:
                outputs = attempt(move)
                if self.outputs_fit(outputs):
                    return move
                successful.append(move)
            except Exception as error:  # of any class: the network got another order than it takes
                if is_final(error):
                    raise
            reset()
        return successful[0] if successful and self._has_steps_after else moves[0]

    def outputs_fit(self, outputs: Sequence[Axes]) -> bool:
        """Return whether output items can be those of the declared heads, in their order.

        Steps after the network can have one of them with any number of channels.
        """
        if not self._has_steps_after:
            pairs = zip(self.shapes.heads, outputs, strict=True)
            return all(not head.outputs or _fitting(head, output) for head, output in pairs)
        parts = [part for output in outputs for part in (output, output[1:], output[:-1])]
        is_known = all(head.outputs for head in self.shapes.heads)
        return not is_known or any(
            matches(part, patch) for part in parts for patch in self._output_patches()
        )

    def output_move(self, item: Axes, move: Move, output: Axes, number: int = 0) -> Move:
        """Return the move behind the network for an output item of a head, by its number.

        `item` is that of the batch before `move`. Unknown lengths of the output are None. Raise
        ModelError if the order is undecided.
        """
        order = self._order(item, move)
        if self._has_steps_after:
            return self._move_before_steps(item, order, output)
        head = self.shapes.heads[number]
        fitting = _fitting(head, output)
        if head.follows_input and len(output) == len(item) and order is LAST:
            return Move.TO_FIRST
        if not fitting:
            return Move.NONE  # the batcher reports the shape
        _check_reading(head, order, output)
        if {Move.NONE, Move.TO_FIRST} <= set(fitting):
            return Move.TO_FIRST if order is LAST else Move.NONE
        return fitting[0]

    def _move_before_steps(self, item: Axes, order: AxisOrder | None, output: Axes) -> Move:
        """Return the move of an output that steps get, which can have any number of channels."""
        if self._is_moved_by_step(item):
            return Move.NONE
        has_channels = any(head.has_channels for head in self.shapes.heads)
        patches = self._output_patches()
        if not has_channels and any(matches(output, (*patch, 1)) for patch in patches):
            return Move.DROP_LAST
        if not any(len(output) == len(patch) + 1 for patch in patches):
            return Move.NONE
        fits_first = any(matches(output[1:], patch) for patch in patches)
        fits_last = any(matches(output[:-1], patch) for patch in patches)
        if fits_first != fits_last:
            return Move.TO_FIRST if fits_last else Move.NONE
        if order is LAST and _is_cube(output):
            raise ModelError(
                f"{KEY}: the steps after the network get channels first, but an output of shape "
                f"{list(output)} does not show whether they expect that; use another patch size, "
                "or remove these steps"
            )
        return Move.TO_FIRST if order is LAST else Move.NONE

    def _output_patches(self) -> list[Axes]:
        """Return the output patches of all heads; one of unknown shape is expected as the input."""
        shapes = self.shapes
        patch = shapes.input[1:] if shapes.has_channels else shapes.input
        return [
            one
            for head in shapes.heads
            for one in [
                *(shape[1:] if head.has_channels else shape for shape in head.outputs),
                *([] if head.outputs else [patch]),
            ]
        ]

    def _is_moved_by_step(self, item: Axes) -> bool:
        """Return whether a step has moved the channels to the end, or added them there."""
        shapes = self.shapes
        if matches(item, shapes.input):
            return False
        moves = [Move.TO_LAST] if shapes.has_channels else [Move.TO_LAST, Move.ADD_LAST]
        return any(matches(item, move.after(shapes.input)) for move in moves)

    def _order(self, item: Axes, move: Move) -> AxisOrder | None:
        """Return the order of the axes with which the network is called, None if it is unknown."""
        if move in (Move.TO_LAST, Move.ADD_LAST) or self._is_moved_by_step(item):
            return LAST
        has_channels = self.shapes.has_channels and matches(item, self.shapes.input)
        return FIRST if move is Move.ADD_FIRST or has_channels else None

    def input_problem(self, expects: str, batch: Axes) -> str | None:
        """Return the message for a declared shape that does not fit the network, else None.

        `expects` is the subject and verb for the network's declared shape `batch`.
        """
        shapes, declared = self.shapes, self.shapes.written
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
        """Return the shape for the job that fits the network.

        It is None if the number of axes differs, or if the shape of the job fits. The axis of
        `join_dim` stays 1.
        """
        item, axes = self.shapes.input, self.axes or ()
        if self._fitting_moves(item):
            return None
        same_length = [m for m in self._possible(item) if len(m.after(item)) == len(axes)]
        if not same_length:
            return None
        move = (self._nearly_fitting_moves(item) or same_length)[0]
        lengths = [n if a is None else a for a, n in zip(axes, move.after(item), strict=True)]
        fitting = [
            1 if declared is None else n
            for n, declared in zip(move.before(lengths), item, strict=True)
        ]
        is_last = self.shapes.order is LAST
        return list(Move.TO_LAST.after(fitting)) if is_last else fitting


def _fitting(head: HeadShapes, output: Axes) -> list[Move]:
    """Return the moves after which an output item has a declared shape of a head."""
    moves = [Move.NONE, Move.TO_FIRST]
    if not head.has_channels:
        moves = [Move.NONE, Move.DROP_LAST, Move.DROP_FIRST]
    return [
        move for move in moves if any(matches(output, move.before(shape)) for shape in head.outputs)
    ]


def _check_reading(head: HeadShapes, order: AxisOrder | None, output: Axes) -> None:
    """Raise ModelError if the order of the network contradicts how its output shape was read.

    This can only happen if the written shape can be read in both orders.
    """
    shape = head.written
    if not head.is_ambiguous or not matches(output, shape):
        return
    if order is head.order or (order is None and head.order is FIRST):
        return
    first = join(*split(shape, LAST), FIRST)
    raise ModelError(
        f"model_config.model_output_shape: {list(shape)} can have its channels first or last; "
        f"set it to {list(first)} if there are {shape[-1]}"
    )


def _is_cube(item: Axes) -> bool:
    """Return whether all axes have one length above 1, so that their order is not visible."""
    return len(set(item)) == 1 and item[0] not in (None, 1)
