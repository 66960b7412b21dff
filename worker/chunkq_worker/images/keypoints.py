"""Keypoints of an image, in the maps that the network returns for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from chunkq.errors import ModelError
from chunkq.images.peaks import Maps, PeakSpec, find_peaks
from chunkq.images.poses import Poses, poses_of_peaks
from chunkq.images.transform import Placement
from chunkq.job.image_config import PeaksConfig
from chunkq.job.job_file import Job
from chunkq.job.keypoints import skeleton_of
from chunkq_worker.images.instances import poses_of_values
from chunkq_worker.images.rows import RowOutput

KEY = "peaks"


def poses_of(job: Job, output: RowOutput) -> Poses:
    """Return the keypoints in the maps (K, h, w) of an image, in pixels of the image.

    What the maps have in the padding of the input is left out. Raises ModelError if the network
    returns no maps, another number than `classes`, or maps that `peaks.stride` does not fit.
    """
    if job.model.package is not None:
        return poses_of_values(output.values)
    config, [maps] = job.peaks or PeaksConfig(), output.values
    if maps.ndim != 3 or not maps.size:
        raise ModelError(
            f"{KEY}: the network returned shape {list(maps.shape)} for an image, expected one map "
            "per keypoint, (K, h, w); use another network, or remove peaks"
        )
    names = keypoint_names(job, len(maps))
    maps = np.asarray(maps, np.float32)
    if job.activation == "sigmoid":
        maps = (np.tanh(maps / 2) + 1) / 2
    stride = _stride(config.stride, maps, job, output.placement)
    height, width = (int(np.ceil(n / stride)) for n in output.placement.size)
    spec = PeakSpec(config.threshold, config.refinement, stride, config.multiple)
    peaks = find_peaks(maps[:, :height, :width], spec)
    points = output.placement.to_image(peaks.points.astype(np.float64)).astype(np.float32)
    return poses_of_peaks(replace(peaks, points=points), len(names), multiple=config.multiple)


def keypoint_names(job: Job, maps: int | None = None) -> tuple[str, ...]:
    """Return the names of the keypoints: those of the job, or the numbers of the maps.

    Raises ModelError if there is another number of maps.
    """
    skeleton = skeleton_of(job)
    if skeleton is None:
        return tuple(map(str, range(maps or 0)))
    count = len(skeleton.names)
    if maps is not None and maps != count:
        raise ModelError(
            f"classes: found {count} keypoints, but the network returns {maps} maps; fix one of "
            "them"
        )
    return skeleton.names


def _stride(stride: float | None, maps: Maps, job: Job, placement: Placement) -> float:
    """Return the pixels of the input per pixel of a map; raise ModelError if it does not fit."""
    inputs, sizes = job.image_spec.padded(placement.size), maps.shape[1:]
    expected = inputs[0] / sizes[0]
    used = round(expected) if stride is None and expected >= 1 else stride or expected
    if any(abs(n / used - size) >= 1 for n, size in zip(inputs, sizes, strict=True)):
        raise ModelError(
            f"{KEY}.stride: {used:g} does not fit maps of {sizes[0]} x {sizes[1]} for an input of "
            f"{inputs[0]} x {inputs[1]} pixels; use {expected:g}, or a network whose maps have the "
            "proportions of its input"
        )
    return used
