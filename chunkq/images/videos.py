"""Frames of a video file, by number."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import IO, Any

import av
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError, InvalidDataError
from av.sidedata.sidedata import SideDataContainer, Type

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
    keys   time stamp of each keyframe, and the earlier one of this and of its decoding, ascending,
           int64 (k, 2); at least one
    shape  height and width of a frame as it is stored, in pixels
    """

    times: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.times)

    def key_before(self, time: int) -> int:
        """Return the number of the keyframe from which the frame at a time can be decoded."""
        return max(0, int(np.searchsorted(self.keys[:, 0], time, side="right")) - 1)

    def key_after(self, time: int) -> float:
        """Return the time stamp of the first keyframe after a time, infinity if there is none."""
        number = int(np.searchsorted(self.keys[:, 0], time, side="right"))
        return float(self.keys[number, 0]) if number < len(self.keys) else np.inf

    def positions(self, time: int) -> Iterator[tuple[int, bool]]:
        """Yield where to seek for the frame at a time, from keyframe to keyframe, ever earlier.

        Each is a time and whether to seek backward from it. Some formats have an index of times of
        display, others of decoding, or none, and some find nothing before their first keyframe.
        """
        yield time, True
        number, step = self.key_before(time), 1
        while number > 0:
            yield int(self.keys[number, 1]), True
            number, step = number - step, 2 * step
        yield int(self.keys[0, 1]), True
        yield int(self.keys[0, 1]), False


def index_video(file: str | IO[bytes]) -> VideoIndex:
    """Return the index of a video. Reads all packets of its first video stream, decodes none.

    Raises ImageError if the file is no video, or if its frames have no distinct time stamps.
    """
    stamps: list[int | None] = []
    keys: list[tuple[int, int]] = []
    with _opened(file) as (container, stream):
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.is_keyframe and packet.pts is not None:
                decoded = packet.pts if packet.dts is None else packet.dts
                keys.append((packet.pts, min(packet.pts, decoded)))
            if not packet.is_discard:
                stamps.append(packet.pts)
        shape = (stream.codec_context.height, stream.codec_context.width)
    times = np.array(sorted(stamp for stamp in stamps if stamp is not None), np.int64)
    if not len(times) or len(times) != len(stamps) or len(np.unique(times)) != len(times):
        raise ImageError(
            "read", "the frames of the video have no distinct time stamps; convert it to MP4"
        )
    if not keys:
        raise ImageError("read", "the video has no keyframe; convert it to MP4")
    return VideoIndex(times, np.array(sorted(keys), np.int64), shape)


def read_frames(
    file: str | IO[bytes], index: VideoIndex, numbers: Sequence[int], mode: Mode
) -> Iterator[tuple[int, Pixels | ImageError]]:
    """Yield the frames `numbers` in this order, ascending, each with its number.

    A frame is pixels (H, W, C), uint8, turned as players show it, or an ImageError if it cannot be
    decoded. Decoding starts at the last keyframe before the first number, and goes on to the last
    one. After damage it starts again at the next keyframe, so that the result does not depend on
    the first number. Raises ImageError if the file cannot be opened.
    """
    wanted = {int(index.times[n]): n for n in numbers}
    with _opened(file) as (container, stream):
        while wanted:
            reached = int(index.keys[index.key_before(min(wanted)), 0])
            resumed, reason = np.inf, "the frame is missing in the stream"
            try:
                for frame in _frames_from(container, stream, index, min(wanted)):
                    reached = frame.pts
                    if frame.is_corrupt:  # decoders guess the pixels that they lack
                        raise InvalidDataError(errno.EINVAL, "invalid data")
                    for time in list(takewhile(reached.__gt__, wanted)):
                        yield _failed(wanted.pop(time), reason)
                    number = wanted.pop(reached, None)
                    if number is not None:
                        yield number, _pixels(frame, number, mode)
                    if not wanted:
                        return
            except MemoryError:  # FFmpeg's is an FFmpegError, too
                raise
            except FFmpegError as error:
                resumed, reason = index.key_after(reached), f"damaged: {error.strerror}"
            for time in [time for time in wanted if time < resumed]:
                yield _failed(wanted.pop(time), reason)


def _frames_from(container: Any, stream: Any, index: VideoIndex, time: int) -> Iterator[Any]:
    """Yield frames in the order of display, from one on that is not later than `time`.

    Frames that are decoded after a keyframe and shown before it are left out: they can depend on
    others. Of a stream without whole keyframes a decoder shows none until all of a frame was
    refreshed, so decoding begins one earlier. Raises FFmpegError for damage.
    """
    earliest = int(index.keys[0, 0])
    for position, is_backward in index.positions(time):
        key = None
        with suppress(FFmpegError):  # no packet of the stream is there
            container.seek(position, stream=stream, backward=is_backward)
            packets = container.demux(stream)
            key = next((packet for packet in packets if packet.is_keyframe), None)
        if key is None or key.pts is None:
            continue
        frames = _decoded(chain([key], packets), key.pts)
        first = next(frames, None)
        if key.pts <= earliest or (first is not None and first.pts <= time):
            yield from chain([] if first is None else [first], frames)
            return


def _decoded(packets: Iterable[Any], start: int) -> Iterator[Any]:
    """Yield the frames of packets that are shown from a time on."""
    for packet in packets:
        for frame in packet.decode():
            if frame.pts is not None and frame.pts >= start:
                yield frame


def _pixels(frame: Any, number: int, mode: Mode) -> Pixels | ImageError:
    """Return the pixels (H, W, C) of a frame, turned and mirrored as its display matrix says.

    The matrix a, b, u, c, d, v, x, y, w maps a column p and a row q to the column a p + c q and the
    row b p + d q, see libavutil/display.h. An ImageError stands for turns by no multiple of 90°.
    """
    pixels: Pixels = frame.to_ndarray(format=FORMATS[mode])
    pixels = pixels.reshape(frame.height, frame.width, -1)
    # A frame keeps its own container, which keeps the frame, in memory until a garbage collection.
    container: Any = SideDataContainer  # whose stub lacks the argument
    matrix = container(frame).get(Type.DISPLAYMATRIX)
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if not (b or c):
        row, column = d, a
    elif not (a or d):
        pixels, row, column = pixels.swapaxes(0, 1), b, c
    else:
        return ImageError(
            "decode",
            f"frame {number}: the video is turned by no multiple of 90 degrees; convert it",
        )
    turned = pixels[:: -1 if row < 0 else 1, :: -1 if column < 0 else 1]
    return np.ascontiguousarray(turned)


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
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise ImageError("read", "missing; fix the path", code=ErrorCode.IMAGE_MISSING) from error
    except FFmpegError as error:
        raise ImageError("read", f"not a video: {error.strerror}; replace the file") from error
