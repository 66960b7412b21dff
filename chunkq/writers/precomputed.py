"""Writer of Neuroglancer precomputed volumes: images, and segmentations with compressed blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from chunkq.errors import ChunkReadError, StoreError
from chunkq.geometry.box import Box
from chunkq.paths import join, split_format
from chunkq.storage.array import Array, Voxels, box_error
from chunkq.storage.formats.precomputed_metadata import (
    INFO,
    SEGMENT_PROPERTIES,
    SPATIAL_RANK,
    first_voxels,
    info,
    moved,
    scale_metadata,
    segment_properties,
    spatial_order,
    stored_dtype,
    volume_metadata,
)
from chunkq.storage.formats.tensorstore_arrays import kvstore, read_store
from chunkq.storage.objects import ObjectFolder
from chunkq.writers.base import (
    DEFAULT_OPTIONS,
    ImageToWrite,
    WriterOptions,
)
from chunkq.writers.pyramid import PyramidWriter

BLOCK = 64
"""Edge of a block (voxels)."""


class PrecomputedWriter(PyramidWriter):
    """A volume with scales; a time series is a folder with one volume per time point, `t000`, ….

    Stored axes are ([t,] [c,] z, y, x). An axis that runs backwards is stored from its other end,
    because voxel sizes are positive. Labels are stored as a segmentation.
    """

    def __init__(
        self, image: ImageToWrite, path: str, options: WriterOptions = DEFAULT_OPTIONS
    ) -> None:
        super().__init__(image, path, options)
        spatial = image.numbers("space")
        channels, time = image.numbers("channel"), image.numbers("time")
        if not 1 <= len(spatial) <= SPATIAL_RANK or len(channels) > 1 or len(time) > 1:
            axes = ", ".join(axis.name for axis in image.axes)
            raise self.refused(
                f"a precomputed volume has the axes x, y, z and channels; found {axes}; use Zarr"
            )
        dtype = stored_dtype(np.dtype(image.dtype).name, is_labels=image.is_labels)
        if dtype is None:
            raise self.refused(
                f"a precomputed volume {'of labels ' if image.is_labels else ''}has no dtype "
                f"{image.dtype}; set --dtype, or use Zarr"
            )
        self.dtype = dtype
        order = [spatial[n] for n in spatial_order([image.axes[n] for n in spatial])]
        self.orientation = (
            *((number, 1) for number in (*time, *channels)),
            *((n, -1 if image.axes[n].scale < 0 else 1) for n in order),
        )
        leading = [*(1 for _ in time), *(image.axes[n].size for n in channels)]
        block = options.chunks or (*leading, *(BLOCK for _ in order))
        self._has_time, self._has_channels = bool(time), bool(channels)
        self._lay_out(block)
        stored = self.axes[self.lead :]
        self.notes = tuple(moved(stored, first_voxels(stored), self.name))

    def info(self) -> dict[str, Any]:
        """Return the document `info` of a volume."""
        document = info(self._volume, [self.scale(n) for n in range(len(self.levels) + 1)])
        if self.image.classes:
            document[SEGMENT_PROPERTIES] = SEGMENT_PROPERTIES
        values = self.image.values
        return document if values is None else {**document, "chunkq": values.attributes}

    @property
    def _volume(self) -> dict[str, Any]:
        channels = self.axes[self.lead - 1].size if self._has_channels else 1
        return volume_metadata(self.dtype, channels, is_labels=self.image.is_labels)

    def scale(self, number: int) -> dict[str, Any]:
        """Return the metadata of a scale for tensorstore; x first."""
        spatial = self.axes[self.lead :]
        return scale_metadata(
            spatial,
            first_voxels(spatial),
            self.level_shape(number)[self.lead :],
            self.levels[number - 1].total if number else (1,) * len(spatial),
            self.chunk[self.lead :],
            is_labels=self.image.is_labels,
        )

    def volumes(self, path: str) -> list[str]:
        """Return the path of the volume of each time point, or of the only one."""
        if not self._has_time:
            return [path]
        digits = max(3, len(str(self.axes[0].size - 1)))
        return [join(path, f"t{number:0{digits}d}") for number in range(self.axes[0].size)]

    @override
    def _create(self, path: str) -> None:
        if kvstore(split_format(path)[1]) is None:
            raise self.refused(
                "precomputed volumes are written to local disks, s3:// and gs://; choose another "
                "path"
            )

    @override
    def _open(self, path: str, number: int) -> Array:
        scale = self.scale(number)
        stores = [_open_scale(p, self._volume, scale) for p in self.volumes(path)]
        return ScaleArray(
            path, self.level_shape(number), self.dtype, stores, self._has_time, self.rank
        )

    @override
    def _finish(self, path: str) -> None:
        content = json.dumps(self.info(), indent=1).encode()
        names = json.dumps(segment_properties(self.image.classes), indent=1).encode()
        for volume in self.volumes(path):
            if self.image.classes:
                ObjectFolder(volume).put(f"{SEGMENT_PROPERTIES}/{INFO}", names)
            ObjectFolder(volume).put(INFO, content)


class ScaleArray(Array):
    """A scale of a volume, or of the volumes of a time series: ([t,] [c,] [z,] [y,] x)."""

    def __init__(
        self,
        path: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        stores: Sequence[Any],
        has_time: bool,
        rank: int,
    ) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self._stores, self._has_time, self._rank = stores, has_time, rank

    def _parts(self, box: Box) -> list[tuple[Any, Box]]:
        """Return the store of each time point of a box, and the box (c, z, y, x) in it."""
        start, stop = list(box.start), list(box.stop)
        times = range(start.pop(0), stop.pop(0)) if self._has_time else range(1)
        if len(start) == self._rank:
            start, stop = [0, *start], [1, *stop]
        missing = SPATIAL_RANK - self._rank
        inner = Box((start[0], *(0,) * missing, *start[1:]), (stop[0], *(1,) * missing, *stop[1:]))
        return [(self._stores[time], inner) for time in times]

    @override
    def read(self, box: Box) -> Voxels:
        try:
            parts = [read_store(store, inner) for store, inner in self._parts(box)]
        except (ValueError, OSError, RuntimeError) as error:
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error
        return np.stack(parts).reshape(box.shape)

    @override
    def write(self, box: Box, values: Voxels) -> None:
        parts = self._parts(box)
        stacked = values.reshape(len(parts), *parts[0][1].shape)
        try:
            for (store, inner), part in zip(parts, stacked, strict=True):
                store[inner.slices((0,) * len(inner.shape))].write(part).result()
        except (ValueError, RuntimeError) as error:
            raise OSError(box_error(self.path, box, "written", error)) from error


def _open_scale(path: str, metadata: Mapping[str, Any], scale: Mapping[str, Any]) -> Any:
    """Open a scale for writing as (c, z, y, x), without a document `info`. Raises StoreError."""
    import tensorstore as ts

    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": kvstore(path),
        "multiscale_metadata": dict(metadata),
        "scale_metadata": {**scale, "sharding": None},
    }
    try:
        store = ts.open(spec, open=True, read=True, write=True, assume_metadata=True).result()
    except ValueError as error:
        raise StoreError(f"output: {path}: {error}") from error
    return store[ts.d[:].translate_to[0]].T
