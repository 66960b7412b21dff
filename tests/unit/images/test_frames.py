"""Frames of videos as rows of a list."""

from __future__ import annotations

import errno
import gc
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from chunkq_worker.images import frames
from chunkq_worker.images.frames import FrameReader, check_videos, frame_inputs

from chunkq.access import DEFAULT_ACCESS
from chunkq.errors import ChunkReadError, ErrorCode, StoreError
from chunkq.geometry.position_range import positions_in
from chunkq.images import frame_list
from chunkq.images.decoding import unlimited
from chunkq.images.frame_list import (
    FRAME,
    STATE,
    open_video,
    picked_frames,
    video_state,
    with_frames,
)
from chunkq.images.image_error import ImageError
from chunkq.images.image_list import PATH, ImageList, find_images
from tests.harness.videos import all_frames, write_video

FRAMES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos")
    write_video(path / "a.mp4", FRAMES, bf="2", g="6")
    write_video(path / "b.mkv", 7)
    (path / "c.mp4").write_bytes(b"no video")
    return path


def rows(images: ImageList) -> list[tuple[str, int | None]]:
    names = [Path(path).name for path in images.paths]
    return list(zip(names, images.table.column(FRAME).to_pylist(), strict=True))


def test_each_frame_is_a_row_and_a_broken_video_is_one(folder: Path) -> None:
    images = with_frames(find_images(str(folder)))
    expected: list[tuple[str, int | None]] = [("a.mp4", n) for n in range(FRAMES)]
    assert rows(images) == [*expected, *(("b.mkv", n) for n in range(7)), ("c.mp4", None)]


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (None, range(10)),
        ("2:8:3", [2, 5]),
        (":4", range(4)),
        ("8:", [8, 9]),
        ("5:100", range(5, 10)),
        (3, [3]),
        ((7, 2), [2, 7]),
        ((4, 30), [4, 30]),  # a row whose error says how many frames there are
    ],
)
def test_frames_are_picks_or_a_range(frames: Any, expected: Any) -> None:
    assert picked_frames(frames, 10).tolist() == list(expected)


def test_a_step_of_0_is_no_range() -> None:
    assert positions_in("0:10:0", 10) is None
    with pytest.raises(ValueError, match="no range"):
        picked_frames("0:10:0", 10)


def test_a_list_can_name_frames_itself(folder: Path) -> None:
    paths = [str(folder / "a.mp4")] * 2
    images = ImageList(pa.table({PATH: paths, FRAME: [3, 1]}))
    table = with_frames(images).table
    assert table.drop_columns([STATE]).equals(images.table)
    assert table.column(STATE).to_pylist() == [video_state(str(folder / "a.mp4"))] * 2
    with pytest.raises(StoreError) as error:
        with_frames(images, "0:2")
    assert error.value.code is ErrorCode.IMAGE_LIST_INVALID
    with pytest.raises(StoreError):
        with_frames(ImageList(pa.table({PATH: paths, FRAME: ["x", "y"]})))


def test_images_have_no_frames(folder: Path) -> None:
    images = ImageList(pa.table({PATH: ["a.png"]}))
    assert with_frames(images).table.column_names == [PATH]
    mixed = ImageList(pa.table({PATH: ["a.png", str(folder / "b.mkv")]}))
    assert rows(with_frames(mixed, "0:2")) == [("a.png", None), ("b.mkv", 0), ("b.mkv", 1)]
    with pytest.raises(StoreError):
        with_frames(images, "0:2")


def test_threads_that_read_out_of_order_get_the_frames_of_the_whole_video(folder: Path) -> None:
    expected = all_frames(folder / "a.mp4")
    numbers = [1, 2, 7, 8, 15, 19]
    reader = FrameReader(str(folder / "a.mp4"), numbers, DEFAULT_ACCESS, "RGB")
    with ThreadPoolExecutor(3) as pool:
        read = pool.map(reader.read, reversed(numbers), repeat(unlimited))
        frames = dict(zip(reversed(numbers), read, strict=True))
    for number, frame in frames.items():
        np.testing.assert_array_equal(frame, expected[number])


def test_decoded_frames_leave_memory_without_a_garbage_collection(folder: Path) -> None:
    reader = FrameReader(str(folder / "a.mp4"), range(20), DEFAULT_ACCESS, "RGB")
    gc.collect()
    gc.disable()
    try:
        for number in range(20):
            reader.read(number, unlimited)
        frames = sum(isinstance(each, av.VideoFrame) for each in gc.get_objects())
    finally:
        gc.enable()
    assert frames <= 2


def test_rows_of_a_video_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    from chunkq.images import videos

    original = videos.read_frames

    def counted(*arguments: Any) -> Any:
        for number, frame in original(*arguments):
            decoded.append(number)
            yield number, frame

    monkeypatch.setattr(videos, "read_frames", counted)
    paths = [str(folder / "a.mp4")] * 4 + [str(folder / "b.mkv")] * 2
    inputs = list(frame_inputs(paths, [4, 5, 8, 2, 0, 1], [None] * 6, DEFAULT_ACCESS, "RGB"))
    assert [one.row for one in inputs] == list(range(6))
    pixels: list[npt.NDArray[Any]] = [one.read(unlimited) for one in inputs]
    assert decoded == [4, 5, 8, 2, 0, 1]
    np.testing.assert_array_equal(pixels[3], all_frames(folder / "a.mp4")[2])
    np.testing.assert_array_equal(pixels[5], all_frames(folder / "b.mkv")[1])


