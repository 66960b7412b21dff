"""Writers of chunked volumes with resolution levels: each level is made from the one before."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, product
from math import prod
from typing import ClassVar

import numpy as np
from typing_extensions import override

from chunkq.blend.downsampling import downsample
from chunkq.geometry.axes import Axis, reduced
from chunkq.geometry.axis_units import voxel_sizes
from chunkq.geometry.box import Box
from chunkq.geometry.levels import Level, pyramid_levels
from chunkq.storage.array import Array, Voxels
from chunkq.writers.base import ExportWriter, Report
from chunkq.writers.blocks import tiles

UNIT_CHUNKS = 2
"""Storage chunks along each axis that one step of a level writes."""


class PyramidWriter(ExportWriter):
    """A volume whose storage chunks are objects, with levels.

    The stored axes are leading axes, such as time and channels, and then the spatial ones. A
    subclass sets `orientation` and `dtype`, calls `_lay_out`, and implements `_create`, `_open` and
    `_finish`.
    """

    is_resumable: ClassVar[bool] = True

    def _lay_out(self, chunk: Sequence[int]) -> None:
        """Compute blocks and levels for storage chunks of this shape along the stored axes."""
        stored = self.image.presented(self.orientation)
        self.axes, self.chunk = stored.axes, tuple(chunk)
        self.rank = len(stored.numbers("space"))
        self.lead = len(self.axes) - self.rank
        self.blocks = tiles(stored.shape, self.dtype.itemsize, chunk)
        spatial = self.axes[self.lead :]
        sizes = voxel_sizes(spatial)
        storage = self.chunk[self.lead :]
        unit = tuple(UNIT_CHUNKS * edge for edge in storage)
        # `pyramid_levels` divides the unit by the factors of each level.
        self.levels = tuple(
            replace(level, unit=unit)
            for level in pyramid_levels(
                stored.shape[self.lead :], sizes, storage, storage, unit, self.options.levels
            )
        )
        self.method = self.options.method or ("mode" if self.image.is_labels else "mean")

    @property
    @override
    def steps(self) -> int:
        return self.blocks.count + sum(map(self._units, self.levels))

    def _units(self, level: Level) -> int:
        return prod(self._leading_grid) * prod(level.units)

    @property
    def _leading_grid(self) -> tuple[int, ...]:
        """Number of storage chunks along each leading axis."""
        pairs = zip(self.axes[: self.lead], self.chunk, strict=False)
        return tuple(-(-axis.size // edge) for axis, edge in pairs)

    def level_shape(self, number: int) -> tuple[int, ...]:
        """Return the shape of a level along the stored axes."""
        spatial = self.levels[number - 1].shape if number else self.blocks.shape[self.lead :]
        return (*self.blocks.shape[: self.lead], *spatial)

    def level_axes(self, number: int) -> tuple[Axis, ...]:
        """Return the axes of a level. A voxel has the position of its center."""
        if not number:
            return self.axes
        level = self.levels[number - 1]
        spatial = map(reduced, self.axes[self.lead :], level.shape, level.total)
        return (*self.axes[: self.lead], *spatial)

    @override
    def write(self, path: str, voxels: Iterator[Voxels], report: Report, first: int = 0) -> None:
        self._create(path)
        below = self._open(path, 0)
        done = first
        boxes = self.blocks.boxes(first)
        for values in voxels:
            below.write(next(boxes), np.ascontiguousarray(values, self.dtype))
            del values  # before the next one is read
            done += 1
            report(done)
        start = self.blocks.count
        for number, level in enumerate(self.levels, start=1):
            array = self._open(path, number)
            for box in islice(self._boxes(level), max(0, done - start), None):
                self._reduce(level, below, array, box)
                done += 1
                report(done)
            below, start = array, start + self._units(level)
        self._finish(path)

    def _boxes(self, level: Level) -> Iterator[Box]:
        """Yield what each step of a level writes."""
        leading = self.blocks.shape[: self.lead]
        for outer in product(*map(range, self._leading_grid)):
            starts = tuple(n * edge for n, edge in zip(outer, self.chunk, strict=False))
            axes = zip(starts, self.chunk, leading, strict=False)
            stops = tuple(min(low + edge, size) for low, edge, size in axes)
            for index in product(*map(range, level.units)):
                inner = level.box(index)
                yield Box((*starts, *inner.start), (*stops, *inner.stop))

    def _reduce(self, level: Level, below: Array, array: Array, box: Box) -> None:
        source = level.source(Box(box.start[self.lead :], box.stop[self.lead :]))
        leading = Box(box.start[: self.lead], box.stop[: self.lead])
        outer = Box((*leading.start, *source.start), (*leading.stop, *source.stop))
        array.write(box, downsample(below.read(outer), level.factors, self.method))

    @abstractmethod
    def _create(self, path: str) -> None:
        """Create what `_open` needs, unless it exists. Idempotent."""

    @abstractmethod
    def _open(self, path: str, number: int) -> Array:
        """Open a level for reading and writing, along the stored axes."""

    @abstractmethod
    def _finish(self, path: str) -> None:
        """Write the metadata with which readers find the volume."""
