"""Format of Zarr v2 and v3: arrays, and level 0 of OME-Zarr images.

tensorstore reads and writes voxels if it has a driver for the storage and the codec. zarr-python
reads the arrays that tensorstore does not support.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from chunkq.access import DEFAULT_ACCESS, Access
from chunkq.errors import ErrorCode, StoreError
from chunkq.paths import is_web, join, without_secret
from chunkq.storage.array import Array
from chunkq.storage.formats.base import (
    CACHED,
    NO_OPTIONS,
    NUMBERS,
    ArrayInfo,
    LeveledFormat,
    Options,
    missing_error,
    native_dtype,
    unreadable_error,
)
from chunkq.storage.formats.tensorstore_arrays import kvstore
from chunkq.storage.formats.zarr_arrays import TensorStoreArray, ZarrPythonArray
from chunkq.storage.formats.zarr_axes import Level, NamedArray, level_of, named_array
from chunkq.storage.formats.zarr_chunks import (
    ChunkKeys,
    existing_keys,
    list_chunks,
    stored_keys,
    with_keys,
)
from chunkq.storage.formats.zarr_nodes import (
    ARRAY_METADATA,
    ATTRIBUTES,
    FORBIDDEN_IS_MISSING,
    ZarrNode,
    access_options,
    dtype_error,
    fetch_document,
    first_document,
    level_error,
    member_names,
    metadata_error,
    read_node,
    require_parts,
)
from chunkq.storage.formats.zarr_writing import WritableZarr
from chunkq.storage.ome import MultiscaleImage, channel_labels, first_image
from chunkq.storage.stored_chunks import StoredChunks

ZARR_FORMAT = "zarr_format"
"""Option: version of the Zarr format, 2 or 3."""
CHUNK_KEYS = "chunk_keys"
"""Option: names of the storage chunks (`ChunkKeys`), if the metadata name them otherwise."""
SHARDING = "sharding_indexed"
"""Codec of arrays with shards."""
CODEC_PACKAGES = {
    "crc32c": "numcodecs[crc32c]",
    "flac": "flac-numcodecs",
    "imagecodecs": "imagecodecs",
    "msgpack2": "numcodecs[msgpack]",
    "pcodec": "numcodecs[pcodec]",
    "wavpack": "wavpack-numcodecs",
    "zfpy": "numcodecs[zfpy]",
}
"""Codec, or its name up to an underscore -> the package that provides it."""
log = logging.getLogger("chunkq.storage")


class ZarrFormat(LeveledFormat):
    """Zarr arrays and OME-Zarr images, recognized by their metadata documents.

    Each array is read with its own document, never with consolidated metadata of a group. The
    identity is the hash of the document, so changed chunks do not change it.
    """

    @override
    def detects(self, path: str, options: Options = NO_OPTIONS) -> bool:
        try:
            return read_node(path, Access.of(options)) is not None
        except StoreError as error:
            if error.code is ErrorCode.STORE_UNSUPPORTED:
                return True  # a document that is invalid
            raise

    @override
    def find_any(self, path: str, level: int | str | None, access: Access) -> ArrayInfo:
        return _find(path, level, access)

    @override
    def stored_chunks(self, path: str, options: Options) -> StoredChunks | None:
        node = _require_node(path, Access.of(options))
        shape = tuple(node.document["shape"])
        chunks = _stored_chunks(node)
        if chunks is None or options.get(FORBIDDEN_IS_MISSING) or is_web(path):
            return None
        keys = ChunkKeys.parse(str(options[CHUNK_KEYS])) if CHUNK_KEYS in options else None
        try:
            indices = list_chunks(node, keys or stored_keys(node), shape, chunks)
        except Exception as error:  # each file system raises different errors
            raise unreadable_error(node.path, error) from error
        return StoredChunks(shape, chunks, indices)

    @override
    def open(self, path: str, options: Options) -> Array:
        array, reason = _open_node(_require_node(path, Access.of(options)), options)
        if reason:
            # tensorstore lacks the codec or dtype: zarr-python reads the same voxels, but slower.
            log.warning("%s is read with zarr-python: %s", without_secret(path), reason)
        return array

    @override
    def open_for_writing(self, path: str, options: Options) -> WritableZarr:
        node = _require_node(path, DEFAULT_ACCESS)
        array, _ = _open_node(node, options)
        try:
            return WritableZarr(array, node.metadata, node.zarr_format)
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"output: {without_secret(path)}: {_reason(error)}") from error

    @override
    def identity(self, path: str, options: Options) -> str | None:
        document = first_document(path, Access.of(options), ARRAY_METADATA)
        return None if document is None else hashlib.sha256(document[1]).hexdigest()


def _find(path: str, level: int | str | None, access: Access) -> ArrayInfo:
    """Return an array, or a level of an image. Raises StoreError."""
    node = _require_node(path, access)
    if node.is_array:
        if level is not None:
            raise level_error(path, level, "is an array")
        described = level_of(path, lambda parent: _group_attributes(parent, access))
        names = node.document.get("dimension_names")
        return _array_info(node, described or named_array(names, node.attributes))
    image = _image_of(node)
    dataset = image.level(0 if level is None else level)
    if dataset is None:
        raise level_error(path, level, f"has the levels {_level_names(image)}")
    name = f"level {0 if level is None else level} of {without_secret(path)}"
    array = _require_node(join(path, dataset.path), access, name)
    if not array.is_array:
        raise _group_error(array)
    return _array_info(array, Level(image, dataset, channel_labels(node.attributes)))


def _group_attributes(path: str, access: Access) -> dict[str, Any] | None:
    """Return the attributes of a group, or None if there is no readable group."""
    try:
        node = read_node(path, access)
    except Exception:  # each file system raises different errors
        return None
    return None if node is None or node.is_array else node.attributes


def _require_node(path: str, access: Access, description: str = "") -> ZarrNode:
    """Return the node at a path. Raises StoreError if there is none or it cannot be read."""
    try:
        node = read_node(path, access)
    except StoreError:
        raise
    except Exception as error:  # each file system raises different errors
        raise unreadable_error(path, error) from error
    if node is None and description:
        raise StoreError(
            f"input: {without_secret(path)} is missing, although it is {description}; restore it",
            code=ErrorCode.STORE_MISSING,
        )
    if node is None:
        raise missing_error(path)
    return node


def _array_info(node: ZarrNode, described: Level | NamedArray) -> ArrayInfo:
    """Return an array that can be opened, and whether it has storage chunks."""
    options = {ZARR_FORMAT: node.zarr_format, **access_options(node.path, node.access)}
    path = without_secret(node.path)
    array, _ = _open_node(node, options)
    if is_web(node.path) and SHARDING in node.codecs():
        require_parts(node.path, node.name, node.access)
    dtype = native_dtype(array.dtype)
    if dtype.type.__module__ != "numpy" or dtype.kind not in NUMBERS:
        raise dtype_error(join(node.path, node.name), str(dtype))
    stored = stored_keys(node)
    try:
        keys = existing_keys(node, array.shape, _stored_chunks(node) or array.shape)
    except Exception as error:  # each file system raises different errors
        raise unreadable_error(node.path, error) from error
    if keys not in (None, stored):
        options[CHUNK_KEYS] = str(keys)
        first = (0,) * len(array.shape)
        log.warning(
            "%s: expected chunks with names such as %s, found names such as %s, which are read",
            path, stored.name(first), keys.name(first),
        )  # fmt: skip
    return ArrayInfo(
        node.path,
        described.axes(array.shape),
        str(dtype),
        options,
        is_empty=keys is None,
        named_by=described.named_by(len(array.shape)),
        labels=described.labels,
        storage=_read_chunks(node),
    )


def _stored_chunks(node: ZarrNode) -> tuple[int, ...] | None:
    """Return the shape of a storage chunk, or of a shard; None if they differ in shape."""
    if node.zarr_format == 2:
        return tuple(node.document["chunks"])
    grid = node.document["chunk_grid"]
    shape = grid.get("configuration", {}).get("chunk_shape")
    return tuple(shape) if grid.get("name") == "regular" and shape else None


def _read_chunks(node: ZarrNode) -> tuple[int, ...]:
    """Return the shape of what is read at once: a storage chunk, or a chunk of a shard."""
    for codec in node.document.get("codecs") or ():
        if codec.get("name") == SHARDING:
            return tuple(codec["configuration"]["chunk_shape"])
    return _stored_chunks(node) or ()


def _open_node(node: ZarrNode, options: Options) -> tuple[Array, str]:
    """Open an array, with tensorstore if possible; return it and why tensorstore did not open it.

    Raises StoreError.
    """
    metadata, reason = node.metadata, ""
    if CHUNK_KEYS in options:
        metadata = with_keys(node, ChunkKeys.parse(str(options[CHUNK_KEYS])))
    is_lenient = bool(options.get(FORBIDDEN_IS_MISSING))
    if not is_lenient and kvstore(node.path, node.access) is not None:
        # Not `!=`: false equals 0.
        is_changed = json.dumps(metadata) != json.dumps(node.document)
        changed = metadata if is_changed else None
        try:
            array = TensorStoreArray(
                node.path,
                node.zarr_format,
                access=node.access,
                metadata=changed,
                cached=bool(options.get(CACHED)),
            )
        except (ValueError, OSError, RuntimeError) as error:
            reason = _reason(error)
        else:
            return array, ""
    from chunkq.storage.formats.zarr_python import lenient_store, open_array, open_store

    store = open_store(node.path, node.access)
    check: Callable[[], None] = lambda: None  # noqa: E731
    if is_lenient:
        store, check = lenient_store(
            store, lambda: fetch_document(node.path, node.name, node.access)
        )
    try:
        return ZarrPythonArray(node.path, open_array(store, metadata), check), reason
    except Exception as error:  # zarr-python and the codecs raise different errors
        raise _array_error(node, error) from error


def _array_error(node: ZarrNode, error: Exception) -> StoreError:
    """Return the error for an array that neither tensorstore nor zarr-python opens."""
    for codec in node.codecs():
        # Older releases of zarr-python raise KeyError.
        is_unknown = isinstance(error, KeyError) or type(error).__name__ == "UnknownCodecError"
        if is_unknown and codec in str(error):
            name = codec.removeprefix("numcodecs.")
            package = CODEC_PACKAGES.get(name) or CODEC_PACKAGES.get(name.partition("_")[0])
            return StoreError(
                f"input: {without_secret(join(node.path, node.name))}: codec {codec!r} is not "
                f"installed; install {package or 'the package that provides it'}",
                code=ErrorCode.PACKAGE_MISSING,
            )
    return metadata_error(node.path, node.name, f"{error}" or type(error).__name__)


def _image_of(group: ZarrNode) -> MultiscaleImage:
    """Return the OME-Zarr image that a group describes. Raises StoreError if there is none."""
    name = group.name if group.zarr_format == 3 else ATTRIBUTES
    try:
        image = first_image(group.attributes)
    except StoreError:
        raise
    except ValueError as error:
        raise metadata_error(group.path, name, str(error)) from error
    if image is None:
        raise _group_error(group)
    return image


def _level_names(image: MultiscaleImage) -> str:
    paths = [dataset.path for dataset in image.datasets]
    if len(paths) == 1:
        return f"0 only ({paths[0]})"
    return f"0 to {len(paths) - 1} ({', '.join(paths[:8])})"


def _group_error(group: ZarrNode) -> StoreError:
    members = member_names(group.path, group.access)
    hint = f"use one of its members: {', '.join(members)}" if members else "the group is empty"
    return StoreError(
        f"input: {without_secret(group.path)} is a Zarr group; expected an array; {hint}",
        code=ErrorCode.STORE_UNSUPPORTED,
    )


def _reason(error: Exception) -> str:
    """Return the message of tensorstore's error without the specification it appends."""
    return " ".join(str(error).partition(" [tensorstore_spec")[0].split())
