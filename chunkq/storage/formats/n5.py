"""Format of N5: datasets, and levels of multiscale groups."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from chunkq.access import Access, is_forbidden
from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.box import Box
from chunkq.paths import is_web, join, without_secret
from chunkq.storage.array import Array
from chunkq.storage.formats.base import (
    CACHED,
    NO_OPTIONS,
    ArrayInfo,
    LeveledFormat,
    Options,
    missing_error,
    unreadable_error,
)
from chunkq.storage.formats.n5_metadata import (
    ATTRIBUTES,
    N5Node,
    group_members,
    parse_n5_node,
)
from chunkq.storage.formats.tensorstore_arrays import BlockLayout, block_indices, open_blocks
from chunkq.storage.formats.zarr_chunks import ChunkKeys, keys_in, listed_indices
from chunkq.storage.formats.zarr_nodes import (
    FORBIDDEN_IS_MISSING,
    access_options,
    first_document,
    level_error,
)
from chunkq.storage.stored_chunks import StoredChunks

BLOCK_KEYS = ChunkKeys("v2", "/")
"""Names of blocks, such as `0/1/2`; x is first."""


@dataclass(frozen=True)
class N5Layout(BlockLayout):
    """Blocks of an N5 dataset. `shape` and `block` are presented, z first."""

    folder: str
    shape: tuple[int, ...]
    block: tuple[int, ...]
    spec: Mapping[str, Any]
    key: str = ""

    @override
    def present(self, store: Any) -> Any:
        return store.T

    @override
    def names(self, box: Box) -> Iterator[str]:
        for index in block_indices(box.start, box.stop, self.block):
            yield BLOCK_KEYS.name(index[::-1])


class N5Format(LeveledFormat):
    """N5 datasets and levels of multiscale groups, recognized by `attributes.json`.

    Stored axes are x, y, z, …; arrays are presented in the opposite order. The identity is a hash
    of the attributes that determine the voxels.
    """

    @override
    def detects(self, path: str, options: Options = NO_OPTIONS) -> bool:
        names = (ATTRIBUTES, f"s0/{ATTRIBUTES}")
        return first_document(path, Access.of(options), names) is not None

    @override
    def find_any(self, path: str, level: int | str | None, access: Access) -> ArrayInfo:
        return _find(path, level, access)

    @override
    def stored_chunks(self, path: str, options: Options) -> StoredChunks | None:
        if options.get(FORBIDDEN_IS_MISSING) or is_web(path):
            return None
        access = Access.of(options)
        node = _read(path, access)
        if node is None:
            raise missing_error(path)
        dataset = node.dataset
        shape, block = dataset.dimensions[::-1], dataset.block[::-1]
        try:
            indices = listed_indices(
                path,
                access,
                BLOCK_KEYS.pattern(len(shape)),
                lambda name: [int(n) for n in reversed(name.split("/"))],
                dataset.grid[::-1],
            )
        except Exception as error:  # each file system raises different errors
            raise unreadable_error(path, error) from error
        return StoredChunks(shape, block, indices)

    @override
    def open(self, path: str, options: Options) -> Array:
        node = _read(path, Access.of(options))
        if node is None:
            raise missing_error(path)
        return _open(node, options)

    @override
    def identity(self, path: str, options: Options) -> str | None:
        access = Access.of(options)
        document = first_document(path, access, [ATTRIBUTES])
        if document is None:
            return None
        values: Any = document[1].hex()
        with suppress(StoreError):
            values = parse_n5_node(path, document[1], access).dataset.metadata
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read(path: str, access: Access) -> N5Node | None:
    """Return the node at a path. Raises StoreError if it cannot be read."""
    try:
        document = first_document(path, access, [ATTRIBUTES])
    except StoreError:
        raise
    except Exception as error:  # each file system raises different errors
        raise unreadable_error(path, error) from error
    return None if document is None else parse_n5_node(path, document[1], access)


def _find(path: str, level: int | str | None, access: Access) -> ArrayInfo:
    """Return a dataset, or a level of a group. Raises StoreError."""
    refusal: StoreError | None = None
    try:
        node = _read(path, access)
    except StoreError as error:
        if not is_forbidden(error.__cause__ or error):
            raise
        node, refusal = None, error
    if node is not None and node.is_dataset:
        if level is not None:
            raise level_error(path, level, "is an array")
        return _array_info(node)
    # A group need not have attributes, and a server can refuse what does not exist.
    members = [] if node is not None else group_members(path, access)
    group = node or N5Node(path, {}, access)
    levels = group.level_paths()
    if node is None and not levels and not members:
        raise refusal or missing_error(path)
    if not levels:
        raise _group_error(group)
    wanted = 0 if level is None else level
    if isinstance(wanted, int):
        dataset = levels[wanted] if wanted < len(levels) else None
    else:
        dataset = wanted if wanted in levels else None
    if dataset is None:
        names = f"0 to {len(levels) - 1} ({', '.join(levels[:8])})"
        raise level_error(path, level, f"has the levels {names}")
    array = _read(join(path, dataset), access)
    if array is None:
        raise StoreError(
            f"input: {without_secret(join(path, dataset))} is missing, although it is level "
            f"{wanted} of {without_secret(path)}; restore it",
            code=ErrorCode.STORE_MISSING,
        )
    if not array.is_dataset:
        raise _group_error(array)
    return _array_info(array)


def _array_info(node: N5Node) -> ArrayInfo:
    """Return a dataset that can be opened, and whether it has blocks."""
    dataset = node.dataset
    options = access_options(node.path, node.access)
    _open(node, options)
    grid = dataset.grid
    try:
        keys = keys_in(node.path, node.access, grid, [BLOCK_KEYS]) if all(grid) else BLOCK_KEYS
    except Exception as error:  # each file system raises different errors
        raise unreadable_error(node.path, error) from error
    axes, named_by = node.axes()
    return ArrayInfo(
        node.path,
        axes,
        dataset.dtype,
        options,
        is_empty=keys is None,
        named_by=named_by,
        storage=dataset.block[::-1],
    )


def _open(node: N5Node, options: Options) -> Array:
    """Open a dataset. Raises StoreError."""
    if not node.is_dataset:
        raise _group_error(node)
    dataset = node.dataset
    layout = N5Layout(
        node.path,
        dataset.dimensions[::-1],
        dataset.block[::-1],
        {"driver": "n5", "metadata": dataset.metadata},
    )
    is_lenient = bool(options.get(FORBIDDEN_IS_MISSING))
    try:
        return open_blocks(
            node.path,
            layout,
            node.access,
            join(node.path, ATTRIBUTES) if is_lenient else None,
            cached=bool(options.get(CACHED)),
        )
    except ValueError as error:
        raise node.error(str(error).partition(" [tensorstore_spec")[0]) from error


def _group_error(group: N5Node) -> StoreError:
    members = group_members(group.path, group.access)
    hint = f"use one of its members: {', '.join(members)}" if members else "name one of its members"
    return StoreError(
        f"input: {without_secret(group.path)} is an N5 group without levels; expected a dataset; "
        f"{hint}",
        code=ErrorCode.STORE_UNSUPPORTED,
    )
