"""Draw predictions of images with matplotlib."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from chunkq.images.decoding import Pixels
from chunkq.images.poses import Poses
from chunkq.job.image_rows import score_spec
from chunkq.job.job_file import Job
from chunkq.plan.label_colors import label_color
from chunkq_worker.images.keypoints import keypoint_names
from chunkq_worker.images.preview import shown

INCHES = 6
"""Length of the longer side of a figure."""
MAX_LEGEND_ENTRIES = 20


def draw(job: Job, pixels: Pixels, value: Any, path: str | None) -> Figure:
    """Draw an image (H, W, C) with its poses, or with its label and score as the title."""
    height, width = pixels.shape[:2]
    inches = INCHES / max(height, width)
    figure = Figure(figsize=(max(2, width * inches), max(2, height * inches) + 0.6))
    figure.set_layout_engine("compressed")
    axes = figure.subplots()
    axes.imshow(shown(pixels), cmap="gray" if pixels.shape[2] == 1 else None)
    title = path.rpartition("/")[2] if path else ""
    if isinstance(value, Poses):
        _draw_poses(axes, value, keypoint_names(job, value.points.shape[1]))
    elif job.keep != "features":
        columns = score_spec(job).columns(np.asarray(value).reshape(1, -1))
        label, score = columns["label"][0].as_py(), columns["score"][0].as_py()
        title = f"{title}: {label} ({score:.3g})" if title else f"{label} ({score:.3g})"
    axes.set_title(title, parse_math=False)  # a name can have dollars
    axes.set_axis_off()
    return figure


def _draw_poses(axes: Any, poses: Poses, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        points = poses.points[:, number]
        points = points[np.isfinite(points).all(axis=1)]
        if len(points):
            color = tuple(part / 255 for part in label_color(number + 1))
            axes.plot(points[:, 0], points[:, 1], "o", color=color, label=name, markersize=5)
    if 0 < len(axes.lines) <= MAX_LEGEND_ENTRIES:
        for text in axes.legend(loc="upper right", fontsize="small").get_texts():
            text.set_parse_math(False)
