"""Results as images of nibabel and xarray, with the axes of the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.errors import ChunkqError
from chunkq.geometry.axes import Axis, cropped
from chunkq.geometry.box import Box

NIFTI_UNITS = {"millimeter": "mm", "micrometer": "micron", "meter": "meter"}
"""Unit of an axis -> name in NIfTI headers."""
NIFTI_1_SIZE = 32_767
"""Longest axis of NIfTI-1."""


@dataclass(frozen=True, eq=False)
class ImageGeometry:
    """What is known of the spatial axes of an image, in the order of its array.

    `affine` (4, 4) and `header` are those of a nibabel image or of a NIfTI file, `dims` and
    `coords` those of a DataArray. The columns of the affine are in the order of the array, unless
    `file_order` has the numbers of the array's spatial axes in the order of the file, x first.
    """

    axes: tuple[Axis, ...] = ()
    affine: npt.NDArray[Any] | None = None
    header: Any = None
    file_order: tuple[int, ...] = ()
    dims: tuple[Any, ...] = ()
    coords: Mapping[Any, Any] = field(default_factory=dict)

    def cropped(self, region: Box) -> ImageGeometry:
        """Return the geometry of a region of the image."""
        affine = self.affine
        if affine is not None:
            affine = affine.copy()
            affine[:3, 3] += affine[:3, : len(region.start)] @ region.start
        slices = dict(zip(self.dims, region.slices((0,) * len(region.start)), strict=False))
        return replace(
            self,
            axes=tuple(map(cropped, self.axes, region.start, region.stop)),
            affine=affine,
            coords={
                name: coord.isel({dim: slices[dim] for dim in coord.dims})
                for name, coord in self.coords.items()
            },
        )


def to_nibabel(array: npt.NDArray[Any], geometry: ImageGeometry, affine: Any) -> Any:
    """Return a NIfTI image of an array (*S) or (C, *S); channels become its fifth axis.

    Without `affine`, the image has the order of the file from which the array comes. Raise
    ChunkqError without an affine, or if the array has more than three spatial axes.
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
    if affine is None and geometry.file_order:
        lead = array.ndim - rank
        array = array.transpose(*range(lead), *(lead + axis for axis in geometry.file_order))
    if array.ndim > rank:  # NIfTI: x, y, z, time, channel
        array = np.moveaxis(array, 0, -1).reshape(*array.shape[1:], *(1,) * (4 - rank), -1)
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
    if len(units) == 1 and (unit := units.pop()) is not None:
        image.header.set_xyzt_units(unit)
    return image


def to_xarray(array: npt.NDArray[Any], geometry: ImageGeometry, name: str) -> Any:
    """Return a DataArray of an array (*S) or (C, *S), whose channels are the dimension `c`.

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
    axes = geometry.axes
    dims, coords = geometry.dims, dict(geometry.coords)
    if not dims:
        dims = tuple(axis.name for axis in axes)
        for axis in axes:
            positions = axis.translation + axis.scale * np.arange(axis.size)
            attributes = {} if axis.unit is None else {"units": axis.unit}
            coords[axis.name] = xarray.DataArray(positions, dims=[axis.name], attrs=attributes)
    channels = ("c",) if array.ndim > len(axes) else ()
    return xarray.DataArray(array, dims=(*channels, *dims), coords=coords, name=name)
