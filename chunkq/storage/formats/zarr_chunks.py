"""Names of the storage chunks of an array, and whether any of them exists."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from chunkq.access import S3_SCHEMES, Access, is_forbidden
from chunkq.paths import is_url, is_web, join, open_filesystem
from chunkq.storage.formats.stored_objects import NOTHING
from chunkq.storage.formats.zarr_nodes import ZarrNode

MAX_PROBES = 64
"""Storage chunks that are asked for by name where objects cannot be listed."""
PROBES_AT_ONCE = 16
MAX_ENTRIES = 20_000
"""Files and folders that are listed in search of a storage chunk."""
S3_PAGE = 1000
"""Objects in one answer of S3 to a listing."""


class Keys(Protocol):
    """Names of storage chunks in the folder of an array."""

    def name(self, index: Sequence[int]) -> str:
        """Return the name of a storage chunk."""

    def pattern(self, rank: int) -> re.Pattern[str]:
        """Return a pattern that names of storage chunks match as a whole."""


AnyKeys = TypeVar("AnyKeys", bound=Keys)


@dataclass(frozen=True)
class ChunkKeys:
    """Names of storage chunks in the folder of an array: `chunk_key_encoding` of Zarr v3.

    `encoding` is "v2" (`0.1.2`) or "default" (`c/0/1/2`), `separator` a dot or a slash.
    """

    encoding: str
    separator: str

    @classmethod
    def parse(cls, text: str) -> ChunkKeys:
        """Return the keys from the result of `str`."""
        return cls(text[:-1], text[-1])

    def __str__(self) -> str:
        return f"{self.encoding}{self.separator}"

    def name(self, index: Sequence[int]) -> str:
        """Return the name of a storage chunk."""
        prefix = ["c"] if self.encoding == "default" else []
        return self.separator.join([*prefix, *map(str, index)])

    def pattern(self, rank: int) -> re.Pattern[str]:
        """Return a pattern that names of storage chunks match as a whole."""
        separator = re.escape(self.separator)
        prefix = f"c{separator}" if self.encoding == "default" else ""
        return re.compile(prefix + separator.join([r"\d+"] * rank))

    def index(self, name: str) -> tuple[int, ...]:
        """Return the index of the storage chunk with a name that matches the pattern."""
        return tuple(map(int, re.findall(r"\d+", name)))


def stored_keys(node: ZarrNode) -> ChunkKeys:
    """Return the keys that the metadata of an array name, or imply."""
    return document_keys(node.document, node.zarr_format)


def document_keys(document: Mapping[str, Any], zarr_format: int) -> ChunkKeys:
    """Return the keys that the metadata document of an array names, or implies."""
    if zarr_format == 2:
        return ChunkKeys("v2", document.get("dimension_separator") or ".")
    encoding = document.get("chunk_key_encoding")
    encoding = encoding if isinstance(encoding, dict) else {"name": encoding}
    name = "v2" if encoding.get("name") == "v2" else "default"
    configuration = encoding.get("configuration") or encoding
    return ChunkKeys(name, configuration.get("separator") or ("." if name == "v2" else "/"))


def with_keys(node: ZarrNode, keys: ChunkKeys) -> dict[str, Any]:
    """Return the metadata of an array with other names of its storage chunks."""
    if node.zarr_format == 2:
        return {**node.metadata, "dimension_separator": keys.separator}
    encoding = {"name": keys.encoding, "configuration": {"separator": keys.separator}}
    return {**node.metadata, "chunk_key_encoding": encoding}


def existing_keys(node: ZarrNode, shape: Sequence[int], chunks: Sequence[int]) -> ChunkKeys | None:
    """Return names under which the array has storage chunks, or None if it has none.

    `chunks` is the shape of what one object stores, a chunk or a shard. The names of the metadata
    come first. They are also returned if the storage is too large to tell. Raises the storage's
    errors.
    """
    stored = stored_keys(node)
    if not shape or not prod(shape):
        return stored
    encodings = ("v2",) if node.zarr_format == 2 else ("default", "v2")
    others = (ChunkKeys(encoding, separator) for encoding in encodings for separator in "/.")
    candidates = [stored, *(keys for keys in others if keys != stored)]
    grid = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
    return keys_in(node.path, node.access, grid, candidates)


def keys_in(
    path: str, access: Access, grid: Sequence[int], candidates: Sequence[AnyKeys]
) -> AnyKeys | None:
    """Return the first candidate whose names a folder has, or None if it has none of them.

    `grid` has the number of storage chunks along each axis. The first candidate is also returned if
    the storage is too large to tell. Raises the storage's errors.
    """
    if not is_url(path):
        return _match(_walk(path, _list_local), len(grid), candidates)
    filesystem, inner = open_filesystem(path, access)
    is_s3 = path.partition("://")[0] in S3_SCHEMES
    if is_s3:
        with suppress(PermissionError):
            return _match(_list_s3(filesystem, inner), len(grid), candidates)
    if is_s3 or is_web(path):
        return _probe(filesystem, inner, grid, candidates)
    names = _walk(inner, lambda folder: _list_remote(filesystem, folder))
    return _match(names, len(grid), candidates)


def list_chunks(
    node: ZarrNode, keys: ChunkKeys, shape: Sequence[int], chunks: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Return the indices of the storage chunks that exist, int64 (n, rank), by one listing.

    `chunks` is the shape of what one object stores. Objects with other names are left out. Raises
    the storage's errors.
    """
    prefix = len(keys.name(()))
    grid = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]

    def index_of(name: str) -> Sequence[int]:
        return [int(n) for n in name[prefix:].removeprefix(keys.separator).split(keys.separator)]

    return listed_indices(node.path, node.access, keys.pattern(len(shape)), index_of, grid)


