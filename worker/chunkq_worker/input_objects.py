"""Arrays and images of other packages as inputs, read box by box, with their axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq.blend.image_objects import ImageGeometry
from chunkq.errors import ArgumentError, ChunkqError, ChunkReadError, JobError
from chunkq.geometry.axes import Axis, named_axes
from chunkq.geometry.axis_units import unit_name
from chunkq.geometry.box import Box
from chunkq.storage.array import Array, box_error
from chunkq.storage.formats import hdf5_axes
from chunkq.storage.formats.base import Options, native_dtype
from chunkq.storage.formats.tiff_axes import ImageMetadata, described_axes, image_metadata
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
class OpenedInput:
    """An input: its array, what is known of its spatial axes, and whether it is in memory.

    `axes` are all axes of the array if the object names them, else empty. `path` is that of an
    input that a job can read, else empty, and `options` are those of its format.
    """

    array: Array
    geometry: ImageGeometry
    in_memory: bool = False
    axes: tuple[Axis, ...] = ()
    path: str = ""
    options: Options = field(default_factory=dict)


def open_object(value: Any, name: str) -> OpenedInput:
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
    in_memory: bool = False,
    **geometry: Any,
) -> OpenedInput:
    """Return an input; `axes` describe all axes of `shape`."""
    if any(isinstance(n, float) for n in shape):  # dask's unknown lengths are NaN
        raise JobError(
            f"input: {name} has the unknown shape {tuple(shape)}; call its method "
            "compute_chunk_sizes() first"
        )
    array = ObjectArray(name, values, shape, dtype, convert)
    return OpenedInput(array, ImageGeometry(**geometry), in_memory, tuple(axes or ()))


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


def _open_masked(value: Any, name: str) -> OpenedInput:
    if np.ma.is_masked(value):
        raise JobError(
            f"input: {name} has masked voxels; fill them first, for example with array.filled(0)"
        )
    return _opened(name, value.data, value.shape, value.dtype, in_memory=True)


def _open_tensor(tensor: Any, name: str) -> OpenedInput:
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


def _open_nibabel(image: Any, name: str) -> OpenedInput:
    """Open an image; its axes are those of its array, x first."""
    data, shape = image.dataobj, tuple(image.shape)
    file = image.file_map.get("image") if image.file_map else None
    is_array = isinstance(data, np.ndarray)
    if not is_array and str(getattr(file, "filename", "") or "").endswith(COMPRESSED):
        data, is_array = np.asanyarray(data), True
    # Reading applies the scale factors of the file, which determine the dtype.
    dtype = data.dtype if is_array else np.asanyarray(data[(slice(0, 1),) * len(shape)]).dtype
    unit = None
    if hasattr(image.header, "get_xyzt_units"):
        unit = image.header.get_xyzt_units()[0].replace("unknown", "") or None
    affine = None if image.affine is None else np.asarray(image.affine, np.float64)
    count, extra = min(3, len(shape)), max(0, len(shape) - 3)
    scales, origin = [1.0] * count, [0.0] * count
    if affine is not None:
        scales = [float(n) for n in np.linalg.norm(affine[:3, :3], axis=0)[:count]]
        if (
            np.array_equal(affine[:3, :3], np.diag(np.diag(affine)[:3]))
            and (np.diag(affine)[:3] > 0).all()
        ):
            origin = [float(n) for n in affine[:count, 3]]
    axes = _named_axes(
        [*"xyz"[:count], *["t", *["c"] * extra][:extra]],
        shape,
        [n or 1.0 for n in scales] + [1.0] * extra,
        origin + [0.0] * extra,
        [unit] * count + [None] * extra,
    )
    return _opened(
        name, data, shape, dtype, axes=axes, in_memory=is_array, affine=affine, header=image.header
    )


def _open_xarray(array: Any, name: str) -> OpenedInput:
    steps = [
        _spacing(array.coords.get(dim), n) for dim, n in zip(array.dims, array.shape, strict=True)
    ]
    units = [getattr(array.coords.get(dim), "attrs", {}).get("units") for dim in array.dims]
    axes = _named_axes(
        array.dims, array.shape, [step for step, _ in steps], [start for _, start in steps], units
    )
    dims = {dim for dim, axis in zip(array.dims, axes, strict=True) if axis.kind == "space"}
    coords = {key: coord for key, coord in array.coords.items() if {*coord.dims} <= dims}
    kept = tuple(dim for dim in array.dims if dim in dims)
    return _opened(
        name,
        array.variable,  # without coordinates, which a slice would load, too
        array.shape,
        array.dtype,
        axes=axes,
        convert=lambda part: part.values,
        in_memory=isinstance(array.variable._data, np.ndarray),
        dims=kept,
        coords=coords,
    )


def _spacing(coordinate: Any, size: int) -> tuple[float, float]:
    """Return step and start of the positions along an axis; (1, 0) if they are not regular."""
    if coordinate is None or size < 2 or coordinate.dtype.kind not in "iuf":
        return 1.0, 0.0
    positions = np.asarray(coordinate.values, np.float64)
    steps = np.diff(positions)
    if not np.isfinite(positions).all() or not np.allclose(steps, steps[0], rtol=1e-3, atol=0):
        return 1.0, 0.0
    step = float(positions[-1] - positions[0]) / (size - 1)
    return (step, float(positions[0])) if step > 0 else (abs(step) or 1.0, 0.0)


def _open_tensorstore(store: Any, name: str) -> OpenedInput:
    import tensorstore

    shape = tuple(store.shape)
    values = store[tensorstore.d[:].translate_to[0]] if shape else store
    # NumPy has no bfloat16; float32 holds its values.
    dtype = np.dtype(store.dtype.numpy_dtype)
    is_standard = dtype.kind != "V"
    units = [None if unit is None else unit.base_unit for unit in store.dimension_units]
    scales = [1.0 if unit is None else float(unit.multiplier) for unit in store.dimension_units]
    return _opened(
        name,
        values,
        shape,
        dtype if is_standard else np.float32,
        axes=_named_axes(store.domain.labels, shape, scales, (), units),
        convert=lambda part: part.read().result(),
    )


def _open_zarr(array: Any, name: str) -> OpenedInput:
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    is_named = isinstance(names, (list, tuple)) and len(names) == len(array.shape)
    axes = _named_axes(names, array.shape) if is_named and any(names) else None
    return _opened(name, array, array.shape, array.dtype, axes=axes)


def _open_tiff(file: Any, name: str) -> OpenedInput:
    """Open a `TiffFile`, or one of its series, whose axes the file describes."""
    series = file.series[0] if hasattr(file, "series") else file
    is_first = hasattr(file, "series")
    metadata = image_metadata(file, series.kind, series.name) if is_first else ImageMetadata()
    return _open_series(series, name, metadata)


def _open_series(series: Any, name: str, metadata: ImageMetadata) -> OpenedInput:
    import zarr

    array = zarr.open_array(series.aszarr(level=0), mode="r")
    axes = described_axes(series.axes, array.shape, metadata)
    return _opened(name, array, array.shape, array.dtype, axes=axes)


def _open_hdf5(dataset: Any, name: str) -> OpenedInput:
    if dataset.shape is None:
        raise ArgumentError(f"input: {name} is an HDF5 dataset without values, {EXPECTED}")
    axes, source = hdf5_axes.described_axes(dataset)
    return _opened(name, dataset, dataset.shape, dataset.dtype, axes=axes if source else None)


def _open_tiff_store(store: Any, name: str) -> OpenedInput:
    import zarr

    node: Any = zarr.open(store, mode="r")
    array = node["0"] if hasattr(node, "keys") else node
    return _open_zarr(array, name)


def _refuse(what: str, advice: str) -> Callable[[Any, str], OpenedInput]:
    def refuse(value: Any, name: str) -> OpenedInput:
        members = ", ".join(sorted(map(str, value))[:8])
        raise ArgumentError(
            f"input: {name} is {what} with {members or 'nothing'}, {EXPECTED}; pass {advice}"
        )

    return refuse


_PACKAGES: tuple[tuple[str, tuple[str, ...], Callable[[Any, str], OpenedInput]], ...] = (
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
