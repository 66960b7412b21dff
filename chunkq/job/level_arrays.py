"""`LevelArray`: one level of an output of an item, read and written channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.geometry.box import Box
from chunkq.storage.formats.zarr_writing import WritableArray

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LevelArray:
    """The array of a level of an output, as an item of its image sees it.

    `point` is the position of the item along the leading axes of the array. `channels` are the
    numbers of the channels that follow; one None if the array has no channel axis. `chunk` is the
    shape of a storage chunk along the spatial axes.
    """

    array: WritableArray
    point: Shape
    channels: tuple[int | None, ...]
    chunk: Shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the array."""
        return self.array.dtype

    def read(self, box: Box, channel: int | None) -> npt.NDArray[Any]:
        """Read a box of a channel; shape `box.shape`. Raises ChunkReadError."""
        return self.array.read(level_box(self.point, box, channel)).reshape(box.shape)

    def store(self, box: Box, values: npt.NDArray[Any], channel: int | None) -> list[int]:
        """Write whole storage units of a channel; return the checksums of their objects.

        `values` has the shape `box.shape`. Raises OSError.
        """
        outer = level_box(self.point, box, channel)
        return self.array.store(outer, values.reshape(outer.shape))


def level_box(point: Shape, box: Box, channel: int | None) -> Box:
    """Return the box of the array of a level that has a box of a channel of the item at `point`."""
    leading = point if channel is None else (*point, channel)
    return Box((*leading, *box.start), (*(n + 1 for n in leading), *box.stop))
