"""Stored volumes: open an array, create its metadata, read boxes with padding, write boxes.

tensorstore reads and writes voxels if it has a driver for the storage and the codec. zarr-python
reads and writes metadata, and all arrays that tensorstore does not support. Boxes cover all axes
of the stored array, including channels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq import buffers
from chunkq.box import Box
from chunkq.errors import ChunkReadError, ErrorCode, StoreError
from chunkq.ome import Space, first_image, read_space
from chunkq.padding import PadMode, source_indices, source_range
from chunkq.paths import is_url, join, open_filesystem, read_bytes, without_secret
from chunkq.plan import Volume

NPY_HEADER_LOCK = threading.Lock()
"""Lock for reading a `.npy` header. NumPy parses it as Python code, which is not thread-safe in
CPython before 3.13."""

NPY_HEADER_BYTES = 128
"""Number of bytes at the start of a `.npy` file that contain dtype and shape."""
NO_LOCKS = {"mode": "none"}
"""tensorstore's option to write without file locks. Every object has one writer, and a lock of a
suspended process would block all others."""

UNSAFE_CODECS = frozenset({"pickle"})
"""Codecs of Zarr v2 that can run code from the stored bytes."""
log = logging.getLogger("chunkq.stores")
Voxels = npt.NDArray[Any]


class Array(ABC):
    """A stored array. Reading and writing are thread-safe."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def read(self, box: Box) -> Voxels:
        """Read a box inside the array; shape `box.shape`. Raises ChunkReadError."""

    def write(self, box: Box, values: Voxels) -> None:
        """Write whole storage chunks, each of them atomically. Raises OSError."""
        raise StoreError(f"{self.path}: this type of array is read-only; use a Zarr array")


class TensorStoreArray(Array):
    """Zarr array read and written by tensorstore: local files, S3, GCS."""

    def __init__(self, path: str, zarr_format: int, *, write: bool = False) -> None:
        import tensorstore as ts

        self.path = path
        self._store = ts.open(
            {
                "driver": "zarr3" if zarr_format == 3 else "zarr",
                "kvstore": _kvstore(path),
            },
            open=True,
            read=True,
            write=write,
        ).result()
        self.shape = tuple(self._store.shape)
        self.dtype = self._store.dtype.numpy_dtype

    @override
    def read(self, box: Box) -> Voxels:
        import tensorstore as ts

        try:
            values: Voxels = buffers.zeros(box.shape, self.dtype)
            region = self._store[box.slices((0,) * len(self.shape))]
            ts.array(values, copy=False, write=True).write(region).result()
        except (ValueError, OSError, RuntimeError) as error:
            raise ChunkReadError(_box_error(self.path, box, "read", error)) from error
        return values

    @override
    def write(self, box: Box, values: Voxels) -> None:
        try:
            self._store[box.slices((0,) * len(self.shape))].write(values).result()
        except (ValueError, RuntimeError) as error:
            raise OSError(_box_error(self.path, box, "written", error)) from error


class ZarrPythonArray(Array):
    """Zarr array read and written by zarr-python, if tensorstore has no driver or codec."""

    def __init__(self, path: str, array: Any) -> None:
        self.path, self._array = path, array
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype)

    @override
    def read(self, box: Box) -> Voxels:
        try:
            return np.asarray(self._array[box.slices((0,) * len(self.shape))])
        except Exception as error:
            raise ChunkReadError(_box_error(self.path, box, "read", error)) from error

    @override
    def write(self, box: Box, values: Voxels) -> None:
        self._array[box.slices((0,) * len(self.shape))] = values


