"""`LevelArray`: one level of an output of an item, read and written by groups of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.geometry.box import Box
from chunkq.storage.formats.zarr_writing import WritableArray

Shape = tuple[int, ...]
Channels = range | None
"""Channels that one object stores together; None if an array has no channel axis."""


@dataclass(frozen=True)
class LevelArray:
    """The array of a level of an output, as an item of its image sees it.

    `point` is the position of the item along the leading axes of the array. `channels` are the
    groups of the channels that follow. `chunk` is the shape of a storage chunk along the spatial
    axes.
    """

    array: WritableArray
    point: Shape
    channels: tuple[Channels, ...]
    chunk: Shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the array."""
        return self.array.dtype

    def shape_of(self, box: Box, channels: Channels) -> Shape:
        """Return the shape of a box of a group: ([C,] *box.shape)."""
        return box.shape if channels is None else (len(channels), *box.shape)

    def read(self, box: Box, channels: Channels) -> npt.NDArray[Any]:
        """Read a box of a group; shape `shape_of`. Raises ChunkReadError."""
        outer = level_box(self.point, box, channels)
        return self.array.read(outer).reshape(self.shape_of(box, channels))

    def store(self, box: Box, values: npt.NDArray[Any], channels: Channels) -> list[int]:
        """Write whole storage units of a group; return the checksums of their objects.

        `values` has the shape `shape_of`. Raises OSError.
        """
        outer = level_box(self.point, box, channels)
        return self.array.store(outer, values.reshape(outer.shape))


def channel_groups(count: int | None, together: int) -> tuple[Channels, ...]:
    """Return the groups of so many channels, of which an object stores `together`.

    `count` is None for an array without channel axis.
    """
    if count is None:
        return (None,)
    return tuple(range(n, min(n + together, count)) for n in range(0, count, together))


def level_box(point: Shape, box: Box, channels: Channels) -> Box:
    """Return the box of the array of a level that has a box of a group of the item at `point`."""
    start, stop = point, tuple(n + 1 for n in point)
    if channels is not None:
        start, stop = (*start, channels.start), (*stop, channels.stop)
    return Box((*start, *box.start), (*stop, *box.stop))
