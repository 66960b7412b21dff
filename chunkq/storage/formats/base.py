"""The contract of a format of stored arrays."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np
from typing_extensions import override

from chunkq.access import BUCKET_SCHEMES, Access, is_denied
from chunkq.errors import ErrorCode, StoreError, suggestion
from chunkq.geometry.axes import Axis
from chunkq.paths import is_url, mask_secrets, without_secret
from chunkq.storage.array import Array
from chunkq.storage.oriented import Orientation
from chunkq.storage.stored_chunks import StoredChunks

Options = Mapping[str, str | int | bool]
"""What a format needs, besides the path, to open an array that it has found."""
MAX_NAMES = 10_000
"""Names of a folder that are compared with one that is missing."""
NUMBERS = "biufc"
"""NumPy's kinds of dtypes of single numbers."""
CACHED = "cached"
"""Option for `Format.open`: whether storage chunks may be kept in the cache of this process."""
ORIENTATION = "orientation"
"""Option for `Format.find`: the orientation in which a job presents an array, such as `RAS`."""
AFFINE = "affine"
"""Option of an array of a NIfTI image: the affine (4, 4) of voxel indices x, y, z, as JSON."""
NO_OPTIONS: Options = MappingProxyType({})


@dataclass(frozen=True)
class ArrayInfo:
    """One array of a format: its path, all its axes in stored order, and its native dtype.

    `orientation` says how the stored axes are presented, if the format supports the option
    ORIENTATION and got it. `axes` and `storage` are then in the presented order.

    The path is that of the array itself, after groups and resolution levels are resolved. `options`
    is passed to `Format.open` and must be JSON scalars. `is_empty` says that none of its storage
    chunks exists, as far as the storage can tell, so that all voxels are the fill value. `named_by`
    says which metadata name the axes, such as "OME-Zarr metadata"; it is empty if nothing does.
    `labels` are the names of the channels, empty if there are none. `storage` is the shape of what
    is fetched at once, such as a storage chunk, in stored order; empty if any voxel can be.
    `staged` says why the array cannot be read by region, so that a job copies it to Zarr first; it
    is empty if it can.
    """

    path: str
    axes: tuple[Axis, ...]
    dtype: str
    options: Options = field(default_factory=dict)
    named_by: str = ""
    labels: tuple[str, ...] = ()
    is_empty: bool = False
    staged: str = ""
    storage: tuple[int, ...] = ()
    orientation: Orientation = ()


