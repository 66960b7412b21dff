"""Choose the chunks of an image for a job file that sets none.

The choice depends on the image, the patches and the outputs, never on the machine or on the
workers. See docs/design.md, section "Chunks and blocks".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import lcm, log, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.geometry.grid_spec import GridSpec, Shape
from chunkq.geometry.grids import AxisGrid
from chunkq.geometry.padding import IntArray

STORAGE_EDGE = {1: 1 << 18, 2: 512, 3: 64, 4: 32}
"""Default edge of an output storage chunk in voxels, by the number of spatial axes."""
MIN_STORAGE_EDGE = 16
"""Smallest default edge of a storage chunk in voxels, if it divides the chunk."""
MAX_CHUNK_BYTES = 512 << 20
"""Upper limit for the memory of one chunk in flight with the default chunk size."""
WORKERS = 16
"""Worker processes, or chunks in flight, that are to get even shares of the patches."""
MIN_PATCHES = 2
"""Patches of the fullest chunk; batches never contain patches of two chunks."""
BLOCK_COST, OBJECT_COST = 1.0, 0.02
"""What a chunk or a block costs beside its voxels, and what a storage chunk costs, in patches."""
READ_COST = 0.1
"""What reading the input once costs, relative to the network's time and the pieces."""
STEPS, SHARES, DOUBLINGS = 8, 12, 24
"""Candidates along an axis: steps and doublings above the smallest chunk, numbers of blocks."""
MAX_BLOCKS = 64
"""Blocks of an axis that are looked at; the others are like these."""

Floats = npt.NDArray[np.float64]


def choose_chunks(spec: GridSpec, storage: Shape | None, voxel_bytes: float) -> tuple[Shape, Shape]:
    """Return the default shapes of chunks and storage chunks; those of `spec` are ignored.

    A chunk is a whole number of storage chunks, which are of the shape `storage` if it is set.
    Chunks need at most MAX_CHUNK_BYTES, at `voxel_bytes` per voxel of the input window, unless the
    smallest chunk needs more, and the fullest has MIN_PATCHES patches, if such chunks fit. Among
    those it is the shape that makes a job with WORKERS workers fastest: the costs of halos, reads,
    blocks and storage chunks, times `1 + (WORKERS - 1) * largest share of the patches`.
    """
    rank = spec.rank
    longest = int(MAX_CHUNK_BYTES / voxel_bytes)
    axes = [_candidates(spec, a, storage[a] if storage else None, longest) for a in range(rank)]

    def over_axes(values: Callable[[_Candidates], npt.NDArray[Any]]) -> Floats:
        return reduce(np.multiply.outer, [values(axis).astype(np.float64) for axis in axes])

    size = over_axes(lambda axis: axis.window)
    patches = float(prod(axis.patches for axis in axes))
    tasks = over_axes(lambda axis: axis.chunks) + over_axes(lambda axis: axis.blocks)
    objects = over_axes(lambda axis: axis.objects)
    work = over_axes(lambda axis: axis.halo) + READ_COST * over_axes(lambda axis: axis.read)
    work += (BLOCK_COST * tasks + OBJECT_COST * objects) / patches
    most = over_axes(lambda axis: axis.most)
    cost = work * (1 + (WORKERS - 1) * most / patches)
    fits = size * voxel_bytes <= MAX_CHUNK_BYTES
    has_several = fits & (most >= min(MIN_PATCHES, patches))
    allowed = has_several if has_several.any() else fits
    best = np.argmin(np.where(allowed, cost, np.inf)) if allowed.any() else np.argmin(size)
    numbers = np.unravel_index(best, size.shape)
    return (
        tuple(int(axis.chunk[n]) for axis, n in zip(axes, numbers, strict=True)),
        tuple(int(axis.storage[n]) for axis, n in zip(axes, numbers, strict=True)),
    )