class NpyArray(Array):
    """`.npy` file in C order. Local files are memory-mapped, URLs are read in byte ranges."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._filesystem, self._inner = open_filesystem(path)
        try:
            with NPY_HEADER_LOCK, self._filesystem.open(self._inner, "rb") as file:
                version = np.lib.format.read_magic(file)
                read_header = np.lib.format.read_array_header_1_0
                if version != (1, 0):
                    read_header = np.lib.format.read_array_header_2_0
                self.shape, is_fortran, self.dtype = read_header(file)
                self._data_offset = file.tell()
        except (ValueError, EOFError) as error:
            raise StoreError(
                f"input: {without_secret(path)}: invalid .npy file: {error}; "
                "save it again with numpy.save",
                code=ErrorCode.STORE_UNSUPPORTED,
            ) from None
        if is_fortran or self.dtype.hasobject:
            order = "Fortran order" if is_fortran else f"dtype {self.dtype}"
            raise StoreError(
                f"input: {without_secret(path)}: unsupported {order}; "
                "save the .npy file in C order with a numeric dtype",
                code=ErrorCode.STORE_UNSUPPORTED,
            )

    @override
    def read(self, box: Box) -> Voxels:
        rows, inner = slice(box.start[0], box.stop[0]), box.slices((0,) * len(self.shape))[1:]
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        try:
            if not is_url(self.path):
                mapped = np.memmap(self._inner, self.dtype, "r", self._data_offset, self.shape)
                return buffers.cast(mapped[(rows, *inner)], self.dtype)
            content = self._filesystem.cat_file(
                self._inner,
                start=self._data_offset + rows.start * row_bytes,
                end=self._data_offset + rows.stop * row_bytes,
            )
            values = np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:])
        except (OSError, ValueError) as error:
            raise ChunkReadError(_box_error(self.path, box, "read", error)) from error
        return values[(slice(None), *inner)]


@dataclass(frozen=True)
class Source:
    """An input volume: the path of its array, its shape and dtype, and its physical space."""

    array_path: str
    volume: Volume
    space: Space


def find_source(path: str) -> Source:
    """Inspect an input path: a Zarr array, an OME-Zarr image (its level 0) or a `.npy` file.

    Raises StoreError if the path does not exist or is not an array.
    """
    if path.endswith(".npy"):
        array = _open_npy(path)
        return _plain_source(path, array.shape, array.dtype)
    node = _open_node(path)
    if hasattr(node, "shape"):
        return _plain_source(path, tuple(node.shape), np.dtype(node.dtype))
    image = first_image(dict(node.attrs))
    if image is None:
        members = ", ".join(sorted(node.keys())[:8])
        raise StoreError(
            f"input: {without_secret(path)} is a Zarr group; expected an array; "
            + (f"use one of its members: {members}" if members else "the group is empty"),
            code=ErrorCode.STORE_UNSUPPORTED,
        )
    level = find_source(join(path, image["datasets"][0]["path"]))
    space = read_space(image, len(level.volume.shape))
    return Source(level.array_path, level.volume, space)


def open_array(path: str, *, write: bool = False) -> Array:
    """Open an existing array. Raises StoreError if it cannot be opened."""
    if path.endswith(".npy"):
        return _open_npy(path)
    zarr_format = _local_format(path)
    if zarr_format is not None:
        with suppress(ValueError):  # opened with zarr-python below, which raises a clear error
            return TensorStoreArray(path, zarr_format, write=write)
    node = _open_node(path, mode="r+" if write else "r")
    if not hasattr(node, "shape"):
        raise StoreError(
            f"{without_secret(path)}: found a Zarr group; expected an array",
            code=ErrorCode.STORE_UNSUPPORTED,
        )
    if _kvstore(path) is not None:
        try:
            return TensorStoreArray(path, node.metadata.zarr_format, write=write)
        except ValueError as error:
            if write:
                raise StoreError(f"output: {without_secret(path)}: {error}") from error
            # tensorstore lacks the codec or dtype: zarr-python reads the same voxels, but slower.
            log.warning("%s is read with zarr-python: %s", without_secret(path), error)
    return ZarrPythonArray(path, node)


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


def input_identity(path: str) -> str | None:
    """Return a string that changes when the array is replaced; None if the array is missing.

    For a Zarr array, the string is the hash of its metadata document, so changed chunks do not
    change it. For a `.npy` file, it has the size, the time of modification (at a URL, the unique
    key of fsspec) and the hash of the header. Raises OSError.
    """
    filesystem, inner = open_filesystem(path)
    try:
        if path.endswith(".npy"):
            return f"{_file_state(path, inner, filesystem)} {_npy_header_hash(inner, filesystem)}"
    except FileNotFoundError:
        return None
    for name in ("zarr.json", ".zarray"):
        try:
            content = read_bytes(join(path, name))
        except (FileNotFoundError, NotADirectoryError):
            continue
        return hashlib.sha256(content).hexdigest()
    return None


def _file_state(path: str, inner: str, filesystem: Any) -> str:
    if is_url(path):
        return str(filesystem.ukey(inner))
    status = os.stat(inner)
    return f"{status.st_size} {status.st_mtime_ns}"


def _npy_header_hash(inner: str, filesystem: Any) -> str:
    return hashlib.sha256(filesystem.cat_file(inner, start=0, end=NPY_HEADER_BYTES)).hexdigest()


def read_padded(array: Array, window: Box, mode: PadMode, value: float) -> Voxels:
    """Read a window of the array, padded like `np.pad` without limit; shape `window.shape`.

    The window must intersect the array.
    """
    axes = list(zip(window.start, window.stop, array.shape, strict=True))
    bounds = [
        source_range(np.asarray(low), np.asarray(high), size, mode) for low, high, size in axes
    ]
    source_box = Box(tuple(int(b[0]) for b in bounds), tuple(int(b[1]) for b in bounds))
    values = array.read(source_box)
    for axis, (low, high, size) in enumerate(axes):
        if low >= 0 and high <= size:
            continue
        indices = source_indices(low, high, size, mode)
        shape = (*values.shape[:axis], len(indices), *values.shape[axis + 1 :])
        padded = buffers.zeros(shape, values.dtype)
        positions = np.maximum(indices - source_box.start[axis], 0)
        # mode="clip", because np.take copies `out` with mode="raise"
        np.take(values, positions, axis=axis, out=padded, mode="clip")
        if mode == "constant":
            padded[(slice(None),) * axis + (indices < 0,)] = value
        values = padded
    return values


def _open_npy(path: str) -> NpyArray:
    try:
        return NpyArray(path)
    except FileNotFoundError:
        raise _missing_error(path) from None
    except OSError as error:
        raise StoreError(f"input: {without_secret(path)} cannot be read: {error}") from None


def _missing_error(path: str) -> StoreError:
    return StoreError(
        f"input: {without_secret(path)} does not exist; fix the path",
        code=ErrorCode.STORE_MISSING,
    )


def _plain_source(path: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Source:
    return Source(path, Volume(shape, str(dtype)), Space.plain(len(shape)))


def _open_node(path: str, mode: Any = "r") -> Any:
    """Open a Zarr array or group with zarr-python.

    Raises StoreError if the path does not exist or has no Zarr metadata.
    """
    import zarr

    printed_path = without_secret(path)
    filesystem, inner = open_filesystem(path)
    try:
        if not is_url(path) and not os.path.isdir(inner):
            if not os.path.exists(inner):
                raise _missing_error(path)
            raise StoreError(
                f"input: {printed_path} is a file; "
                "expected a Zarr store or a .npy file; convert it, for example with "
                "zarr.create_array('volume.zarr', data=array)",
                code=ErrorCode.STORE_UNSUPPORTED,
            )
        if is_url(path):
            # One request first: an unreachable server would fail each of zarr's parallel requests.
            filesystem.exists(join(inner, "zarr.json"))
        node = zarr.open(path, mode=mode)
        _check_codecs(node, path)
        return node
    except StoreError:
        raise
    except (FileNotFoundError, ValueError, KeyError) as error:
        if not filesystem.exists(inner):
            raise _missing_error(path) from error
        raise StoreError(
            f"input: {printed_path} has no Zarr metadata; expected a Zarr array; fix the path",
            code=ErrorCode.STORE_UNSUPPORTED,
        ) from error
    except Exception as error:
        raise StoreError(f"input: {printed_path} cannot be opened: {error}") from error


def _check_codecs(node: Any, path: str) -> None:
    """Raise StoreError if the array has a codec that can run code from the stored bytes."""
    if not hasattr(node, "shape"):
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


def _local_format(path: str) -> Literal[2, 3] | None:
    """Return the Zarr format of a local array, or None if zarr-python must detect it.

    Avoids the import of zarr, which takes longer than all other steps of a worker's start.
    """
    if is_url(path):
        return None
    try:
        with open(join(path, "zarr.json"), "rb") as file:
            metadata = json.load(file)
    except FileNotFoundError:
        return 2 if os.path.isfile(join(path, ".zarray")) else None
    except (OSError, ValueError):
        return None
    return 3 if isinstance(metadata, dict) and metadata.get("node_type") == "array" else None


def _kvstore(path: str) -> Any:
    """Return tensorstore's kvstore spec of a path, or None if tensorstore has no driver."""
    if not is_url(path):
        return {"driver": "file", "path": path + "/", "file_io_locking": NO_LOCKS}
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": key + "/"}
    if scheme != "s3":
        return None
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key + "/"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # Without this, the AWS library logs errors about missing credential files.
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def _box_error(path: str, box: Box, verb: str, error: Exception) -> str:
    reason = str(error).partition("\n")[0][:300]
    voxels = f"voxels {list(box.start)} to {list(box.stop)}"
    return f"{without_secret(path)}: {voxels} cannot be {verb}: {reason}"
