"""The formats that inputs can have: built-in ones, and those of other installed packages."""

from __future__ import annotations

from chunkq.access import Access, is_forbidden
from chunkq.errors import ErrorCode, StoreError
from chunkq.extensions import ExtensionPoint
from chunkq.lazy_imports import LazyClasses
from chunkq.paths import is_url, open_filesystem, without_secret
from chunkq.storage.formats.base import (
    NO_OPTIONS,
    Format,
    Options,
    missing_error,
    unreadable_error,
)
from chunkq.storage.formats.suffixes import can_have

BUILT_IN: LazyClasses[Format] = LazyClasses(
    {
        "npy": "chunkq.storage.formats.npy:NpyFormat",
        "nifti": "chunkq.storage.formats.nifti:NiftiFormat",
        "tiff": "chunkq.storage.formats.tiff:TiffFormat",
        "hdf5": "chunkq.storage.formats.hdf5:Hdf5Format",
        "zarr": "chunkq.storage.formats.zarr:ZarrFormat",
        "n5": "chunkq.storage.formats.n5:N5Format",
        "precomputed": "chunkq.storage.formats.precomputed:PrecomputedFormat",
    }
)
"""Formats by name, in the order in which they are asked; many commands need none of them."""
EXTENSIONS = ExtensionPoint(
    "chunkq.formats", Format, "input: format", StoreError, frozenset(BUILT_IN)
)


def format_of(path: str, options: Options = NO_OPTIONS) -> str:
    """Return the name of the first format that detects a path without a scheme of a format.

    `options` are what the job says about the access to it (`Access.options`).
    Other packages are searched for formats only if no built-in format detects it. Raises StoreError
    if no format does, if the storage fails, or if the format of another package cannot be loaded.
    """
    failure: StoreError | None = None
    for name in BUILT_IN:
        if not can_have(name, path):
            continue
        try:
            if BUILT_IN[name]().detects(path, options):
                return name
        except StoreError as error:  # for example the scheme of the URL
            failure = error
            break
        except Exception as error:  # each file system raises different errors
            failure = failure or unreadable_error(path, error)
            # A server can refuse documents of one format that do not exist.
            if not is_forbidden(error):
                break
    for name, entry_point in EXTENSIONS.find().items():
        try:
            if EXTENSIONS.create(entry_point).detects(path, options):
                return name
        except StoreError as error:
            failure = failure or error
        except OSError as error:
            failure = failure or unreadable_error(path, error)
    raise failure or _unclaimed_error(path, Access.of(options))


def format_named(name: str) -> Format:
    """Return a format by the name that `format_of` returned. Raises StoreError if it is missing."""
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if entry_point := EXTENSIONS.find().get(name):
        return EXTENSIONS.create(entry_point)
    raise StoreError(
        f"input: format {name!r} is not installed; install the package that provides it",
        code=ErrorCode.PACKAGE_MISSING,
    )


def _unclaimed_error(path: str, access: Access) -> StoreError:
    """Return the error for a path in no known format."""
    from chunkq.storage.formats.conversion import conversion
    from chunkq.storage.formats.tiff import stack_pattern
    from chunkq.storage.formats.tiff_stack import is_pattern
    from chunkq.storage.formats.zarr_nodes import member_names, missing_documents

    filesystem, inner = open_filesystem(path, access)
    if is_pattern(path):
        return StoreError(
            f"input: {without_secret(path)} matches no TIFF file; fix the pattern, as in "
            "slices/*.tif",
            code=ErrorCode.STORE_MISSING,
        )
    if not filesystem.exists(inner):
        return missing_error(path)
    expected = "expected Zarr, N5, a precomputed volume, or a file .nii, .nii.gz, .tif, .h5 or .npy"
    if advice := conversion(without_secret(path)):
        reason = advice
    elif path.endswith(".npz"):
        reason = "is an archive of arrays; save one array with numpy.save as a .npy file"
    elif not is_url(path) and filesystem.isfile(inner):
        convert = "zarr.create_array('volume.zarr', data=array)"
        reason = f"is a file; {expected}; convert it, for example with {convert}"
    elif pattern := stack_pattern(path, access):
        reason = f"is a folder of TIFF files; use {pattern} for a stack of them"
    elif documents := missing_documents(path, access):
        reason = f"lacks {documents}; restore the file"
    elif members := member_names(path, access):
        reason = f"is a folder without metadata; use one of {', '.join(members)} in it"
    else:
        reason = f"holds no array; {expected}; fix the path"
    return StoreError(f"input: {without_secret(path)} {reason}", code=ErrorCode.STORE_UNSUPPORTED)
