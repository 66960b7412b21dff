"""Poses of a batch of images as arrays of one shape, which is what a runtime returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.images.poses import Poses

Heads = tuple[npt.NDArray[np.float32], ...]
"""Number of animals (n,), their scores (n, I), keypoints (n, I, K, 3) as x, y and whether it was
found, and scores of keypoints (n, I, K): finite float32, 0 where there is nothing."""


def stack_poses(poses: Sequence[Poses], keypoints: int) -> Heads:
    """Return the poses of a batch as arrays, filled up to the largest number of animals."""
    most = max((len(one.scores) for one in poses), default=0)
    counts = np.array([len(one.scores) for one in poses], np.float32)
    scores = np.zeros((len(poses), most), np.float32)
    points = np.zeros((len(poses), most, keypoints, 3), np.float32)
    point_scores = np.zeros((len(poses), most, keypoints), np.float32)
    for number, one in enumerate(poses):
        count = len(one.scores)
        is_found = np.isfinite(one.points[..., 0]) & np.isfinite(one.points[..., 1])
        scores[number, :count] = one.scores
        points[number, :count, :, :2] = np.where(is_found[..., None], one.points, 0)
        points[number, :count, :, 2] = is_found
        point_scores[number, :count] = np.where(is_found, one.point_scores, 0)
    return counts, scores, points, point_scores


def poses_of_values(values: Sequence[npt.NDArray[Any]]) -> Poses:
    """Return the poses of one image, of the arrays of a batch without their first axis."""
    count, scores, points, point_scores = (np.asarray(value, np.float32) for value in values)
    animals = slice(0, round(float(count)))
    is_found = points[animals, :, 2] > 0
    return Poses(
        np.where(is_found[..., None], points[animals, :, :2], np.float32(np.nan)),
        np.where(is_found, point_scores[animals], np.float32(np.nan)),
        scores[animals],
    )


def joined(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return batches of a head as one, filled up with 0 where images have different shapes."""
    shape = tuple(np.max([part.shape[1:] for part in parts], axis=0, initial=0))
    padded = [
        np.pad(part, [(0, 0), *((0, m - n) for m, n in zip(shape, part.shape[1:], strict=True))])
        for part in parts
    ]
    return np.concatenate(padded)
