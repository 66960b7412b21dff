"""Writer of Neuroglancer precomputed volumes: images, and segmentations with compressed blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from chunkq.errors import ChunkReadError, StoreError
from chunkq.geometry.axes import Axis
from chunkq.geometry.axis_units import METERS, common_unit, unit_factor
from chunkq.geometry.box import Box
from chunkq.paths import join, split_format
from chunkq.storage.array import Array, Voxels, box_error
from chunkq.storage.formats.precomputed import INFO, UNIT
from chunkq.storage.formats.tensorstore_arrays import kvstore, read_store
from chunkq.storage.objects import ObjectFolder
from chunkq.writers.base import (
    DEFAULT_OPTIONS,
    ImageToWrite,
    WriterOptions,
    stored_dtype,
)
from chunkq.writers.pyramid import PyramidWriter

DTYPES = frozenset({"uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "float32"})
REPLACED = {"float16": "float32", "bool": "uint8"}
"""Dtypes that the format does not have -> one that holds all of their values."""
SEGMENT_DTYPES = {
    **dict.fromkeys(("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32"), "uint32"),
    **dict.fromkeys(("uint64", "int64"), "uint64"),
}
"""Dtype of labels -> dtype of a segmentation. Negative labels do not fit and are refused later."""
BLOCK = 64
"""Edge of a block (voxels)."""
SEGMENTATION_BLOCK = (8, 8, 8)
"""Shape of the blocks inside a compressed block."""
SPATIAL_RANK = 3
MAX_SHIFT = 1e-3
"""Distance (voxels) by which a position may be rounded without a note."""
NAMES = ("x", "y", "z")


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
        replaced = SEGMENT_DTYPES if image.is_labels else REPLACED
        dtype = stored_dtype(image, DTYPES, replaced)
        if dtype is None:
            raise self.refused(
                f"a precomputed volume has no dtype {image.dtype}; set --dtype, or use Zarr"
            )
        self.dtype = dtype
        order = _by_name(image, spatial)
        self.orientation = (
            *((number, 1) for number in (*time, *channels)),
            *((n, -1 if image.axes[n].scale < 0 else 1) for n in order),
        )
        leading = [*(1 for _ in time), *(image.axes[n].size for n in channels)]
        block = options.chunks or (*leading, *(BLOCK for _ in order))
        self._has_time, self._has_channels = bool(time), bool(channels)
        self._lay_out(block)
        self.notes = tuple(self._moved())

    def _moved(self) -> Iterator[str]:
        """Yield a line for each axis that does not begin at a whole voxel."""
        for axis, offset in zip(
            _xyz(self.axes[self.lead :]), self.scale(0)["voxel_offset"], strict=True
        ):
            start = axis.translation / (axis.scale or 1.0)
            if abs(start - offset) > MAX_SHIFT:
                yield (
                    f"output: {self.name}: {axis.name} begins at voxel {start:.6g}, stored as "
                    f"{offset}, because a precomputed volume begins at a whole voxel"
                )

    def info(self) -> dict[str, Any]:
        """Return the document `info` of a volume."""
        return {
            "@type": "neuroglancer_multiscale_volume",
            "type": "segmentation" if self.image.is_labels else "image",
            "data_type": self.dtype.name,
            "num_channels": self._channels,
            "scales": [
                {
                    **{k: v for k, v in scale.items() if k != "chunk_size"},
                    "chunk_sizes": [scale["chunk_size"]],
                }
                for scale in map(self.scale, range(len(self.levels) + 1))
            ],
            **({"chunkq": values.attributes} if (values := self.image.values) else {}),
        }

    @property
    def _channels(self) -> int:
        return self.axes[self.lead - 1].size if self._has_channels else 1

    def scale(self, number: int) -> dict[str, Any]:
        """Return the metadata of a scale for tensorstore; x first."""
        axes = list(_xyz(self.axes[self.lead :]))
        unit = common_unit((axis.unit for axis in axes), METERS, [UNIT])
        total = _three(self.levels[number - 1].total if number else (), 1)
        resolution = [
            abs(axis.scale) * unit_factor(axis.unit, unit, METERS) * factor or 1.0
            for axis, factor in zip(axes, total, strict=True)
        ]
        # The offset counts voxels from the corner of the volume, at every level.
        offset = [
            int(np.floor(axis.translation / (axis.scale or 1.0) / factor + 0.5 / factor))
            for axis, factor in zip(axes, total, strict=True)
        ]
        scale: dict[str, Any] = {
            "key": "_".join(f"{size:.10g}" for size in resolution),
            "size": list(_three(self.level_shape(number)[self.lead :], 1)),
            "resolution": resolution,
            "voxel_offset": offset,
            "chunk_size": list(_three(self.chunk[self.lead :], 1)),
            "encoding": "raw",
        }
        if self.image.is_labels:
            scale["encoding"] = "compressed_segmentation"
            scale["compressed_segmentation_block_size"] = list(SEGMENTATION_BLOCK)
        return scale

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
        metadata = {
            "type": "segmentation" if self.image.is_labels else "image",
            "data_type": self.dtype.name,
            "num_channels": self._channels,
        }
        stores = [_open_scale(p, metadata, self.scale(number)) for p in self.volumes(path)]
        return ScaleArray(
            path, self.level_shape(number), self.dtype, stores, self._has_time, self.rank
        )

    @override
    def _finish(self, path: str) -> None:
        content = json.dumps(self.info(), indent=1).encode()
        for volume in self.volumes(path):
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


def _by_name(image: ImageToWrite, spatial: Sequence[int]) -> list[int]:
    """Return the numbers of the spatial axes in the order z, y, x."""
    names = {image.axes[number].name: number for number in spatial}
    if set(names) <= set(NAMES) and "x" in names and (len(names) < 2 or "y" in names):
        return [names[name] for name in reversed(NAMES) if name in names]
    return list(spatial)


def _xyz(axes: Sequence[Axis]) -> list[Axis]:
    """Return three axes, x first; those that the image lacks have one voxel."""
    absent = [Axis(name, "space", 1, axes[-1].unit) for name in NAMES[len(axes) :]]
    return [*reversed(axes), *absent]


def _three(numbers: Sequence[int], default: int) -> tuple[int, ...]:
    """Return three numbers, x first, of some in the order z, y, x."""
    return (*reversed(numbers), *(default,) * (SPATIAL_RANK - len(numbers)))
