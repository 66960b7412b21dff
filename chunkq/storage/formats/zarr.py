"""Format of Zarr v2 and v3: arrays, and level 0 of OME-Zarr images.

tensorstore reads and writes voxels if it has a driver for the storage and the codec. zarr-python
reads metadata, and all arrays that tensorstore does not support.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axes import Axis, plain_axes
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
from chunkq.storage.ome import MultiscaleImage, first_image, read_axes

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
        try:
            info = None if is_url(path) else _find_local(path)
        except (OSError, ValueError, LookupError, TypeError, StoreError):
            info = None
        # zarr-python says what is wrong, but importing it takes longer than anything else.
        return info or self._find_with_zarr_python(path)

    def _find_with_zarr_python(self, path: str) -> ArrayInfo:
        node = self._open_node(path)
        if _is_array(node):
            return _array_info(path, node, plain_axes(node.shape))
        image = _image_of(node, path)
        level = join(path, image.datasets[0].path)
        array = self._open_node(level)
        if not _is_array(array):
            raise _group_error(array, level)
        return _array_info(level, array, read_axes(image, array.shape))

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


def _find_local(path: str) -> ArrayInfo | None:
    """Return the array at a local path, or None if zarr-python must look at it.

    Errors of documents, of tensorstore and of OME metadata are raised as they are.
    """
    zarr_format, attributes = _local_node(path)
    if attributes is None:
        return _local_array(path, zarr_format, plain_axes)
    image = first_image(attributes)
    if image is None:
        return None
    level = join(path, image.datasets[0].path)
    zarr_format, attributes = _local_node(level)
    if attributes is not None:
        return None
    return _local_array(level, zarr_format, lambda shape: read_axes(image, shape))


def _local_node(path: str) -> tuple[int, dict[str, Any] | None]:
    """Return the Zarr format of a node, and its attributes if it is a group.

    Raises ValueError unless there is exactly one document.
    """
    [name] = [name for name in (*METADATA, ".zmetadata") if _exists(join(path, name))]
    if name == "zarr.json":
        document = json.loads(Path(path, name).read_bytes())
        is_group = document["node_type"] == "group"
        return 3, document.get("attributes", {}) if is_group else None
    attributes = Path(path, ".zattrs")
    if name == ".zgroup":
        return 2, json.loads(attributes.read_bytes()) if attributes.exists() else {}
    return 2, None


def _local_array(
    path: str, zarr_format: int, axes: Callable[[Sequence[int]], tuple[Axis, ...]]
) -> ArrayInfo | None:
    """Return an array that tensorstore opens; None if its dtype is not one of NumPy's."""
    array = TensorStoreArray(path, zarr_format)
    dtype = native_dtype(array.dtype)
    is_numpy = dtype.isbuiltin == 1
    options = {ZARR_FORMAT: zarr_format}
    return ArrayInfo(path, axes(array.shape), str(dtype), options) if is_numpy else None


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


def _array_info(path: str, array: Any, axes: tuple[Axis, ...]) -> ArrayInfo:
    options = {ZARR_FORMAT: int(array.metadata.zarr_format)}
    return ArrayInfo(path, axes, str(native_dtype(array.dtype)), options)


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
