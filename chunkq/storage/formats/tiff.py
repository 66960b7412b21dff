"""Format of TIFF: single files, OME-TIFF of several files, and stacks of files by a pattern."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from typing_extensions import override

from chunkq.access import Access
from chunkq.errors import ErrorCode, StoreError
from chunkq.paths import is_url, is_web, join, open_filesystem, without_secret
from chunkq.storage.array import Array
from chunkq.storage.formats import suffixes
from chunkq.storage.formats.base import NO_OPTIONS, ArrayInfo, Format, Options
from chunkq.storage.formats.single_file import SingleFile
from chunkq.storage.formats.tiff_file import check_size, read_image
from chunkq.storage.formats.tiff_stack import (
    StackArray,
    check_slices,
    gaps,
    is_pattern,
    matching_files,
    names_hash,
    stack_axes,
)

LEVEL = "level"
"""Option: resolution level, if it is not 0."""
FILES = "files"
"""Option: names of the other files of an OME-TIFF, relative to its folder, one per line."""
NAMES = "names"
"""Option: hash of the names of the files of a stack."""
HEADER_BYTES = 1024
"""Bytes at the start of a file that its identity covers."""


class TiffFormat(Format):
    """TIFF files and stacks of them, recognized by the suffix.

    A path with `*`, `?` or `[` that is not the name of a file is a stack: all files that match it,
    in natural order, are the slices of one array. The identity has the size, the time of
    modification (at a URL, the unique key of fsspec) and the hash of the start of each file.
    """

    @override
    def detects(self, path: str, options: Options = NO_OPTIONS) -> bool:
        if not path.lower().endswith(suffixes.TIFF) or (not is_url(path) and os.path.isdir(path)):
            return False
        return not is_pattern(path) or bool(matching_files(path, Access.of(options)))

    @override
    def find(self, path: str, options: Options = NO_OPTIONS) -> ArrayInfo:
        return _find(path, 0, Access.of(options))

    @override
    def find_level(self, path: str, level: int | str, options: Options = NO_OPTIONS) -> ArrayInfo:
        if not isinstance(level, int):
            raise SingleFile(path, Access.of(options)).error(
                f"expected the number of a level, found level {level!r}; use a number"
            )
        return _find(path, level, Access.of(options))

    @override
    def doubts(self, path: str, options: Options) -> tuple[str, ...]:
        access, level = Access.of(options), int(options.get(LEVEL, 0))
        files = matching_files(path, access) if NAMES in options else [path]
        if not files:
            return ()
        return (*read_image(files[0], access, level).warnings, *gaps(files))

    @override
    def open(self, path: str, options: Options) -> Array:
        access, level = Access.of(options), int(options.get(LEVEL, 0))
        if NAMES not in options:
            return read_image(path, access, level).array
        files = matching_files(path, access)
        if names_hash(files) != options[NAMES]:
            raise StoreError(
                f"input: {without_secret(path)} matches other files than when the job was "
                "produced; restore them, or use --overwrite to start again",
                code=ErrorCode.STORE_MISSING,
            )
        return StackArray(path, files, read_image(files[0], access, level).array, level, access)

    @override
    def identity(self, path: str, options: Options) -> str | None:
        access = Access.of(options)
        if NAMES in options:
            files = matching_files(path, access)
        else:
            folder = path.rpartition("/")[0]
            others = str(options.get(FILES, "")).splitlines()
            files = [path, *(join(folder, name) for name in others)]
        states = [SingleFile(file, access).identity(HEADER_BYTES) for file in files]
        if not states or None in states:
            return None
        if len(states) == 1:
            return states[0]
        text = "\n".join([names_hash(files), *map(str, states)])
        return hashlib.sha256(text.encode()).hexdigest()


def stack_pattern(path: str, access: Access) -> str:
    """Return the pattern of the TIFF files in a folder, for a message; empty if it has none."""
    try:
        filesystem, inner = open_filesystem(path, access)
        names = [] if is_web(path) else filesystem.ls(inner, detail=False)
    except Exception:  # a message without this advice is better than another error
        return ""
    ends = [os.path.splitext(str(name))[1] for name in names]
    suffix = next((end for end in ends if end.lower() in suffixes.TIFF), None)
    return "" if suffix is None else without_secret(join(path, f"*{suffix}"))


def _find(path: str, level: int, access: Access) -> ArrayInfo:
    options: dict[str, Any] = access.options | ({LEVEL: level} if level else {})
    if not is_pattern(path):
        image = read_image(path, access, level)
        check_size(image.array, access)
        if image.files:
            options[FILES] = "\n".join(image.files)
        axes = image.axes
    else:
        files = matching_files(path, access)
        image = read_image(files[0], access, level)
        check_slices(files, image.array, level, access)
        options[NAMES] = names_hash(files)
        axes = stack_axes(len(files), image.axes)
    return ArrayInfo(
        path,
        axes,
        str(image.array.dtype),
        options,
        named_by=image.named_by,
        labels=image.labels,
        staged=image.staged,
    )
