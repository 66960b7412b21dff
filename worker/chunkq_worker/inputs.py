"""Open the volumes that a caller passes: array-likes in memory, or paths."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.image_objects import ImageGeometry
from chunkq.errors import ErrorCode, JobError, StoreError
from chunkq.geometry.axes import plain_axes
from chunkq.geometry.box import Box
from chunkq.paths import absolute, absolute_input, is_url, without_secret
from chunkq.plan.plan import Volume
from chunkq.storage.array import Array
from chunkq.storage.formats.base import ArrayInfo
from chunkq.storage.formats.nifti import AFFINE, affine_of
from chunkq.storage.images import ImageSource, find_source, source_of
from chunkq.storage.selection import EVERYTHING, Selection
from chunkq_worker.input_objects import ObjectArray, OpenedInput, open_object

Input = Any
"""One volume: an array or image object (see `input_objects`), or a path."""
COPY_BYTES = 64 << 20
"""Bytes written at a time when an array is copied to a file."""
READERS: MappingProxyType[str, str] = MappingProxyType(
    {
        ".mgz": "nibabel.load(path)",
    }
)
"""Suffix of a file that no job reads -> what returns an object that a predictor reads."""


def open_inputs(
    inputs: Input | Sequence[Input],
    selection: Selection = EVERYTHING,
    *,
    allow_empty: bool = False,
) -> tuple[OpenedInput, ...]:
    """Open one volume, or each volume of a list or tuple, for reading box by box.

    `selection` applies to each of them. A path can be to an array without any storage chunk only if
    `allow_empty`. The arrays are views ([C,] *S). Raise ArgumentError if one is not an
    array, JobError if the axes are not clear or the shapes differ, and StoreError for a bad path.
    """
    volumes = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    if not volumes:
        raise JobError("input: expected at least one volume, found an empty list")
    names = [f"array {n}" for n in range(len(volumes))] if len(volumes) > 1 else ["the array"]
    opened = tuple(
        _open_input(v, name, selection, allow_empty) for v, name in zip(volumes, names, strict=True)
    )
    arrays = [one.array for one in opened]
    problems = [
        f"input: {without_secret(array.path)} has shape {list(array.shape)}, expected "
        f"{list(arrays[0].shape)} as the first input; use inputs of the same shape"
        for array in arrays
        if array.shape != arrays[0].shape
    ]
    if problems:
        raise JobError(problems)
    return opened


def volume_of(inputs: Sequence[OpenedInput]) -> Volume:
    """Return the shape and dtype of the inputs for the planner."""
    return Volume.joined([_volume_of(one.array) for one in inputs])


def _volume_of(array: Array) -> Volume:
    if not array.has_channels:
        return Volume(array.shape, str(array.dtype))
    return Volume(array.shape[1:], str(array.dtype), channels=array.shape[0])


def read_region(array: Array, region: Box) -> npt.NDArray[Any]:
    """Return a region of an input ([C,] *S) as a NumPy array, without a copy if it is one."""
    channels = array.shape[: len(array.shape) - len(region.shape)]
    start, stop = (*(0 for _ in channels), *region.start), (*channels, *region.stop)
    return array.read(Box(start, stop))


@contextmanager
def as_paths(opened: Sequence[OpenedInput], output: str) -> Iterator[list[str]]:
    """Yield one path per input; write the views ([C,] *S) of inputs without one to temporary files.

    The files are created beside a local output, else in the
    system's temporary folder, and removed at the end. Raise StoreError if one cannot be written.
    """
    arrays = [one.array for one in opened]
    paths = [one.path for one in opened]
    parent = os.path.dirname(absolute(output, Path.cwd()))
    directory = parent if not is_url(output) and os.path.isdir(parent) else None
    with ExitStack() as stack:
        if not all(paths):
            try:
                temporary = tempfile.TemporaryDirectory(prefix=".chunkq-", dir=directory)
                folder = stack.enter_context(temporary)
                for number, array in enumerate(arrays):
                    paths[number] = paths[number] or _write_npy(array, f"{folder}/{number}.npy")
            except OSError as error:
                reason = error.strerror or error
                raise StoreError(
                    f"output: {without_secret(arrays[0].path)} cannot be copied beside "
                    f"{without_secret(output)}: {reason}"
                ) from error
        yield paths


def _open_input(volume: Input, name: str, selection: Selection, allow_empty: bool) -> OpenedInput:
    if isinstance(volume, (str, os.PathLike)):
        return _open_path(_path(volume), selection, allow_empty)
    return _selected(open_object(volume, name), selection, name)


def _selected(opened: OpenedInput, selection: Selection, name: str) -> OpenedInput:
    """Return the view of an object's array that the network sees."""
    described = opened.axes or plain_axes(opened.array.shape)
    named_by = "the object" if opened.axes else ""
    info = ArrayInfo(name, described, str(opened.array.dtype), named_by=named_by)
    source = source_of(info, selection, name)
    geometry = replace(opened.geometry, axes=source.spatial_axes)
    return replace(opened, array=_presented(source, opened.array), geometry=geometry)


def _presented(source: ImageSource, array: Array) -> Array:
    """Return the view of an array that the network sees. Raise JobError for a time series."""
    if len(source.time) > 1:
        raise JobError(
            f"input: {without_secret(array.path)} has {len(source.time)} time points; predict them "
            "one by one, or run a job"
        )
    return source.present(array)


def _path(volume: Input) -> str:
    return absolute_input(os.fspath(volume), Path.cwd())


def _open_path(path: str, selection: Selection, allow_empty: bool) -> OpenedInput:
    """Open an input of a job."""
    try:
        source = find_source(path, selection, allow_empty=allow_empty)
    except StoreError as error:
        if error.code is not ErrorCode.STORE_UNSUPPORTED or is_url(path):
            raise
        advice = next((text for end, text in READERS.items() if path.lower().endswith(end)), None)
        if advice is None:
            raise
        raise StoreError(
            f"input: {path} cannot be read by chunkq; pass what {advice} returns",
            code=ErrorCode.STORE_UNSUPPORTED,
        ) from error
    array = _presented(source, source.open())
    if source.staged:  # a region would be read from the start of the file each time
        values = array.read(Box.of_shape(array.shape))
        array = ObjectArray(path, values, array.shape, array.dtype)
    geometry = ImageGeometry(source.spatial_axes, **_nifti_geometry(source))
    return OpenedInput(
        array, geometry, in_memory=bool(source.staged), path=path, options=source.options
    )


def _nifti_geometry(source: ImageSource) -> dict[str, Any]:
    """Return the affine of a NIfTI image, and the order of its spatial axes x, y, z."""
    if AFFINE not in source.options:
        return {}
    names = [axis.name for axis in source.spatial_axes]
    order = tuple(names.index(name) for name in "xyz" if name in names)
    is_named = len(order) == len(names)
    return {"affine": affine_of(source.options), "file_order": order} if is_named else {}


def _write_npy(array: Array, path: str) -> str:
    """Write an input to a `.npy` file, COPY_BYTES at a time; return the path."""
    shape = array.shape
    rows = max(1, COPY_BYTES // (prod(shape[1:]) * array.dtype.itemsize))
    descriptor = np.lib.format.dtype_to_descr(array.dtype)
    # No memory map: on a full disk, writing to a mapped file kills the process.
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": descriptor, "fortran_order": False, "shape": shape}
        )
        for first in range(0, shape[0], rows):
            last = min(first + rows, shape[0])
            zeros = (0,) * (len(shape) - 1)
            part = array.read(Box((first, *zeros), (last, *shape[1:])))
            file.write(np.ascontiguousarray(part, array.dtype).data)
    return path
