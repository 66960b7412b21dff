"""The formats that inputs can have: built-in ones, and those of other installed packages."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

from chunkq.errors import ErrorCode, StoreError
from chunkq.paths import is_url, open_filesystem, without_secret
from chunkq.storage.formats.base import Format, missing_error, unreadable_error
from chunkq.storage.formats.npy import NpyFormat
from chunkq.storage.formats.zarr import ZarrFormat

ENTRY_POINTS = "chunkq.formats"
"""Group of the entry points by which other packages add formats."""
BUILT_IN: MappingProxyType[str, Format] = MappingProxyType(
    {"npy": NpyFormat(), "zarr": ZarrFormat()}
)
"""Formats by name, in the order in which they are asked."""


def format_of(path: str) -> str:
    """Return the name of the first format that detects a path.

    Other packages are searched for formats only if no built-in format detects it. Raises StoreError
    if no format does, if the storage fails, or if the format of another package cannot be loaded.
    """
    failure: StoreError | None = None
    try:
        for name, built_in in BUILT_IN.items():
            if built_in.detects(path):
                return name
    except StoreError as error:  # for example the scheme of the URL, which another format may know
        failure = error
    except Exception as error:  # each file system raises different errors
        failure = unreadable_error(path, error)
    for name, entry_point in _outside().items():
        try:
            if _load(entry_point).detects(path):
                return name
        except StoreError as error:
            failure = failure or error
        except OSError as error:
            failure = failure or unreadable_error(path, error)
    raise failure or _unclaimed_error(path)


def format_named(name: str) -> Format:
    """Return a format by the name that `format_of` returned. Raises StoreError if it is missing."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if entry_point := _outside().get(name):
        return _load(entry_point)
    raise StoreError(
        f"input: format {name!r} is not installed; install the package that provides it",
        code=ErrorCode.PACKAGE_MISSING,
    )


def _outside() -> dict[str, EntryPoint]:
    """Return the entry points of other packages by the name of their format.

    Raises StoreError if a name is not unique, because job records contain only the name.
    """
    by_name: dict[str, EntryPoint] = {}
    for entry_point in sorted(entry_points(group=ENTRY_POINTS), key=lambda e: (e.name, e.value)):
        name = entry_point.name
        if name in BUILT_IN or name in by_name:
            other = _package(by_name[name]) if name in by_name else "chunkq"
            raise StoreError(
                f"input: format {name!r} of the package {_package(entry_point)} has the name of a "
                f"format of {other}; uninstall one of the packages",
            )
        by_name[name] = entry_point
    return by_name


def _package(entry_point: EntryPoint) -> str:
    """Return the name of the package that registers an entry point."""
    return entry_point.dist.name if entry_point.dist else entry_point.module


@cache
def _load(entry_point: EntryPoint) -> Format:
    try:
        loaded = entry_point.load()()
        if not isinstance(loaded, Format):
            raise TypeError(f"{entry_point.value} is not a chunkq Format")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise StoreError(
            f"input: format {entry_point.name!r} of the package {_package(entry_point)} cannot be "
            f"loaded: {reason}; repair or uninstall the package",
            code=ErrorCode.PACKAGE_MISSING,
        ) from error
    return loaded


def _unclaimed_error(path: str) -> StoreError:
    """Return the error for a path in no known format."""
    filesystem, inner = open_filesystem(path)
    if not filesystem.exists(inner):
        return missing_error(path)
    if not is_url(path) and filesystem.isfile(inner):
        return StoreError(
            f"input: {without_secret(path)} is a file; expected a Zarr store or a .npy file; "
            "convert it, for example with zarr.create_array('volume.zarr', data=array)",
            code=ErrorCode.STORE_UNSUPPORTED,
        )
    return StoreError(
        f"input: {without_secret(path)} holds no Zarr array; expected a Zarr store or a .npy "
        "file; fix the path",
        code=ErrorCode.STORE_UNSUPPORTED,
    )