class Format(ABC):
    """A format of stored arrays. Instances have no state; all methods are thread-safe.

    To add a format, subclass this class and run `tests/contract/test_format_contract.py` for it. A
    package outside chunkq registers the class as an entry point of the group `chunkq.formats`. The
    name of the entry point is stored in job records and must not change.

    - `detects` decides by the name of the path, or by a few small requests. It opens no files of
      other formats. The first format that detects a path gets it, built-in formats first.
    - `find` is called once, when a job is created. `open` and `identity` are called in every
      process of the job with what `find` returned. They must not search again, and must not depend
      on the working directory.
    - Arrays satisfy the contract of `Array`. In particular `read` returns native byte order
      whatever the stored order is, returns the fill value for missing storage chunks, and raises
      ChunkReadError for damaged or truncated ones.
    - A mistake of the user is a StoreError of one line, which begins with `input: PATH`. It has no
      password of a URL: print paths with `without_secret`, and other errors with `mask_secrets`.
    - Stored bytes never run code. A format that could, such as pickled objects, is refused with
      `ErrorCode.CODEC_UNSAFE` or `STORE_UNSUPPORTED`.
    """

    @abstractmethod
    def detects(self, path: str, options: Options) -> bool:
        """Return whether a path belongs to this format.

        `options` are what the job says about the access to it (`Access.options`).
        False if there is nothing at the path, unless its name can only be of this format. Raises
        OSError if the path cannot be examined.
        """

    @abstractmethod
    def find(self, path: str, options: Options) -> ArrayInfo:
        """Return the array at a path that `detects` accepts, without reading voxels.

        The options of the array contain those that `detects` got, as far as they are used.
        Raises StoreError with the code STORE_MISSING if the path does not exist, and
        STORE_UNSUPPORTED or CODEC_UNSAFE if it is not an array that the format can read.
        """

    def find_level(self, path: str, level: int | str, options: Options = NO_OPTIONS) -> ArrayInfo:
        """Return a resolution level of an image, by its number or name.

        Raises StoreError as `find` does, and if the image has no such level.
        """
        raise StoreError(
            f"input: {without_secret(path)} has no levels; remove level",
            code=ErrorCode.STORE_UNSUPPORTED,
        )

    def stored_chunks(self, path: str, options: Options) -> StoredChunks | None:
        """Return the storage chunks of an array that exist, by one listing.

        None if the format has no storage chunks that can be absent, or the storage cannot list
        them. Raises StoreError and OSError.
        """
        return None

    def doubts(self, path: str, options: Options) -> tuple[str, ...]:
        """Return a line for each property of an array's files that can be a mistake of the user.

        Reads metadata only. Raises StoreError and OSError.
        """
        return ()

    @abstractmethod
    def open(self, path: str, options: Options) -> Array:
        """Open an array for reading. Raises StoreError if it cannot be opened."""

    @abstractmethod
    def identity(self, path: str, options: Options) -> str | None:
        """Return a string that changes when the array is replaced; None if it is missing.

        Reads metadata only, so the string need not change with single voxels. It is the same for
        every process and machine that opens the array. Raises OSError.
        """

    def open_for_writing(self, path: str, options: Options) -> Array:
        """Open an existing array for reading and writing. Raises StoreError."""
        raise StoreError(f"{without_secret(path)}: this format is read-only; use a Zarr array")


class LeveledFormat(Format):
    """A format whose images can have resolution levels. What `find` returns is one of them."""

    @abstractmethod
    def find_any(self, path: str, level: int | str | None, access: Access) -> ArrayInfo:
        """Return a level of an image, None for the one at the path. Raises StoreError as `find`."""

    @override
    def find(self, path: str, options: Options = NO_OPTIONS) -> ArrayInfo:
        return self.find_any(path, None, Access.of(options))

    @override
    def find_level(self, path: str, level: int | str, options: Options = NO_OPTIONS) -> ArrayInfo:
        return self.find_any(path, level, Access.of(options))


def native_dtype(dtype: Any) -> np.dtype[Any]:
    """Return a dtype in native byte order."""
    stored: np.dtype[Any] = np.dtype(dtype)
    return stored if stored.isnative else stored.newbyteorder("=")


def missing_error(path: str) -> StoreError:
    """Return the error for a path that does not exist."""
    return StoreError(
        f"input: {without_secret(path)} does not exist; fix the path{_similar(path)}",
        code=ErrorCode.STORE_MISSING,
    )


def _similar(path: str) -> str:
    """Return a hint with the name beside the first missing part of a local path, or nothing."""
    if is_url(path):
        return ""
    folder, name = os.path.split(path.rstrip("/"))
    while name and not os.path.lexists(folder):
        folder, name = os.path.split(folder)
    try:
        with os.scandir(folder or ".") as entries:
            names = [entry.name for entry in islice(entries, MAX_NAMES)]
    except OSError:  # a message without this advice is better than another error
        return ""
    return suggestion(name, sorted(names))


def unreadable_error(path: str, error: BaseException) -> StoreError:
    """Return the error for a path whose storage reports an error."""
    reason = mask_secrets(str(error) or type(error).__name__, path).rstrip(".")
    hint = ""
    if is_url(path) and is_denied(error):
        hint = "; check the path and the credentials"
        if path.partition("://")[0] in BUCKET_SCHEMES:
            hint += ", or set anonymous or requester_pays for this input"
    return StoreError(f"input: {without_secret(path)} cannot be opened: {reason}{hint}")
