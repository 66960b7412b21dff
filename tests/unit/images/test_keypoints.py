"""Keypoints in the maps of a network, in pixels of the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from chunkq_worker.images.keypoints import poses_of
from chunkq_worker.images.rows import RowOutput
from hypothesis import given
from hypothesis import strategies as st

from chunkq.errors import ErrorCode, JobError, ModelError
from chunkq.images.transform import Placement, transform
from chunkq.job.job_file import Job
from chunkq.job.job_reading import load_job


def job_with(image: dict[str, Any], **keys: Any) -> Job:
    model = {"runtime": "onnx", "type": "file", "model_file": "net.onnx"}
    values = {
        "input": "photos",
        "output": "out.parquet",
        "inference_type": "image",
        "image": {"mode": "L", **image},
        "peaks": {},
        "model_config": {**model, "model_input_shape": [1, 16, 16]},
    }
    return load_job(values | keys)


def spot(shape: tuple[int, int], x: float, y: float, width: float = 1.5) -> npt.NDArray[Any]:
    """Return a Gaussian around a point, in pixels."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * width**2)).astype(np.float32)


def centroid(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Return the center of mass of the 5 x 5 pixels around the largest one: the reference."""
    y, x = np.unravel_index(values.argmax(), values.shape)
    total = mass_x = mass_y = 0.0
    for row in range(max(0, y - 2), min(values.shape[0], y + 3)):
        for column in range(max(0, x - 2), min(values.shape[1], x + 3)):
            total += values[row, column]
            mass_x += column * float(values[row, column])
            mass_y += row * float(values[row, column])
    return mass_x / total, mass_y / total


def placed(job: Job, shape: tuple[int, int]) -> Placement:
    return transform(np.zeros((*shape, 1), np.uint8), job.image_spec)[1]


@given(
    shape=st.tuples(st.integers(24, 70), st.integers(24, 70)),
    point=st.tuples(st.floats(4, 11), st.floats(4, 11)),
    stride=st.sampled_from([1, 2, 4]),
)
def test_a_keypoint_is_the_center_of_mass_of_its_map_in_pixels_of_the_image(
    shape: tuple[int, int], point: tuple[float, float], stride: int
) -> None:
    job = job_with({"resize": 20, "crop": 16})
    placement = placed(job, shape)
    maps = spot((16 // stride, 16 // stride), point[0] / stride, point[1] / stride, 1.0)[None]
    poses = poses_of(job, RowOutput(0, (maps,), placement))
    x, y = (stride * value for value in centroid(maps[0]))
    short = min(shape)
    resized = [20 * n // short for n in shape]
    top, left = (round((n - 16) / 2) for n in resized)
    expected = [
        (x + left + 0.5) * shape[1] / resized[1] - 0.5,
        (y + top + 0.5) * shape[0] / resized[0] - 0.5,
    ]
    np.testing.assert_allclose(poses.points[0, 0], expected, rtol=1e-5, atol=1e-4)
    assert poses.point_scores[0, 0] == maps.max()


def test_peaks_in_the_padding_are_left_out() -> None:
    job = job_with({"pad_to_multiple": 16})
    placement = placed(job, (10, 12))
    assert placement.size == (10, 12)
    maps = np.maximum(0.5 * spot((16, 16), 3, 4), spot((16, 16), 14, 13))[None]
    poses = poses_of(job, RowOutput(0, (maps,), placement))
    np.testing.assert_allclose(poses.points[0, 0], [3, 4], atol=1e-3)


def test_each_animal_has_a_peak_and_a_plateau_has_one() -> None:
    job = job_with({}, peaks={"multiple": True, "refinement": "none"})
    maps = np.zeros((2, 16, 16), np.float32)
    maps[0, 3, 4] = maps[0, 10, 12] = 0.9
    maps[1, 6:9, 2:5] = 0.7
    poses = poses_of(job, RowOutput(0, (maps,), placed(job, (16, 16))))
    found = [[tuple(p) for p in points if np.isfinite(p).all()] for points in poses.points]
    assert found == [[(4, 3)], [(12, 10)], [(2, 6)]]


def test_a_map_below_the_threshold_has_no_keypoint() -> None:
    job = job_with({}, peaks={"threshold": 0.5}, classes=["nose", "tail"])
    maps = np.stack([spot((16, 16), 5, 6), 0.4 * spot((16, 16), 5, 6)])
    poses = poses_of(job, RowOutput(0, (maps,), placed(job, (16, 16))))
    assert poses.points.shape == (1, 2, 2)
    assert np.isfinite(poses.points[0]).all(axis=1).tolist() == [True, False]


@pytest.mark.parametrize(
    ("maps", "keys"),
    [
        ((3,), {}),  # scores
        ((2, 16, 16), {"classes": ["nose", "ear", "tail"]}),
        ((1, 16, 8), {}),  # another shape than the input
        ((1, 4, 4), {"peaks": {"stride": 2}}),
    ],
)
def test_maps_that_do_not_fit_the_job_are_refused(
    maps: tuple[int, ...], keys: dict[str, Any]
) -> None:
    job = job_with({}, **keys)
    with pytest.raises(ModelError) as error:
        poses_of(job, RowOutput(0, (np.zeros(maps, np.float32),), placed(job, (16, 16))))
    assert error.value.code is ErrorCode.MODEL_UNUSABLE


@pytest.mark.parametrize(
    "keys", [{"truth": {"column": "label"}}, {"top_k": 2}, {"activation": "softmax"}]
)
def test_keys_of_classes_are_refused_beside_peaks(keys: dict[str, Any]) -> None:
    with pytest.raises(JobError) as error:
        job_with({}, **keys)
    assert error.value.code is ErrorCode.JOB_INVALID
    assert len(error.value.problems) == 1
