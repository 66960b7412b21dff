"""Frames of videos for the rows of a chunk, each decoded once and in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from threading import Lock

from chunkq.access import Access
from chunkq.errors import ErrorCode
from chunkq.images.decoding import Pixels
from chunkq.images.frame_list import open_video, video_index
from chunkq.images.image_error import ImageError
from chunkq.images.image_list import is_video
from chunkq.images.image_spec import Mode
from chunkq_worker.images.rows import RowInput

INDEXES = 8
"""Indexes of videos that a process keeps, 8 bytes per frame."""


class FrameReader:
    """Frames of one video, with ascending numbers. Threads may read them in any order.

    Frames that were decoded for a later number wait in memory, so threads that read in about the
    order of the numbers keep few of them.
    """

    def __init__(self, path: str, numbers: Sequence[int], access: Access, mode: Mode) -> None:
        self._path, self._numbers, self._access, self._mode = path, numbers, access, mode
        self._lock = Lock()
        self._frames: Iterator[tuple[int, Pixels | ImageError]] | None = None
        self._ready: dict[int, Pixels | ImageError] = {}
        self._broken: ImageError | None = None

    def read(self, number: int) -> Pixels:
        """Return a frame (H, W, C), uint8. Raises ImageError if it cannot be decoded."""
        with self._lock:
            if self._broken is None:
                try:
                    self._decode_to(number)
                except ImageError as error:
                    self._broken = error
            frame = self._ready.pop(number, self._broken)
        if frame is None:
            raise ImageError("decode", f"frame {number}: not decoded; convert the video again")
        if isinstance(frame, ImageError):
            raise frame
        return frame

    def _decode_to(self, number: int) -> None:
        if self._frames is None:
            self._frames = self._decoded()
        while number not in self._ready:
            following = next(self._frames, None)
            if following is None:
                return
            self._ready[following[0]] = following[1]

    def _decoded(self) -> Iterator[tuple[int, Pixels | ImageError]]:
        from chunkq.images.videos import read_frames  # an extra

        index = _index(self._path, self._access)
        present = [n for n in self._numbers if 0 <= n < len(index)]
        for number in self._numbers:
            if number not in range(len(index)):
                yield (
                    number,
                    ImageError(
                        "read",
                        f"frame {number}: the video has {len(index)} frames, from 0; fix frames",
                        code=ErrorCode.IMAGE_MISSING,
                    ),
                )
        with open_video(self._path, self._access) as file:
            yield from read_frames(file, index, present, self._mode)


_index = lru_cache(INDEXES)(video_index)


def frame_inputs(
    paths: Sequence[str], frames: Sequence[int | None], access: Access, mode: Mode
) -> Iterator[RowInput]:
    """Yield the input of each row that is a frame of a video; rows are numbered from 0.

    Rows that follow each other and have ascending frames of one video are decoded together.
    """
    start = 0
    while start < len(paths):
        stop = start + 1
        if not is_video(paths[start]):
            start = stop
            continue
        while stop < len(paths) and _continues(paths, frames, stop):
            stop += 1
        run = frames[start:stop]
        reader = FrameReader(paths[start], [n for n in run if n is not None], access, mode)
        for position, number in enumerate(run, start):
            read = (
                partial(_unreadable, paths[start], access)
                if number is None
                else partial(reader.read, number)
            )
            yield RowInput(position, read)
        start = stop


def _continues(paths: Sequence[str], frames: Sequence[int | None], row: int) -> bool:
    before, this = frames[row - 1], frames[row]
    if before is None or this is None or this <= before:
        return False
    return paths[row] == paths[row - 1]


def _unreadable(path: str, access: Access) -> Pixels:
    """Raise the ImageError of a video that had no frames when its job was created."""
    _index(path, access)
    raise ImageError(
        "read",
        "the video could not be read when the job was created; start the job again with "
        "--overwrite",
        code=ErrorCode.IMAGE_DAMAGED,
    )
