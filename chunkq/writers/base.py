"""The contract of a writer of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axes import Axis
from chunkq.paths import without_secret
from chunkq.plan.object_sizes import StoredSize
from chunkq.plan.pyramid import Method
from chunkq.storage.array import Voxels
from chunkq.storage.oriented import Orientation
from chunkq.writers.blocks import Blocks
from chunkq.writers.file_space import FileSpace

Report = Callable[[int], None]
"""Receives the number of finished steps."""


@dataclass(frozen=True)
class StoredValues:
    """The values for which stored integers stand: `stored * scale + offset`."""

    scale: float
    offset: float

    @property
    def attributes(self) -> dict[str, float]:
        """The values as attributes of chunkq."""
        return {"scale": self.scale, "offset": self.offset}


@dataclass(frozen=True)
class ImageToWrite:
    """An image as it is read: its axes and its meaning.

    axes        all axes of the array, in its order
    dtype       in native byte order
    is_labels   whether the values are labels
    storage     shape of the storage chunks that are read; empty if any voxel can be
    channels    names of the channels; empty if there are none
    space       where the voxels lie in the NIfTI file from which the image comes
    values      what stored integers stand for; None for the integers themselves
    classes     names of labels, from label 0 on; empty if there are none
    """

    axes: tuple[Axis, ...]
    dtype: str
    is_labels: bool = False
    storage: tuple[int, ...] = ()
    channels: tuple[str, ...] = ()
    space: FileSpace | None = None
    values: StoredValues | None = None
    classes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(axis.size for axis in self.axes)

    def numbers(self, kind: str) -> list[int]:
        """Return the numbers of the axes of a kind."""
        return [number for number, axis in enumerate(self.axes) if axis.kind == kind]

    def presented(self, orientation: Orientation) -> ImageToWrite:
        """Return the image with its axes permuted and flipped.

        A flipped axis keeps its step and begins at its other end.
        """
        axes, edges = [], []
        for number, direction in orientation:
            axis = self.axes[number]
            if direction < 0:
                last = axis.translation + (axis.size - 1) * axis.scale
                axis = replace(axis, scale=-axis.scale, translation=last)
            axes.append(axis)
            edges.append(self.storage[number] if self.storage else 1)
        return replace(self, axes=tuple(axes), storage=tuple(edges))


@dataclass(frozen=True)
class WriterOptions:
    """What a user can choose; None for the default of the format.

    levels  number of resolution levels, level 0 included
    method  how a level is computed of the one before
    chunks  shape of the storage chunks, one entry per axis that is written
    dataset name of the dataset in the file
    """

    levels: int | None = None
    method: Method | None = None
    chunks: tuple[int, ...] = ()
    dataset: str = ""


DEFAULT_OPTIONS = WriterOptions()


class ExportWriter(ABC):
    """Write one image in a format.

    To add a format, subclass this class or `FileWriter`, add it to `registry`, and run
    `tests/contract/test_writer_contract.py` for it.

    - `__init__` computes the layout and raises StoreError in one line if the format cannot hold
      the image. It reads and writes nothing.
    - `orientation` says which axes of the image are stored, in which order and direction. `blocks`
      are boxes of the stored axes, and `dtype` is what they contain when they are written.
    - `write` receives the voxels of the blocks in their order, and reports the number of finished
      steps after each one. A process that is killed loses no finished step of a resumable writer:
      another one calls `write` with this number as `first`, and with the blocks from there on.
      The other writers write a file from its start.
    - Writing the same image again writes the same bytes.
    - Memory is a few blocks, whatever the size of the image.
    - An image that is not complete has no metadata with which a reader would find it: they are
      written in the last step.
    """

    is_resumable: ClassVar[bool] = False
    """Whether steps can be written by another process, each of them atomically."""
    orientation: Orientation
    dtype: np.dtype[Any]
    blocks: Blocks
    notes: tuple[str, ...] = ()
    """What the format does not hold exactly, for the user."""

    def __init__(
        self, image: ImageToWrite, path: str, options: WriterOptions = DEFAULT_OPTIONS
    ) -> None:
        """Compute the layout. `path` names the output in messages. Raises StoreError."""
        self.image, self.name, self.options = image, without_secret(path), options

    @property
    def steps(self) -> int:
        """Number of steps of `write`."""
        return self.blocks.count

    @abstractmethod
    def write(self, path: str, voxels: Iterator[Voxels], report: Report, first: int = 0) -> None:
        """Write the image at a path, from step `first` on.

        `voxels` are those of the blocks from number `first` on, in `dtype`. Raises OSError.
        """

    def refused(self, problem: str) -> StoreError:
        """Return the error for an image that the format cannot hold."""
        return StoreError(f"output: {self.name}: {problem}", code=ErrorCode.STORE_UNSUPPORTED)


class FileWriter(ExportWriter):
    """Write one image into a file."""

    @property
    @abstractmethod
    def size(self) -> StoredSize:
        """How many bytes the image takes in its file."""


def deflated_bytes(size: int, padding: int = 0, parts: int = 1) -> int:
    """Return how many bytes so many bytes have at most when they are compressed with Deflate.

    They are compressed in parts, which `padding` zeros fill up. The fastest level of zlib-ng stores
    up to 9 bits per byte, and a run of zeros in less than a hundredth of it.
    """
    size += padding // 32
    return size + size // 8 + 64 * parts


def stored_dtype(
    image: ImageToWrite, supported: frozenset[str], replaced: dict[str, str]
) -> np.dtype[Any] | None:
    """Return the dtype in which a format stores an image; None if it has none for it."""
    name = np.dtype(image.dtype).name
    name = replaced.get(name, name)
    return np.dtype(name) if name in supported else None
