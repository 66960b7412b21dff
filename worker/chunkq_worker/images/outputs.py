"""`Outputs`: what a predictor returns for images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from chunkq.errors import ArgumentError, ChunkqError
from chunkq.images.decoding import Pixels
from chunkq.images.image_error import ImageError
from chunkq.images.image_list import PATH
from chunkq.images.poses import Poses
from chunkq.images.scores import activate_rows, predicted_classes
from chunkq.install_hint import install_command
from chunkq.job.image_rows import score_spec
from chunkq.job.job_file import Job
from chunkq.summaries import html_table, one_line
from chunkq_worker.images.chunk_rows import columns_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ERROR = "error"
"""Column with what is wrong with an image, null for others."""


@dataclass(frozen=True, eq=False, repr=False)
class Outputs:
    """Predictions of n images, in their order. An image that failed is in `errors`.

    job      the job of the predictor
    paths    path of each image, None for one that was passed in memory
    values   for each image what the network returned, without the axis of the batch, float32; its
             `Poses` in a job with `peaks`; None if it failed
    errors   what is wrong with each image that failed, by its number
    pixels   reads the image of a number, (H, W, C)
    """

    job: Job
    paths: tuple[str | None, ...]
    values: tuple[Any, ...]
    errors: Mapping[int, ImageError]
    pixels: Callable[[int], Pixels] = field(repr=False)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return one_line("Outputs", self._summary())

    def _repr_html_(self) -> str:
        return html_table("Outputs", self._summary())

    def _summary(self) -> dict[str, str]:
        rows = {"images": str(len(self))}
        if self.errors:
            rows["failed"] = str(len(self.errors))
        names = [name for name in self._columns() if name != PATH]
        return rows | {"columns": ", ".join(names)}

    @property
    def labels(self) -> list[str | None]:
        """Name of the predicted class of each image, its number without names, None if it failed.

        Raises ArgumentError if the network returns no scores of classes.
        """
        self._check_classes("labels")
        names, scores = score_spec(self.job).names, self.scores
        if not scores.size:
            return [None] * len(self)
        classes = [
            None if n in self.errors else int(number)
            for n, number in enumerate(predicted_classes(np.nan_to_num(scores)))
        ]
        return [None if n is None else names[n] if names else str(n) for n in classes]

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """Score of each class after `activation`, (n, C); NaN for images that failed.

        It is (n, 0) if all failed. Raises ArgumentError if the network returns no scores of
        classes.
        """
        self._check_classes("scores")
        values = self.numpy()
        if not values.size:
            return values
        scores: npt.NDArray[np.float32] = activate_rows(values, score_spec(self.job).activation)
        return scores

    @property
    def keypoints(self) -> list[Poses | None]:
        """Keypoints of each image in pixels, see `Poses`; None for images that failed.

        Raises ArgumentError in a job without `peaks`.
        """
        if self.job.peaks is None:
            raise ArgumentError("keypoints: the job finds none; set peaks")
        return list(self.values)

    def numpy(self) -> npt.NDArray[np.float32]:
        """Return what the network returned for all images, (n, ...), before `activation`.

        With `peaks` it is (x, y) of each keypoint in pixels, (n, K, 2), NaN where none was found.
        Rows of images that failed are NaN. Raises ArgumentError if the images have outputs of
        different shapes, and for several animals.
        """
        if self.job.peaks is not None:
            if self.job.peaks.multiple:
                raise ArgumentError("numpy: images have several animals each; use keypoints")
            points = [None if one is None else one.points for one in self.values]
            shapes = {one.shape[1:] for one in points if one is not None}
            arrays = [None if one is None or not len(one) else one[0] for one in points]
        else:
            arrays = list(self.values)
            shapes = {one.shape for one in arrays if one is not None}
        if len(shapes) > 1:
            raise ArgumentError(
                f"numpy: the outputs have {len(shapes)} different shapes; use values"
            )
        result = np.full((len(arrays), *(shapes or {(0,)}).pop()), np.nan, np.float32)
        for row, one in zip(result, arrays, strict=True):
            if one is not None:
                row[...] = one
        return result

    def to(self, device: str) -> Any:
        """Return `numpy()` as a torch tensor on a device, such as "cuda"."""
        import torch

        return torch.from_numpy(self.numpy()).to(device)

    def to_arrow(self) -> pa.Table:
        """Return one row per image: `path`, the columns of a job's table, and `error`."""
        errors = [str(self.errors[n]) if n in self.errors else None for n in range(len(self))]
        columns = {name: self._aligned(values) for name, values in self._columns().items()}
        paths = pa.array(self.paths, pa.string())
        return pa.table({PATH: paths, **columns, ERROR: pa.array(errors, pa.string())})

    def to_pandas(self) -> Any:
        """Return `to_arrow()` as a DataFrame. Raises ChunkqError if pandas is not installed."""
        try:
            return self.to_arrow().to_pandas()
        except ImportError as error:
            raise ChunkqError(
                f"Outputs.to_pandas: pandas is not installed ({error}); run `pip install pandas`, "
                "or use to_arrow"
            ) from None

    def plot(self, number: int = 0, path: str | Path | None = None) -> Figure:
        """Draw an image with its label or its keypoints; save the figure to `path` if set.

        Raises ChunkqError if matplotlib is not installed, IndexError without such an image, and
        ImageError for one that failed.
        """
        try:
            from chunkq_worker.images.plot import draw
        except ImportError as error:
            raise ChunkqError(
                f"Outputs.plot: matplotlib is not installed ({error}); "
                f"run `{install_command('plot')}`"
            ) from None
        number = range(len(self))[number]
        if number in self.errors:
            raise self.errors[number]
        figure = draw(self.job, self.pixels(number), self.values[number], self.paths[number])
        if path is not None:
            figure.savefig(path)
        return figure

    def _columns(self) -> dict[str, pa.Array]:
        """Return the columns of the images that did not fail."""
        return columns_of(self.job, [value for value in self.values if value is not None])

    def _check_classes(self, name: str) -> None:
        """Raise ArgumentError if the network returns no scores of classes."""
        has_peaks = self.job.peaks is not None
        if has_peaks or self.job.keep == "features":
            raise ArgumentError(
                f"{name}: the network of this job returns no scores of classes; use "
                f"{'keypoints' if has_peaks else 'numpy()'}"
            )

    def _aligned(self, values: pa.Array) -> pa.Array:
        """Return values of the images that did not fail as one per image, null for others."""
        return values.take(pa.array(_positions(self.values), pa.int64()))


def _positions(values: Sequence[Any]) -> list[int | None]:
    """Return the position of each value among those that are not None, None for others."""
    positions: list[int | None] = []
    count = 0
    for value in values:
        positions.append(None if value is None else count)
        count += value is not None
    return positions
