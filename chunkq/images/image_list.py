"""Lists of images: the rows of an image job, found by a pattern, a folder or a table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from posixpath import normpath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from chunkq.access import DEFAULT_ACCESS, Access
from chunkq.errors import ErrorCode, StoreError
from chunkq.paths import absolute, is_url, join, open_filesystem, read_bytes, without_secret

SUFFIXES = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe",
    ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm",
    ".qoi", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Suffixes of the files of a folder that are images."""
VIDEO_SUFFIXES = (
    ".3g2", ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg",
    ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv",
)  # fmt: skip
"""Suffixes of files whose frames are images."""
TABLES = (".csv", ".parquet", ".txt")
"""Suffixes of files that list images."""
PATH = "path"
"""Column of the paths."""
RESERVED = "chunkq:"
"""Start of the names of columns that chunkq adds to a stored list."""
CSV = pa.csv.ParseOptions(newlines_in_values=True)
"""Without it, a text of several lines is damage where it lies on a border of blocks."""
PATHS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class ImageList:
    """Rows of images: a table with the column `path`, absolute paths or URLs, then the others."""

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def paths(self) -> list[str]:
        """The path of each row."""
        paths: list[str] = self.table.column(PATH).to_pylist()
        return paths

    @property
    def has_videos(self) -> bool:
        """Whether a row is that of a video."""
        return any(path and is_video(path) for paths in _path_parts(self.table) for path in paths)

    def without(self, path: str) -> ImageList:
        """Return the list without the rows of a path."""
        is_other = pc.not_equal(self.table.column(PATH), path)
        return self if pc.all(is_other).as_py() else ImageList(self.table.filter(is_other))


def find_images(path: str, access: Access = DEFAULT_ACCESS) -> ImageList:
    """Return the images that a path names: a pattern, a folder, a table or one file.

    Files of patterns and folders are sorted by their paths, and those of folders are found in
    folders below too: images, or videos if there are no images. A table is CSV or Parquet with a
    column `path`, or text with one path per line, without the spaces around it; its rows stay in
    their order, and relative paths start at the table's folder.

    Raises StoreError if nothing is found, and for a table that cannot be read.
    """
    suffix = os.path.splitext(path)[1].lower()
    is_name = is_url(path) or os.path.exists(path)
    if suffix in TABLES and (is_name or not has_magic(path)):
        return _checked(path, _absolute_paths(_read_table(path, suffix, access), path))
    return _checked(path, pa.table({PATH: pa.array(_files(path, access), pa.string())}))


def join_lists(lists: Sequence[ImageList]) -> ImageList:
    """Return the rows of several lists, one list after the other.

    A column that a list does not have is null there. Raises StoreError if a column has types that
    do not fit.
    """
    try:
        tables = [images.table for images in lists]
        return ImageList(pa.concat_tables(tables, promote_options="default").combine_chunks())
    except pa.ArrowInvalid as error:
        raise StoreError(
            f"input: the tables do not fit: {error}; use equal types in columns of one name",
            code=ErrorCode.IMAGE_LIST_INVALID,
        ) from None


def _checked(path: str, table: pa.Table) -> ImageList:
    if not table.num_rows:
        raise StoreError(
            f"input: {without_secret(path)} names no image; fix the path or the pattern",
            code=ErrorCode.IMAGE_LIST_INVALID,
        )
    return ImageList(table)


def _files(path: str, access: Access) -> list[str]:
    if not is_url(path):
        return _local_files(path)
    filesystem, inner = open_filesystem(path, access)
    scheme = path.partition("://")[0]
    if has_magic(inner):
        entries = filesystem.glob(inner, detail=True)
        files = [name for name, info in entries.items() if info["type"] == "file"]
    elif scheme not in ("http", "https") and filesystem.isdir(inner):
        files = _images_or_videos([str(name) for name in filesystem.find(inner)])
    else:
        return [path]
    names = (str(name) for name in files)
    return sorted(name if is_url(name) else f"{scheme}://{name.lstrip('/')}" for name in names)


def _local_files(path: str) -> list[str]:
    if os.path.isdir(path):
        walk = (os.path.join(top, name) for top, _, names in os.walk(path) for name in names)
        files = _images_or_videos(list(walk))
    elif has_magic(path) and not os.path.exists(path):
        files = [name for name in glob(path, recursive=True) if not os.path.isdir(name)]
    else:
        return [path] if os.path.lexists(path) else []
    return sorted(map(_as_text, files))


def _as_text(name: str) -> str:
    """Return a path that is valid Unicode: other bytes of a name are shown, not kept.

    Tables store Unicode, so such a file is an error of its row.
    """
    return os.fsencode(name).decode(errors="backslashreplace")


