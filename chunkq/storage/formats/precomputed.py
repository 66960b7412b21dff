"""Format of Neuroglancer precomputed volumes, whose scales are levels."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from typing_extensions import override

from chunkq.access import Access
from chunkq.errors import ChunkReadError, ErrorCode, StoreError
from chunkq.geometry.box import Box
from chunkq.paths import is_url, is_web, join, without_secret
from chunkq.storage.array import Array, Voxels, box_error
from chunkq.storage.formats.base import (
    CACHED,
    NO_OPTIONS,
    ArrayInfo,
    LeveledFormat,
    Options,
    unreadable_error,
)
from chunkq.storage.formats.precomputed_info import (
    GZIP_MAGIC,
    Info,
    Scale,
    Sharding,
    axes_of,
    channels_of,
    info_error,
    key_of,
    parse_info,
    read_info,
    require_info,
    scale_of,
)
from chunkq.storage.formats.precomputed_metadata import INFO
from chunkq.storage.formats.stored_objects import NOTHING
from chunkq.storage.formats.tensorstore_arrays import (
    DECOMPRESSORS,
    BlockLayout,
    StoreArray,
    block_indices,
    kvstore,
    open_blocks,
    web_kvstore,
)
from chunkq.storage.formats.zarr_chunks import keys_in, listed_indices
from chunkq.storage.formats.zarr_nodes import (
    FORBIDDEN_IS_MISSING,
    access_options,
    level_error,
    require_parts,
)
from chunkq.storage.stored_chunks import StoredChunks

SCALE = "scale"
"""Option: key of the scale."""
SUFFIX = "suffix"
"""Option: what the names of the blocks end with, if they are compressed as files."""
NAMED_BY_INFO = "precomputed metadata"
OTHER_SUFFIXES = (".br", ".zstd")
"""Suffixes of compressed blocks that cannot be read."""


@dataclass(frozen=True)
class BlockKeys:
    """Names of blocks, `X0-X1_Y0-Y1_Z0-Z1`, and what they end with."""

    scale: Scale
    suffix: str = ""

    def name(self, index: Sequence[int]) -> str:
        """Return the name of the block with this index along x, y and z."""
        scale = self.scale
        axes = zip(index, scale.block, scale.size, scale.voxel_offset, strict=True)
        ranges = ((n * b + o, min((n + 1) * b, size) + o) for n, b, size, o in axes)
        return "_".join(f"{start}-{stop}" for start, stop in ranges) + self.suffix

    def pattern(self, rank: int) -> re.Pattern[str]:
        """Return a pattern that names of blocks match as a whole."""
        return re.compile("_".join([r"-?\d+--?\d+"] * rank) + re.escape(self.suffix))


@dataclass(frozen=True)
class ShardKeys:
    """Names of shards: hexadecimal numbers."""

    bits: int

    def name(self, index: Sequence[int]) -> str:
        """Return the name of a shard."""
        return f"{index[0]:0{max(1, -(-self.bits // 4))}x}.shard"

    def pattern(self, rank: int) -> re.Pattern[str]:
        """Return a pattern that names of shards match as a whole."""
        return re.compile(r"[0-9a-f]+\.shard")


@dataclass(frozen=True)
class ScaleLayout(BlockLayout):
    """Blocks of a scale."""

    folder: str
    key: str
    shape: tuple[int, ...]
    spec: Mapping[str, Any]
    keys: BlockKeys
    itemsize: int
    suffix: str = ""

    @override
    def present(self, store: Any) -> Any:
        import tensorstore as ts

        # Stored axes are x, y, z, channel, and begin at voxel_offset.
        store = store[ts.d[:].translate_to[0]]
        return store.T if len(self.shape) == 4 else store[..., 0].T

    @override
    def names(self, box: Box) -> Iterator[str]:
        for index in block_indices(box.start[-3:], box.stop[-3:], self.keys.scale.block[::-1]):
            yield self.keys.name(index[::-1])

    @override
    def plain(self, name: str, content: bytes) -> bytes:
        content = super().plain(name, content)
        # A bucket can store blocks with the content encoding gzip.
        if not content.startswith(GZIP_MAGIC):
            return content
        if self.keys.scale.encoding == "raw" and len(content) == self._raw_bytes(name):
            return content
        return gzip.decompress(content)

    def _raw_bytes(self, name: str) -> int:
        edges = [re.fullmatch(r"(-?\d+)-(-?\d+)", part) for part in name.split("_")]
        lengths = [int(edge[2]) - int(edge[1]) for edge in edges if edge]
        channels = self.shape[0] if len(self.shape) == 4 else 1
        return prod(lengths) * channels * self.itemsize


class ShardedArray(StoreArray):
    """Scale in shards. tensorstore reads an empty shard as if it were missing."""

    def __init__(self, path: str, store: Any, folder: str) -> None:
        super().__init__(path, store)
        self._folder = folder

    @override
    def read(self, box: Box) -> Voxels:
        if not is_url(self._folder) and (name := self._empty_shard):
            error = OSError(f"{join(self._folder, name)} is empty")
            raise ChunkReadError(box_error(self.path, box, "read", error))
        return super().read(box)

    @cached_property
    def _empty_shard(self) -> str | None:
        with suppress(*NOTHING), os.scandir(self._folder) as entries:
            return next((e.name for e in entries if e.is_file() and not e.stat().st_size), None)
        return None


class PrecomputedFormat(LeveledFormat):
    """Neuroglancer precomputed volumes, recognized by the document `info`.

    Stored axes are x, y, z, channel; arrays are presented as ([c,] z, y, x), from the first voxel
    of the scale. The path of a scale is that of its volume. The identity is a hash of the
    metadata that determine the voxels of the scale.
    """

    @override
    def detects(self, path: str, options: Options = NO_OPTIONS) -> bool:
        content = (read_info(path, Access.of(options)) or b"").lstrip()
        try:
            info = json.loads(content)
        except (ValueError, RecursionError):
            return content.startswith(b"{")  # a document that is invalid
        if not isinstance(info, dict):
            return False
        return "scales" in info or str(info.get("@type")).startswith("neuroglancer")

    @override
    def find_any(self, path: str, level: int | str | None, access: Access) -> ArrayInfo:
        return _find(path, level, access)

    @override
    def stored_chunks(self, path: str, options: Options) -> StoredChunks | None:
        access, key = Access.of(options), str(options[SCALE])
        info = require_info(path, access)
        scale = scale_of(path, info, key)
        if options.get(FORBIDDEN_IS_MISSING) or is_web(path) or scale.sharding is not None:
            return None
        channels = channels_of(info)

        def index_of(name: str) -> Sequence[int]:
            starts = (int(match[1]) for match in re.finditer(r"(-?\d+)--?\d+", name))
            axes = zip(starts, scale.voxel_offset, scale.block, strict=True)
            return [*(0 for _ in channels), *reversed([(s - o) // b for s, o, b in axes])]

        grid = (*(1 for _ in channels), *scale.grid[::-1])
        pattern = BlockKeys(scale, str(options.get(SUFFIX, ""))).pattern(3)
        try:
            indices = listed_indices(_folder(path, key), access, pattern, index_of, grid)
        except Exception as error:  # each file system raises different errors
            raise unreadable_error(path, error) from error
        block = (*channels, *scale.block[::-1])
        return StoredChunks((*channels, *scale.size[::-1]), block, indices)

    @override
    def open(self, path: str, options: Options) -> Array:
        info = require_info(path, Access.of(options))
        return _open(path, info, scale_of(path, info, str(options[SCALE])), options)

    @override
    def identity(self, path: str, options: Options) -> str | None:
        content, key = read_info(path, Access.of(options)), str(options[SCALE])
        if content is None:
            return None
        values: Any = content.hex()
        with suppress(StoreError):
            info = parse_info(path, content)
            if key not in info.keys:
                return None
            values = [info.data_type, info.num_channels, key, scale_of(path, info, key).spec]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _find(path: str, level: int | str | None, access: Access) -> ArrayInfo:
    """Return a scale of a volume that can be opened, and whether it has blocks.

    Raises StoreError.
    """
    info = require_info(path, access)
    keys = info.keys
    key = key_of(0 if level is None else level, keys)
    if key is None:
        raise level_error(
            path, level, f"has the levels 0 to {len(keys) - 1} ({', '.join(keys[:8])})"
        )
    scale = scale_of(path, info, key)
    options = {SCALE: key, **access_options(path, access)}
    try:
        existing = _existing_keys(_folder(path, key), access, scale)
    except StoreError:
        raise
    except Exception as error:  # each file system raises different errors
        raise unreadable_error(path, error) from error
    if isinstance(existing, BlockKeys) and existing.suffix:
        options[SUFFIX] = existing.suffix
    if scale.sharding is not None and is_web(path):
        require_parts(path, INFO, access)
    _open(path, info, scale, options)
    return ArrayInfo(
        path,
        axes_of(info, scale),
        info.data_type,
        options,
        is_empty=existing is None,
        named_by=NAMED_BY_INFO,
        storage=(*channels_of(info), *scale.block[::-1]),
    )


def _folder(path: str, key: str) -> str:
    """Return the folder of a scale. A key can lead out of the volume, as in `../8_8_8`."""
    scheme, separator, rest = path.rpartition("://")
    return f"{scheme}{separator}{posixpath.normpath(join(rest, key))}"


def _existing_keys(folder: str, access: Access, scale: Scale) -> BlockKeys | ShardKeys | None:
    """Return the names under which a scale has blocks, or None if it has none.

    Raises the storage's errors, and StoreError for compressed blocks that cannot be read.
    """
    if not all(scale.grid):
        return BlockKeys(scale)
    if scale.sharding is not None:
        sharding = Sharding.model_validate(scale.sharding)
        keys = ShardKeys(sharding.shard_bits)
        return keys_in(folder, access, [sharding.used_shards(scale.grid)], [keys])
    # cloud-volume compresses files of a local volume, and adds a suffix.
    suffixes = ("",) if is_url(folder) else (*DECOMPRESSORS, *OTHER_SUFFIXES)
    existing = keys_in(folder, access, scale.grid, [BlockKeys(scale, s) for s in suffixes])
    if existing is not None and existing.suffix in OTHER_SUFFIXES:
        raise StoreError(
            f"input: {folder}: unsupported compression of blocks {existing.suffix}; expected none "
            "or gzip; store the volume with one of them, or as Zarr",
            code=ErrorCode.STORE_UNSUPPORTED,
        )
    return existing


def _open(path: str, info: Info, scale: Scale, options: Options) -> Array:
    """Open a scale. Raises StoreError."""
    access, folder = Access.of(options), _folder(path, scale.key)
    suffix, key = str(options.get(SUFFIX, "")), folder.rpartition("/")[2]
    layout = ScaleLayout(
        folder,
        key,
        (*channels_of(info), *scale.size[::-1]),
        {
            "driver": "neuroglancer_precomputed",
            "multiscale_metadata": {
                "type": "image",
                "data_type": info.data_type,
                "num_channels": info.num_channels,
            },
            "scale_metadata": {"key": key, **scale.spec},
        },
        BlockKeys(scale),
        np.dtype(info.data_type).itemsize,
        suffix,
    )
    is_lenient, cached = bool(options.get(FORBIDDEN_IS_MISSING)), bool(options.get(CACHED))
    try:
        if scale.sharding is not None:
            storage = _shard_storage(path, folder, access, is_lenient)
            return ShardedArray(path, layout.open(storage, cached=cached), folder)
        document = join(path, INFO) if is_lenient else None
        return open_blocks(path, layout, access, document, cached=cached)
    except ValueError as error:
        raise info_error(path, str(error).partition(" [tensorstore_spec")[0]) from error


def _shard_storage(path: str, folder: str, access: Access, is_lenient: bool) -> dict[str, Any]:
    """Return tensorstore's kvstore with the folder of a sharded scale. Raises StoreError."""
    parent = folder.rpartition("/")[0]
    storage = None if is_lenient else web_kvstore(parent) or kvstore(parent, access)
    if storage is None:
        raise StoreError(
            f"input: {without_secret(path)}: unsupported access to a volume with shards; "
            "tensorstore reads them from local disks, web servers, s3:// and gs://, without "
            "requester_pays, and where missing objects are answered with 404; copy the volume",
            code=ErrorCode.STORE_UNSUPPORTED,
        )
    return storage
