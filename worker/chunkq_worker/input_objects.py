"""Arrays and images of other packages as inputs, read box by box, with their axes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq.blend.image_objects import ImageGeometry
from chunkq.errors import ArgumentError, ChunkqError, ChunkReadError, JobError
from chunkq.geometry.axes import Axis, AxisKind, plain_axes
from chunkq.geometry.axis_units import unit_name
from chunkq.geometry.box import Box
from chunkq.storage.array import Array, box_error
from chunkq.storage.formats.base import native_dtype
from chunkq_worker.imported_classes import class_name, is_instance

EXPECTED = (
    "expected an array (NumPy, torch, dask, xarray, zarr, h5py, tensorstore), an image (nibabel, "
    "tifffile), a path, or a list of these for model_config.join_dim"
)
KIND_OF_NAME: Mapping[str, AxisKind] = {
    **dict.fromkeys(("c", "ch", "channel", "channels", "band"), "channel"),
    **dict.fromkeys(("t", "time", "frame", "frames"), "time"),
}
"""Name of an axis in lower case -> kind; all others are spatial."""
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
    input that a job can read, else empty.
    """

    array: Array
    geometry: ImageGeometry
    in_memory: bool = False
    axes: tuple[Axis, ...] = ()
    path: str = ""


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
    scales: Sequence[float] | None = None,
    translations: Sequence[float] | None = None,
    units: Sequence[str | None] | None = None,
) -> tuple[Axis, ...]:
    """Return axes with these names. Spatial ones without distinct names get the default names."""
    kinds = [KIND_OF_NAME.get(str(name).lower(), "space") for name in names]
    spatial = [n for n, kind in enumerate(kinds) if kind == "space"]
    labels = [str(names[n] or "") for n in spatial]
    if len({*labels, ""}) <= len(labels):
        labels = [axis.name for axis in plain_axes([shape[n] for n in spatial])]
    name_of = dict(zip(spatial, labels, strict=True))
    count = len(names)
    return tuple(
        Axis(
            name_of.get(n, str(names[n])),
            kinds[n],
            int(shape[n]),
            unit_name((units or [None] * count)[n]),
            float((scales or [1.0] * count)[n]),
            float((translations or [0.0] * count)[n]),
        )
        for n in range(count)
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
        axes=_named_axes(store.domain.labels, shape, scales, None, units),
        convert=lambda part: part.read().result(),
    )


def _open_zarr(array: Any, name: str) -> OpenedInput:
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    is_named = isinstance(names, (list, tuple)) and len(names) == len(array.shape)
    axes = _named_axes(names, array.shape) if is_named and any(names) else None
    return _opened(name, array, array.shape, array.dtype, axes=axes)


def _open_tiff(file: Any, name: str) -> OpenedInput:
    series = file.series[0] if hasattr(file, "series") else file
    return _open_series(series, name, _tiff_scales(file) if hasattr(file, "series") else {})


def _open_series(series: Any, name: str, scales: Mapping[str, tuple[float, Any]]) -> OpenedInput:
    import zarr

    array = zarr.open_array(series.aszarr(level=0), mode="r")
    letters = [{"S": "c"}.get(letter, letter.lower()) for letter in series.axes]
    spatial = {letter for letter in letters if letter not in KIND_OF_NAME}
    if not spatial <= {*"zyx"}:
        letters = [letter if letter in KIND_OF_NAME else "" for letter in letters]
    known = [scales.get(letter, (1.0, None)) for letter in letters]
    axes = _named_axes(
        letters, array.shape, [scale for scale, _ in known], None, [unit for _, unit in known]
    )
    return _opened(name, array, array.shape, array.dtype, axes=axes)


def _tiff_scales(file: Any) -> dict[str, tuple[float, Any]]:
    """Return the voxel size and unit along the axes of an OME-TIFF, or of an ImageJ stack."""
    import tifffile

    scales: dict[str, tuple[float, Any]] = {}
    if file.is_ome:
        image = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
        pixels = (image[0] if isinstance(image, list) else image)["Pixels"]
        for letter in "XYZ":
            if (size := pixels.get(f"PhysicalSize{letter}")) is not None:
                unit = pixels.get(f"PhysicalSize{letter}Unit", "µm")
                scales[letter.lower()] = float(size), unit
    elif file.is_imagej:
        metadata = file.imagej_metadata or {}
        unit = str(metadata.get("unit", "")).replace("\\u00B5m", "µm").replace("pixel", "")
        for letter, tag in (("x", "XResolution"), ("y", "YResolution")):
            value = file.pages[0].tags.get(tag)
            if value is not None and value.value[0] and unit:
                scales[letter] = value.value[1] / value.value[0], unit
        if metadata.get("spacing") and unit:
            scales["z"] = float(metadata["spacing"]), unit
    return scales


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
    ("h5py", ("Group",), _refuse("an HDF5 group", "one of its datasets")),
)
"""Package, classes, and the function that opens their objects."""


def open_tiff_path(path: str, name: str) -> OpenedInput:
    """Open a TIFF file. Raise ImportError without tifffile, and its errors for a damaged file."""
    import tifffile

    file = tifffile.TiffFile(os.fspath(path))
    try:
        opened = _open_tiff(file, name)
    except BaseException:
        file.close()
        raise
    weakref.finalize(opened.array, file.close)
    return opened
