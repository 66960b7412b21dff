"""Poses of a batch as arrays of one shape."""

from __future__ import annotations

import numpy as np
from chunkq_worker.images.instances import joined, poses_of_values, stack_poses
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkq.images.poses import Poses
from tests.strategies import poses


@settings(max_examples=30)
@given(images=st.lists(poses(), min_size=1, max_size=5), cut=st.integers(0, 5))
def test_a_batch_of_any_size_keeps_the_poses_of_each_image(images: list[Poses], cut: int) -> None:
    parts = [stack_poses(part, 3) for part in (images[:cut], images[cut:]) if part]
    heads = [joined(list(head)) for head in zip(*parts, strict=True)]
    assert all(np.isfinite(head).all() for head in heads)
    for number, expected in enumerate(images):
        found = poses_of_values([head[number] for head in heads])
        np.testing.assert_array_equal(found.points, expected.points)
        np.testing.assert_array_equal(found.point_scores, expected.point_scores)
        np.testing.assert_array_equal(found.scores, expected.scores)


def test_parts_of_one_shape_are_joined_as_they_are() -> None:
    parts = [np.ones((2, 3), np.float64), np.zeros((1, 3), np.float64)]
    np.testing.assert_array_equal(joined(parts), np.concatenate(parts))