def listed_indices(
    path: str,
    access: Access,
    pattern: re.Pattern[str],
    index_of: Callable[[str], Sequence[int]],
    grid: Sequence[int],
) -> npt.NDArray[np.int64]:
    """Return the indices of the objects in a folder whose names match, int64 (n, rank).

    `index_of` returns the index for a name. Indices outside of the grid are left out. Raises the
    storage's errors.
    """
    if is_url(path):
        filesystem, inner = open_filesystem(path, access)
        root = inner.rstrip("/") + "/"
        names: Iterable[str | None] = (name.removeprefix(root) for name in filesystem.find(inner))
    else:
        names = _walk(path, _list_local, is_limited=False)
    rows = [index_of(name) for name in names if name is not None and pattern.fullmatch(name)]
    indices = np.array(rows, dtype=np.int64).reshape(-1, len(grid))
    return indices[((indices >= 0) & (indices < grid)).all(axis=1)]


def _match(names: Iterable[str | None], rank: int, candidates: Sequence[AnyKeys]) -> AnyKeys | None:
    """Return the first candidate for the names of files; None in `names` ends a search early."""
    patterns = [(keys, keys.pattern(rank)) for keys in candidates]
    others: list[AnyKeys] = []
    for name in names:
        if name is None:
            return candidates[0]
        for keys, pattern in patterns:
            if pattern.fullmatch(name):
                if keys == candidates[0]:
                    return keys
                if keys not in others:
                    others.append(keys)
                break
    return next((keys for keys in candidates if keys in others), None)


def _walk(
    root: str,
    entries: Callable[[str], Iterable[tuple[str, bool]]],
    *,
    is_limited: bool = True,
) -> Iterator[str | None]:
    """Yield the names of files below a folder, relative to it; None after `MAX_ENTRIES`.

    `entries` returns the names in a folder, and whether each is a folder. Folders that cannot
    contain storage chunks are left out. Files come before the content of folders.
    """
    remaining = MAX_ENTRIES if is_limited else math.inf
    pending = [""]
    while pending:
        folder = pending.pop()
        for name, is_folder in entries(join(root, folder) if folder else root):
            remaining -= 1
            if remaining < 0:
                yield None
                return
            path = f"{folder}/{name}" if folder else name
            if not is_folder:
                yield path
            elif re.fullmatch(r"\d+|c", name):
                pending.append(path)


def _list_local(folder: str) -> Iterator[tuple[str, bool]]:
    with suppress(*NOTHING), os.scandir(folder) as entries:
        for entry in entries:
            yield entry.name, entry.is_dir()


def _list_remote(filesystem: Any, folder: str) -> Iterator[tuple[str, bool]]:
    try:
        entries = filesystem.ls(folder, detail=True)
    except NOTHING:
        return
    for entry in entries:
        name = entry["name"].rstrip("/").rpartition("/")[2]
        yield name, entry["type"] == "directory"


def _list_s3(filesystem: Any, inner: str) -> Iterator[str | None]:
    """Yield the names of the first objects below a folder, in their order; None if there are more.

    Only `.zarray`, `.zattrs` and similar documents sort before digits.
    """
    is_truncated = False
    bucket, _, key = inner.partition("/")
    prefix = f"{key.rstrip('/')}/" if key else ""
    for start in dict.fromkeys((prefix, f"{prefix}c")):
        listing = filesystem.call_s3(
            "list_objects_v2", Bucket=bucket, Prefix=start, MaxKeys=S3_PAGE, **filesystem.req_kw
        )
        for entry in listing.get("Contents", ()):
            yield entry["Key"].removeprefix(prefix)
        if listing.get("IsTruncated"):
            is_truncated = True
    if is_truncated:
        yield None


def _probe(
    filesystem: Any, inner: str, grid: Sequence[int], candidates: Sequence[AnyKeys]
) -> AnyKeys | None:
    """Ask for some storage chunks by name: those in the middle first, then others evenly spread."""

    def exists(name: str) -> bool:
        try:
            filesystem.info(join(inner, name))
        except NOTHING:
            return False
        except Exception as error:  # each file system raises different errors
            if is_forbidden(error):
                return False
            raise
        return True

    indices = _spread(grid)
    with ThreadPoolExecutor(PROBES_AT_ONCE) as pool:
        for keys in candidates:
            names = iter([keys.name(index) for index in indices])
            while batch := list(islice(names, PROBES_AT_ONCE)):
                if any(pool.map(exists, batch)):
                    return keys
    return None


def _spread(grid: Sequence[int]) -> list[tuple[int, ...]]:
    """Return up to `MAX_PROBES` indices of storage chunks, that in the middle first."""
    count = prod(grid)
    middle = 0
    for size in grid:
        middle = middle * size + size // 2
    probes = min(count, MAX_PROBES)
    numbers = dict.fromkeys([middle, *(count * n // probes for n in range(probes)), count - 1])
    return [_unravel(number, grid) for number in islice(numbers, MAX_PROBES)]


def _unravel(number: int, grid: Sequence[int]) -> tuple[int, ...]:
    """Return the index of a number in C order."""
    index = []
    for size in reversed(grid):
        number, position = divmod(number, size)
        index.append(position)
    return tuple(reversed(index))
