"""Writer of NIfTI images: `.nii` and `.nii.gz`, in the order and with the affine of a scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from math import prod
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from typing_extensions import override
from zlib_ng import zlib_ng

from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axes import Axis
from chunkq.geometry.axis_units import METERS, SECONDS, common_unit, unit_factor
from chunkq.install_hint import install_command
from chunkq.plan.object_sizes import StoredSize
from chunkq.storage.array import Voxels
from chunkq.writers.base import (
    DEFAULT_OPTIONS,
    FileWriter,
    ImageToWrite,
    Report,
    StoredValues,
    WriterOptions,
    deflated_bytes,
    stored_dtype,
)
from chunkq.writers.blocks import as_bytes, slabs

DTYPES = frozenset(
    {
        "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32",
        "float64",
    }
)  # fmt: skip
REPLACED = {"float16": "float32", "bool": "uint8"}
"""Dtypes that NIfTI does not have -> one that holds all of their values."""
RANK = 3
MAX_SIZE = 32_767
"""Longest axis (voxels) of NIfTI-1."""
UNITS: MappingProxyType[str, str] = MappingProxyType(
    {
        "meter": "meter",
        "millimeter": "mm",
        "micrometer": "micron",
        "second": "sec",
        "millisecond": "msec",
        "microsecond": "usec",
    }
)
"""Unit of an axis -> its name in nibabel."""
LABEL_INTENT = "label"
SCANNER = 1
"""sform_code of coordinates of the scanner, which voxel sizes and positions stand for."""
LEVEL = 1
"""Level of gzip: labels shrink by a factor of 100 at each, and higher ones take much longer."""
PART_BYTES = 1 << 20
"""Bytes that are compressed at a time."""


class NiftiWriter(FileWriter):
    """NIfTI-1, and NIfTI-2 for axes longer than 32 767 voxels.

    Dimensions are x, y, z, time, channels. Voxels of an image that comes from a NIfTI file are in
    the order of that file, with its affine. Otherwise x, y and z are the axes of these names, or
    the last ones, and the affine has the voxel sizes and positions of the axes.
    """

    def __init__(
        self, image: ImageToWrite, path: str, options: WriterOptions = DEFAULT_OPTIONS
    ) -> None:
        super().__init__(image, path, options)
        for kind in ("channel", "time"):
            if len(image.numbers(kind)) > 1:
                raise self.refused(
                    f"NIfTI has one axis for {kind}, found {len(image.numbers(kind))}; use Zarr"
                )
        if len(image.numbers("space")) > RANK:
            raise self.refused(
                f"NIfTI has at most {RANK} spatial axes, found {len(image.numbers('space'))}; use "
                "Zarr"
            )
        dtype = stored_dtype(image, DTYPES, REPLACED)
        if dtype is None:
            raise self.refused(f"NIfTI has no dtype {image.dtype}; use Zarr")
        self.dtype = dtype
        self._dimensions = self._spatial_dimensions()
        leading = [*image.numbers("channel"), *image.numbers("time")]
        spatial = [place for place in reversed(self._dimensions) if place is not None]
        self.orientation = (*((number, 1) for number in leading), *spatial)
        stored = image.presented(self.orientation)
        self.blocks = slabs(stored.shape, dtype.itemsize, stored.storage)
        self._header = self._described()

    def _spatial_dimensions(self) -> tuple[tuple[int, int] | None, ...]:
        """Return for x, y and z the number of the image's axis and its direction, or None."""
        image, spatial = self.image, self.image.numbers("space")
        if image.space is not None:
            return tuple(
                None if place is None else (spatial[place[0]], place[1])
                for place in image.space.dimensions
            )
        names = {image.axes[number].name: number for number in spatial}
        if not set(names) <= set("xyz"):
            names = dict(zip("xyz", reversed(spatial), strict=False))
        return tuple((names[name], 1) if name in names else None for name in "xyz")

    def _described(self) -> bytes:
        """Return the header and the bytes up to the voxels."""
        try:
            nifti1, nifti2 = import_module("nibabel.nifti1"), import_module("nibabel.nifti2")
        except ImportError as error:
            raise StoreError(
                f"output: {self.name}: NIfTI files need nibabel ({error}); run "
                f"`{install_command('nifti')}`",
                code=ErrorCode.PACKAGE_MISSING,
            ) from None
        axes = {axis.kind: axis for axis in self.image.axes if axis.kind != "space"}
        sizes = [
            1 if place is None else self.image.axes[place[0]].size for place in self._dimensions
        ]
        sizes += [axes[kind].size if kind in axes else 1 for kind in ("time", "channel")]
        while len(sizes) > 1 and self._is_absent(len(sizes) - 1):
            sizes.pop()
        is_small = max(sizes) <= MAX_SIZE
        header = (nifti1.Nifti1Header if is_small else nifti2.Nifti2Header)(endianness="<")
        header.set_data_dtype(self.dtype)
        header.set_data_shape(sizes)
        values = self.image.values or StoredValues(1, 0)
        header["scl_slope"], header["scl_inter"] = values.scale, values.offset
        if self.image.is_labels:
            header.set_intent(LABEL_INTENT)
        self._set_space(header, axes.get("time"))
        header["magic"] = header.single_magic
        header["vox_offset"] = header.single_vox_offset
        padding = b"\0" * (header.single_vox_offset - header.sizeof_hdr)
        content: bytes = header.binaryblock + padding
        return content

    def _is_absent(self, dimension: int) -> bool:
        """Return whether the image has no axis for a dimension of the file."""
        if dimension < RANK:
            return self._dimensions[dimension] is None
        return not self.image.numbers(("time", "channel")[dimension - RANK])

    def _set_space(self, header: Any, time: Axis | None) -> None:
        """Set affine, voxel sizes and units."""
        space, spatial = self.image.space, self._file_axes()
        unit = common_unit((axis.unit for axis in spatial), METERS, UNITS)
        if space is None:
            affine, qform, codes = _straight(spatial, unit), None, (SCANNER, 0)
        else:
            affine, codes = np.array(space.affine), space.codes
            qform = affine if space.qform is None else np.array(space.qform)
        header["pixdim"][1 : RANK + 1] = np.linalg.norm(affine[:RANK, :RANK], axis=0)
        if codes[1]:
            header.set_qform(qform, codes[1])
        if codes[0]:
            header.set_sform(affine, codes[0])
        time_unit = None
        if time is not None:
            time_unit = common_unit([time.unit], SECONDS, UNITS)
            factor = unit_factor(time.unit, time_unit, SECONDS)
            header["pixdim"][RANK + 1] = time.scale * factor
            header["toffset"] = time.translation * factor
        header.set_xyzt_units(
            UNITS.get(unit or "", "unknown"), UNITS.get(time_unit or "", "unknown")
        )

    def _file_axes(self) -> list[Axis]:
        """Return the axes x, y, z of the file; one of a single voxel where the image has none."""
        axes = [None if place is None else self.image.axes[place[0]] for place in self._dimensions]
        units = [axis.unit for axis in axes if axis is not None]
        absent = Axis("", "space", 1, units[0] if units else None)
        return [
            replace(absent, name=n) if a is None else a for n, a in zip("xyz", axes, strict=True)
        ]

    @property
    @override
    def size(self) -> StoredSize:
        size = len(self._header) + prod(self.blocks.shape) * self.dtype.itemsize
        if self._is_compressed:
            return StoredSize.of_file(deflated_bytes(size), is_exact=False)
        return StoredSize.of_file(size, is_exact=True)

    @property
    def _is_compressed(self) -> bool:
        return self.name.lower().endswith(".gz")

    @override
    def write(self, path: str, voxels: Iterator[Voxels], report: Report, first: int = 0) -> None:
        with _opened(path, is_compressed=self._is_compressed) as write:
            write(self._header)
            done = first
            for values in voxels:
                write(as_bytes(values))
                del values  # before the next one is read
                done += 1
                report(done)


def _straight(axes: list[Axis], unit: str | None) -> npt.NDArray[np.float64]:
    """Return the affine of axes x, y, z that are those of the scanner."""
    affine = np.eye(RANK + 1)
    for number, axis in enumerate(axes):
        factor = unit_factor(axis.unit, unit, METERS)
        affine[number, number] = axis.scale * factor
        affine[number, RANK] = axis.translation * factor
    return affine


@contextmanager
def _opened(path: str, *, is_compressed: bool) -> Iterator[Callable[[Any], None]]:
    """Create a file; yield a function that appends bytes to it."""
    with open(path, "wb") as file:
        if not is_compressed:
            yield lambda content: _write(file, content)
            return
        # As a file of gzip without name and time, which would change its bytes.
        compress = zlib_ng.compressobj(LEVEL, zlib_ng.DEFLATED, zlib_ng.MAX_WBITS | 16)

        def write(content: Any) -> None:
            view = memoryview(content)
            for start in range(0, len(view), PART_BYTES):
                file.write(compress.compress(view[start : start + PART_BYTES]))

        yield write
        file.write(compress.flush())


def _write(file: BinaryIO, content: Any) -> None:
    file.write(content)
