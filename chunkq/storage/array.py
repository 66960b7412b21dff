"""Arrays that are read and written box by box."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.errors import StoreError
from chunkq.geometry.box import Box
from chunkq.paths import mask_secrets, without_secret

Voxels = npt.NDArray[Any]


class Array(ABC):
    """A stored array.

    Reading and writing are thread-safe. Boxes cover all axes of the array. `dtype` is in native
    byte order. `path` is for messages. `has_channels` says whether the first axis has channels and
    the others are spatial; else all are.
    """

    has_channels: bool = False
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def read(self, box: Box) -> Voxels:
        """Read a box inside the array; shape `box.shape`, dtype `dtype`.

        A storage chunk that is missing is read as the array's fill value. Raises ChunkReadError if
        voxels cannot be read or are damaged; never returns other voxels instead.
        """

    def read_together(self, boxes: Sequence[Box]) -> list[Voxels]:
        """Read boxes in one request, in their order. Raises ChunkReadError.

        A storage chunk that several boxes have in common is fetched and decoded once, as far as
        the storage can do that.
        """
        return [self.read(box) for box in boxes]

    def read_in_order(self, boxes: Iterable[Box]) -> Iterator[Voxels]:
        """Yield the voxels of boxes, which follow each other in the order of storage.

        Arrays that cannot be read by region read all boxes in one pass, and then verify the rest of
        the file. Raises ChunkReadError.
        """
        return map(self.read, boxes)

    def write(self, box: Box, values: Voxels) -> None:
        """Write whole storage chunks, each of them atomically. Raises OSError."""
        raise StoreError(
            f"{without_secret(self.path)}: this type of array is read-only; use a Zarr array"
        )


def box_error(path: str, box: Box, verb: str, error: Exception) -> str:
    """Return the message of an error of the storage while a box is `read` or `written`."""
    reason = mask_secrets(str(error).partition("\n")[0], path)[:300]
    voxels = f"voxels {list(box.start)} to {list(box.stop)}"
    return f"{without_secret(path)}: {voxels} cannot be {verb}: {reason}"
