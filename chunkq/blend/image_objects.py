"""Results as images of nibabel and xarray, with the axes of the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.errors import ChunkqError
from chunkq.geometry.axes import Axis, cropped, scaled
from chunkq.geometry.box import Box

NIFTI_UNITS = {"millimeter": "mm", "micrometer": "micron", "meter": "meter"}
"""Unit of an axis -> name in NIfTI headers."""
NIFTI_TIME_UNITS = {"second": "sec", "millisecond": "msec", "microsecond": "usec"}
"""Unit of a time axis -> name in NIfTI headers."""
NIFTI_1_SIZE = 32_767
"""Longest axis of NIfTI-1."""


@dataclass(frozen=True, eq=False)
class ImageGeometry:
    """What is known of the axes of an image, in the order of its array.

    `axes` are the spatial axes. `series` are those along which volumes were predicted one by one:
    time, channels or none. `affine` (4, 4) and `header` are those of a nibabel image or of a NIfTI
    file, `dims` (of the series and the spatial axes) and `coords` those of a DataArray. The columns
    of the affine are in the order of the array, unless `file_order` has the numbers of the spatial
    axes in the order of the file, x first.
    """

    axes: tuple[Axis, ...] = ()
    affine: npt.NDArray[Any] | None = None
    header: Any = None
    file_order: tuple[int, ...] = ()
    dims: tuple[Any, ...] = ()
    coords: Mapping[Any, Any] = field(default_factory=dict)
    series: tuple[Axis, ...] = ()

    def scaled(self, scale: Sequence[Fraction]) -> ImageGeometry:
        """Return the geometry of an output with this scale, without coordinates of scaled axes."""
        affine = self.affine
        if affine is not None:
            affine = affine.astype(np.float64)
            for column, axis in enumerate(self.file_order or range(len(scale))):
                affine[:3, 3] += affine[:3, column] * float((scale[axis] - 1) / 2)
                affine[:3, column] *= float(scale[axis])
        spatial = self.dims[len(self.series) :]
        changed = {dim for dim, factor in zip(spatial, scale, strict=False) if factor != 1}
        return replace(
            self,
            axes=tuple(map(scaled, self.axes, scale)),
            affine=affine,
            coords={
                name: coord for name, coord in self.coords.items() if not changed & {*coord.dims}
            },
        )

    def cropped(self, region: Box) -> ImageGeometry:
        """Return the geometry of a region of the image, along its spatial axes."""
        affine = self.affine
        if affine is not None:
            affine = affine.copy()
            order = self.file_order or range(len(region.start))
            start = [region.start[axis] for axis in order]
            affine[:3, 3] += affine[:3, : len(start)] @ start
        spatial = self.dims[len(self.series) :]
        slices = dict(zip(spatial, region.slices((0,) * len(region.start)), strict=False))
        return replace(
            self,
            axes=tuple(map(cropped, self.axes, region.start, region.stop)),
            affine=affine,
            coords={
                name: coord.isel({dim: slices[dim] for dim in coord.dims if dim in slices})
                for name, coord in self.coords.items()
            },
        )


def to_nibabel(array: npt.NDArray[Any], geometry: ImageGeometry, affine: Any) -> Any:
    """Return a NIfTI image of an array (*series, [C,] *S).

    Time points become its fourth axis, channels its fifth. Without `affine`, the image has the
    order of the file from which the array comes. Raise ChunkqError without an affine, or if the
    array has more than three spatial axes.
    """
    try:
        nibabel: Any = import_module("nibabel")
    except ImportError as error:
        raise ChunkqError(
            f"Prediction.to_nibabel: nibabel is not installed ({error}); install it with pip "
            "install nibabel"
        ) from None
    rank = len(geometry.axes)
    matrix = geometry.affine if affine is None else np.asarray(affine, np.float64)
    if matrix is None:
        raise ChunkqError(
            "Prediction.to_nibabel: the input has no affine; pass affine=, for example that of the "
            "image from which the array comes, image.affine"
        )
    if matrix.shape != (4, 4) or rank > 3:
        raise ChunkqError(
            f"Prediction.to_nibabel: expected an affine of shape [4, 4] and 1 to 3 spatial axes, "
            f"found {list(matrix.shape)} and {rank} axes"
        )
    leading = array.ndim - rank
    if affine is None and geometry.file_order:
        order = (leading + axis for axis in geometry.file_order)
        array = array.transpose(*range(leading), *order)
    time = next((axis for axis in geometry.series if axis.kind == "time"), None)
    if leading:  # NIfTI: x, y, z, time, channel
        times, spatial = 1 if time is None else time.size, array.shape[leading:]
        array = np.moveaxis(array.reshape(times, -1, *spatial), (0, 1), (-2, -1))
        array = array.reshape(*spatial, *(1,) * (3 - rank), times, -1)
        if time is not None and leading == 1:
            array = array[..., 0]
    if array.dtype == np.float16:  # which NIfTI does not have
        array = array.astype(np.float32)
    kind = nibabel.Nifti1Image if max(array.shape) <= NIFTI_1_SIZE else nibabel.Nifti2Image
    image = kind(array, matrix, dtype=array.dtype)
    codes = {}
    if affine is None and isinstance(geometry.header, nibabel.Nifti1Header):
        codes = {name: int(geometry.header[f"{name}_code"]) for name in ("sform", "qform")}
    if any(codes.values()):
        image.set_sform(matrix, codes["sform"])
        image.set_qform(matrix, codes["qform"])
    units = {NIFTI_UNITS.get(axis.unit or "") for axis in geometry.axes}
    unit = units.pop() if len(units) == 1 else None
    time_unit = None if time is None else NIFTI_TIME_UNITS.get(time.unit or "")
    if unit is not None or time_unit is not None:
        image.header.set_xyzt_units(unit, time_unit)
    if time is not None:
        image.header["pixdim"][4] = time.scale
    return image


def to_xarray(array: npt.NDArray[Any], geometry: ImageGeometry, name: str) -> Any:
    """Return a DataArray of an array (*series, [C,] *S), whose channels are the dimension `c`.

    It has the dimensions and coordinates of the input, or the positions of the voxels. Raise
    ChunkqError if xarray is not installed.
    """
    try:
        xarray: Any = import_module("xarray")
    except ImportError as error:
        raise ChunkqError(
            f"Prediction.to_xarray: xarray is not installed ({error}); install it with pip install "
            "xarray"
        ) from None
    axes = (*geometry.series, *geometry.axes)
    dims, coords = geometry.dims, dict(geometry.coords)
    if not dims:
        dims = tuple(axis.name for axis in axes)
        for axis in axes:
            positions = axis.translation + axis.scale * np.arange(axis.size)
            attributes = {} if axis.unit is None else {"units": axis.unit}
            coords[axis.name] = xarray.DataArray(positions, dims=[axis.name], attrs=attributes)
    first = len(geometry.series)
    if array.ndim > len(axes):
        if "c" not in dims:
            dims = (*dims[:first], "c", *dims[first:])
        else:  # one value for each predicted channel
            array = np.squeeze(array, first)
    return xarray.DataArray(array, dims=dims, coords=coords, name=name)