def storage_edge(chunk: int, rank: int) -> int:
    """Return the default edge of a storage chunk: a divisor of `chunk`, about a quarter of it.

    Bands would intersect every storage chunk of a block if these were much larger.
    """
    target = min(STORAGE_EDGE[rank], max(MIN_STORAGE_EDGE, chunk // 4))
    return min(_divisors(chunk), key=lambda d: (abs(log(d / target)), -d))


def inner_chunk(shard: Shape) -> Shape:
    """Return the default shape of the storage chunks of a shard: divisors near the usual edge."""
    return tuple(_largest_divisor(length, STORAGE_EDGE[len(shard)]) for length in shard)


def _divisors(number: int) -> set[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return {*small, *(number // d for d in small)}


@dataclass(frozen=True)
class _Candidates:
    """Chunk lengths along one axis, and what depends on each; arrays (n,).

    patches   patches of the first grid along the axis
    chunk     length of a chunk in voxels
    storage   length of a storage chunk
    window    length of the longest halo
    blocks    number of blocks
    chunks    number of blocks that own a patch
    most      largest number of patches of a block
    halo      length of all halos, divided by the length of the axis
    read      how often the input is read if it has storage chunks of the default edge
    objects   storage chunks along the axis
    """

    patches: int
    chunk: IntArray
    storage: IntArray
    window: IntArray
    blocks: IntArray
    chunks: IntArray
    most: IntArray
    halo: Floats
    read: Floats
    objects: IntArray


def _candidates(spec: GridSpec, a: int, storage: int | None, longest: int) -> _Candidates:
    """Return the chunk lengths to choose from along axis `a`, at most `longest` if any fits."""
    axis = spec.axes[a]
    grid, volume, edge = axis.grids[0], axis.volume, STORAGE_EDGE[spec.rank]
    smallest = min(grid.kept, volume)
    last = max(0, grid.start(max(0, grid.end_kept - 1)) + grid.lead)
    unit = spec.unit[a] if spec.unit else 1
    if storage is not None:
        steps = [storage]
    else:
        steps = [lcm(edge, unit), lcm(MIN_STORAGE_EDGE if smallest > MIN_STORAGE_EDGE else 1, unit)]
    lengths: dict[int, int] = {}
    for step in steps:
        for length in _lengths(smallest, last, step):
            if length <= last and (length <= longest or not lengths):
                lengths.setdefault(length, storage or _largest_divisor(length, edge))
    whole = storage or lcm(min(edge, volume), unit)
    lengths[-(-volume // whole) * whole] = whole  # one block
    chunk, storage_edges = (np.array(list(n), np.int64) for n in (lengths, lengths.values()))
    patches = max(1, grid.end_kept - grid.first_kept)
    chunks = last // chunk + 1
    halos = _halos(axis.grids, chunk)
    return _Candidates(
        patches=patches,
        chunk=chunk,
        storage=storage_edges,
        window=halos.max(0),
        blocks=-(-volume // chunk),
        chunks=chunks,
        most=_most_patches(grid, chunks, chunk),
        halo=halos.sum(0) * np.maximum(1.0, chunks / MAX_BLOCKS) / volume,
        read=np.minimum(chunks, 1 + chunks * edge / volume),
        objects=-(-volume // storage_edges),
    )


def _lengths(smallest: int, last: int, step: int) -> Iterable[int]:
    """Yield multiples of `step` that are at least `smallest`.

    These are the shortest ones, doublings of the shortest, and the shortest that divide the
    patches, the last of which starts at `last`, among two and more blocks.
    """

    def rounded(length: int) -> int:
        return -(-max(length, smallest) // step) * step

    low = rounded(1)
    yield from (low + n * step for n in range(STEPS))
    yield from (low << n for n in range(DOUBLINGS) if low << n <= last)
    yield from (rounded(last // n + 1) for n in range(2, SHARES + 1))


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in _divisors(number) if d <= limit)


def _most_patches(grid: AxisGrid, blocks: IntArray, chunk: IntArray) -> IntArray:
    """Return the largest number of patches of a grid that a block of each length owns."""
    first, second = np.zeros_like(blocks), np.minimum(1, blocks - 1)
    ends = np.stack([first, second, np.maximum(blocks - 2, 0), blocks - 1])
    low, high = grid.owned(ends, chunk)
    most: IntArray = (high - low).max(0)
    return most


def _halos(grids: Sequence[AxisGrid], chunk: IntArray) -> IntArray:
    """Return the lengths of the halos of up to MAX_BLOCKS blocks of each length."""
    number = np.arange(MAX_BLOCKS)[:, None]
    low = np.full((MAX_BLOCKS, len(chunk)), np.iinfo(np.int64).max)
    high = np.full_like(low, np.iinfo(np.int64).min)
    for grid in grids:
        first, end = grid.owned(number, chunk)
        owns = end > first
        low = np.where(owns, np.minimum(low, grid.start(first)), low)
        high = np.where(owns, np.maximum(high, grid.start(end - 1) + grid.patch), high)
    return np.where(high > low, high - low, 0)
