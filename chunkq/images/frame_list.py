"""Rows of the frames of videos, in a list of images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import numpy as np
import pyarrow as pa

from chunkq.access import DEFAULT_ACCESS, Access
from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.position_range import positions_in
from chunkq.images.image_error import ImageError
from chunkq.images.image_list import PATH, RESERVED, ImageList, is_video
from chunkq.images.reading import failed, listed_filesystem, open_local, storage_errors
from chunkq.install_hint import install_command
from chunkq.paths import is_url

if TYPE_CHECKING:
    from chunkq.images.videos import VideoIndex

FRAME = "frame"
"""Column with the number of a frame, from 0; null for an image and for a video without frames."""
STATE = f"{RESERVED}video"
"""Column with the `video_state` of each row of a video when the list was made. It is null for an
image, and for a video that could not be opened."""
TAGS = ("ETag", "etag", "md5Hash", "mtime", "LastModified")
"""What file systems of fsspec call the tag or the time of a file, the most exact one first."""
Frames = int | str | tuple[int | str, ...] | None
"""One number, a half-open range `START:STOP:STEP` of which all parts are optional, or a list."""


def with_frames(
    images: ImageList, frames: Frames = None, access: Access = DEFAULT_ACCESS
) -> ImageList:
    """Return a list with one row per frame of each video, ascending, with the column `frame`.

    A list without videos is returned unchanged, and one that has the column keeps its rows. Videos
    add the column `STATE`. A video that cannot be opened keeps one row, without a number. Raises
    StoreError if PyAV is missing, and if `frames` is set for a list without videos or beside the
    column.
    """
    paths = images.paths if images.has_videos else []
    numbers = [n for n, path in enumerate(paths) if path and is_video(path)]
    has_column = FRAME in images.table.column_names
    if not numbers or has_column:
        if frames is not None:
            problem = "the list has a column `frame`" if has_column else "the list has no video"
            raise StoreError(
                f"input.frames: {problem}; remove frames", code=ErrorCode.IMAGE_LIST_INVALID
            )
        kind = images.table.schema.field(FRAME).type if has_column else None
        if numbers and not pa.types.is_integer(kind):
            raise StoreError(
                f"input: the column `frame` has the type {kind}; use integers",
                code=ErrorCode.IMAGE_LIST_INVALID,
            )
        if not numbers:
            return images
        of_path = {path: video_state(path, access) for path in {paths[n] for n in numbers}}
        return ImageList(_with_states(images.table, [of_path.get(path) for path in paths]))
    videos = {*numbers}
    rows: list[np.ndarray] = []
    columns: list[pa.Array] = []
    states: list[str | None] = []
    for number, path in enumerate(paths):
        # The state first: a video that is replaced meanwhile has another one when it is read.
        state = video_state(path, access) if number in videos else None
        picked = _frames_of(path, frames, access) if number in videos else None
        count = 1 if picked is None else len(picked)
        rows.append(np.full(count, number))
        columns.append(pa.array([None] if picked is None else picked, pa.int64()))
        states += [None if picked is None else state] * count
    table = _with_states(images.table.take(pa.array(np.concatenate(rows))), states)
    if not table.num_rows:
        raise StoreError(
            f"input.frames: {frames!r} names no frame of the videos; fix it",
            code=ErrorCode.IMAGE_LIST_INVALID,
        )
    at = table.column_names.index(PATH) + 1
    return ImageList(table.add_column(at, FRAME, pa.concat_arrays(columns)))


def _with_states(table: pa.Table, states: list[str | None]) -> pa.Table:
    return table.append_column(STATE, pa.array(states, pa.string()))


def video_state(path: str, access: Access = DEFAULT_ACCESS) -> str | None:
    """Return a text that changes when a video is replaced; None if it is missing or forbidden.

    It has the size and the time of modification, or what the storage has instead of a time. Raises
    StoreError if the storage fails.
    """
    try:
        with storage_errors(path):
            if not is_url(path):
                status = os.stat(path)
                return f"{status.st_size} {status.st_mtime_ns}"
            filesystem, inner = listed_filesystem(path, access)
            info = filesystem.info(inner)
    except ImageError:
        return None
    tag = next((info[key] for key in TAGS if info.get(key)), "")
    return f"{info.get('size')} {tag}"


def _frames_of(path: str, frames: Frames, access: Access) -> np.ndarray | None:
    """Return the numbers of the frames of a video, None if it cannot be opened."""
    try:
        return picked_frames(frames, len(video_index(path, access)))
    except ImageError:
        return None


def picked_frames(frames: Frames, count: int) -> np.ndarray:
    """Return the numbers of the frames of a video with `count` frames, ascending, int64."""
    if frames is None:
        return np.arange(count)
    if isinstance(frames, str):
        positions = positions_in(frames, count)
        if positions is None:
            raise ValueError(f"{frames!r} is no range")
        return np.array(positions, np.int64)
    picks = frames if isinstance(frames, tuple) else (frames,)
    return np.unique(np.array(picks, np.int64))


def video_index(path: str, access: Access = DEFAULT_ACCESS) -> VideoIndex:
    """Return the index of a video. Raises ImageError if it cannot be read.

    Raises StoreError if PyAV is missing.
    """
    try:
        from chunkq.images.videos import index_video
    except ImportError as error:
        raise StoreError(
            f"input: videos need packages that are missing ({error}); run "
            f"`{install_command('video')}`",
            code=ErrorCode.PACKAGE_MISSING,
        ) from None
    with open_video(path, access) as file:
        return index_video(file)


@contextmanager
def open_video(path: str, access: Access = DEFAULT_ACCESS) -> Iterator[IO[bytes]]:
    """Open a video for `chunkq.images.videos`. Raises ImageError unless it is a file.

    Raises StoreError if the storage fails, also while the video is read: FFmpeg would take it for
    damage of the video.
    """
    with storage_errors(path):
        file = _open_url(path, access) if is_url(path) else open_local(path)
    with file:
        try:
            yield file
        except (ImageError, StoreError, MemoryError):
            raise
        except Exception as error:  # each file system raises different errors
            if is_url(path) or isinstance(error, OSError):
                raise failed(path, error) from error
            raise


def _open_url(path: str, access: Access) -> IO[bytes]:
    filesystem, inner = listed_filesystem(path, access)
    file: IO[bytes] = filesystem.open(inner, "rb")
    return file
