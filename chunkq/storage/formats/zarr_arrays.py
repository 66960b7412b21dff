"""Zarr arrays, read and written by tensorstore or by zarr-python."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from typing_extensions import override

from chunkq.errors import ChunkReadError
from chunkq.geometry.box import Box
from chunkq.paths import is_url
from chunkq.storage.array import Array, Voxels, box_error
from chunkq.storage.formats.base import native_dtype
from chunkq.system import buffers

NO_LOCKS = {"mode": "none"}
"""tensorstore's option to write without file locks. Every object has one writer, and a lock of a
suspended process would block all others."""


class TensorStoreArray(Array):
    """Zarr array read and written by tensorstore: local files, S3, GCS.

    Raises ValueError if tensorstore cannot open it, for example for lack of a codec.
    """

    def __init__(self, path: str, zarr_format: int, *, write: bool = False) -> None:
        import tensorstore as ts

        self.path = path
        self._store = ts.open(
            {
                "driver": "zarr3" if zarr_format == 3 else "zarr",
                "kvstore": kvstore(path),
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
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error
        return values

    @override
    def write(self, box: Box, values: Voxels) -> None:
        try:
            self._store[box.slices((0,) * len(self.shape))].write(values).result()
        except (ValueError, RuntimeError) as error:
            raise OSError(box_error(self.path, box, "written", error)) from error


class ZarrPythonArray(Array):
    """Zarr array read and written by zarr-python, if tensorstore has no driver or codec."""

    def __init__(self, path: str, array: Any) -> None:
        self.path, self._array = path, array
        self.shape, self.dtype = tuple(array.shape), native_dtype(array.dtype)

    @override
    def read(self, box: Box) -> Voxels:
        try:
            return np.asarray(self._array[box.slices((0,) * len(self.shape))], self.dtype)
        except Exception as error:
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error

    @override
    def write(self, box: Box, values: Voxels) -> None:
        self._array[box.slices((0,) * len(self.shape))] = values


def kvstore(path: str) -> dict[str, Any] | None:
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
