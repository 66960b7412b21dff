"""Moves of the channel axis of a batch, for arrays of any framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

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


def format_axes(axes: Sequence[int | None]) -> str:
    """Return axes as `(any, 1, 64, 64)`."""
    return f"({', '.join('any' if n is None else str(n) for n in axes)})"


def matches(item: Axes, shape: Axes) -> bool:
    """Return whether two shapes can be the same; None is any length."""
    pairs = zip(item, shape, strict=False)
    return len(item) == len(shape) and all(a == b or None in (a, b) for a, b in pairs)
