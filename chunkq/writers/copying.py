"""Copy the voxels of an array to a writer, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from chunkq.casts import misfit
from chunkq.geometry.box import Box
from chunkq.storage.array import Array, Voxels
from chunkq.storage.oriented import OrientedArray
from chunkq.writers.base import ExportWriter, Report
from chunkq.writers.blocks import reads


def copy_image(
    writer: ExportWriter, array: Array, path: str, report: Report, first: int = 0
) -> None:
    """Write an image at a path, from step `first` on.

    `array` has the axes of the writer's image. Raises ChunkReadError, OSError, and StoreError if
    the format's dtype does not hold a value.
    """
    block = min(first, writer.blocks.count)
    writer.write(path, _voxels(writer, array, block), report, first)


def _voxels(writer: ExportWriter, array: Array, first: int) -> Iterator[Voxels]:
    """Yield the voxels of the blocks from number `first` on, in the writer's dtype."""
    is_stored = writer.orientation == tuple((n, 1) for n in range(len(array.shape)))
    view = array if is_stored else OrientedArray(array, writer.orientation)
    edges = writer.image.presented(writer.orientation).storage
    for box in writer.blocks.boxes(first):
        yield _converted(writer, _read(view, box, edges), box)


def _read(array: Array, box: Box, edges: Sequence[int]) -> Voxels:
    """Read a box in as many reads as bound the storage chunks in memory."""
    parts = list(reads(box, edges, array.dtype.itemsize))
    if len(parts) == 1:
        return array.read(box)
    values = np.empty(box.shape, array.dtype)
    for part in parts:
        values[part.slices(box.start)] = array.read(part)
    return values


def _converted(writer: ExportWriter, values: Voxels, box: Box) -> Voxels:
    if values.dtype == writer.dtype:
        return values
    if problem := misfit(values, writer.dtype.name):
        raise writer.refused(
            f"{problem} in voxels {list(box.start)} to {list(box.stop)} do not fit "
            f"{writer.dtype.name}; set --dtype, or use Zarr"
        )
    with np.errstate(over="ignore"):  # infinity stays infinity
        return values.astype(writer.dtype)
