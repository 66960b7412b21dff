"""Arrays that are written object by object, with a checksum of each stored object."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import override
from zlib_ng import zlib_ng

from chunkq.geometry.box import Box
from chunkq.paths import join, open_filesystem
from chunkq.storage.array import Array, Voxels, box_error
from chunkq.storage.checksums import NOT_STORED, object_checksum
from chunkq.storage.codecs import DEFAULT_CODEC, Codec
from chunkq.storage.formats.tensorstore_arrays import kvstore
from chunkq.storage.formats.zarr_arrays import METADATA_KEYS
from chunkq.storage.object_grid import ObjectGrid

SLAB_BYTES = 32 << 20
"""Bytes of voxels that are encoded at a time. Their objects are in memory until they are stored."""
PUTS_AT_ONCE = 16
"""Objects that are stored concurrently where tensorstore does not access the storage."""


def shard_index_bytes(chunks: int) -> int:
    """Return the size of the index of a shard of so many storage chunks: positions, sizes, CRC."""
    return 16 * chunks + 4


def array_metadata(
    name: str,
    *,
    shape: Sequence[int],
    chunks: Sequence[int],
    shards: Sequence[int] | None = None,
    dtype: npt.DTypeLike,
    fill_value: float,
    zarr_format: Literal[2, 3],
    axes: Sequence[str] | None,
    codec: Codec = DEFAULT_CODEC,
    attributes: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Return the metadata documents of a new Zarr array, by their paths in its group."""
    import zarr
    from zarr.storage import MemoryStore

    if zarr_format == 3:
        extra: dict[str, Any] = {"dimension_names": axes}
    else:
        extra = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    documents: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(documents),
        name=name,
        zarr_format=zarr_format,
        shape=tuple(shape),
        chunks=tuple(chunks),
        shards=None if shards is None else tuple(shards),
        dtype=np.dtype(dtype).name,
        compressors=codec.compressor(zarr_format),
        fill_value=fill_value,
        attributes=dict(attributes or {}),
        **extra,
    )
    return {
        path: content.to_bytes().decode()
        for path, content in documents.items()
        if path.startswith(f"{name}/")
    }


class WritableArray(Array, ABC):
    """An open array for reading and writing, whose objects are those of a grid.

    tensorstore encodes voxels into memory. The objects are stored from there, so their checksums
    are those of what was to be stored.
    """

    def __init__(self, array: Array, grid: ObjectGrid) -> None:
        self.path, self.shape, self.dtype = array.path, array.shape, array.dtype
        self._array, self._grid = array, grid

    @abstractmethod
    def _in_memory(self) -> tuple[Any, Any]:
        """Return an empty array in a memory of its own, and the storage in which its objects are.

        Both are tensorstore's. The array has the axes of this one and begins at 0.
        """

    @override
    def read(self, box: Box) -> Voxels:
        return self._array.read(box)

    @override
    def write(self, box: Box, values: Voxels) -> None:
        self.store(box, values)

    def store(self, box: Box, values: Voxels) -> list[int]:
        """Write whole storage chunks, each atomically; return the checksum of each object.

        They are in C order. The objects of a shard must be written together. An object whose
        voxels are all the fill value is not stored: `NOT_STORED`. Raises OSError.
        """
        checksums: list[int] = []
        finish: Callable[[], None] = lambda: None  # noqa: E731
        try:
            for part in self._grid.slabs(box, SLAB_BYTES // self.dtype.itemsize):
                voxels = values[part.slices(box.start)].astype(self.dtype, copy=False)
                objects = self._encode(part, voxels)
                finish()  # the objects of one slab are stored while the next one is encoded
                finish = self._put([(name, c) for name, c in objects if c is not None])
                checksums += (
                    NOT_STORED if c is None else object_checksum(zlib_ng.crc32(c))
                    for _, c in objects
                )
            finish()
        except (ValueError, RuntimeError) as error:
            raise OSError(box_error(self.path, box, "written", error)) from error
        return checksums

    def _encode(self, box: Box, values: Voxels) -> list[tuple[str, bytes | None]]:
        """Return the names of the objects of a box and their contents, None where not stored."""
        store, memory = self._in_memory()
        # Without can_reference_source_data_indefinitely, which loses chunks of arrays that have
        # an axis of length 1 (tensorstore 0.1.86).
        store[box.slices((0,) * len(self.shape))].write(values).result()
        reads = [(name, memory.read(name)) for name in self._grid.names(box)]
        results = ((name, read.result()) for name, read in reads)
        return [(name, r.value if r.state == "value" else None) for name, r in results]

    def _put(self, objects: Sequence[tuple[str, bytes]]) -> Callable[[], None]:
        """Begin to store objects; return a function that waits until they are stored."""
        if self._kvstore is not None:
            writes = [self._kvstore.write(name, content) for name, content in objects]

            def finish() -> None:
                for write in writes:
                    write.result()

            return finish
        filesystem, inner = open_filesystem(self.path)
        with ThreadPoolExecutor(PUTS_AT_ONCE) as pool:
            puts = [pool.submit(filesystem.pipe_file, join(inner, n), c) for n, c in objects]
        for put in puts:
            put.result()
        return lambda: None

    @cached_property
    def _kvstore(self) -> Any:
        """tensorstore's access to the storage, or None if it has none."""
        import tensorstore as ts

        spec = kvstore(self.path)
        return None if spec is None else ts.KvStore.open(spec).result()


class WritableZarr(WritableArray):
    """A Zarr array. `metadata` is its document."""

    def __init__(self, array: Array, metadata: Mapping[str, Any], zarr_format: int) -> None:
        super().__init__(array, ObjectGrid.of_document(json.dumps(metadata), zarr_format))
        self._format, known = zarr_format, METADATA_KEYS[zarr_format]
        self._metadata = {key: metadata[key] for key in known if key in metadata}

    @override
    def _in_memory(self) -> tuple[Any, Any]:
        import tensorstore as ts

        store = ts.open(
            {
                "driver": "zarr3" if self._format == 3 else "zarr",
                "kvstore": {"driver": "memory"},
                "metadata": self._metadata,
            },
            context=ts.Context(),  # a memory of its own
            open=True,
            write=True,
            assume_metadata=True,
        ).result()
        return store, store.kvstore
