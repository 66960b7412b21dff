"""Volumes as a caller hands them over: arrays of any kind in memory, or paths."""

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

from chunkq.box import Box
from chunkq.combine import to_numpy
from chunkq.errors import JobError, StoreError
from chunkq.paths import absolute, is_url, without_secret
from chunkq.plan import Volume
from chunkq.stores import Array, find_source, open_array

Input = Any
"""One volume: what `np.asarray` takes, what is sliced into that (zarr, h5py, dask), or a path."""
COPY_BYTES = 64 << 20
"""Copied at a time when an array becomes a file."""


class MemoryArray(Array):
    """An array in memory, or one that gives NumPy arrays when it is sliced."""

    def __init__(self, values: Any, name: str) -> None:
        self.path, self.values = name, values
        self.shape = tuple(int(n) for n in values.shape)
        self.dtype = np.dtype(values.dtype)

    @override
    def read(self, box: Box) -> npt.NDArray[Any]:
        return np.asarray(self.values[box.slices((0,) * len(self.shape))])


def open_inputs(given: Input | Sequence[Input]) -> tuple[Array, ...]:
    """Return one volume, or each of a list or tuple of them, ready to be read box by box.

    Raises JobError where one is no array or they differ in shape, StoreError for a bad path.
    """
    volumes = list(given) if isinstance(given, (list, tuple)) else [given]
    if not volumes:
        raise JobError("input: no volume was given")
    names = [f"array {n}" for n in range(len(volumes))] if len(volumes) > 1 else ["the array"]
    arrays = tuple(_array(v, name) for v, name in zip(volumes, names, strict=True))
    problems = [
        f"input: {without_secret(array.path)} has shape {list(array.shape)}, the first input "
        f"{list(arrays[0].shape)}; several inputs must have one shape"
        for array in arrays
        if array.shape != arrays[0].shape
    ]
    if problems:
        raise JobError(problems)
    return arrays


def volume_of(arrays: Sequence[Array]) -> Volume:
    """Return what planning needs to know of the inputs."""
    return Volume.joined([Volume(array.shape, str(array.dtype)) for array in arrays])


def read_all(array: Array) -> npt.NDArray[Any]:
    """Return all of an input as NumPy; not copied where it is that already."""
    return array.read(Box.of_shape(array.shape))


@contextmanager
def as_paths(
    given: Input | Sequence[Input], arrays: Sequence[Array], output: str
) -> Iterator[list[str]]:
    """Yield a path for each input: its own, or that of a temporary file beside the output.

    Raises StoreError where that file cannot be written.
    """
    volumes = list(given) if isinstance(given, (list, tuple)) else [given]
    paths = [absolute(str(v), Path.cwd()) if isinstance(v, (str, Path)) else "" for v in volumes]
    beside = os.path.dirname(absolute(output, Path.cwd()))
    place = beside if not is_url(output) and os.path.isdir(beside) else None
    with ExitStack() as stack:
        if not all(paths):
            try:
                made = tempfile.TemporaryDirectory(prefix=".chunkq-", dir=place)
                folder = stack.enter_context(made)
                for number, array in enumerate(arrays):
                    paths[number] = paths[number] or _stored(array, f"{folder}/{number}.npy")
            except OSError as error:
                reason = error.strerror or error
                raise StoreError(
                    f"output: no copy of {without_secret(arrays[0].path)} can be written beside "
                    f"{without_secret(output)}: {reason}"
                ) from error
        yield paths


def _array(given: Input, name: str) -> Array:
    if isinstance(given, (str, Path)):
        return open_array(find_source(absolute(str(given), Path.cwd())).array_path)
    try:
        if hasattr(given, "detach"):  # a torch tensor, on any device
            return MemoryArray(to_numpy(given), name)
        if _is_sliceable(given):
            return MemoryArray(given, name)
        return MemoryArray(np.asarray(given), name)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise JobError(f"input: {name} ({type(given).__name__}) is no array: {reason}") from error


def _is_sliceable(given: Any) -> bool:
    """Tell whether something can be read box by box, so that it need not be in memory."""
    try:
        np.dtype(given.dtype)
        return len(given.shape) > 0 and hasattr(given, "__getitem__")
    except (AttributeError, TypeError):
        return False


def _stored(array: Array, path: str) -> str:
    """Write an input as a `.npy` file, a few rows at a time."""
    shape = array.shape
    rows = max(1, COPY_BYTES // (prod(shape[1:]) * array.dtype.itemsize))
    described = np.lib.format.dtype_to_descr(array.dtype)
    # Written, not mapped: writing to a mapped file ends the process where the disk is full.
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": described, "fortran_order": False, "shape": shape}
        )
        for first in range(0, shape[0], rows):
            last = min(first + rows, shape[0])
            zeros = (0,) * (len(shape) - 1)
            part = array.read(Box((first, *zeros), (last, *shape[1:])))
            file.write(np.ascontiguousarray(part, array.dtype).data)
    return path
