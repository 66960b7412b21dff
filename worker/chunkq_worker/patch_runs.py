"""Find the patches of a batch that lie in a line, so that few operations process them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import sub

from chunkq.plan.chunk import Patch


@dataclass(frozen=True, slots=True)
class PatchRun:
    """Consecutive patches of a batch: `count` from `first` on, of one grid.

    They start `step` voxels apart along `axis` and are equal along the other axes.
    """

    first: int
    count: int
    axis: int
    step: int


def patch_runs(batch: Sequence[Patch]) -> list[PatchRun]:
    """Return runs that contain every patch of a batch exactly once, in the order of the batch."""
    runs: list[PatchRun] = []
    first, line = 0, None
    for position in range(1, len(batch) + 1):
        move = _move(batch[position - 1], batch[position]) if position < len(batch) else None
        if move is None or line not in (None, move):
            axis, step = line or (len(batch[first].numbers) - 1, 1)
            runs.append(PatchRun(first, position - first, axis, step))
            first, line = position, None
        else:
            line = move
    return runs


def _move(before: Patch, after: Patch) -> tuple[int, int] | None:
    """Return the axis and the distance between two patches, None if they are not in a line."""
    steps = list(map(sub, after.source.start, before.source.start))
    step = max(steps)  # in a line, all other steps are 0
    if before.grid != after.grid or step <= 0 or steps.count(0) != len(steps) - 1:
        return None
    return steps.index(step), step
