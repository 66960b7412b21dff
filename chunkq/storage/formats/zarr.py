"""Format of Zarr v2 and v3: arrays, and level 0 of OME-Zarr images.

tensorstore reads and writes voxels if it has a driver for the storage and the codec. zarr-python
reads metadata, and all arrays that tensorstore does not support.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq.errors import ErrorCode, StoreError
from chunkq.paths import is_url, join, mask_secrets, open_filesystem, read_bytes, without_secret
from chunkq.storage.array import Array
from chunkq.storage.formats.base import (
    ArrayInfo,
    Format,
    Options,
    missing_error,
    native_dtype,
    unreadable_error,
)
from chunkq.storage.formats.zarr_arrays import TensorStoreArray, ZarrPythonArray, kvstore
from chunkq.storage.formats.zarr_axes import Level, NamedArray, level_of, named_array
from chunkq.storage.ome import MultiscaleImage, channel_labels, first_image

METADATA = ("zarr.json", ".zarray", ".zgroup")
"""Names of the documents of which each Zarr node has one."""
ARRAY_METADATA = METADATA[:2]
"""Names of the documents of which each Zarr array has one."""
ZARR_FORMAT = "zarr_format"
"""Option: version of the Zarr format, 2 or 3."""
UNSAFE_CODECS = frozenset({"pickle"})
"""Codecs of Zarr v2 that can run code from the stored bytes."""
log = logging.getLogger("chunkq.storage")


class ZarrFormat(Format):
    """Zarr arrays and OME-Zarr images, recognized by their metadata documents.

    The identity is the hash of the array's metadata document, so changed chunks do not change it.
    """

    @override
    def detects(self, path: str) -> bool:
        return any(_exists(join(path, name)) for name in METADATA)

    @override
    def find(self, path: str) -> ArrayInfo:
        return self._find(path, None)

    @override
    def find_level(self, path: str, level: int | str) -> ArrayInfo:
        return self._find(path, level)

    def _find(self, path: str, level: int | str | None) -> ArrayInfo:
        try:
            info = None if is_url(path) else _find_local(path, level)
        except (OSError, ValueError, LookupError, TypeError, StoreError):
            info = None
        # zarr-python says what is wrong, but importing it takes longer than anything else.
        return info or self._find_with_zarr_python(path, level)

    def _find_with_zarr_python(self, path: str, level: int | str | None) -> ArrayInfo:
        node = self._open_node(path)
        if _is_array(node):
            if level is not None:
                raise _level_error(path, level, "is an array")
            described = level_of(path, self._attributes) or named_array(
                getattr(node.metadata, "dimension_names", None), dict(node.attrs)
            )
            return _array_info(path, node, described)
        image = _image_of(node, path)
        dataset = image.level(0 if level is None else level)
        if dataset is None:
            raise _level_error(path, level, f"has the levels {_level_names(image)}")
        array_path = join(path, dataset.path)
        array = self._open_node(array_path)
        if not _is_array(array):
            raise _group_error(array, array_path)
        return _array_info(array_path, array, Level(image, dataset, channel_labels(node.attrs)))

    def _attributes(self, path: str) -> dict[str, Any] | None:
        """Return the attributes of a group, or None if there is no readable group."""
        try:
            node = self._open_node(path)
        except (StoreError, OSError):
            return None
        return None if _is_array(node) else dict(node.attrs)

    @override
    def open(self, path: str, options: Options) -> Array:
        if kvstore(path) is None:
            return ZarrPythonArray(path, self._open_array(path))
        try:
            return TensorStoreArray(path, int(options[ZARR_FORMAT]))
        except ValueError as error:
            array = self._open_array(path)
            # tensorstore lacks the codec or dtype: zarr-python reads the same voxels, but slower.
            log.warning("%s is read with zarr-python: %s", without_secret(path), _reason(error))
            return ZarrPythonArray(path, array)

    @override
    def open_for_writing(self, path: str, options: Options) -> Array:
        if kvstore(path) is None:
            return ZarrPythonArray(path, self._open_array(path, "r+"))
        try:
            return TensorStoreArray(path, int(options[ZARR_FORMAT]), write=True)
        except ValueError as error:
            raise StoreError(f"output: {without_secret(path)}: {_reason(error)}") from error

    @override
    def identity(self, path: str, options: Options) -> str | None:
        for name in ARRAY_METADATA:
            try:
                content = read_bytes(join(path, name))
            except (FileNotFoundError, NotADirectoryError):
                continue
            return hashlib.sha256(content).hexdigest()
        return None

    def _open_array(self, path: str, mode: Literal["r", "r+"] = "r") -> Any:
        node = self._open_node(path, mode)
        if not _is_array(node):
            raise _group_error(node, path)
        return node

    def _open_node(self, path: str, mode: Literal["r", "r+"] = "r") -> Any:
        """Open an array or group with zarr-python. Raises StoreError."""
        import zarr

        try:
            node = zarr.open(path, mode=mode)
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
            if not self.detects(path):
                raise missing_error(path) from error
            raise _metadata_error(path, error) from error
        except Exception as error:  # each file system raises different errors
            raise unreadable_error(path, error) from error
        _check_codecs(node, path)
        return node


def _find_local(path: str, level: int | str | None) -> ArrayInfo | None:
    """Return the array at a local path, or None if zarr-python must look at it.

    Errors of documents, of tensorstore and of OME metadata are raised as they are.
    """
    node = _LocalNode.read(path)
    if not node.is_group:
        if level is not None:
            return None
        described = level_of(path, _local_attributes)
        return node.array(path, described or named_array(node.dimension_names, node.attributes))
    image = first_image(node.attributes)
    dataset = None if image is None else image.level(0 if level is None else level)
    if image is None or dataset is None:
        return None
    array_path = join(path, dataset.path)
    array = _LocalNode.read(array_path)
    if array.is_group:
        return None
    return array.array(array_path, Level(image, dataset, channel_labels(node.attributes)))


def _local_attributes(path: str) -> dict[str, Any] | None:
    try:
        node = _LocalNode.read(path)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return node.attributes if node.is_group else None


def _mapping(attributes: Any) -> dict[str, Any]:
    """Return the attributes of a node. Raises ValueError if they are none."""
    if not isinstance(attributes or {}, dict):
        raise ValueError(f"attributes: expected a mapping, found {attributes!r:.80}")
    return attributes or {}


@dataclass(frozen=True)
class _LocalNode:
    """A local group or array, as its documents describe it."""

    zarr_format: int
    is_group: bool
    attributes: dict[str, Any]
    dimension_names: Any = None

    @classmethod
    def read(cls, path: str) -> _LocalNode:
        """Read the documents of a node. Raises ValueError unless there is exactly one document."""
        [name] = [name for name in (*METADATA, ".zmetadata") if _exists(join(path, name))]
        if name == "zarr.json":
            document = json.loads(Path(path, name).read_bytes())
            is_group = document["node_type"] == "group"
            names = document.get("dimension_names")
            return cls(3, is_group, _mapping(document.get("attributes")), names)
        file = Path(path, ".zattrs")
        attributes = json.loads(file.read_bytes()) if file.exists() else {}
        return cls(2, name == ".zgroup", _mapping(attributes))

    def array(self, path: str, described: Level | NamedArray) -> ArrayInfo | None:
        """Return an array that tensorstore opens; None if its dtype is not one of NumPy's."""
        array = TensorStoreArray(path, self.zarr_format)
        dtype = native_dtype(array.dtype)
        if dtype.isbuiltin != 1:
            return None
        return _info(path, array.shape, dtype, self.zarr_format, described)


