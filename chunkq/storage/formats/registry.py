"""The formats that inputs can have: built-in ones, and those of other installed packages."""

from __future__ import annotations

from types import MappingProxyType

from chunkq.errors import ErrorCode, StoreError
from chunkq.extensions import ExtensionPoint
from chunkq.paths import is_url, open_filesystem, without_secret
from chunkq.storage.formats.base import Format, missing_error, unreadable_error
from chunkq.storage.formats.conversion import conversion
from chunkq.storage.formats.npy import NpyFormat
from chunkq.storage.formats.zarr import ZarrFormat

BUILT_IN: MappingProxyType[str, Format] = MappingProxyType(
    {"npy": NpyFormat(), "zarr": ZarrFormat()}
)
"""Formats by name, in the order in which they are asked."""
EXTENSIONS = ExtensionPoint(
    "chunkq.formats", Format, "input: format", StoreError, frozenset(BUILT_IN)
)


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
    for name, entry_point in EXTENSIONS.find().items():
        try:
            if EXTENSIONS.create(entry_point).detects(path):
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
    if entry_point := EXTENSIONS.find().get(name):
        return EXTENSIONS.create(entry_point)
    raise StoreError(
        f"input: format {name!r} is not installed; install the package that provides it",
        code=ErrorCode.PACKAGE_MISSING,
    )


def _unclaimed_error(path: str) -> StoreError:
    """Return the error for a path in no known format."""
    filesystem, inner = open_filesystem(path)
    if not filesystem.exists(inner):
        return missing_error(path)
    shown = without_secret(path)
    if advice := conversion(shown):
        return StoreError(f"input: {shown}: {advice}", code=ErrorCode.STORE_UNSUPPORTED)
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