def _images_or_videos(names: Sequence[str]) -> list[str]:
    """Return the names of images, or of videos if there are no images."""
    images = [name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
    return images or [name for name in names if is_video(name)]


def is_video(path: str) -> bool:
    """Return whether a path is that of a video, by its suffix."""
    return os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES


def _read_table(path: str, suffix: str, access: Access) -> pa.Table:
    printed = without_secret(path)
    try:
        content = read_bytes(path, access)
    except OSError as error:
        raise StoreError(
            f"input: {printed} cannot be read: {error.strerror or error}; fix the path",
            code=ErrorCode.IMAGE_LIST_INVALID,
        ) from None
    try:
        table = _parsed(content, suffix)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise StoreError(
            f"input: {printed} is not a {suffix} table: {error}; fix the file",
            code=ErrorCode.IMAGE_LIST_INVALID,
        ) from None
    repeated = [name for name, count in Counter(table.column_names).items() if count > 1]
    if repeated:
        raise StoreError(
            f"input: {printed} has the column {repeated[0]!r} twice; rename one",
            code=ErrorCode.IMAGE_LIST_INVALID,
        )
    if PATH not in table.column_names:
        columns = ", ".join(table.column_names) or "none"
        raise StoreError(
            f"input: {printed} has no column `path`; found {columns}; add the column",
            code=ErrorCode.IMAGE_LIST_INVALID,
        )
    for field in table.schema:
        if field.name.startswith(RESERVED):
            raise StoreError(
                f"input: {printed}: the name of the column {field.name!r} is reserved; rename it",
                code=ErrorCode.IMAGE_LIST_INVALID,
            )
        if not _can_take(field.type):
            raise StoreError(
                f"input: {printed}: the column {field.name!r} has the unsupported type "
                f"{field.type}; convert it, or remove the column",
                code=ErrorCode.IMAGE_LIST_INVALID,
            )
    if not pa.types.is_string(table.schema.field(PATH).type):
        raise StoreError(
            f"input: {printed}: the column `path` has the type {table.schema.field(PATH).type}; "
            "use text",
            code=ErrorCode.IMAGE_LIST_INVALID,
        )
    return table


def _parsed(content: bytes, suffix: str) -> pa.Table:
    source = pa.BufferReader(content)
    if suffix == ".parquet":
        table = pq.read_table(source)
        return _plain_strings(table)
    if suffix == ".csv":
        options = pa.csv.ConvertOptions(column_types={PATH: pa.string()})
        return pa.csv.read_csv(source, parse_options=CSV, convert_options=options)
    lines = (line.strip() for line in content.decode("utf-8-sig").split("\n"))
    return pa.table({PATH: pa.array([line for line in lines if line], pa.string())})


def _can_take(kind: pa.DataType) -> bool:
    """Return whether pyarrow can take rows of a type: of some that it reads it cannot."""
    try:
        pa.chunked_array([], kind).take(pa.array([], pa.int64()))
    except pa.ArrowNotImplementedError:
        return False
    return True


def _plain_strings(table: pa.Table) -> pa.Table:
    """Return a table whose texts have one type: other writers use large strings or dictionaries."""
    fields = []
    for field in table.schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        is_text = pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        kind = pa.binary() if pa.types.is_binary_view(kind) else kind
        fields.append(field.with_type(pa.string() if is_text else kind))
    return table.cast(pa.schema(fields))


def _absolute_paths(table: pa.Table, source: str) -> pa.Table:
    """Return a table with the column `path` first, relative paths joined to the table's folder."""
    folder = source.rpartition("/")[0]
    is_local = not is_url(folder)
    parts = [
        pa.array(
            [
                # Most rows of a long list are relative paths: no function is called for them.
                f"{folder}/{path}" if is_local and path and path[0] != "/" and "://" not in path
                else _absolute_path(folder, path)
                for path in paths
            ],
            pa.string(),
        )
        for paths in _path_parts(table)
    ]  # fmt: skip
    others = [name for name in table.column_names if name != PATH]
    columns: dict[str, Any] = {PATH: pa.chunked_array(parts, pa.string())}
    return pa.table(columns | {name: table.column(name) for name in others})


def _path_parts(table: pa.Table) -> Iterator[list[str | None]]:
    """Yield the paths of a table, some at a time: as texts of Python they are large."""
    column = table.column(PATH)
    for start in range(0, len(column), PATHS_AT_ONCE):
        yield column.slice(start, PATHS_AT_ONCE).to_pylist()


def _absolute_path(folder: str, path: str | None) -> str:
    """Return an absolute path. A missing one is empty, and is an error of its row.

    `file://` becomes a local path, so that it has the limits of one. `..` stays in local paths,
    where it can follow a link, and is resolved in the keys of a bucket.
    """
    if not path:
        return ""
    if is_url(path):
        return absolute(path, Path("/"))
    if path.startswith("/"):
        return path
    joined = join(folder, path)
    if ".." not in joined.split("/"):
        return joined
    scheme, _, rest = joined.partition("://")
    bucket, _, key = rest.partition("/")
    return f"{scheme}://{bucket}{normpath(f'/{key}')}"
