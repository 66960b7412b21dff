"""Zarr arrays, read and written by tensorstore or by zarr-python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from typing_extensions import override

from chunkq.access import DEFAULT_ACCESS, Access
from chunkq.errors import ChunkReadError
from chunkq.geometry.box import Box
from chunkq.storage import chunk_cache
from chunkq.storage.array import Array, Voxels, box_error
from chunkq.storage.formats.base import native_dtype
from chunkq.storage.formats.tensorstore_arrays import StoreArray, kvstore

METADATA_KEYS = {
    2: (
        "zarr_format", "shape", "chunks", "dtype", "compressor", "fill_value", "order", "filters",
        "dimension_separator",
    ),
    3: (
        "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding",
        "fill_value", "codecs", "dimension_names", "attributes",
    ),
}  # fmt: skip
"""Zarr format -> keys of an array's metadata that tensorstore accepts from a caller."""


class TensorStoreArray(StoreArray):
    """Zarr array read and written by tensorstore: local files, S3, GCS.

    `metadata` replaces the stored metadata. `cached` keeps storage chunks in the cache of this
    process. `is_whole` stores chunks of fill values only, too, and makes a missing one an error.
    Raises ValueError, or the error of the storage, if tensorstore cannot open the array, for
    example for lack of a codec.
    """

    def __init__(
        self,
        path: str,
        zarr_format: int,
        *,
        write: bool = False,
        access: Access = DEFAULT_ACCESS,
        metadata: Mapping[str, Any] | None = None,
        cached: bool = False,
        is_whole: bool = False,
    ) -> None:
        import tensorstore as ts

        spec: dict[str, Any] = {
            "driver": "zarr3" if zarr_format == 3 else "zarr",
            "kvstore": kvstore(path, access),
        }
        if metadata is not None:
            known = METADATA_KEYS[zarr_format]
            spec["metadata"] = {key: metadata[key] for key in known if key in metadata}
        if cached:
            # What was read since the array was opened is not asked for again.
            spec["recheck_cached_data"] = "open"
        if is_whole:
            spec |= {"store_data_equal_to_fill_value": True, "fill_missing_data_reads": False}
        store = ts.open(
            spec,
            open=True,
            read=True,
            write=write,
            assume_metadata=metadata is not None,
            context=chunk_cache.context() if cached else None,
        ).result()
        super().__init__(path, store)

    @override
    def write(self, box: Box, values: Voxels) -> None:
        try:
            self._store[box.slices((0,) * len(self.shape))].write(values).result()
        except (ValueError, RuntimeError) as error:
            raise OSError(box_error(self.path, box, "written", error)) from error


class ZarrPythonArray(Array):
    """Zarr array read and written by zarr-python, if tensorstore has no driver or codec.

    `check_access` is called after voxels were read. It raises if they can be wrong because the
    storage refused requests.
    """

    def __init__(
        self, path: str, array: Any, check_access: Callable[[], None] = lambda: None
    ) -> None:
        self.path, self._array, self._check_access = path, array, check_access
        self.shape, self.dtype = tuple(array.shape), native_dtype(array.dtype)

    @override
    def read(self, box: Box) -> Voxels:
        try:
            values = np.asarray(self._array[box.slices((0,) * len(self.shape))], self.dtype)
            self._check_access()
        except Exception as error:
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error
        return values

    @override
    def write(self, box: Box, values: Voxels) -> None:
        self._array[box.slices((0,) * len(self.shape))] = values
