"""Open the volumes that a caller passes: array-likes in memory, or paths."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq.blend.combine import to_numpy
from chunkq.errors import JobError, StoreError
from chunkq.geometry.axes import plain_axes
from chunkq.geometry.box import Box
from chunkq.paths import absolute, is_url, without_secret
from chunkq.plan.plan import Volume
from chunkq.storage.array import Array
from chunkq.storage.axes_view import AxesView
from chunkq.storage.formats.base import ArrayInfo
from chunkq.storage.images import ImageSource, find_source, source_of
from chunkq.storage.selection import Selection

Input = Any
"""One volume: an argument of `np.asarray`, an array that yields such when sliced, or a path."""
COPY_BYTES = 64 << 20
"""Bytes written at a time when an array is copied to a file."""


class MemoryArray(Array):
    """An array in memory, or an array-like that returns NumPy arrays when sliced."""

    def __init__(self, values: Any, name: str) -> None:
        self.path, self.values = name, values
        self.shape = tuple(int(n) for n in values.shape)
        self.dtype = np.dtype(values.dtype)

    @override
    def read(self, box: Box) -> npt.NDArray[Any]:
        return np.asarray(self.values[box.slices((0,) * len(self.shape))])


def open_inputs(
    inputs: Input | Sequence[Input], axes: str | None = None, *, allow_empty: bool = False
) -> tuple[Array, ...]:
    """Open one volume, or each volume of a list or tuple, for reading box by box.

    `axes` has a letter of tczyx for each axis. A path can be to an array without any storage chunk
    only if `allow_empty`. The arrays are views ([C,] *S). Raise JobError if one is not an array, if
    the axes are not clear or if the shapes differ, StoreError for a bad path.
    """
    volumes = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    if not volumes:
        raise JobError("input: expected at least one volume, found an empty list")
    names = [f"array {n}" for n in range(len(volumes))] if len(volumes) > 1 else ["the array"]
    arrays = tuple(
        _open_input(v, name, axes, allow_empty) for v, name in zip(volumes, names, strict=True)
    )
    problems = [
        f"input: {without_secret(array.path)} has shape {list(array.shape)}, expected "
        f"{list(arrays[0].shape)} as the first input; use inputs of the same shape"
        for array in arrays
        if array.shape != arrays[0].shape
    ]
    if problems:
        raise JobError(problems)
    return arrays


def volume_of(arrays: Sequence[Array]) -> Volume:
    """Return the shape and dtype of the inputs for the planner."""
    return Volume.joined([_volume_of(array) for array in arrays])


def _volume_of(array: Array) -> Volume:
    if not array.has_channels:
        return Volume(array.shape, str(array.dtype))
    return Volume(array.shape[1:], str(array.dtype), channels=array.shape[0])


def read_all(array: Array) -> npt.NDArray[Any]:
    """Return an entire input as a NumPy array, without a copy if it is one already."""
    return array.read(Box.of_shape(array.shape))


@contextmanager
def as_paths(
    inputs: Input | Sequence[Input], arrays: Sequence[Array], output: str
) -> Iterator[list[str]]:
    """Yield one path per input; write inputs without a path to temporary files.

    `arrays` are the opened `inputs`. The files are created beside a local output, else in the
    system's temporary folder, and removed at the end. Raise StoreError if one cannot be written.
    """
    volumes = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    paths = [absolute(str(v), Path.cwd()) if isinstance(v, (str, Path)) else "" for v in volumes]
    parent = os.path.dirname(absolute(output, Path.cwd()))
    directory = parent if not is_url(output) and os.path.isdir(parent) else None
    with ExitStack() as stack:
        if not all(paths):
            try:
                temporary = tempfile.TemporaryDirectory(prefix=".chunkq-", dir=directory)
                folder = stack.enter_context(temporary)
                for number, array in enumerate(arrays):
                    stored = array.stored if isinstance(array, AxesView) else array
                    paths[number] = paths[number] or _write_npy(stored, f"{folder}/{number}.npy")
            except OSError as error:
                reason = error.strerror or error
                raise StoreError(
                    f"output: {without_secret(arrays[0].path)} cannot be copied beside "
                    f"{without_secret(output)}: {reason}"
                ) from error
        yield paths


def _open_input(volume: Input, name: str, axes: str | None, allow_empty: bool) -> Array:
    selection = Selection(axes=axes)
    if isinstance(volume, (str, Path)):
        path = absolute(str(volume), Path.cwd())
        source = find_source(path, selection, allow_empty=allow_empty)
        return _presented(source, source.open())
    array = _array_in_memory(volume, name)
    info = ArrayInfo(name, plain_axes(array.shape), str(array.dtype))
    return _presented(source_of(info, selection, name), array)


def _presented(source: ImageSource, array: Array) -> Array:
    """Return the view of an array that the network sees. Raise JobError for a time series."""
    if len(source.time) > 1:
        raise JobError(
            f"input: {without_secret(array.path)} has {len(source.time)} time points; predict them "
            "one by one, or run a job"
        )
    return source.present(array)


def _array_in_memory(volume: Input, name: str) -> MemoryArray:
    try:
        if hasattr(volume, "detach"):  # a torch tensor, on any device
            return MemoryArray(to_numpy(volume), name)
        if _is_sliceable(volume):
            return MemoryArray(volume, name)
        return MemoryArray(np.asarray(volume), name)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise JobError(
            f"input: {name} ({type(volume).__name__}) is not an array: {reason}"
        ) from error


def _is_sliceable(volume: Any) -> bool:
    """Return whether a volume can be read box by box without loading all of it."""
    try:
        np.dtype(volume.dtype)
        return len(volume.shape) > 0 and hasattr(volume, "__getitem__")
    except (AttributeError, TypeError):
        return False


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
