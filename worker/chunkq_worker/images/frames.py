"""Frames of videos for the rows of a chunk, each decoded once and in order."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache, partial
from math import prod
from threading import Lock
from typing import TYPE_CHECKING

from chunkq.access import Access
from chunkq.errors import ChunkReadError, ErrorCode
from chunkq.images.decoding import Pixels, Reserve
from chunkq.images.frame_list import open_video, video_index, video_state
from chunkq.images.image_error import ImageError
from chunkq.images.image_list import is_video
from chunkq.images.image_spec import Mode
from chunkq.paths import without_secret
from chunkq_worker.images.rows import RowInput

if TYPE_CHECKING:
    from chunkq.images.videos import VideoIndex

_Frames = Generator[tuple[int, Pixels | ImageError], None, None]
INDEXES = 8
"""Indexes of videos that a process keeps, 8 bytes per frame."""


class FrameReader:
    """Frames of one video, with ascending numbers. Threads may read them in any order.

    Frames that were decoded for a later number wait in memory, so threads that read in about the
    order of the numbers keep few of them.
    """

    def __init__(
        self,
        path: str,
        numbers: Sequence[int],
        access: Access,
        mode: Mode,
        state: str | None = None,
    ) -> None:
        self._path, self._numbers, self._access, self._mode = path, numbers, access, mode
        self._state = state
        self._lock = Lock()
        self._video: VideoIndex | None = None
        self._frames: _Frames | None = None
        self._left = len(numbers)
        self._ready: dict[int, Pixels | ImageError] = {}
        self._broken: ImageError | None = None

    def read(self, number: int, reserve: Reserve) -> Pixels:
        """Return a frame (H, W, C), uint8. Raises ImageError if it cannot be decoded."""
        with self._lock:
            pixels = self._prepare()
        reserve(pixels)  # without the lock: what others hold is given back by those who have it
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

    def _prepare(self) -> int:
        """Find the index of the video; return the pixels of a frame, 0 if it cannot be read."""
        if self._broken is None and self._video is None:
            try:
                self._video = _index(self._path, self._access, self._state)
            except ImageError as error:
                self._broken = error
        return 0 if self._video is None else prod(self._video.shape)

    def _decode_to(self, number: int) -> None:
        if self._frames is None and self._video is not None:
            self._frames = _decoded(
                self._path, self._numbers, self._access, self._mode, self._video
            )
        while number not in self._ready:
            following = None if self._frames is None else next(self._frames, None)
            if self._frames is None or following is None:
                return
            self._ready[following[0]] = following[1]
            self._left -= 1
            if not self._left:
                self._frames.close()  # a decoder holds the frames that others refer to


def _decoded(
    path: str, numbers: Sequence[int], access: Access, mode: Mode, index: VideoIndex
) -> _Frames:
    """Yield frames of a video, each with its number.

    No reader is referred to, so a reader that is given up closes the video.
    """
    from chunkq.images.videos import read_frames  # an extra

    present = [n for n in numbers if 0 <= n < len(index)]
    for number in numbers:
        if number not in range(len(index)):
            yield (
                number,
                ImageError(
                    "read",
                    f"frame {number}: the video has {len(index)} frames, from 0; fix frames",
                    code=ErrorCode.IMAGE_MISSING,
                ),
            )
    with open_video(path, access) as file:
        yield from read_frames(file, index, present, mode)


@lru_cache(INDEXES)
def _index(path: str, access: Access, state: str | None) -> VideoIndex:
    """Return the index of a video. One that was replaced has another `state`."""
    return video_index(path, access)


def check_videos(paths: Sequence[str], states: Sequence[str | None], access: Access) -> None:
    """Raise ChunkReadError if a video is missing or was replaced since its job was created.

    `states` are those of the videos at `paths`, then; None if nothing is compared.
    """
    for path, state in {*zip(paths, states, strict=True)}:
        if state is None or (current := video_state(path, access)) == state:
            continue
        printed = without_secret(path)
        if current is None:
            raise ChunkReadError(
                f"input: {printed} is missing; restore it", code=ErrorCode.INPUT_MISSING
            )
        raise ChunkReadError(
            f"input: {printed} was replaced since the job was created (its size or time of change "
            "differs); restore it together with its time, or use --overwrite to start again",
            code=ErrorCode.INPUT_CHANGED,
        )


def frame_inputs(
    paths: Sequence[str],
    frames: Sequence[int | None],
    states: Sequence[str | None],
    access: Access,
    mode: Mode,
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
        numbers = [n for n in run if n is not None]
        reader = FrameReader(paths[start], numbers, access, mode, states[start])
        for position, number in enumerate(run, start):
            read = (
                partial(_unreadable, paths[start], access, states[start])
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


def _unreadable(path: str, access: Access, state: str | None, reserve: Reserve) -> Pixels:
    """Raise the ImageError of a row without a number of a frame."""
    _index(path, access, state)
    raise ImageError(
        "read",
        "the row has no number of a frame; set it in the column frame, or, if the video could not "
        "be read when the job was created, start again with --overwrite",
        code=ErrorCode.IMAGE_DAMAGED,
    )