def array_metadata(
    name: str,
    *,
    shape: Sequence[int],
    chunks: Sequence[int],
    dtype: npt.DTypeLike,
    zarr_format: Literal[2, 3],
    axes: Sequence[str] | None,
) -> dict[str, str]:
    """Return the metadata documents of a new Zarr array, by their paths in its group."""
    import zarr
    from zarr.codecs import BloscCodec
    from zarr.storage import MemoryStore

    compressor: Any
    if zarr_format == 3:
        compressor = BloscCodec(cname="lz4", clevel=5)
        extra: dict[str, Any] = {"dimension_names": axes}
    else:
        import numcodecs

        compressor = numcodecs.Blosc(cname="lz4", clevel=5)
        extra = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    documents: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(documents),
        name=name,
        zarr_format=zarr_format,
        shape=tuple(shape),
        chunks=tuple(chunks),
        dtype=np.dtype(dtype).name,
        compressors=compressor,
        fill_value=0,
        **extra,
    )
    return {
        path: content.to_bytes().decode()
        for path, content in documents.items()
        if path.startswith(f"{name}/")
    }


def _array_info(path: str, array: Any, described: Level | NamedArray) -> ArrayInfo:
    zarr_format = int(array.metadata.zarr_format)
    return _info(path, array.shape, native_dtype(array.dtype), zarr_format, described)


