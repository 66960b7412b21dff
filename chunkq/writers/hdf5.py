"""Writer of HDF5 files: one dataset in chunks, with the names of its axes and the voxel size."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from typing_extensions import override

from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axis_units import METERS, common_unit, unit_factor
from chunkq.install_hint import install_command
from chunkq.plan.chunk_choice import STORAGE_EDGE
from chunkq.plan.object_sizes import StoredSize
from chunkq.storage.array import Voxels
from chunkq.storage.formats.hdf5_axes import ELEMENT_SIZE, ELEMENT_START
from chunkq.writers.base import (
    DEFAULT_OPTIONS,
    FileWriter,
    ImageToWrite,
    Report,
    WriterOptions,
    deflated_bytes,
    stored_dtype,
)
from chunkq.writers.blocks import tiles

DTYPES = frozenset(
    {
        "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16",
        "float32", "float64",
    }
)  # fmt: skip
REPLACED = {"bool": "uint8"}
"""HDF5 has no bool: h5py stores an enumeration that other programs do not read as numbers."""
DATASET = "data"
"""Name of the dataset if the user names none."""
FILTERS: dict[str, Any] = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
"""Filters that every installation of HDF5 reads."""
DATASET_BYTES, CHUNK_ENTRY_BYTES = 16384, 256
"""Most bytes of the metadata of a dataset, and of what an index has for each of its chunks."""


class Hdf5Writer(FileWriter):
    """A dataset of an HDF5 file, in the axes of the image. A file can have several datasets.

    The dimensions are labelled with the names of the axes. `element_size_um` and
    `element_start_um` have voxel size and position of the spatial axes in micrometers, if their
    units are known.
    """

    def __init__(
        self, image: ImageToWrite, path: str, options: WriterOptions = DEFAULT_OPTIONS
    ) -> None:
        super().__init__(image, path, options)
        try:
            import h5py  # noqa: F401
        except ImportError as error:
            raise StoreError(
                f"output: {self.name}: HDF5 files need h5py ({error}); run "
                f"`{install_command('hdf5')}`",
                code=ErrorCode.PACKAGE_MISSING,
            ) from None
        dtype = stored_dtype(image, DTYPES, REPLACED)
        if dtype is None:
            raise self.refused(f"HDF5 files have no dtype {image.dtype}; use Zarr")
        self.dtype = dtype
        self.orientation = tuple((number, 1) for number in range(len(image.axes)))
        edge = STORAGE_EDGE[max(1, len(image.numbers("space")))]
        default = [min(edge, a.size) if a.kind == "space" else 1 for a in image.axes]
        self._chunks = options.chunks or tuple(default)
        self.blocks = tiles(image.shape, dtype.itemsize, self._chunks)

    @property
    @override
    def size(self) -> StoredSize:
        grid = zip(self.image.shape, self._chunks, strict=True)
        count = prod(-(-edge // step) for edge, step in grid)
        size = prod(self.image.shape) * self.dtype.itemsize
        padding = count * prod(self._chunks) * self.dtype.itemsize - size
        size = deflated_bytes(size, padding, count) + count * CHUNK_ENTRY_BYTES
        return StoredSize.of_file(DATASET_BYTES + size, is_exact=False)

    @override
    def write(self, path: str, voxels: Iterator[Voxels], report: Report, first: int = 0) -> None:
        import h5py

        with h5py.File(path, "a", locking=False) as file:
            dataset = file.create_dataset(
                self.options.dataset or DATASET,
                self.image.shape,
                self.dtype,
                chunks=self._chunks,
                **FILTERS,
            )
            self._describe(dataset)
            for done, box in enumerate(self.blocks.boxes(), start=1):
                values = np.asarray(next(voxels), self.dtype)
                dataset[box.slices((0,) * len(box.shape))] = values
                del values  # before the next one is read
                report(done)

    def _describe(self, dataset: Any) -> None:
        axes = self.image.axes
        for dimension, axis in zip(dataset.dims, axes, strict=True):
            dimension.label = axis.name
        spatial = [axis for axis in axes if axis.kind == "space"]
        unit = common_unit((axis.unit for axis in spatial), METERS, ["micrometer"])
        if unit is not None:
            factors = [unit_factor(axis.unit, unit, METERS) for axis in spatial]
            pairs = list(zip(spatial, factors, strict=True))
            dataset.attrs[ELEMENT_SIZE] = [abs(axis.scale) * f for axis, f in pairs]
            if all(axis.scale > 0 for axis in spatial):
                dataset.attrs[ELEMENT_START] = [axis.translation * f for axis, f in pairs]
        if self.image.values is not None:  # as readers of the CF conventions expect
            dataset.attrs["scale_factor"] = self.image.values.scale
            dataset.attrs["add_offset"] = self.image.values.offset
