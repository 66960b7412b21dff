"""What the server of a viewer gives out: folders, files, and arrays presented as Zarr."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from typing_extensions import override

from chunkq.access import Access
from chunkq.geometry.axes import Axis
from chunkq.geometry.box import Box
from chunkq.paths import is_url, join, open_filesystem
from chunkq.storage.array import Array
from chunkq.storage.formats.stored_objects import NOTHING
from chunkq.storage.ome import image_metadata

EDGE = 64
"""Voxels of a served storage chunk along each spatial axis."""


class Served(ABC):
    """Objects by name. Methods are thread-safe."""

    @abstractmethod
    def path(self, name: str) -> str | None:
        """Return the path of a local file, or None if the object is none."""

    @abstractmethod
    def content(self, name: str) -> bytes | None:
        """Return an object that is no local file, or None if it does not exist."""


@dataclass(frozen=True)
class ServedFolder(Served):
    """A folder, local or at a URL."""

    root: str
    access: Access

    @override
    def path(self, name: str) -> str | None:
        if is_url(self.root):
            return None
        root = os.path.realpath(self.root)
        path = os.path.realpath(os.path.join(root, name))
        is_inside = path.startswith(f"{root.rstrip(os.sep)}{os.sep}")
        return path if is_inside and os.path.isfile(path) else None

    @override
    def content(self, name: str) -> bytes | None:
        if not is_url(self.root) or ".." in name.split("/"):
            return None
        filesystem, inner = open_filesystem(self.root, self.access)
        try:
            content: bytes = filesystem.cat_file(join(inner, name))
        except NOTHING:
            return None
        return content


@dataclass(frozen=True)
class ServedArray(Served):
    """An array of any format, presented as an OME-Zarr image of one level without compression."""

    array: Array
    axes: tuple[Axis, ...]

    @override
    def path(self, name: str) -> str | None:
        return None

    @override
    def content(self, name: str) -> bytes | None:
        if name in self._documents:
            return self._documents[name]
        parts = name.split("/")
        if parts[:2] != ["0", "c"] or not all(part.isdecimal() for part in parts[2:]):
            return None
        index = [int(part) for part in parts[2:]]
        if len(index) != len(self._chunk):
            return None
        start = [i * step for i, step in zip(index, self._chunk, strict=True)]
        sizes = [axis.size for axis in self.axes]
        if any(low >= size for low, size in zip(start, sizes, strict=True)):
            return None
        stop = [min(a + b, c) for a, b, c in zip(start, self._chunk, sizes, strict=True)]
        return self._encoded(Box(tuple(start), tuple(stop)))

    def _encoded(self, box: Box) -> bytes:
        """Return the voxels of a storage chunk; those outside of the array are 0."""
        import numpy as np

        values = np.zeros(self._chunk, self.array.dtype)
        values[tuple(slice(0, length) for length in box.shape)] = self.array.read(box)
        return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()

    @property
    def _chunk(self) -> tuple[int, ...]:
        return tuple(EDGE if axis.kind == "space" else 1 for axis in self.axes)

    @cached_property
    def _documents(self) -> dict[str, bytes]:
        array = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [axis.size for axis in self.axes],
            "data_type": self.array.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self._chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "dimension_names": [axis.name for axis in self.axes],
            "attributes": {},
        }
        attributes: dict[str, Any] = image_metadata({"0": self.axes}, 3)
        group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        documents = {"zarr.json": group, "0/zarr.json": array}
        return {name: json.dumps(values).encode() for name, values in documents.items()}
