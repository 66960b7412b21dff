"""`Poses`: the keypoints of the animals in one image, and their columns in a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from chunkq.images.peaks import Peaks

Floats = npt.NDArray[np.float32]
SCORES, KEYPOINTS = "scores", "keypoints"
"""Columns of a table of poses."""
KEYPOINT = pa.struct(
    [
        ("name", pa.string()),
        ("x", pa.float32()),
        ("y", pa.float32()),
        ("score", pa.float32()),
    ]
)
"""Type of one keypoint."""
COLUMN_TYPES = {SCORES: pa.list_(pa.float32()), KEYPOINTS: pa.list_(pa.list_(KEYPOINT))}
"""Column -> type: one score per animal, and one list of keypoints per animal."""


@dataclass(frozen=True, eq=False)
class Poses:
    """Keypoints of the animals in one image.

    points        (x, y) in pixels of the image, float32 (I, K, 2) for I animals with K keypoints;
                  integers are centers of pixels, and NaN is a keypoint that was not found
    point_scores  score of each keypoint, float32 (I, K); NaN where it was not found
    scores        score of each animal, float32 (I,)
    """

    points: Floats
    point_scores: Floats
    scores: Floats

    def __post_init__(self) -> None:
        count, keypoints = self.points.shape[:2]
        shapes = (self.points.shape, self.point_scores.shape, self.scores.shape)
        if shapes != ((count, keypoints, 2), (count, keypoints), (count,)):
            raise ValueError(f"shapes {shapes} do not fit")


def poses_of_peaks(peaks: Peaks, keypoints: int, *, multiple: bool) -> Poses:
    """Return the poses of peaks, which no rule assigns to animals.

    Without `multiple` they are the keypoints of one animal, whose score is the sum of theirs, or of
    none. With it, each peak is an animal with one keypoint.
    """
    peak_count = len(peaks.maps)
    count = peak_count if multiple else min(peak_count, 1)
    owners = np.arange(peak_count) if multiple else np.zeros(peak_count, np.intp)
    points = np.full((count, keypoints, 2), np.nan, np.float32)
    point_scores = np.full((count, keypoints), np.nan, np.float32)
    points[owners, peaks.maps] = peaks.points
    point_scores[owners, peaks.maps] = peaks.scores
    return Poses(points, point_scores, np.nansum(point_scores, axis=1, dtype=np.float32))


def pose_columns(poses: Sequence[Poses], names: Sequence[str]) -> dict[str, pa.Array]:
    """Return the columns of images: scores of animals, and the keypoints that were found.

    `names` are those of the keypoints.
    """
    empty = np.zeros((0, len(names), 2), np.float32)
    points = np.concatenate([empty, *(one.points for one in poses)])
    point_scores = np.concatenate([empty[..., 0], *(one.point_scores for one in poses)])
    scores = np.concatenate([np.zeros(0, np.float32), *(one.scores for one in poses)])
    animals = np.cumsum([0, *(len(one.scores) for one in poses)], dtype=np.int32)
    is_found = np.isfinite(points).all(axis=2)
    offsets = np.concatenate([[0], np.cumsum(is_found.sum(axis=1))]).astype(np.int32)
    numbers = np.nonzero(is_found)[1]
    keypoints = pa.StructArray.from_arrays(
        [
            pa.array(list(names), pa.string()).take(pa.array(numbers)),
            pa.array(points[is_found][:, 0]),
            pa.array(points[is_found][:, 1]),
            pa.array(point_scores[is_found], from_pandas=True),
        ],
        fields=list(KEYPOINT),
    )
    per_animal = pa.ListArray.from_arrays(offsets, keypoints)
    return {
        SCORES: pa.ListArray.from_arrays(animals, pa.array(scores, pa.float32(), from_pandas=True)),
        KEYPOINTS: pa.ListArray.from_arrays(animals, per_animal),
    }


def read_poses(table: pa.Table, names: Sequence[str]) -> Iterator[Poses]:
    """Yield the poses of each row of a table with the columns of `pose_columns`.

    Raises ValueError for a keypoint without a name in `names`.
    """
    for batch in table.select([SCORES, KEYPOINTS]).to_batches():
        scores, keypoints = batch.column(SCORES), batch.column(KEYPOINTS)
        animals = _offsets(keypoints)
        per_animal = keypoints.flatten()
        counts = np.diff(_offsets(per_animal))
        entries = per_animal.flatten()
        numbers = pa.compute.index_in(entries.field("name"), pa.array(list(names), pa.string()))
        if numbers.null_count:
            raise ValueError("a keypoint has a name that is not expected")
        owners = np.repeat(np.arange(len(counts)), counts)
        points = np.full((len(counts), len(names), 2), np.nan, np.float32)
        point_scores = np.full((len(counts), len(names)), np.nan, np.float32)
        at = (owners, numbers.to_numpy(zero_copy_only=False))
        points[(*at, 0)] = _values(entries.field("x"))
        points[(*at, 1)] = _values(entries.field("y"))
        point_scores[at] = _values(entries.field("score"))
        per_score = _values(scores.flatten())
        for start, stop in pairwise(animals):
            part = slice(start, stop)
            yield Poses(points[part], point_scores[part], per_score[part])


def _offsets(lists: pa.ListArray) -> npt.NDArray[np.int64]:
    """Return the starts of lists in what `flatten` returns, and the end of the last one."""
    offsets: npt.NDArray[np.int64] = lists.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    return offsets


def _values(array: pa.Array) -> npt.NDArray[Any]:
    """Return numbers as float32; null is NaN."""
    return np.asarray(array.to_numpy(zero_copy_only=False), np.float32)
