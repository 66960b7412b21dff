"""Writer of OME-TIFF files: BigTIFF, tiled, with a pyramid along y and x."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from itertools import product
from math import lcm, prod
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from typing_extensions import override

from chunkq.blend.downsampling import downsample
from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axis_units import METERS, SECONDS, common_unit, unit_factor, voxel_sizes
from chunkq.geometry.levels import Level, pyramid_levels
from chunkq.install_hint import install_command
from chunkq.plan.object_sizes import StoredSize
from chunkq.storage.array import Voxels
from chunkq.writers.base import (
    DEFAULT_OPTIONS,
    FileWriter,
    ImageToWrite,
    Report,
    WriterOptions,
    deflated_bytes,
    stored_dtype,
)
from chunkq.writers.blocks import COPY_BYTES, Blocks, as_bytes

DTYPES = frozenset({"uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"})
REPLACED = {"float16": "float32", "bool": "uint8"}
"""Dtypes that OME-TIFF does not have -> one that holds all of their values."""
LETTERS = "tczyx"
"""Axes of a file in the order of its pages."""
TILE = 256
"""Edge of a tile (pixels)."""
PLANE_RANK = 2
COMPRESSION: Mapping[str, Any] = MappingProxyType(
    {"compression": "zlib", "compressionargs": {"level": 1}}
)
ENCODED_BYTES = 16 << 20
"""Bytes of tiles that are compressed at a time."""
UNITS: MappingProxyType[str, str] = MappingProxyType(
    {
        "angstrom": "Å",
        "nanometer": "nm",
        "micrometer": "µm",
        "millimeter": "mm",
        "centimeter": "cm",
        "meter": "m",
        "microsecond": "µs",
        "millisecond": "ms",
        "second": "s",
        "minute": "min",
        "hour": "h",
    }
)
"""Unit of an axis -> its name in OME-XML."""
TILE_ENTRY_BYTES = 16
"""Position and size of a tile in its page."""
PAGE_BYTES, XML_BYTES = 1024, 4096
"""Most bytes of the tags of a page with its position in OME-XML, and of the rest of OME-XML."""
NO_UNIT = "pixel"
NAMESPACE = uuid.UUID("f3f0b7a4-4e0c-4c55-9d25-6b0f7a1a5a10")
"""Namespace of the identifiers of files, which would be random otherwise."""


class TiffWriter(FileWriter):
    """OME-TIFF. Pages are y, x; they follow each other along time, channels and z.

    Each page has its smaller versions in sub-IFDs, as readers of pyramids expect; z is not reduced.
    Sizes of voxels are positive: an axis that runs backwards keeps the order of its voxels, and has
    no position.
    """

    def __init__(
        self, image: ImageToWrite, path: str, options: WriterOptions = DEFAULT_OPTIONS
    ) -> None:
        super().__init__(image, path, options)
        self._check_package()
        letters = self._letters()
        dtype = stored_dtype(image, DTYPES, REPLACED)
        if dtype is None:
            raise self.refused(f"OME-TIFF has no dtype {image.dtype}; set --dtype, or use Zarr")
        self.dtype = dtype
        order = sorted(range(len(letters)), key=lambda number: LETTERS.index(letters[number]))
        self.orientation = tuple((number, 1) for number in order)
        self._image = image.presented(self.orientation)
        self._letters_stored = "".join(sorted(letters, key=LETTERS.index))
        self._levels = self._pyramid()
        self.blocks = self._blocks()
        falling = [axis.name for axis in self._image.axes if axis.scale < 0]
        if falling:
            self.notes = (
                f"output: {self.name}: {', '.join(falling)} runs backwards, which OME-TIFF cannot "
                "store; the order of the voxels is kept, the position is not stored",
            )

    def _check_package(self) -> None:
        try:
            import tifffile  # noqa: F401
        except ImportError as error:
            raise StoreError(
                f"output: {self.name}: TIFF files need tifffile ({error}); run "
                f"`{install_command('tiff')}`",
                code=ErrorCode.PACKAGE_MISSING,
            ) from None

    def _letters(self) -> list[str]:
        """Return the letter of each axis of the image."""
        letters = {"time": "t", "channel": "c"}
        found = [letters.get(axis.kind, "") for axis in self.image.axes]
        spatial = self.image.numbers("space")
        names = [self.image.axes[number].name for number in spatial]
        if not set(names) <= set("zyx") or len(set(names)) < len(names) or names == ["z"]:
            names = list("zyx")[3 - len(names) :]
        for number, name in zip(spatial, names, strict=False):
            found[number] = name
        if not {"y", "x"} <= set(found) or "" in found or len(set(found)) < len(found):
            axes = ", ".join(axis.name for axis in self.image.axes)
            raise self.refused(
                f"OME-TIFF has the axes t, c, z, y, x, and needs y and x; found {axes}; use Zarr"
            )
        return found

    def _pyramid(self) -> tuple[Level, ...]:
        y, x = self._image.axes[-PLANE_RANK:]
        edges = (TILE, TILE)
        sizes = voxel_sizes((y, x))
        return pyramid_levels((y.size, x.size), sizes, edges, edges, edges, self.options.levels)

    def _blocks(self) -> Blocks:
        """Return blocks of whole pages, or if a page is too large of whole rows of tiles."""
        shape, storage = self._image.shape, self._image.storage
        page = prod(shape[-PLANE_RANK:]) * self.dtype.itemsize
        planes = max(1, COPY_BYTES // page)
        if page > COPY_BYTES:
            rows = min(self._rows(COPY_BYTES), shape[-2])
            return Blocks(shape, (*(1,) * (len(shape) - 2), rows, shape[-1]))
        block = [1] * (len(shape) - PLANE_RANK)
        if block:
            edge = storage[len(block) - 1] if storage else 1
            planes = planes // edge * edge or planes
            block[-1] = min(planes, shape[len(block) - 1])
        return Blocks(shape, (*block, *shape[-PLANE_RANK:]))

    def _rows(self, size: int) -> int:
        """Return the number of rows of a page in `size` bytes, of which levels are whole rows."""
        unit = lcm(TILE, *(level.total[0] for level in self._levels))
        row = self._image.shape[-1] * self.dtype.itemsize
        return max(1, size // (row * unit)) * unit

    @property
    @override
    def size(self) -> StoredSize:
        shapes = [self._image.shape[-PLANE_RANK:], *(level.shape for level in self._levels)]
        pages = prod(self._image.shape[:-PLANE_RANK])
        size = XML_BYTES + pages * sum(map(self._page_bytes, shapes))
        return StoredSize.of_file(size, is_exact=False)

    def _page_bytes(self, shape: tuple[int, ...]) -> int:
        """Return how many bytes a page has at most in the file."""
        tiles = prod(-(-edge // TILE) for edge in shape)
        size = prod(shape) * self.dtype.itemsize
        padding = tiles * TILE**PLANE_RANK * self.dtype.itemsize - size
        return deflated_bytes(size, padding, tiles) + tiles * TILE_ENTRY_BYTES + PAGE_BYTES

    @property
    @override
    def steps(self) -> int:
        return self.blocks.count + len(self._levels)

    @override
    def write(self, path: str, voxels: Iterator[Voxels], report: Report, first: int = 0) -> None:
        import tifffile

        with (
            ExitStack() as stack,
            tifffile.TiffWriter(path, bigtiff=True, byteorder="<", ome=True) as writer,
        ):
            scratch = [
                stack.enter_context(_Scratch(f"{path}.level{number}"))
                for number in range(1, len(self._levels) + 1)
            ]
            writer.write(
                _tiles(self._with_levels(voxels, scratch, report)),
                shape=self._image.shape,
                dtype=self.dtype,
                subifds=len(self._levels),
                metadata=self._metadata(),
                **self._options(),
            )
            report(self.blocks.count)
            for number, level in enumerate(self._levels):
                shape = (*self._image.shape[:-PLANE_RANK], *level.shape)
                writer.write(
                    _tiles(scratch[number].rows(shape, self.dtype)),
                    shape=shape,
                    dtype=self.dtype,
                    subfiletype=1,
                    metadata=None,
                    **self._options(),
                )
                report(self.blocks.count + number + 1)

    def _options(self) -> dict[str, Any]:
        return {
            "tile": (TILE, TILE),
            "photometric": "minisblack",
            "buffersize": ENCODED_BYTES,
            **COMPRESSION,
        }

    def _with_levels(
        self, voxels: Iterator[Voxels], scratch: list[_Scratch], report: Report
    ) -> Iterator[Voxels]:
        """Write the levels of blocks to the scratch files, then yield the blocks."""
        steps = iter(range(1, self.blocks.count))
        for values in voxels:
            self._reduce(values, scratch)
            yield values  # the last one returns only if tifffile asks for more
            del values  # before the next one is read
            if (done := next(steps, None)) is not None:
                report(done)

    def _reduce(self, values: Voxels, scratch: list[_Scratch]) -> None:
        """Write the levels of a block to the scratch files."""
        method = self.options.method or ("mode" if self.image.is_labels else "mean")
        for part in self._parts(values):
            reduced = part
            for level, file in zip(self._levels, scratch, strict=True):
                reduced = downsample(reduced, level.factors, method)
                file.append(reduced)

    def _parts(self, values: Voxels) -> Iterator[Voxels]:
        """Yield the pages of a block, in parts of whole rows if they are large.

        A level is computed in wider dtypes, whose arrays would be larger than the block.
        """
        rows = self._rows(ENCODED_BYTES)
        for page in values.reshape(-1, *values.shape[-PLANE_RANK:]):
            for start in range(0, len(page), rows):
                yield page[start : start + rows]

    def _metadata(self) -> dict[str, Any]:
        """Return what tifffile writes as OME-XML."""
        axes = dict(zip(self._letters_stored, self._image.axes, strict=True))
        identity = repr((self.image.axes, self.dtype.name, self.image.channels))
        values: dict[str, Any] = {
            "axes": self._letters_stored.upper(),
            "UUID": str(uuid.uuid5(NAMESPACE, identity)),
        }
        spatial = {letter: axis for letter, axis in axes.items() if letter in "zyx"}
        unit = common_unit((axis.unit for axis in spatial.values()), METERS, UNITS)
        positions: dict[str, Any] = {}
        pages = prod(self._image.shape[:-PLANE_RANK])
        for letter, axis in spatial.items():
            factor = unit_factor(axis.unit, unit, METERS)
            if not axis.scale:
                continue
            values[f"PhysicalSize{letter.upper()}"] = abs(axis.scale) * factor
            values[f"PhysicalSize{letter.upper()}Unit"] = UNITS.get(unit or "", NO_UNIT)
            if axis.translation and axis.scale > 0 and unit is not None:
                key = f"Position{letter.upper()}"
                positions[key] = [axis.translation * factor] * pages
                positions[f"{key}Unit"] = [UNITS[unit]] * pages
        if positions:
            values["Plane"] = positions
        if (time := axes.get("t")) is not None and (
            second := common_unit([time.unit], SECONDS, UNITS)
        ):
            values["TimeIncrement"] = time.scale * unit_factor(time.unit, second, SECONDS)
            values["TimeIncrementUnit"] = UNITS[second]
        if self.image.values is not None:
            numbers = self.image.values.attributes
            values["MapAnnotation"] = {"Namespace": "chunkq", "Value": numbers}
        if self.image.channels:
            values["Channel"] = {"Name": list(self.image.channels)}
        return values


class _Scratch:
    """A temporary file with the voxels of a level, in C order; deleted at the end."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> _Scratch:
        self._file: BinaryIO = open(self._path, "wb")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        with suppress(FileNotFoundError):
            os.unlink(self._path)

    def append(self, values: Voxels) -> None:
        """Append voxels."""
        self._file.write(as_bytes(values))

    def rows(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Voxels]:
        """Yield the level's pages in order, in whole rows of tiles."""
        self._file.flush()
        height, width = shape[-PLANE_RANK:]
        at_once = max(1, ENCODED_BYTES // (TILE * width * dtype.itemsize)) * TILE
        # Not mapped: pages of a mapped file count as memory of the process.
        with open(self._path, "rb") as file:
            for _ in range(prod(shape[:-PLANE_RANK])):
                for start in range(0, height, at_once):
                    rows = min(at_once, height - start)
                    yield np.fromfile(file, dtype, rows * width).reshape(rows, width)


def _tiles(blocks: Iterator[Voxels]) -> Iterator[Voxels]:
    """Yield the tiles of pages, or of whole rows of tiles; the last ones are smaller.

    They are copies, because tifffile collects tiles, and a view would keep its whole block.
    """
    for values in blocks:
        for page in values.reshape(-1, *values.shape[-PLANE_RANK:]):
            starts = (range(0, size, TILE) for size in page.shape)
            for y, x in product(*starts):
                yield page[y : y + TILE, x : x + TILE].copy()
        del values, page  # before the next block is read
