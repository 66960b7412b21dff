"""Rules for the grid of an output: chunks hold a patch, and no voxel is without a prediction."""

from __future__ import annotations

from chunkq.geometry.box import Box
from chunkq.geometry.grid_spec import GridSpec


def chunk_problems(grid: GridSpec, source: str, prefix: str) -> list[str]:
    """Return one line per mistake; `source` says where the output patch comes from.

    `prefix` is that of the keys of the output.
    """
    problems = []
    for number, axis in enumerate(grid.axes):
        width = axis.grids[0].kept + 2 * axis.grids[0].reach  # of the widest output
        if axis.chunk < min(width, axis.volume):
            factor = 1 if grid.scale is None else grid.scale[number]
            problems.append(
                f"chunksize: {axis.chunk * factor} along axis {number} is smaller than the output "
                f"patch ({width * factor} in {source}); use at least "
                f"{min(width, axis.volume) * factor}"
            )
        if axis.chunk < axis.volume and axis.chunk % axis.storage:
            key = "storage_chunks" if grid.shard is None else "storage_shards"
            problems.append(
                f"{prefix}{key}: {axis.storage} along axis {number} does not divide the chunk "
                f"({axis.chunk}); use a divisor of {axis.chunk}"
            )
        if axis.storage % grid.storage[number]:
            problems.append(
                f"{prefix}storage_shards: {axis.storage} along axis {number} is not a multiple of "
                f"the storage chunk ({grid.storage[number]}); use a multiple of "
                f"{grid.storage[number]}"
            )
    return problems


def coverage_problems(spec: GridSpec, source: str) -> list[str]:
    """Return one line for each axis along which a voxel lies in no output patch.

    `source` says where the output patch comes from.
    """
    problems, axes = [], spec.axes
    for number, axis in enumerate(axes):
        grid = axis.grids[0]
        gap = grid.gap(axis.low, axis.high)
        if gap is None and grid.stride > grid.kept:
            low, high = grid.span(axis.low, axis.high)
            if high < axis.high:
                gap = high  # the next patch starts beyond the region
            elif low > axis.low > grid.first + grid.lead:
                gap = axis.low  # the patch before ends before the region
        if gap is not None and len(axis.grids) == 1:
            factor = 1 if spec.scale is None else spec.scale[number]
            problems.append(
                f"strides: {grid.stride * factor} along axis {number} is larger than the output "
                f"patch ({grid.kept * factor} in {source}) and leaves voxel {gap * factor} without "
                f"a prediction; use at most {grid.kept * factor}"
            )
    if problems:
        return problems
    uncovered = [Box(tuple(axis.low for axis in axes), tuple(axis.high for axis in axes))]
    for g in range(len(axes[0].grids)):
        spans = [axis.grids[g].span(axis.low, axis.high) for axis in axes]
        covered = Box(tuple(s[0] for s in spans), tuple(s[1] for s in spans))
        uncovered = [rest for box in uncovered for rest in box.minus(covered)]
    if not uncovered:
        return []
    for number, axis in enumerate(axes):
        if axis.grids[0].span(axis.low, axis.high) != (axis.low, axis.high):
            factor = 1 if spec.scale is None else spec.scale[number]
            problems.append(
                f"pad_width: no output patch covers voxel {uncovered[0].start[number] * factor} "
                f"along axis {number}; use {spec.lead[number] * factor} along this axis"
            )
    return problems
