"""Volumes on disk and in buckets: open, create, read a box with padding, write a box.

tensorstore carries the voxels wherever it has a driver, zarr-python the metadata and the rest.
Boxes cover all axes of the stored array, channels included.
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
from chunkq.ome import Space, first_image, space_of
from chunkq.padding import PadMode, source_indices, source_range
from chunkq.paths import is_url, join, open_filesystem, read_bytes, without_secret
from chunkq.plan import Volume

HEADERS = threading.Lock()
"""Held while a `.npy` header is read: as Python code, which CPython before 3.13 can do only once
at a time."""

HEADER_BYTES = 128
"""Bytes at the beginning of a `.npy` file that hold dtype and shape."""
NO_LOCKS = {"mode": "none"}
"""Every object has one writer, and a suspended process that held a lock would block all others."""

CODE_CODECS = frozenset({"pickle"})
"""Codecs of Zarr v2 that run code which the stored bytes name; older numcodecs do not ask."""
log = logging.getLogger("chunkq.stores")
Voxels = npt.NDArray[Any]


class Array(ABC):
    """One stored array. Reading and writing are thread-safe."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def read(self, box: Box) -> Voxels:
        """Return the voxels of a box inside the array; raises ChunkReadError."""

    def write(self, box: Box, values: Voxels) -> None:
        """Write whole storage chunks; each appears at once or not at all."""
        raise StoreError(f"{self.path}: this kind of array can only be read")


class TensorStoreArray(Array):
    """A Zarr array through tensorstore: local files, S3, GCS."""

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
            asked = self._store[box.slices((0,) * len(self.shape))]
            ts.array(values, copy=False, write=True).write(asked).result()
        except (ValueError, OSError, RuntimeError) as error:
            raise ChunkReadError(_failure(self.path, box, "read", error)) from error
        return values

    @override
    def write(self, box: Box, values: Voxels) -> None:
        try:
            self._store[box.slices((0,) * len(self.shape))].write(values).result()
        except (ValueError, RuntimeError) as error:
            raise OSError(_failure(self.path, box, "written", error)) from error


class ZarrPythonArray(Array):
    """A Zarr array through zarr-python, where tensorstore has no driver or codec."""

    def __init__(self, path: str, array: Any) -> None:
        self.path, self._array = path, array
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype)

    @override
    def read(self, box: Box) -> Voxels:
        try:
            return np.asarray(self._array[box.slices((0,) * len(self.shape))])
        except Exception as error:
            raise ChunkReadError(_failure(self.path, box, "read", error)) from error

    @override
    def write(self, box: Box, values: Voxels) -> None:
        self._array[box.slices((0,) * len(self.shape))] = values


class NpyArray(Array):
    """A `.npy` file in C order: mapped into memory, or read in byte ranges from a URL."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._filesystem, self._inner = open_filesystem(path)
        try:
            with HEADERS, self._filesystem.open(self._inner, "rb") as file:
                version = np.lib.format.read_magic(file)
                header = np.lib.format.read_array_header_1_0
                if version != (1, 0):
                    header = np.lib.format.read_array_header_2_0
                self.shape, fortran, self.dtype = header(file)
                self._origin = file.tell()
        except (ValueError, EOFError) as error:
            raise StoreError(f"{path}: not a .npy file: {error}") from None
        if fortran or self.dtype.hasobject:
            raise StoreError(f"{path}: only .npy files in C order with plain numbers can be read")

    @override
    def read(self, box: Box) -> Voxels:
        rows, inner = slice(box.start[0], box.stop[0]), box.slices((0,) * len(self.shape))[1:]
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        try:
            if not is_url(self.path):
                mapped = np.memmap(self._inner, self.dtype, "r", self._origin, self.shape)
                return buffers.cast(mapped[(rows, *inner)], self.dtype)
            content = self._filesystem.cat_file(
                self._inner,
                start=self._origin + rows.start * row_bytes,
                end=self._origin + rows.stop * row_bytes,
            )
            values = np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:])
        except (OSError, ValueError) as error:
            raise ChunkReadError(_failure(self.path, box, "read", error)) from error
        return values[(slice(None), *inner)]


@dataclass(frozen=True)
class Source:
    """An input volume as found: where its array is and what is known of its space."""

    array_path: str
    volume: Volume
    space: Space


def find_source(path: str) -> Source:
    """Look at an input path: a Zarr array, an OME-Zarr image (its level 0), or a `.npy` file.

    Raises StoreError in one line if there is nothing, or nothing that is an array.
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
            f"input: {without_secret(path)} is a Zarr group, not an array; "
            + (f"name one of its members: {members}" if members else "and it is empty")
        )
    found = find_source(join(path, image["datasets"][0]["path"]))
    space = space_of(image, len(found.volume.shape))
    return Source(found.array_path, found.volume, space)


