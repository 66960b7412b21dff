"""Frames of videos, against decoding from the start."""

from __future__ import annotations

import errno
import struct
from itertools import product
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest

from chunkq.errors import ErrorCode
from chunkq.images import videos
from chunkq.images.image_error import ImageError
from chunkq.images.videos import index_video, read_frames

FRAMES, HEIGHT, WIDTH = 75, 48, 64


def write_video(path: Path, codec: str, **options: str) -> None:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t in range(FRAMES):
            spot = 255 * np.exp(-((x - t % WIDTH) ** 2 + (y - t % HEIGHT) ** 2) / 40)
            pixels = np.repeat(spot[..., None], 3, axis=2).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def all_frames(path: Path) -> npt.NDArray[Any]:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


CODECS = {
    "B-frames": ("libx264", "mp4", {"bf": "3", "g": "20"}),
    "one keyframe": ("libx264", "mkv", {"bf": "2", "g": "1000"}),
    "shown before the keyframe": ("mpeg4", "avi", {"bf": "2", "g": "12"}),
    "no index": ("libx264", "ts", {"bf": "3", "g": "20"}),
    "keyframes only": ("libx264", "mov", {"g": "1"}),
    "no whole keyframe": ("libx264", "mkv", {"x264-params": "intra-refresh=1:keyint=20"}),
}


@pytest.fixture(scope="module", params=list(CODECS))
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    codec, suffix, options = CODECS[request.param]
    path = tmp_path_factory.mktemp("videos") / f"video.{suffix}"
    write_video(path, codec, **options)
    return path


def test_every_range_has_the_frames_of_the_whole_video(video: Path) -> None:
    index, expected = index_video(str(video)), all_frames(video)
    assert (len(index), index.shape) == (FRAMES, (HEIGHT, WIDTH))
    for numbers in (range(FRAMES), range(17, 43), range(70, 75), range(3, 70, 7), range(74, 75)):
        frames = dict(read_frames(str(video), index, numbers, "RGB"))
        assert list(frames) == list(numbers)
        for number, frame in frames.items():
            np.testing.assert_array_equal(frame, expected[number])


def test_each_frame_can_be_the_first_of_a_chunk(video: Path) -> None:
    index, expected = index_video(str(video)), all_frames(video)
    for number in range(FRAMES):
        [(_, frame)] = read_frames(str(video), index, [number], "RGB")
        np.testing.assert_array_equal(frame, expected[number])


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_a_video_whose_start_is_cut_off_has_all_frames_from_its_first_keyframe(
    tmp_path: Path, suffix: str
) -> None:
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    write_video(whole, "libx264", bf="2", g="9")
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if number >= 5 and packet.size:
                packet.stream = stream
                target.mux(packet)
    index, expected = index_video(str(cut)), all_frames(cut)
    lost = len(index) - len(expected)
    assert 0 < lost < 9
    for first in range(len(index)):
        [(_, frame)] = read_frames(str(cut), index, [first], "RGB")
        if first < lost:
            assert isinstance(frame, ImageError)
        else:
            np.testing.assert_array_equal(frame, expected[first - lost])
    frames = dict(read_frames(str(cut), index, range(len(index)), "RGB"))
    assert sum(isinstance(frame, ImageError) for frame in frames.values()) == lost


TURNS = [(a, 0, 0, d) for a, d in product((-1, 1), repeat=2)]
TURNS += [(0, b, c, 0) for b, c in product((-1, 1), repeat=2)]
"""Matrices of turns by multiples of 90°, mirrored or not: column a p + c q, row b p + d q."""


@pytest.fixture(scope="module")
def small_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "video.mp4"
    write_video(path, "libx264", g="20")
    return path


def with_matrix(path: Path, matrix: tuple[float, ...]) -> Path:
    """Return a copy of an MP4 file that says that its frames are turned by a matrix a, b, c, d."""
    turned, content = path.with_name("turned.mp4"), bytearray(path.read_bytes())
    a, b, c, d = (round(value * (1 << 16)) for value in matrix)
    start = content.index(b"tkhd") + 44
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    turned.write_bytes(content)
    return turned


