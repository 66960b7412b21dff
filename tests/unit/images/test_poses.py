"""Poses of animals, and their columns in a table."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkq.images.peaks import Peaks
from chunkq.images.poses import COLUMN_TYPES, Poses, pose_columns, poses_of_peaks, read_poses
from tests.strategies import poses

NAMES = ("head", "thorax", "tail")
NAN = float("nan")


@settings(max_examples=30)
@given(images=st.lists(poses(), max_size=6), skip=st.integers(0, 2), batches=st.integers(1, 3))
def test_a_table_returns_the_poses_of_which_it_was_made(
    images: list[Poses], skip: int, batches: int
) -> None:
    parts = [
        pa.table(pose_columns(images[start::batches], NAMES)).cast(
            pa.schema([*COLUMN_TYPES.items()])
        )
        for start in range(batches)
    ]
    rest = [one for start in range(batches) for one in images[start::batches]][skip:]
    table = pa.concat_tables(parts).slice(skip)
    for found, expected in zip(read_poses(table, NAMES), rest, strict=True):
        np.testing.assert_array_equal(found.points, expected.points)
        np.testing.assert_array_equal(found.point_scores, expected.point_scores)
        np.testing.assert_array_equal(found.scores, expected.scores)


def test_a_row_names_the_keypoints_that_were_found() -> None:
    points = np.array([[[1, 2], [NAN, NAN], [5, 6]]], np.float32)
    scores = np.array([[0.5, NAN, 0.25]], np.float32)
    table = pa.table(pose_columns([Poses(points, scores, np.array([2], np.float32))], NAMES))
    assert table.to_pylist() == [
        {
            "scores": [2.0],
            "keypoints": [
                [
                    {"name": "head", "x": 1.0, "y": 2.0, "score": 0.5},
                    {"name": "tail", "x": 5.0, "y": 6.0, "score": 0.25},
                ]
            ],
        }
    ]


def test_a_chunk_without_a_result_has_the_columns_of_others() -> None:
    table = pa.table(pose_columns([], ()))
    assert table.schema == pa.schema([*COLUMN_TYPES.items()])
    assert len(table) == 0


def test_a_keypoint_without_a_known_name_is_refused() -> None:
    one = Poses(np.ones((1, 3, 2), np.float32), np.ones((1, 3), np.float32), np.ones(1, np.float32))
    table = pa.table(pose_columns([one], NAMES))
    with pytest.raises(ValueError, match="name"):
        list(read_poses(table, NAMES[:2]))


def found(*numbers: int) -> Peaks:
    count = len(numbers)
    points = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
    scores = np.arange(1, count + 1, dtype=np.float32)
    return Peaks(np.array(numbers, np.int32), points, scores)


def test_peaks_of_single_maps_are_the_keypoints_of_one_animal() -> None:
    result = poses_of_peaks(found(0, 2), 3, multiple=False)
    expected: npt.NDArray[np.float32] = np.array([[[0, 1], [NAN, NAN], [2, 3]]], np.float32)
    np.testing.assert_array_equal(result.points, expected)
    assert result.scores.tolist() == [3]
    assert len(poses_of_peaks(found(), 3, multiple=False).scores) == 0


def test_peaks_that_no_rule_assigns_are_animals_with_one_keypoint() -> None:
    result = poses_of_peaks(found(0, 0, 2), 3, multiple=True)
    assert np.argwhere(np.isfinite(result.point_scores)).tolist() == [[0, 0], [1, 0], [2, 2]]
    assert result.scores.tolist() == [1, 2, 3]