def open_array(path: str, *, write: bool = False) -> Array:
    """Open an array that exists; raises StoreError if it does not."""
    if path.endswith(".npy"):
        return _open_npy(path)
    zarr_format = _local_format(path)
    if zarr_format is not None:
        with suppress(ValueError):  # raised again, with a message, on the way through zarr-python
            return TensorStoreArray(path, zarr_format, write=write)
    node = _open_node(path, mode="r+" if write else "r")
    if not hasattr(node, "shape"):
        raise StoreError(f"{without_secret(path)}: is no array")
    if _kvstore(path) is not None:
        try:
            return TensorStoreArray(path, node.metadata.zarr_format, write=write)
        except ValueError as error:
            if write:
                raise StoreError(f"output: {without_secret(path)}: {error}") from error
            # A codec or dtype that only zarr-python knows: the same voxels, more slowly.
            log.warning("%s is read through zarr-python: %s", without_secret(path), error)
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
    """Return the metadata documents of a new Zarr array, by their names below its group."""
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
    own = {path: content for path, content in documents.items() if path.startswith(f"{name}/")}
    return {path: content.to_bytes().decode() for path, content in own.items()}


def input_identity(path: str) -> str | None:
    """Return a text that changes when the array at `path` is replaced; None if it is gone.

    Of a Zarr array it is the hash of its metadata document, so other chunks are not noticed. Of a
    `.npy` file it is the file's size, time of change (behind a URL, what the storage says of it)
    and header. Raises OSError as the storage does.
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
    return hashlib.sha256(filesystem.cat_file(inner, start=0, end=HEADER_BYTES)).hexdigest()


def read_padded(array: Array, window: Box, mode: PadMode, value: float) -> Voxels:
    """Return a window of the endlessly padded array; shape `window.shape`.

    Outside the array the voxels are those `np.pad` would put there. The window meets the array.
    """
    axes = list(zip(window.start, window.stop, array.shape, strict=True))
    bounds = [
        source_range(np.asarray(low), np.asarray(high), size, mode) for low, high, size in axes
    ]
    real = Box(tuple(int(b[0]) for b in bounds), tuple(int(b[1]) for b in bounds))
    values = array.read(real)
    for number, (low, high, size) in enumerate(axes):
        if low >= 0 and high <= size:
            continue
        indices = source_indices(low, high, size, mode)
        shape = (*values.shape[:number], len(indices), *values.shape[number + 1 :])
        taken = buffers.zeros(shape, values.dtype)
        there = np.maximum(indices - real.start[number], 0)
        np.take(values, there, axis=number, out=taken, mode="clip")  # "raise" would buffer it
        if mode == "constant":
            taken[(slice(None),) * number + (indices < 0,)] = value
        values = taken
    return values


def _open_npy(path: str) -> NpyArray:
    try:
        return NpyArray(path)
    except FileNotFoundError:
        raise StoreError(f"input: no file {without_secret(path)}") from None
    except OSError as error:
        raise StoreError(f"input: {without_secret(path)} cannot be read: {error}") from None


def _plain_source(path: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Source:
    return Source(path, Volume(shape, str(dtype)), Space.plain(len(shape)))


def _open_node(path: str, mode: Any = "r") -> Any:
    """Open a Zarr array or group with zarr-python; StoreError says what is there instead."""
    import zarr

    shown = without_secret(path)
    filesystem, inner = open_filesystem(path)
    try:
        if not is_url(path) and not os.path.isdir(inner):
            there = "a file, not a Zarr store or .npy" if os.path.exists(inner) else "not there"
            raise StoreError(f"input: {shown} is {there}")
        if is_url(path):
            # A server that is away shows here; zarr's many requests at once would each complain.
            filesystem.exists(join(inner, "zarr.json"))
        node = zarr.open(path, mode=mode)
        _check_codecs(node, path)
        return node
    except StoreError:
        raise
    except (FileNotFoundError, ValueError, KeyError) as error:
        exists = filesystem.exists(inner)
        reason = "holds no Zarr array" if exists else "is not there"
        raise StoreError(f"input: {shown} {reason}") from error
    except Exception as error:
        raise StoreError(f"input: {shown} cannot be opened: {error}") from error


def _check_codecs(node: Any, path: str) -> None:
    """Raise StoreError for an array whose voxels run code when they are read."""
    if not hasattr(node, "shape"):
        return
    metadata = node.metadata.to_dict()
    codecs = [*(metadata.get("filters") or ()), metadata.get("compressor") or {}]
    names = {codec.get("id") for codec in codecs} & CODE_CODECS
    if names:
        raise StoreError(
            f"input: {without_secret(path)} is stored with the codec {names.pop()!r}, which can "
            "run code when it is read; store it as plain numbers",
            code=ErrorCode.CODEC_UNSAFE,
        )


def _local_format(path: str) -> Literal[2, 3] | None:
    """Return the Zarr format of a local array, or None where zarr-python has to find out.

    Importing zarr takes longer than all other steps of a worker's start.
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
    """Return tensorstore's key-value spec for a path, or None where it has no driver."""
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
        # Else the AWS library first looks for files and complains when there are none.
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def _failure(path: str, box: Box, verb: str, error: Exception) -> str:
    first = str(error).partition("\n")[0][:300]
    where = f"voxels {list(box.start)} to {list(box.stop)}"
    return f"{without_secret(path)}: {where} cannot be {verb}: {first}"