def _info(
    path: str,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    zarr_format: int,
    described: Level | NamedArray,
) -> ArrayInfo:
    return ArrayInfo(
        path,
        described.axes(shape),
        str(dtype),
        {ZARR_FORMAT: zarr_format},
        described.named_by(len(shape)),
        described.labels,
    )


def _is_array(node: Any) -> bool:
    return hasattr(node, "shape")


def _image_of(group: Any, path: str) -> MultiscaleImage:
    """Return the OME-Zarr image that a group describes. Raises StoreError if there is none."""
    try:
        image = first_image(dict(group.attrs))
    except ValueError as error:
        raise _metadata_error(path, error) from error
    if image is None:
        raise _group_error(group, path)
    return image


def _level_names(image: MultiscaleImage) -> str:
    paths = [dataset.path for dataset in image.datasets]
    return f"0 to {len(paths) - 1} ({', '.join(paths[:8])})"


def _level_error(path: str, level: int | str | None, reason: str) -> StoreError:
    return StoreError(
        f"input: {without_secret(path)} {reason}; found level {level!r}; use a level of the image, "
        "or remove level",
        code=ErrorCode.STORE_UNSUPPORTED,
    )


def _group_error(group: Any, path: str) -> StoreError:
    members = ", ".join(sorted(group.keys())[:8])
    return StoreError(
        f"input: {without_secret(path)} is a Zarr group; expected an array; "
        + (f"use one of its members: {members}" if members else "the group is empty"),
        code=ErrorCode.STORE_UNSUPPORTED,
    )


def _metadata_error(path: str, error: Exception) -> StoreError:
    reason = mask_secrets(" ".join(str(error).split()), path)
    return StoreError(
        f"input: {without_secret(path)}: invalid Zarr metadata: {reason}; restore or repair them",
        code=ErrorCode.STORE_UNSUPPORTED,
    )


def _check_codecs(node: Any, path: str) -> None:
    """Raise StoreError if the array has a codec that can run code from the stored bytes."""
    if not _is_array(node):
        return
    metadata = node.metadata.to_dict()
    codecs = [*(metadata.get("filters") or ()), metadata.get("compressor") or {}]
    names = {codec.get("id") for codec in codecs} & UNSAFE_CODECS
    if names:
        raise StoreError(
            f"input: {without_secret(path)}: unsupported codec {names.pop()!r}, which can run "
            "code; store the array with a numeric dtype and another codec",
            code=ErrorCode.CODEC_UNSAFE,
        )


def _exists(path: str) -> bool:
    """Return whether a file exists. Raises OSError if that cannot be determined."""
    try:
        if not is_url(path):
            os.stat(path)
        else:
            filesystem, inner = open_filesystem(path)
            filesystem.info(inner)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _reason(error: Exception) -> str:
    """Return the message of tensorstore's error without the specification it appends."""
    return " ".join(str(error).partition(" [tensorstore_spec")[0].split())
