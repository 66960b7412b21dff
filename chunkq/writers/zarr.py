"""Writer of OME-Zarr images with resolution levels."""

from __future__ import annotations

import json
from typing import Any, Literal

from typing_extensions import override

from chunkq.plan.chunk_choice import STORAGE_EDGE
from chunkq.storage.array import Array
from chunkq.storage.formats.zarr import ZARR_FORMAT, ZarrFormat
from chunkq.storage.formats.zarr_writing import array_metadata
from chunkq.storage.objects import ObjectFolder
from chunkq.storage.ome import image_metadata, is_image
from chunkq.writers.base import (
    DEFAULT_OPTIONS,
    ImageToWrite,
    WriterOptions,
    stored_dtype,
)
from chunkq.writers.pyramid import PyramidWriter

DTYPES = frozenset(
    {
        "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
        "float16", "float32", "float64",
    }
)  # fmt: skip
FORMAT: Literal[3] = 3
DOCUMENT = "zarr.json"


class ZarrWriter(PyramidWriter):
    """OME-Zarr 0.5: a group with one array per level, named `0`, `1`, …

    Time and channels come before the spatial axes, as OME-Zarr requires.
    """

    def __init__(
        self, image: ImageToWrite, path: str, options: WriterOptions = DEFAULT_OPTIONS
    ) -> None:
        super().__init__(image, path, options)
        dtype = stored_dtype(image, DTYPES, {})
        if dtype is None:
            raise self.refused(f"unsupported dtype {image.dtype}; use one of numbers")
        self.dtype = dtype
        leading = [*image.numbers("time"), *image.numbers("channel")]
        self.orientation = tuple((n, 1) for n in (*leading, *image.numbers("space")))
        edge = STORAGE_EDGE[max(1, len(image.numbers("space")))]
        sizes = [image.axes[n].size for n, _ in self.orientation]
        chunk = options.chunks or tuple(
            1 if number in leading else min(edge, size)
            for (number, _), size in zip(self.orientation, sizes, strict=True)
        )
        self._lay_out(chunk)

    @override
    def _create(self, path: str) -> None:
        objects = ObjectFolder(path)
        names = [axis.name for axis in self.axes] if is_image(self.axes) else None
        for number in range(len(self.levels) + 1):
            documents = array_metadata(
                str(number),
                shape=self.level_shape(number),
                chunks=self.chunk,
                dtype=self.dtype,
                fill_value=0,
                zarr_format=FORMAT,
                axes=names,
            )
            for name, text in documents.items():
                objects.put(name, text.encode())

    @override
    def _open(self, path: str, number: int) -> Array:
        return ZarrFormat().open_for_writing(f"{path}/{number}", {ZARR_FORMAT: FORMAT})

    @override
    def _finish(self, path: str) -> None:
        axes = {str(n): self.level_axes(n) for n in range(len(self.levels) + 1)}
        method = self.method if self.levels else None
        attributes: dict[str, Any] = image_metadata(axes, FORMAT, method)
        if self.image.values is not None:
            attributes["chunkq"] = self.image.values.attributes
        group = {"zarr_format": FORMAT, "node_type": "group", "attributes": attributes}
        ObjectFolder(path).put(DOCUMENT, json.dumps(group, indent=2).encode())
