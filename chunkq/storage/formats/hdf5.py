"""Format of HDF5: a dataset by its path inside a file, `file.h5/group/dataset`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

from typing_extensions import override

from chunkq.access import Access
from chunkq.errors import ChunkqError, ChunkReadError, ErrorCode, StoreError
from chunkq.geometry.box import Box
from chunkq.install_hint import install_command
from chunkq.paths import is_url, join, mask_secrets, without_secret
from chunkq.storage.array import Array, Voxels, box_error
from chunkq.storage.formats import hdf5_axes, suffixes
from chunkq.storage.formats.base import (
    NO_OPTIONS,
    NUMBERS,
    ArrayInfo,
    Format,
    Options,
    native_dtype,
)
from chunkq.storage.formats.file_ranges import open_binary
from chunkq.storage.formats.single_file import SingleFile, opening_error
from chunkq.system import buffers

SIGNATURE = b"\x89HDF\r\n\x1a\n"
BLOCK_BYTES = 1 << 19
"""Size of a cached block of a file at a URL."""
HEADER_BYTES = 1024
"""Bytes at the start of a file that its identity covers."""
DEFAULT_GROUP = "default"
"""Attribute of NeXus with the name of the group in a group that is shown first."""
MAX_LINKS = 16
"""Soft links that are followed to a dataset."""
MAX_SOURCES = 1000
"""Datasets in the same file of which a virtual dataset can consist."""
MAX_LISTED = 8
"""Datasets that a message lists."""
HDF5_LOCK = threading.RLock()
"""The HDF5 library runs one call at a time; the lock covers opening, reading and closing a file."""


class Hdf5Array(Array):
    """Dataset of an HDF5 file, which is opened for each read and closed again.

    No handle outlives a read, so that any number of files, threads and processes can be in use.
    A file at a URL keeps its cached blocks.
    """

    def __init__(self, path: str, access: Access) -> None:
        self.path, self._access, self._stream = path, access, None
        with _read_metadata(path), open_dataset(path, access) as dataset:
            self.shape, self.dtype = tuple(dataset.shape), native_dtype(dataset.dtype.str)

    @override
    def read(self, box: Box) -> Voxels:
        try:
            with HDF5_LOCK:
                self._stream = self._stream or open_stream(self.path, self._access)
            with open_dataset(self.path, self._access, self._stream) as dataset:
                opened = tuple(dataset.shape), native_dtype(dataset.dtype.str)
                if opened != (self.shape, self.dtype):
                    raise OSError("the dataset was replaced")
                values = buffers.zeros(box.shape, self.dtype)
                if values.size:
                    dataset.read_direct(values, box.slices((0,) * len(self.shape)))
                return values
        except MemoryError:
            raise
        except Exception as error:  # of any class, from HDF5 or a file system
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error


class Hdf5Format(Format):
    """Datasets of HDF5 files, recognized by the suffix of a part of the path.

    A file or a group is the dataset that its NeXus attributes name, else the one in it, if it is
    the only one with at least two axes. Links to
    other files, external storage and virtual datasets over other files are refused: they can name
    any file, and HDF5 reads one that is missing as the fill value. The identity has the size, the
    time of modification (at a URL, the unique key of fsspec) and the hash of the start of the file.
    """

    @override
    def detects(self, path: str, options: Options = NO_OPTIONS) -> bool:
        file, inner = split(path)
        if not file:
            return False
        if not is_url(path):
            return not os.path.isdir(file)
        if not inner:
            return True
        single = SingleFile(file, Access.of(options))
        return bool(single.filesystem.isfile(single.inner))

    @override
    def find(self, path: str, options: Options = NO_OPTIONS) -> ArrayInfo:
        access = Access.of(options)
        file = split(path)[0]
        with _read_metadata(path), open_file(path, access) as content:
            name = _dataset_name(path, content)
            dataset = content[name]
            _check(path, dataset)
            axes, named_by = hdf5_axes.described_axes(dataset)
            dtype = str(native_dtype(dataset.dtype.str))
        return ArrayInfo(join(file, name), axes, dtype, access.options, named_by=named_by)

    @override
    def open(self, path: str, options: Options) -> Array:
        return Hdf5Array(path, Access.of(options))

    @override
    def identity(self, path: str, options: Options) -> str | None:
        return SingleFile(split(path)[0], Access.of(options)).identity(HEADER_BYTES)


def split(path: str) -> tuple[str, str]:
    """Return the path of an HDF5 file and the path inside it; two empty strings without a file.

    The first part with a suffix of HDF5 is the file, unless it is a local folder. A colon can
    follow it, as in `file.h5:/group/dataset`.
    """
    parts = path.split("/")
    for number, part in enumerate(parts):
        file = "/".join([*parts[:number], part.removesuffix(":")])
        is_hdf5 = part.lower().removesuffix(":").endswith(suffixes.HDF5)
        if is_hdf5 and (is_url(path) or not os.path.isdir(file)):
            return file, "/".join(parts[number + 1 :]).strip("/")
    return "", ""


@contextmanager
def open_file(path: str, access: Access, stream: Any = None) -> Iterator[Any]:
    """Open the HDF5 file of a path for reading, without a lock of the file.

    `stream` is what `open_stream` returned for it. Raises StoreError if the file does not exist, or
    cannot be opened.
    """
    try:
        h5py = import_module("h5py")
    except ImportError as error:
        raise StoreError(
            f"input: {without_secret(path)}: reading HDF5 needs the package h5py ({error}); run "
            f"`{install_command('hdf5')}`",
            code=ErrorCode.PACKAGE_MISSING,
        ) from None
    name = split(path)[0]
    with HDF5_LOCK:
        try:
            source = name if not is_url(path) else stream or open_stream(path, access)
            content = h5py.File(source, "r", locking=False)
        except ChunkqError:
            raise
        except Exception as error:  # HDF5 and each file system raise different errors
            raise _opening_error(path, access, error) from None
        with content:
            yield content


def open_stream(path: str, access: Access) -> Any:
    """Return a file object with cached blocks for the file of a URL; None for a local path."""
    return open_binary(SingleFile(split(path)[0], access), BLOCK_BYTES) if is_url(path) else None


@contextmanager
def open_dataset(path: str, access: Access, stream: Any = None) -> Iterator[Any]:
    """Open the dataset at a path that `find` returned. Raises StoreError."""
    with open_file(path, access, stream) as content:
        dataset = content[_resolved(path, content, split(path)[1])]
        _check(path, dataset)
        yield dataset


@contextmanager
def _read_metadata(path: str) -> Iterator[None]:
    """Raise StoreError for errors of HDF5."""
    try:
        yield
    except (ChunkqError, MemoryError):
        raise
    except Exception as error:  # HDF5 raises different errors
        reason = " ".join(mask_secrets(str(error), path).split()) or type(error).__name__
        raise StoreError(
            f"input: {without_secret(path)}: invalid HDF5 file: {reason[:200]}; copy it again",
            code=ErrorCode.STORE_UNSUPPORTED,
        ) from error


def _dataset_name(path: str, content: Any) -> str:
    """Return the path of the dataset that a path of the user means. Raises StoreError."""
    file, name = split(path)
    resolved = _resolved(path, content, name)
    item = content[resolved or "/"]
    if not hasattr(item, "keys"):
        return resolved
    if signal := _signal(item):
        return signal
    arrays = list(_arrays(item))
    candidates = [array for array in arrays if len(array.shape) > 1] or arrays
    names = [str(array.name).strip("/") for array in candidates]
    if len(names) == 1:
        return names[0]
    if not names:
        problem = "contains no array of numbers; fix the path"
    else:
        listed = ", ".join(without_secret(join(file, name)) for name in names[:MAX_LISTED])
        rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        problem = f"contains {len(names)} arrays; use one of {listed}{rest}"
    raise StoreError(
        f"input: {without_secret(path)} {problem}",
        code=ErrorCode.STORE_UNSUPPORTED,
    )


def _signal(group: Any) -> str:
    """Return the path of the dataset that is the signal of a group, as NeXus names it, or "".

    The attribute `default` of a group names the group in it that has the signal.
    """
    h5py = import_module("h5py")
    for _ in range(MAX_LINKS):
        name = hdf5_axes.attribute_text(group, hdf5_axes.SIGNAL)
        key = name or hdf5_axes.attribute_text(group, DEFAULT_GROUP)
        if not key or not isinstance(group.get(key, getlink=True), h5py.HardLink):
            return ""
        item = group[key]
        if name:
            is_signal = isinstance(item, h5py.Dataset) and _is_array(item)
            return str(item.name).strip("/") if is_signal else ""
        if not isinstance(item, h5py.Group):
            return ""
        group = item
    return ""


def _resolved(path: str, content: Any, name: str) -> str:
    """Return the path of an item without links. Raises StoreError for one in another file."""
    h5py = import_module("h5py")
    pending, group, followed = [part for part in name.split("/") if part], "", 0
    while pending:
        part = pending.pop(0)
        parent = content[group or "/"]
        link = parent.get(part, getlink=True) if hasattr(parent, "keys") else None
        if link is None:
            raise _missing(path, content, group, part)
        if isinstance(link, h5py.ExternalLink):
            raise _foreign(path, f"{group}/{part}", link.filename, link.path)
        if isinstance(link, h5py.SoftLink):
            followed += 1
            if followed > MAX_LINKS:
                raise _missing(path, content, group, part)
            target = [piece for piece in link.path.split("/") if piece not in ("", ".")]
            group, pending = "" if link.path.startswith("/") else group, [*target, *pending]
            continue
        group = f"{group}/{part}"
    return group.strip("/")


def _missing(path: str, content: Any, group: str, part: str) -> StoreError:
    parent = content[group or "/"]
    names = sorted(map(str, parent))[:MAX_LISTED] if hasattr(parent, "keys") else []
    hint = f"found {', '.join(names)} beside it" if names else "fix the path"
    return StoreError(
        f"input: {without_secret(path)} does not exist: no {part!r} in the file; {hint}",
        code=ErrorCode.STORE_MISSING,
    )


def _foreign(path: str, name: str, file: str, inner: str = "") -> StoreError:
    target = f"{file}{inner}" if inner else file
    return StoreError(
        f"input: {without_secret(path)}: {name} refers to another file, {target}; use the path of "
        "that file, or copy its data into one file with h5repack or h5py",
        code=ErrorCode.STORE_UNSUPPORTED,
    )


def _arrays(group: Any) -> Iterator[Any]:
    """Yield the datasets of numbers below a group; those behind links are left out."""
    h5py = import_module("h5py")
    pending, seen = [group], set()
    while pending:
        parent = pending.pop(0)
        for name in parent:
            if not isinstance(parent.get(name, getlink=True), h5py.HardLink):
                continue
            item = parent[name]
            if isinstance(item, h5py.Group):
                address = h5py.h5o.get_info(item.id).addr
                if address not in seen:
                    seen.add(address)
                    pending.append(item)
            elif isinstance(item, h5py.Dataset) and _is_array(item):
                yield item


def _is_array(dataset: Any) -> bool:
    is_scale = dataset.attrs.get("CLASS") in (b"DIMENSION_SCALE", "DIMENSION_SCALE")
    return bool(dataset.shape) and dataset.dtype.kind in NUMBERS and not is_scale


def _check(path: str, dataset: Any) -> None:
    """Raise StoreError unless a dataset is an array of numbers in this file that can be decoded."""
    if not hasattr(dataset, "dtype") or dataset.shape is None:
        problem = "is no array of numbers; use a dataset"
    elif dataset.dtype.kind not in NUMBERS:
        problem = (
            f"has the unsupported dtype {dataset.dtype}; store it with a dtype of numbers, such as "
            "uint8 or float32"
        )
    else:
        _check_parts(path, dataset)
        _check_filters(path, dataset)
        return
    raise StoreError(f"input: {without_secret(path)} {problem}", code=ErrorCode.STORE_UNSUPPORTED)


def _check_parts(path: str, dataset: Any) -> None:
    """Raise StoreError if a dataset is stored in other files, also one of which it consists."""
    content, pending, seen = dataset.file, [dataset], {dataset.name}
    while pending:
        part = pending.pop()
        if part.external:
            raise _foreign(path, part.name, os.fsdecode(part.external[0][0]))
        for source in part.virtual_sources() if part.is_virtual else ():
            if source.file_name != ".":
                raise _foreign(path, part.name, source.file_name, source.dset_name)
            if source.dset_name in seen:
                continue
            seen.add(source.dset_name)
            if len(seen) > MAX_SOURCES:
                raise _foreign(path, part.name, f"more than {MAX_SOURCES} datasets")
            pending.append(content[_resolved(path, content, source.dset_name)])


def _check_filters(path: str, dataset: Any) -> None:
    """Raise StoreError if a filter of a dataset is not installed."""
    h5py = import_module("h5py")
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(number) for number in range(properties.get_nfilters())]
    for code, _, _, name in filters:
        if not h5py.h5z.filter_avail(code):
            with suppress(ImportError):
                import_module("hdf5plugin")  # registers its filters
        if not h5py.h5z.filter_avail(code):
            label = name.decode(errors="replace").strip() or "without a name"
            raise StoreError(
                f"input: {without_secret(path)}: filter {code} ({label}) is not installed; run "
                f"`{install_command('hdf5')}`, which installs hdf5plugin",
                code=ErrorCode.PACKAGE_MISSING,
            )


def _opening_error(path: str, access: Access, error: Exception) -> StoreError:
    """Return the error for a file that HDF5 does not open."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return opening_error(path, error)
    file = SingleFile(split(path)[0], access)
    try:
        first = file.head(len(SIGNATURE))
    except Exception:  # each file system raises different errors
        return opening_error(path, error)
    if first != SIGNATURE:
        problem = f"not an HDF5 file, it begins with {first!r}; fix the path, or copy it again"
    else:
        reason = " ".join(mask_secrets(str(error), path).split()) or type(error).__name__
        problem = f"invalid HDF5 file: {reason[:200]}; copy it again"
    return StoreError(f"input: {without_secret(path)}: {problem}", code=ErrorCode.STORE_UNSUPPORTED)