@pytest.mark.parametrize("matrix", TURNS)
def test_frames_are_turned_as_the_file_says(
    small_video: Path, matrix: tuple[int, int, int, int]
) -> None:
    path, stored = with_matrix(small_video, matrix), all_frames(small_video)[20]
    a, b, c, d = matrix
    q, p = np.mgrid[:HEIGHT, :WIDTH]
    rows, columns = b * p + d * q, a * p + c * q
    expected = np.zeros((np.ptp(rows) + 1, np.ptp(columns) + 1, 3), np.uint8)
    expected[rows - rows.min(), columns - columns.min()] = stored
    [(_, frame)] = read_frames(str(path), index_video(str(path)), [20], "RGB")
    np.testing.assert_array_equal(frame, expected)


def test_a_turn_by_no_multiple_of_90_degrees_is_an_error_of_each_frame(small_video: Path) -> None:
    path = with_matrix(small_video, (0.7, 0.7, -0.7, 0.7))
    frames = dict(read_frames(str(path), index_video(str(path)), [3, 4], "RGB"))
    assert [type(frames[n]) for n in (3, 4)] == [ImageError, ImageError]


def test_gray_frames_have_one_channel(video: Path) -> None:
    index = index_video(str(video))
    [(number, frame)] = read_frames(str(video), index, range(9, 10), "L")
    assert number == 9
    assert not isinstance(frame, ImageError)
    assert frame.shape == (HEIGHT, WIDTH, 1)


def test_frames_that_are_cut_off_are_errors_and_those_before_are_not(tmp_path: Path) -> None:
    path = tmp_path / "video.mkv"
    write_video(path, "libx264", bf="0", g="10")
    index, expected = index_video(str(path)), all_frames(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames = dict(read_frames(str(path), index, range(FRAMES), "RGB"))
    assert list(frames) == list(range(FRAMES))
    good = [n for n, frame in frames.items() if not isinstance(frame, ImageError)]
    assert 10 < len(good) < FRAMES
    assert good == list(range(len(good)))
    np.testing.assert_array_equal(frames[5], expected[5])


@pytest.mark.parametrize("damaged", [20, 23])
@pytest.mark.parametrize("is_half", [True, False])
def test_damage_reaches_to_the_next_keyframe_whatever_the_first_frame_is(
    tmp_path: Path, damaged: int, is_half: bool
) -> None:
    path = tmp_path / "video.mkv"
    write_video(path, "mpeg4", g="10")
    index, expected = index_video(str(path)), all_frames(path)
    with av.open(str(path)) as container:
        packet = bytes(next(p for n, p in enumerate(container.demux(video=0)) if n == damaged))
    # A decoder returns the frame of which one half is valid, with guessed pixels.
    kept = packet[: len(packet) // 2 * is_half]
    content = path.read_bytes()
    path.write_bytes(content.replace(packet, kept + b"\x55" * (len(packet) - len(kept))))
    for first in (0, 15, 22, 26, 30):
        frames = dict(read_frames(str(path), index, range(first, 40), "RGB"))
        bad = [n for n, frame in frames.items() if isinstance(frame, ImageError)]
        assert bad == list(range(max(first, damaged), 30))
        for number in set(frames) - set(bad):
            np.testing.assert_array_equal(frames[number], expected[number])


def test_a_lack_of_memory_is_no_damage_of_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")

    path = tmp_path / "video.mkv"
    write_video(path, "mpeg4")
    index = index_video(str(path))
    monkeypatch.setattr(videos, "_frames_from", fail)
    with pytest.raises(MemoryError):
        list(read_frames(str(path), index, [0], "RGB"))
    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(MemoryError):
        index_video(str(path))


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, ErrorCode.IMAGE_MISSING),
        (b"", ErrorCode.IMAGE_DAMAGED),
        (b"no video" * 99, ErrorCode.IMAGE_DAMAGED),
    ],
)
def test_a_file_that_is_no_video_is_one_error(
    tmp_path: Path, content: bytes | None, code: ErrorCode
) -> None:
    path = tmp_path / "video.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        index_video(str(path))
    assert caught.value.code == code
