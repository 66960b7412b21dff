"""Find the patches of a batch that lie in a line, so that few operations process them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkq.plan.plan import Patch


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
    for position, patch in enumerate(batch):
        move = _move(batch[position - 1], patch) if runs else None
        if move is not None and (runs[-1].count == 1 or move == (runs[-1].axis, runs[-1].step)):
            runs[-1] = PatchRun(runs[-1].first, runs[-1].count + 1, *move)
        else:
            runs.append(PatchRun(position, 1, len(patch.numbers) - 1, 1))
    return runs


def _move(before: Patch, after: Patch) -> tuple[int, int] | None:
    """Return the axis and the distance between two patches, None if they are not in a line."""
    steps = [b - a for a, b in zip(before.source.start, after.source.start, strict=True)]
    moved = [axis for axis, step in enumerate(steps) if step]
    if before.grid != after.grid or len(moved) != 1 or steps[moved[0]] < 0:
        return None
    return moved[0], steps[moved[0]]
