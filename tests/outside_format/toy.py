"""A format of a package outside chunkq: a line of JSON with shape and dtype, then the voxels."""

import json
import os
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.errors import ChunkReadError, StoreError
from chunkq.geometry.axes import plain_axes
from chunkq.geometry.box import Box
from chunkq.storage.array import Array, box_error
from chunkq.storage.formats.base import ArrayInfo, Format, Options, missing_error, native_dtype


def write_toy(path: Path, values: npt.NDArray[Any]) -> None:
    header = json.dumps({"shape": values.shape, "dtype": values.dtype.str})
    path.write_bytes(header.encode() + b"\n" + values.tobytes())


class ToyArray(Array):
    def __init__(self, path: str, header: dict[str, Any]) -> None:
        self.path, self.shape = path, tuple(header["shape"])
        self._stored = np.dtype(header["dtype"])
        self.dtype = native_dtype(self._stored)

    def read(self, box: Box) -> npt.NDArray[Any]:
        voxels = Path(self.path).read_bytes().partition(b"\n")[2]
        try:
            if len(voxels) != prod(self.shape) * self._stored.itemsize:
                raise ValueError("truncated file")
            values = np.frombuffer(voxels, self._stored).reshape(self.shape)
        except ValueError as error:
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error
        return values[box.slices((0,) * len(self.shape))].astype(self.dtype)


class ToyFormat(Format):
    def detects(self, path: str, options: Options) -> bool:
        return path.endswith(".toy")

    def find(self, path: str, options: Options) -> ArrayInfo:
        array = self.open(path, {})
        return ArrayInfo(path, plain_axes(array.shape), str(array.dtype), {"header": 1})

    def open(self, path: str, options: Options) -> Array:
        try:
            with open(path, "rb") as file:
                return ToyArray(path, json.loads(file.readline()))
        except FileNotFoundError:
            raise missing_error(path) from None
        except ValueError:
            raise StoreError(f"input: {path}: invalid header") from None

    def identity(self, path: str, options: Options) -> str | None:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return None
        return f"{status.st_size} {status.st_mtime_ns}"
