"""Arrays and images of other packages as inputs, read box by box, with their axes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq.access import DEFAULT_ACCESS
from chunkq.errors import ArgumentError, ChunkqError, ChunkReadError, JobError
from chunkq.geometry.axes import Axis, AxisKind, kind_of_name, named_axes, plain_axes
from chunkq.geometry.axis_units import unit_name
from chunkq.geometry.box import Box
from chunkq.storage.array import Array, box_error
from chunkq.storage.formats import hdf5_axes, tiff_axes
from chunkq.storage.formats.base import ArrayInfo, native_dtype
from chunkq.storage.formats.nifti import MAX_SHIFT
from chunkq.storage.images import find_array
from chunkq.storage.selection import EVERYTHING
from chunkq_worker.imported_classes import class_name, is_instance

EXPECTED = (
    "expected an array (NumPy, torch, dask, xarray, zarr, h5py, tensorstore), an image (nibabel, "
    "tifffile), a path, or a list of these for model_config.join_dim"
)
COMPRESSED = (".gz", ".bz2", ".zst")
"""Suffixes of files of which no region can be read alone."""


class ObjectArray(Array):
    """An array-like, read by slicing. `convert` returns NumPy arrays for its slices."""

    def __init__(
        self,
        name: str,
        values: Any,
        shape: Sequence[int],
        dtype: npt.DTypeLike,
        convert: Callable[[Any], Any] = np.asarray,
    ) -> None:
        self.path, self.values, self._convert = name, values, convert
        self.shape = tuple(map(int, shape))
        # NumPy arrays are shared with the caller, in their byte order.
        self.dtype = np.dtype(dtype) if isinstance(values, np.ndarray) else native_dtype(dtype)

    @override
    def read(self, box: Box) -> npt.NDArray[Any]:
        try:
            part = np.asarray(self._convert(self.values[box.slices((0,) * len(self.shape))]))
        except (ChunkqError, MemoryError):
            raise
        except Exception as error:  # of any class, from the package of the array
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error
        if part.shape != box.shape:
            problem = ValueError(f"expected shape {list(box.shape)}, found {list(part.shape)}")
            raise ChunkReadError(box_error(self.path, box, "read", problem))
        return part.astype(self.dtype, copy=False)


@dataclass(frozen=True)
class ObjectInput:
    """An array or image of another package.

    `array` is all of it. `axes` are its axes; `is_named` says whether the object names them.
    `affine` (4, 4) and `header` are those of a nibabel image, `dims` and `coords` those of a
    DataArray. `labels` are the names of its channels, if there are any. `in_memory` says whether
    reading is free. `lost` has one line for each property of its positions that `axes` cannot hold.
    """

    array: Array
    axes: tuple[Axis, ...]
    is_named: bool = False
    affine: npt.NDArray[Any] | None = None
    header: Any = None
    dims: tuple[Any, ...] = ()
    coords: Mapping[Any, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    in_memory: bool = False
    lost: tuple[str, ...] = ()


def open_object(value: Any, name: str) -> ObjectInput:
    """Open an array-like or an image; `name` is for messages.

    Raise ArgumentError if it is neither.
    """
    for package, classes, open_ in _PACKAGES:
        if is_instance(value, package, *classes):
            return open_(value, name)
    if isinstance(value, np.ma.MaskedArray):
        return _open_masked(value, name)
    if _is_sliceable(value):
        is_numpy = isinstance(value, np.ndarray)
        return _opened(name, value, value.shape, value.dtype, in_memory=is_numpy)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ArgumentError(
            f"input: {name} is {class_name(value)}, {EXPECTED} ({reason})"
        ) from error
    if array.dtype == object:
        raise ArgumentError(f"input: {name} is {class_name(value)}, {EXPECTED}")
    return _opened(name, array, array.shape, array.dtype, in_memory=True)


def _is_sliceable(value: Any) -> bool:
    """Return whether a volume can be read box by box without loading all of it."""
    try:
        np.dtype(value.dtype)
        return len(value.shape) > 0 and hasattr(value, "__getitem__")
    except (AttributeError, TypeError):
        return False


def _opened(
    name: str,
    values: Any,
    shape: Sequence[Any],
    dtype: npt.DTypeLike,
    *,
    axes: Sequence[Axis] | None = None,
    convert: Callable[[Any], Any] = np.asarray,
    **more: Any,
) -> ObjectInput:
    """Return an input; `axes` are those that the object names, or None."""
    if any(isinstance(n, float) for n in shape):  # dask's unknown lengths are NaN
        raise JobError(
            f"input: {name} has the unknown shape {tuple(shape)}; call its method "
            "compute_chunk_sizes() first"
        )
    array = ObjectArray(name, values, shape, dtype, convert)
    array_axes = plain_axes(array.shape) if axes is None else tuple(axes)
    return ObjectInput(array, array_axes, **({"is_named": axes is not None} | more))


def _named_axes(
    names: Sequence[Any],
    shape: Sequence[int],
    scales: Sequence[float] = (),
    translations: Sequence[float] = (),
    units: Sequence[Any] = (),
) -> tuple[Axis, ...]:
    """Return axes with the names and numbers of another package."""
    return named_axes(
        [str(name or "") or None for name in names],
        [int(size) for size in shape],
        [float(scale) for scale in scales],
        [float(start) for start in translations],
        [unit_name(unit) for unit in units],
    )


def _open_masked(value: Any, name: str) -> ObjectInput:
    if np.ma.is_masked(value):
        raise JobError(
            f"input: {name} has masked voxels; fill them first, for example with array.filled(0)"
        )
    return _opened(name, value.data, value.shape, value.dtype, in_memory=True)


def _open_tensor(tensor: Any, name: str) -> ObjectInput:
    if tensor.is_sparse or tensor.is_quantized:
        raise JobError(f"input: {name} is sparse or quantized; pass tensor.to_dense() or floats")
    # NumPy has no bfloat16; float32 holds its values.
    dtype = _tensor_to_numpy(tensor.new_empty(0)).dtype
    is_on_host = tensor.device.type == "cpu"
    return _opened(
        name, tensor, tensor.shape, dtype, convert=_tensor_to_numpy, in_memory=is_on_host
    )


def _tensor_to_numpy(tensor: Any) -> npt.NDArray[Any]:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    is_bfloat16 = str(tensor.dtype) == "torch.bfloat16"
    return np.asarray((tensor.float() if is_bfloat16 else tensor).numpy())


def _open_nibabel(image: Any, name: str) -> ObjectInput:
    """Open an image; its axes are those of its array, x first."""
    data, shape = image.dataobj, tuple(image.shape)
    file = image.file_map.get("image") if image.file_map else None
    is_array = isinstance(data, np.ndarray)
    if not is_array and str(getattr(file, "filename", "") or "").endswith(COMPRESSED):
        data, is_array = np.asanyarray(data), True
    # Reading applies the scale factors of the file, which determine the dtype.
    dtype = data.dtype if is_array else np.asanyarray(data[(slice(0, 1),) * len(shape)]).dtype
    unit = time_unit = None
    if hasattr(image.header, "get_xyzt_units"):
        unit, time_unit = image.header.get_xyzt_units()
    affine = None if image.affine is None else np.asarray(image.affine, np.float64)
    count, extra = min(3, len(shape)), max(0, len(shape) - 3)
    scales, origin, lost = _placed(affine, shape[:count])
    step = [float(n) or 1.0 for n in image.header.get_zooms()[3:4]] if extra else []
    axes = _named_axes(
        [*"xyz"[:count], *["t", *["c"] * extra][:extra]],
        shape,
        [*scales, *step, *[1.0] * (extra - len(step))],
        [*origin, *[0.0] * extra],
        [*[unit] * count, *[time_unit, *[None] * extra][:extra]],
    )
    return _opened(
        name,
        data,
        shape,
        dtype,
        axes=axes,
        in_memory=is_array,
        affine=affine,
        header=image.header,
        lost=lost,
    )


def _placed(
    affine: npt.NDArray[Any] | None, shape: Sequence[int]
) -> tuple[list[float], list[float], tuple[str, ...]]:
    """Return voxel sizes, position of the first voxel, and what these do not say of an affine.

    A voxel size is negative along an axis whose position falls.
    """
    count = len(shape)
    if affine is None:
        return [1.0] * count, [0.0] * count, ()
    matrix = affine[:3, :3]
    diagonal = np.diag(matrix)
    sizes = np.linalg.norm(matrix, axis=0)
    lengths = np.array([*shape, *[1] * (3 - count)])
    shift = np.abs(matrix - np.diag(diagonal)) @ (lengths - 1)
    if (shift <= MAX_SHIFT * sizes.min()).all() and diagonal[:count].all():
        return diagonal[:count].tolist(), affine[:count, 3].tolist(), ()
    line = "its affine rotates or permutes the axes: voxel sizes are stored, and no position"
    return [float(size) or 1.0 for size in sizes[:count]], [0.0] * count, (line,)


def _open_xarray(array: Any, name: str) -> ObjectInput:
    pairs = zip(array.dims, array.shape, strict=True)
    places = [_place_of(array.coords.get(dim), n, kind_of_name(str(dim))) for dim, n in pairs]
    axes = _named_axes(
        array.dims,
        array.shape,
        [place.step for place in places],
        [place.start for place in places],
        [place.unit for place in places],
    )
    irregular = [str(dim) for dim, p in zip(array.dims, places, strict=True) if p.is_irregular]
    line = f"its positions along {', '.join(irregular)} are not evenly spaced and are not stored"
    return _opened(
        name,
        array.variable,  # without coordinates, which a slice would load, too
        array.shape,
        array.dtype,
        axes=axes,
        convert=lambda part: part.values,
        in_memory=isinstance(array.variable._data, np.ndarray),
        dims=tuple(array.dims),
        coords=dict(array.coords),
        labels=_channel_names(array),
        lost=(line,) if irregular else (),
    )


@dataclass(frozen=True)
class _Place:
    """Positions along an axis: those of evenly spaced voxels, with a negative step if they fall."""

    step: float = 1.0
    start: float = 0.0
    unit: str | None = None
    is_irregular: bool = False


def _channel_names(array: Any) -> tuple[str, ...]:
    """Return the texts that are the coordinate of the channels of a DataArray, or nothing."""
    dims = [dim for dim in array.dims if kind_of_name(str(dim)) == "channel"]
    if len(dims) != 1 or dims[0] not in array.coords:
        return ()
    names = np.asarray(array.coords[dims[0]].values).tolist()
    return tuple(names) if all(isinstance(name, str) for name in names) else ()


def _place_of(coordinate: Any, size: int, kind: AxisKind) -> _Place:
    """Return the positions of the voxels along an axis from its coordinate.

    Along time, dates begin at 0, and they and durations are in seconds. Texts are no positions.
    """
    numbers = "iufmM" if kind == "time" else "iuf"
    if coordinate is None or coordinate.dtype.kind not in numbers or size == 0:
        return _Place()
    unit = coordinate.attrs.get("units", coordinate.attrs.get("unit"))
    values = np.asarray(coordinate.values)
    if values.dtype.kind in "mM":
        start = values[0] if values.dtype.kind == "M" else np.timedelta64(0)
        values, unit = (values - start) / np.timedelta64(1, "s"), "second"
    positions = values.astype(np.float64)
    steps = np.diff(positions)
    is_even = np.isfinite(positions).all() and np.allclose(steps, steps[:1], rtol=1e-3, atol=0)
    if not is_even or not steps.all():
        return _Place(is_irregular=True)
    step = float(positions[-1] - positions[0]) / (size - 1) if size > 1 else 1.0
    return _Place(step, float(positions[0]), unit)


def _open_tensorstore(store: Any, name: str) -> ObjectInput:
    import tensorstore

    shape = tuple(store.shape)
    values = store[tensorstore.d[:].translate_to[0]] if shape else store
    # NumPy has no bfloat16; float32 holds its values.
    dtype = np.dtype(store.dtype.numpy_dtype)
    is_standard = dtype.kind != "V"
    labels = store.domain.labels
    units = [None if unit is None else unit.base_unit for unit in store.dimension_units]
    scales = [1.0 if unit is None else float(unit.multiplier) for unit in store.dimension_units]
    return _opened(
        name,
        values,
        shape,
        dtype if is_standard else np.float32,
        axes=_named_axes(labels, shape, scales, (), units),
        is_named=any(labels),
        convert=lambda part: part.read().result(),
    )


def _open_zarr(array: Any, name: str) -> ObjectInput:
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    is_named = isinstance(names, (list, tuple)) and len(names) == len(array.shape)
    stored = _stored_array(array)
    if stored is not None:
        return _opened(
            name, array, array.shape, array.dtype, axes=stored.axes, labels=stored.labels
        )
    axes = _named_axes(names, array.shape) if is_named and any(names) else None
    return _opened(name, array, array.shape, array.dtype, axes=axes)


def _stored_array(array: Any) -> ArrayInfo | None:
    """Return what a job finds of a Zarr array on a local disk, None if nothing names its axes.

    The array is often a level of an OME-Zarr image, whose group names the axes and the channels.
    """
    if not is_instance(array.store, "zarr", "storage.LocalStore"):
        return None
    try:
        path = os.path.join(array.store.root, array.path)
        _, info = find_array(path, EVERYTHING, DEFAULT_ACCESS, allow_empty=True)
    except (ChunkqError, OSError):
        return None
    is_same = tuple(axis.size for axis in info.axes) == tuple(array.shape)
    return info if is_same and info.named_by else None


def _open_hdf5(dataset: Any, name: str) -> ObjectInput:
    if dataset.shape is None:
        raise ArgumentError(f"input: {name} is an HDF5 dataset without values, {EXPECTED}")
    axes, source = hdf5_axes.described_axes(dataset)
    return _opened(name, dataset, dataset.shape, dataset.dtype, axes=axes, is_named=bool(source))


def _open_tiff(file: Any, name: str) -> ObjectInput:
    """Open a `TiffFile`, or one of its series, whose axes the file describes."""
    import zarr

    is_file = hasattr(file, "series")
    series = file.series[0] if is_file else file
    metadata = tiff_axes.ImageMetadata()
    if is_file:
        metadata = tiff_axes.image_metadata(file, series.kind, series.name)
    array = zarr.open_array(series.aszarr(level=0), mode="r")
    return _opened(
        name,
        array,
        array.shape,
        array.dtype,
        axes=tiff_axes.described_axes(series.axes, array.shape, metadata),
        is_named=bool(tiff_axes.named_by(series.kind, series.axes)),
        labels=metadata.labels,
    )


def _open_tiff_store(store: Any, name: str) -> ObjectInput:
    import zarr

    node: Any = zarr.open(store, mode="r")
    array = node["0"] if hasattr(node, "keys") else node
    return _open_zarr(array, name)


def _refuse(what: str, advice: str) -> Callable[[Any, str], ObjectInput]:
    def refuse(value: Any, name: str) -> ObjectInput:
        members = ", ".join(sorted(map(str, value))[:8])
        raise ArgumentError(
            f"input: {name} is {what} with {members or 'nothing'}, {EXPECTED}; pass {advice}"
        )

    return refuse


_PACKAGES: tuple[tuple[str, tuple[str, ...], Callable[[Any, str], ObjectInput]], ...] = (
    ("torch", ("Tensor",), _open_tensor),
    ("xarray", ("DataArray",), _open_xarray),
    ("xarray", ("Dataset",), _refuse("a dataset", "one of its variables")),
    ("nibabel", ("spatialimages.SpatialImage",), _open_nibabel),
    ("tensorstore", ("TensorStore",), _open_tensorstore),
    ("tifffile", ("TiffFile", "TiffPageSeries"), _open_tiff),
    ("tifffile.zarr", ("ZarrTiffStore",), _open_tiff_store),
    ("zarr", ("Array",), _open_zarr),
    ("zarr", ("Group",), _refuse("a Zarr group", "one of its arrays, or its path")),
    ("h5py", ("Dataset",), _open_hdf5),
    ("h5py", ("Group",), _refuse("an HDF5 group", "one of its datasets")),
)
"""Package, classes, and the function that opens their objects."""
