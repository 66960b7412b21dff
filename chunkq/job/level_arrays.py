"""`LevelArray`: one level of an output of an item, read and written channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.geometry.box import Box
from chunkq.storage.array import Array

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LevelArray:
    """The array of a level of an output, as an item of its image sees it.

    `point` is the position of the item along the leading axes of the array. `channels` are the
    numbers of the channels that follow; one None if the array has no channel axis. `chunk` is the
    shape of a storage chunk along the spatial axes.
    """

    array: Array
    point: Shape
    channels: tuple[int | None, ...]
    chunk: Shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the array."""
        return self.array.dtype

    def read(self, box: Box, channel: int | None) -> npt.NDArray[Any]:
        """Read a box of a channel; shape `box.shape`. Raises ChunkReadError."""
        return self.array.read(self._outer(box, channel)).reshape(box.shape)

    def write(self, box: Box, values: npt.NDArray[Any], channel: int | None) -> None:
        """Write whole storage units of a channel; `values` has the shape `box.shape`."""
        outer = self._outer(box, channel)
        self.array.write(outer, values.reshape(outer.shape))

    def _outer(self, box: Box, channel: int | None) -> Box:
        leading = self.point if channel is None else (*self.point, channel)
        return Box((*leading, *box.start), (*(n + 1 for n in leading), *box.stop))
