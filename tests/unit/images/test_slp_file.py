"""`.slp` files, read by sleap-io."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sleap_io

from chunkq.errors import ErrorCode, StoreError
from chunkq.images import slp_packages
from chunkq.images.poses import Poses
from chunkq.images.skeleton import Skeleton
from chunkq.images.slp_file import ROWS, SlpFrame, SlpVideo, places_of, videos_of, write_slp

SKELETON = Skeleton(("head", "thorax", "tail"), ((0, 1), (1, 2)), "fly")
VIDEOS = [
    SlpVideo("/videos/one.mp4", (9, 96, 128, 1)),
    SlpVideo(("/images/a.png", "/images/b.png"), (2, 96, 128, 3)),
    SlpVideo("/videos/broken.mp4"),
]


def random_frames(count: int, animals: int = 3) -> Iterator[SlpFrame]:
    random = np.random.default_rng(0)
    for number in range(count):
        found = int(random.integers(0, animals + 1))
        points = random.normal(50, 9, (found, 3, 2)).astype(np.float32)
        points[random.random((found, 3)) < 0.3] = np.nan
        point_scores = random.random((found, 3), np.float32)
        point_scores[np.isnan(points[..., 0])] = np.nan
        yield SlpFrame(number % 2, 5 * number, Poses(points, point_scores, point_scores[:, 0]))


def write(path: Path, count: int = 20) -> Path:
    written = write_slp(str(path), SKELETON, VIDEOS, random_frames(count), {"model": "net.onnx"})
    assert written == count
    return path


def test_sleap_io_reads_the_same_points_scores_and_frames(tmp_path: Path) -> None:
    labels = sleap_io.load_slp(str(write(tmp_path / "all.slp")), open_videos=False)
    for frame, expected in zip(labels, random_frames(20), strict=True):
        assert frame.video is labels.videos[expected.video]
        assert frame.frame_idx == expected.frame
        assert all(type(one) is sleap_io.PredictedInstance for one in frame.instances)
        points = [one.numpy() for one in frame.instances]
        np.testing.assert_array_equal(np.reshape(points, (-1, 3, 2)), expected.poses.points)
        scores = [one.points["score"] for one in frame.instances]
        expected_scores = np.nan_to_num(expected.poses.point_scores)
        np.testing.assert_array_equal(np.reshape(scores, (-1, 3)), expected_scores)
        found = [one.score for one in frame.instances]
        np.testing.assert_array_equal(found, expected.poses.scores)


def test_all_videos_share_one_skeleton(tmp_path: Path) -> None:
    labels = sleap_io.load_slp(str(write(tmp_path / "all.slp")), open_videos=False)
    [skeleton] = labels.skeletons
    assert (skeleton.name, skeleton.node_names) == ("fly", ["head", "thorax", "tail"])
    assert skeleton.edge_inds == [(0, 1), (1, 2)]
    assert [video.filename for video in labels.videos] == [
        "/videos/one.mp4",
        ["/images/a.png", "/images/b.png"],
        "/videos/broken.mp4",
    ]
    shapes = [video.shape and tuple(video.shape) for video in labels.videos]
    assert shapes == [(9, 96, 128, 1), (2, 96, 128, 3), None]
    assert labels.provenance["model"] == "net.onnx"


def test_sleap_io_saves_what_it_has_read(tmp_path: Path) -> None:
    labels = sleap_io.load_slp(str(write(tmp_path / "all.slp")), open_videos=False)
    labels.save(str(tmp_path / "copy.slp"), verbose=False)
    copy = sleap_io.load_slp(str(tmp_path / "copy.slp"), open_videos=False)
    np.testing.assert_array_equal(copy.numpy(video=0), labels.numpy(video=0))


def test_a_file_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first.slp"), write(tmp_path / "second.slp")
    assert first.read_bytes() == second.read_bytes()


def test_more_rows_than_are_written_at_once_stay_in_order(tmp_path: Path) -> None:
    count = ROWS + 7
    frames = (SlpFrame(0, n, _one(n)) for n in range(count))
    write_slp(str(tmp_path / "all.slp"), SKELETON, VIDEOS, frames, {})
    points = sleap_io.load_slp(str(tmp_path / "all.slp"), open_videos=False, lazy=True).numpy()
    np.testing.assert_array_equal(points[:, 0, 0, 0], np.arange(count))


def _one(number: int) -> Poses:
    ones = np.ones((1, 3), np.float32)
    return Poses(np.full((1, 3, 2), number, np.float32), ones, ones[0, :1])


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slp_packages, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match=r"slp") as error:
        write(tmp_path / "all.slp")
    assert error.value.code == ErrorCode.PACKAGE_MISSING


def test_videos_keep_their_frames_and_images_are_one_video() -> None:
    rows = [("a.mp4", 3), ("x.png", None), ("a.mp4", 7), ("b.mp4", 0), ("y.png", None)]
    videos = [video.path for video in videos_of([*rows, ("broken.mp4", None)])]
    assert videos == ["a.mp4", ("x.png", "y.png"), "b.mp4", "broken.mp4"]
    assert list(places_of(rows)) == [(0, 3), (1, 0), (0, 7), (2, 0), (1, 1)]