def test_what_cannot_be_decoded_is_an_error_of_its_row(folder: Path) -> None:
    broken, missing = str(folder / "c.mp4"), str(folder / "d.mp4")
    paths = [str(folder / "a.mp4")] * 3 + [broken, missing]
    inputs = list(frame_inputs(paths, [19, 20, -1, None, 0], [None] * 5, DEFAULT_ACCESS, "L"))
    assert inputs[0].read(unlimited).shape == (32, 48, 1)
    codes = []
    for one in inputs[1:]:
        with pytest.raises(ImageError) as error:
            one.read(unlimited)
        codes.append(error.value.code)
    assert codes == [
        ErrorCode.IMAGE_MISSING,  # a number beyond the end
        ErrorCode.IMAGE_MISSING,  # a number below 0
        ErrorCode.IMAGE_DAMAGED,
        ErrorCode.IMAGE_MISSING,
    ]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/a\0.mp4", ErrorCode.IMAGE_MISSING),
        (f"/{'a' * 300}.mp4", ErrorCode.IMAGE_MISSING),
        ("nothing://bucket/a.mp4", ErrorCode.STORE_UNUSABLE),
        ("simplecache::file:///a.mp4", ErrorCode.STORE_UNUSABLE),
    ],
)
def test_a_path_that_names_no_video_is_an_error_of_its_row(path: str, code: ErrorCode) -> None:
    images = with_frames(ImageList(pa.table({PATH: [path]})))
    assert images.table.column(FRAME).to_pylist() == [None]
    [one] = frame_inputs([path], [None], [None], DEFAULT_ACCESS, "RGB")
    with pytest.raises(ImageError) as error:
        one.read(unlimited)
    assert error.value.code is code


class FailingFile(io.FileIO):
    """A file that cannot be read, as of a server that has lost its disk."""

    def read(self, size: int | None = -1) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


def test_a_disk_that_fails_is_no_damage_of_a_video(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_list, "open_local", FailingFile)
    paths = [str(folder / "a.mp4")]
    with pytest.raises(StoreError):
        with_frames(ImageList(pa.table({PATH: paths})))
    [one] = frame_inputs(paths, [0], [None], DEFAULT_ACCESS, "RGB")
    with pytest.raises(StoreError):
        one.read(unlimited)


def test_a_server_that_does_not_answer_is_no_error_of_a_video() -> None:
    with pytest.raises(StoreError):
        with_frames(ImageList(pa.table({PATH: ["http://127.0.0.1:9/a.mp4"]})))


def test_a_playlist_that_names_other_files_is_no_video(folder: Path) -> None:
    path = folder / "list.m4v"
    path.write_text(f"#EXTM3U\n#EXTINF:1,\n{folder / 'b.mkv'}\n#EXT-X-ENDLIST\n")
    [one] = frame_inputs([str(path)], [None], [None], DEFAULT_ACCESS, "RGB")
    with pytest.raises(ImageError):
        one.read(unlimited)
    path.unlink()


def test_a_video_that_was_replaced_since_its_job_was_created_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, 5)
    images = with_frames(find_images(str(path)))
    states = images.table.column(STATE).to_pylist()
    check_videos(images.paths, states, DEFAULT_ACCESS)
    write_video(path, 5, shift=7)
    with pytest.raises(ChunkReadError) as error:
        check_videos(images.paths, states, DEFAULT_ACCESS)
    assert error.value.code is ErrorCode.INPUT_CHANGED
    path.unlink()
    with pytest.raises(ChunkReadError) as error:
        check_videos(images.paths, states, DEFAULT_ACCESS)
    assert error.value.code is ErrorCode.INPUT_MISSING
    check_videos(images.paths, [None] * 5, DEFAULT_ACCESS)


@pytest.mark.parametrize("numbers", [[0, 3], [0, 3, 5]])
def test_a_video_is_closed_after_the_last_frame_or_with_its_reader(
    folder: Path, monkeypatch: pytest.MonkeyPatch, numbers: list[int]
) -> None:
    is_open: list[bool] = []

    @contextmanager
    def opened(*arguments: Any) -> Iterator[Any]:
        is_open.append(True)
        try:
            with open_video(*arguments) as file:
                yield file
        finally:
            is_open.clear()

    monkeypatch.setattr(frames, "open_video", opened)
    reader = FrameReader(str(folder / "a.mp4"), numbers, DEFAULT_ACCESS, "L")
    reader.read(0, unlimited)
    assert is_open
    reader.read(3, unlimited)
    if numbers[-1] != 3:
        assert is_open
        del reader  # no cycle of references holds the decoder and its frames
    assert not is_open
