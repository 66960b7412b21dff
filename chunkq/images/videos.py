"""Frames of a video file, by number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import IO, Any

import av
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError

from chunkq.errors import ErrorCode
from chunkq.images.decoding import Pixels
from chunkq.images.image_error import ImageError
from chunkq.images.image_spec import Mode

FORMATS: dict[str, str] = {"L": "gray", "RGB": "rgb24", "RGBA": "rgba"}
"""Mode -> pixel format of FFmpeg."""
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,ogg,asf,flv,h264,hevc,m4v,gif"
)
"""Formats of FFmpeg that are opened. Playlists are none: they would read other files."""


@dataclass(frozen=True)
class VideoIndex:
    """Where the frames of a video are.

    times  time stamp of each frame in the order of display, in units of the stream, int64
    shape  height and width of a frame, in pixels
    rate   frames per second, 0 if the file does not say
    """

    times: npt.NDArray[np.int64]
    shape: tuple[int, int]
    rate: float

    def __len__(self) -> int:
        return len(self.times)


def index_video(file: str | IO[bytes]) -> VideoIndex:
    """Return the index of a video. Reads all packets of its first video stream, decodes none.

    Raises ImageError if the file is no video, or if its frames have no distinct time stamps.
    """
    with _opened(file) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size]
        stamps = [packet.pts for packet in packets if not packet.is_discard]
        rate = float(stream.average_rate or 0)
        shape = (stream.codec_context.height, stream.codec_context.width)
    times = np.array(sorted(stamp for stamp in stamps if stamp is not None), np.int64)
    if not len(times) or len(times) != len(stamps) or len(np.unique(times)) != len(times):
        raise ImageError(
            "read", "the frames of the video have no distinct time stamps; convert it to MP4"
        )
    return VideoIndex(times, shape, rate)


def read_frames(
    file: str | IO[bytes], index: VideoIndex, numbers: Sequence[int], mode: Mode
) -> Iterator[tuple[int, Pixels | ImageError]]:
    """Yield the frames `numbers` in this order, ascending, each with its number.

    A frame is pixels (H, W, C), uint8, or an ImageError if it cannot be decoded. Decoding starts at
    the last keyframe before the first number, and goes on to the last one. Raises ImageError if the
    file cannot be opened.
    """
    wanted = {int(index.times[n]): n for n in numbers}
    if not wanted:
        return
    end = max(wanted)
    missing = "the frame is missing in the stream"
    with _opened(file) as (container, stream):
        container.seek(min(wanted), stream=stream, backward=True)
        try:
            for frame in container.decode(stream):
                number = wanted.pop(frame.pts, None) if frame.pts is not None else None
                if number is not None:
                    for time in list(takewhile(frame.pts.__gt__, wanted)):
                        yield _failed(wanted.pop(time), missing)
                    yield (
                        number,
                        frame.to_ndarray(format=FORMATS[mode]).reshape(
                            frame.height, frame.width, -1
                        ),
                    )
                if not wanted or (frame.pts is not None and frame.pts > end):
                    break
            reason = missing
        except FFmpegError as error:
            reason = f"damaged: {error.strerror}"
    for number in wanted.values():
        yield _failed(number, reason)


def _failed(number: int, reason: str) -> tuple[int, ImageError]:
    return number, ImageError(
        "decode", f"frame {number}: {reason}; convert the video again", code=ErrorCode.IMAGE_DAMAGED
    )


@contextmanager
def _opened(file: str | IO[bytes]) -> Iterator[tuple[Any, Any]]:
    """Open a video and its first video stream. Raises ImageError."""
    try:
        with av.open(file, options={"format_whitelist": CONTAINERS}) as container:
            if not container.streams.video:
                raise ImageError("read", "the file has no video stream; fix the path")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except FileNotFoundError as error:
        raise ImageError("read", "missing; fix the path", code=ErrorCode.IMAGE_MISSING) from error
    except FFmpegError as error:
        raise ImageError("read", f"not a video: {error.strerror}; replace the file") from error
