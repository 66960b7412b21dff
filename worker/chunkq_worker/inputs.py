"""Open the volumes that a caller passes: array-likes in memory, or paths."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.image_objects import ImageGeometry
from chunkq.errors import ErrorCode, JobError, StoreError
from chunkq.geometry.box import Box
from chunkq.job.items import Image
from chunkq.paths import absolute, absolute_input, is_url, without_secret
from chunkq.storage.array import Array
from chunkq.storage.formats.base import AFFINE, ArrayInfo
from chunkq.storage.formats.nifti import affine_of
from chunkq.storage.formats.registry import format_named
from chunkq.storage.images import ImageSource, find_source, source_of
from chunkq.storage.remedies import PYTHON
from chunkq.storage.selection import EVERYTHING, Selection
from chunkq_worker.input_objects import ObjectArray, ObjectInput, open_object

Input = Any
"""One volume: an array or image object (see `input_objects`), or a path."""
NAMED_BY = "the array"
"""What names the axes of a written array, if nothing names those of the original."""
COPY_BYTES = 64 << 20
"""Bytes written at a time when an array is copied to a file."""
READERS: MappingProxyType[str, str] = MappingProxyType(
    {
        ".mgz": "nibabel.load(path)",
    }
)
"""Suffix of a file that no job reads -> what returns an object that a predictor reads."""


@dataclass(frozen=True)
class OpenedInput:
    """An input, and what is read of it.

    `array` is all of it, and `source` says what its axes are and what is read along them. `stored`
    is the object that holds the array, None for a path. `in_memory` says whether reading is free.
    `path` is that of an input that a job can read, else empty.
    """

    array: Array
    source: ImageSource
    stored: ObjectInput | None = None
    in_memory: bool = False
    path: str = ""

    @property
    def lost(self) -> tuple[str, ...]:
        """One line for each property of its positions that its axes cannot hold."""
        return self.source.lost_position() if self.stored is None else self.stored.lost

    def geometry(self, image: Image) -> ImageGeometry:
        """Return what is known of the axes of a result for `image`, whose first source it is."""
        geometry = ImageGeometry(self.source.spatial_axes, series=image.series_axes)
        if self.stored is None:
            return replace(geometry, **_nifti_geometry(self.source))
        stored, source = self.stored, self.source
        series = [(axis.kind, source.number(axis.kind)) for axis in image.series_axes]
        numbers = [*(number for _, number in series), *source.spatial_numbers]
        dims = tuple(stored.dims[n] for n in numbers if n is not None) if stored.dims else ()
        picks = {
            dim: list(source.time if kind == "time" else source.channels)
            for dim, (kind, _) in zip(dims, series, strict=False)
        }
        coords = {
            key: coord.isel({dim: picks[dim] for dim in coord.dims if dim in picks})
            for key, coord in stored.coords.items()
            if {*coord.dims} <= {*dims}
        }
        affine = stored.affine
        if affine is not None:
            affine = _reordered(affine, source.spatial_numbers)
        return replace(geometry, affine=affine, header=stored.header, dims=dims, coords=coords)


def _reordered(affine: npt.NDArray[Any], numbers: Sequence[int]) -> npt.NDArray[Any] | None:
    """Return an affine (4, 4) for an array with these of its axes, None if it has other ones."""
    if len(numbers) > 3 or max(numbers) > 2:
        return None
    missing = [number for number in range(3) if number not in numbers]
    return affine[:, [*numbers, *missing, 3]]


def open_inputs(
    inputs: Input | Sequence[Input],
    selection: Selection = EVERYTHING,
    *,
    allow_empty: bool = False,
) -> tuple[OpenedInput, ...]:
    """Open one volume, or each volume of a list or tuple, for reading box by box.

    `selection` applies to each of them. A path can be to an array without any storage chunk only if
    `allow_empty`. Raise ArgumentError if one is not an array, JobError if the axes are not clear or
    the spatial shapes differ, and StoreError for a bad path.
    """
    volumes = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    if not volumes:
        raise JobError("input: expected at least one volume, found an empty list")
    opened = tuple(
        _open_input(v, name, selection, allow_empty)
        for v, name in zip(volumes, array_names(len(volumes)), strict=True)
    )
    shapes = [one.source.shape for one in opened]
    problems = [
        f"input: {without_secret(one.array.path)} has shape {list(shape)}, expected "
        f"{list(shapes[0])} as the first input; use inputs of the same shape"
        for one, shape in zip(opened, shapes, strict=True)
        if shape != shapes[0]
    ]
    if problems:
        raise JobError(problems)
    return opened


def array_names(count: int) -> list[str]:
    """Return the names of the arrays of a call, for messages."""
    return [f"array {n}" for n in range(count)] if count > 1 else ["the array"]


def read_region(array: Array, region: Box) -> npt.NDArray[Any]:
    """Return a region of an input ([C,] *S) as a NumPy array, without a copy if it is one."""
    channels = array.shape[: len(array.shape) - len(region.shape)]
    start, stop = (*(0 for _ in channels), *region.start), (*channels, *region.stop)
    return array.read(Box(start, stop))


@contextmanager
def stored_sources(opened: Sequence[OpenedInput], output: str) -> Iterator[list[ImageSource]]:
    """Yield a source that a job can read for each input; write what has no path to temporary files.

    The files have the axes ([t,] [c,] *S) of what is read. They are created beside a local output,
    else in the system's temporary folder, and removed at the end. Raise StoreError if one cannot be
    written.
    """
    parent = os.path.dirname(absolute(output, Path.cwd()))
    directory = parent if not is_url(output) and os.path.isdir(parent) else None
    sources = [one.source for one in opened]
    with ExitStack() as stack:
        if not all(one.path for one in opened):
            try:
                temporary = tempfile.TemporaryDirectory(prefix=".chunkq-", dir=directory)
                folder = stack.enter_context(temporary)
                for number, one in enumerate(opened):
                    if not one.path:
                        sources[number] = _write_npy(one, f"{folder}/{number}.npy")
            except OSError as error:
                reason = error.strerror or error
                raise StoreError(
                    f"output: {without_secret(opened[0].array.path)} cannot be copied beside "
                    f"{without_secret(output)}: {reason}"
                ) from error
        yield sources


def _open_input(volume: Input, name: str, selection: Selection, allow_empty: bool) -> OpenedInput:
    if isinstance(volume, (str, os.PathLike)):
        return _open_path(_path(volume), selection, allow_empty)
    return _selected(open_object(volume, name), selection, name)


def _selected(stored: ObjectInput, selection: Selection, name: str) -> OpenedInput:
    """Return an object with what is read of it."""
    named_by = "the object" if stored.is_named else ""
    dtype = str(stored.array.dtype)
    info = ArrayInfo(name, stored.axes, dtype, named_by=named_by, labels=stored.labels)
    source = source_of(info, selection, name, remedies=PYTHON)
    return OpenedInput(stored.array, source, stored, stored.in_memory)


def _path(volume: Input) -> str:
    return absolute_input(os.fspath(volume), Path.cwd())


def _open_path(path: str, selection: Selection, allow_empty: bool) -> OpenedInput:
    """Open an input of a job."""
    try:
        source = find_source(path, selection, allow_empty=allow_empty, remedies=PYTHON)
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
    array = source.open()
    if source.staged:  # a region would be read from the start of the file each time
        values = array.read(Box.of_shape(array.shape))
        array = ObjectArray(path, values, array.shape, array.dtype)
    return OpenedInput(array, source, in_memory=bool(source.staged), path=path)


def _nifti_geometry(source: ImageSource) -> dict[str, Any]:
    """Return the affine of a NIfTI image, and the order of its spatial axes x, y, z."""
    if AFFINE not in source.options:
        return {}
    names = [axis.name for axis in source.spatial_axes]
    order = tuple(names.index(name) for name in "xyz" if name in names)
    is_named = len(order) == len(names)
    return {"affine": affine_of(source.options), "file_order": order} if is_named else {}


def _write_npy(opened: OpenedInput, path: str) -> ImageSource:
    """Write what is read of an input, ([t,] [c,] *S), to a `.npy` file; return its source."""
    source = opened.source
    leading = [axis for axis in (source.time_axis, source.channel_axis) if axis and axis.size > 1]
    axes = (*leading, *source.spatial_axes)
    dtype, shape = opened.array.dtype, tuple(axis.size for axis in axes)
    # No memory map: on a full disk, writing to a mapped file kills the process.
    with open(path, "wb") as file:
        descriptor = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(
            file, {"descr": descriptor, "fortran_order": False, "shape": shape}
        )
        for time in range(len(source.time) or 1):
            for part in _slabs(source.present(opened.array, time)):
                file.write(np.ascontiguousarray(part, dtype).data)
    info = format_named("npy").find(path, {})
    named_by = source.named_by or NAMED_BY
    return source_of(replace(info, axes=axes, named_by=named_by), EVERYTHING, path, "npy")


def _slabs(array: Array) -> Iterator[npt.NDArray[Any]]:
    """Yield an array in parts along its first axis, of about `COPY_BYTES`."""
    shape = array.shape
    rows = max(1, COPY_BYTES // (prod(shape[1:]) * array.dtype.itemsize))
    for first in range(0, shape[0], rows):
        start, stop = (first, *(0,) * (len(shape) - 1)), (min(first + rows, shape[0]), *shape[1:])
        yield array.read(Box(start, stop))
