"""Read-only arrays of any driver of tensorstore, over its own storage or over fsspec."""

from __future__ import annotations

import bz2
import gzip
import lzma
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from typing_extensions import override

from chunkq.access import (
    DEFAULT_ACCESS,
    GCS_SCHEMES,
    S3_SCHEMES,
    Access,
    is_forbidden,
    tensorstore_s3,
)
from chunkq.errors import ChunkReadError
from chunkq.geometry.box import Box
from chunkq.paths import is_url, is_web, join
from chunkq.storage import chunk_cache
from chunkq.storage.array import Array, Voxels, box_error
from chunkq.storage.formats.stored_objects import NOTHING, fetch_object
from chunkq.system import buffers

NO_LOCKS = {"mode": "none"}
"""tensorstore's option to write without file locks. Every object has one writer, and a lock of a
suspended process would block all others."""
FETCHES_AT_ONCE = 16
DECOMPRESSORS: Mapping[str, Callable[[bytes], bytes]] = MappingProxyType(
    {"": bytes, ".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
)
"""Suffix of the name of an object -> function that decompresses its content."""


class StoreArray(Array):
    """Array of an open tensorstore, whose domain begins at 0."""

    def __init__(self, path: str, store: Any) -> None:
        self.path, self._store = path, store
        self.shape, self.dtype = tuple(store.shape), store.dtype.numpy_dtype

    @override
    def read(self, box: Box) -> Voxels:
        try:
            return read_store(self._store, box)
        except (ValueError, OSError, RuntimeError) as error:
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error

    @override
    def read_together(self, boxes: Sequence[Box]) -> list[Voxels]:
        import tensorstore as ts

        origin = (0,) * len(self.shape)
        with ts.Batch() as batch:
            reads = [self._store[box.slices(origin)].read(batch=batch) for box in boxes]
        values = []
        for box, future in zip(boxes, reads, strict=True):
            try:
                values.append(future.result())
            except (ValueError, OSError, RuntimeError) as error:
                raise ChunkReadError(box_error(self.path, box, "read", error)) from error
        return values


def read_store(store: Any, box: Box) -> Voxels:
    """Read a box of an open tensorstore into a buffer. Raises tensorstore's errors."""
    import tensorstore as ts

    values: Voxels = buffers.zeros(box.shape, store.dtype.numpy_dtype)
    region = store[box.slices((0,) * len(box.shape))]
    ts.array(values, copy=False, write=True).write(region).result()
    return values


class BlockLayout(ABC):
    """How the blocks of an array are stored: one object each, named by their position.

    Stored axes are in the order of tensorstore's driver, x first.
    """

    shape: tuple[int, ...]
    """Shape of the array as presented."""
    folder: str
    """Path of the folder of the blocks."""
    key: str
    """Name of that folder, as far as it belongs to `spec`; else empty."""
    spec: Mapping[str, Any]
    """tensorstore's specification of the array, with all metadata and without the kvstore."""
    suffix: str = ""
    """What the names of objects end with: the compression around the format's own."""

    @abstractmethod
    def present(self, store: Any) -> Any:
        """Return the view of tensorstore's array that has the axes of the array."""

    @abstractmethod
    def names(self, box: Box) -> Iterator[str]:
        """Yield the names of the blocks that a box intersects, without suffix."""

    def plain(self, name: str, content: bytes) -> bytes:
        """Return the content of a block without the compression around the format's own.

        Raises ValueError, OSError or EOFError if it is damaged.
        """
        return DECOMPRESSORS[self.suffix](content)

    def open(self, storage: Mapping[str, Any], context: Any = None, *, cached: bool = False) -> Any:
        """Open the array in a kvstore. Raises tensorstore's errors.

        `cached` keeps blocks in the cache of this process.
        """
        import tensorstore as ts

        spec = {**self.spec, "kvstore": storage}
        if cached:
            # What was read since the array was opened is not asked for again.
            spec["recheck_cached_data"], context = "open", chunk_cache.context()
        opened = ts.open(spec, context=context, open=True, read=True, assume_metadata=True)
        return self.present(opened.result())


class FetchedArray(Array):
    """Array whose blocks are fetched through fsspec and decoded by tensorstore.

    For storage that tensorstore does not access as the job says. `check_access` is called after
    refused blocks were read as missing; None if a refused block is an error.
    """

    def __init__(
        self,
        path: str,
        layout: BlockLayout,
        access: Access,
        check_access: Callable[[], Any] | None = None,
    ) -> None:
        self.path, self._layout, self._access = path, layout, access
        self._check_access = check_access
        template = layout.open({"driver": "memory"})
        self.shape, self.dtype = tuple(template.shape), template.dtype.numpy_dtype

    @override
    def read(self, box: Box) -> Voxels:
        import tensorstore as ts

        context = ts.Context()
        memory = {"driver": "memory"}
        try:
            blocks = ts.KvStore.open(memory, context=context).result()
            for name, content in self._fetch(list(self._layout.names(box))):
                key = f"{self._layout.key}/{name}" if self._layout.key else name
                blocks.write(key, self._layout.plain(name, content)).result()
            return read_store(self._layout.open(memory, context), box)
        except Exception as error:  # each file system raises different errors
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error

    def _fetch(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yield names and contents of the blocks that exist. Raises the storage's errors."""
        refused: list[str] = []

        def fetch(name: str) -> bytes | None:
            path = join(self._layout.folder, name + self._layout.suffix)
            try:
                return fetch_object(path, self._access)
            except NOTHING:
                return None
            except Exception as error:  # each file system raises different errors
                if self._check_access is None or not is_forbidden(error):
                    raise
                refused.append(name)
                return None

        with ThreadPoolExecutor(min(FETCHES_AT_ONCE, len(names))) as pool:
            for name, content in zip(names, pool.map(fetch, names), strict=True):
                if content is not None:
                    yield name, content
        if refused and self._check_access is not None:
            self._check_access()


def open_blocks(
    path: str,
    layout: BlockLayout,
    access: Access,
    lenient_document: str | None = None,
    *,
    cached: bool = False,
) -> Array:
    """Open an array, with tensorstore's own access to the storage if possible.

    `cached` keeps blocks in the cache of this process, if tensorstore reads them.
    `lenient_document` is the path of the array's document if the server answers 403 for missing
    objects; it must be readable after a block was refused. Raises ValueError if tensorstore does
    not support the array.
    """
    storage = None
    if lenient_document is None and not layout.suffix:
        folder = layout.folder.removesuffix(f"/{layout.key}") if layout.key else layout.folder
        storage = kvstore(folder, access)
    if storage is not None:
        return StoreArray(path, layout.open(storage, cached=cached))
    check = None if lenient_document is None else partial(fetch_object, lenient_document, access)
    return FetchedArray(path, layout, access, check)


def block_indices(
    start: Sequence[int], stop: Sequence[int], block: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Yield the indices of the blocks that a half-open box intersects."""
    axes = zip(start, stop, block, strict=True)
    return product(*(range(low // size, -(-high // size)) for low, high, size in axes))


def kvstore(path: str, access: Access = DEFAULT_ACCESS) -> dict[str, Any] | None:
    """Return tensorstore's kvstore spec of a path, or None if tensorstore cannot access it."""
    if not is_url(path):
        return {"driver": "file", "path": path + "/", "file_io_locking": NO_LOCKS}
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    shared = {"bucket": bucket, "path": f"{key}/" if key else ""}
    if scheme in GCS_SCHEMES and access == DEFAULT_ACCESS:
        return {"driver": "gcs", **shared}
    members = tensorstore_s3(bucket, access) if scheme in S3_SCHEMES else None
    return None if members is None else {"driver": "s3", **shared, **members}


def web_kvstore(path: str) -> dict[str, Any] | None:
    """Return tensorstore's kvstore spec of a folder on a web server; None for other paths."""
    if not is_web(path):
        return None
    parts = urlsplit(path)
    return {
        "driver": "http",
        "base_url": f"{parts.scheme}://{parts.netloc}",
        "path": f"{parts.path.rstrip('/')}/",
    }
