"""Measure whether the borders of blocks are visible in a finished output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq import json_values
from chunkq.job.job_handle import ItemHandle, JobHandle
from chunkq.plan.borders import Border, count_corners, select_corners
from chunkq.plan.outputs import OutputSpec

MAX_BORDERS = 1000
"""Borders between two blocks of an output that are read at most."""
VISIBLE_RATIO = 1.2
"""Difference at borders relative to that inside of blocks above which borders are visible."""
LABELS = ("soft", "hard")
"""Values of `combine` whose outputs have labels."""
MIN_PAIRS = 100_000
"""Pairs of voxels below which a ratio says nothing."""


@dataclass(frozen=True)
class Seam:
    """Differences between neighboring voxels of an output along one axis.

    `at_border` is the mean over `pairs` pairs of voxels on both sides of borders between blocks,
    about `corners` corners of these; `inside` that of as many pairs a quarter of a block away. It
    is the absolute difference of the values, for labels the share of pairs that differ. `output`
    is empty for the only output of a job without names.
    """

    output: str
    axis: str
    corners: int
    pairs: int
    at_border: float
    inside: float

    @property
    def ratio(self) -> float | None:
        """`at_border` relative to `inside`; None if nothing differs inside."""
        return self.at_border / self.inside if self.inside else None

    @property
    def is_visible(self) -> bool:
        """Whether the borders of blocks are visible."""
        return self.pairs >= MIN_PAIRS and self.at_border > VISIBLE_RATIO * self.inside

    def as_dict(self) -> dict[str, Any]:
        """Return the figures and their ratio as JSON values."""
        return {**json_values.to_values(self), "ratio": self.ratio}

    @property
    def warning(self) -> str:
        """A line for the user about visible borders."""
        where = f"output {self.output}: " if self.output else "output: "
        times = f"{self.ratio:.1f} times" if self.ratio else "infinitely many times"
        return (
            f"{where}blocks are visible along axis {self.axis}: neighboring voxels differ {times} "
            "as much at borders of blocks as inside; use a larger overlap (smaller strides) and "
            "weight_gaussian, or look at the output there"
        )


def measure_seams(job: JobHandle) -> list[Seam]:
    """Return the differences at borders of blocks along each axis of each output that has some.

    Which borders are read depends on the plan only. Raises ChunkReadError if voxels cannot be read.
    """
    outputs = job.record.plan().outputs
    return [seam for number, output in enumerate(outputs) for seam in _measure(job, number, output)]


def _measure(job: JobHandle, number: int, output: OutputSpec) -> Iterator[Seam]:
    """Yield the differences along each axis of an output that has borders."""
    rank = job.record.plan().rank
    arrays = [job.output.image(image, number).open_present() for image in job.record.images]
    sums, corners, pairs = np.zeros((rank, 2)), [0] * rank, [0] * rank
    for item, borders in _selected(job, number):
        boxes = [box for border in borders for box in (border.at_border, border.inside)]
        layers = iter(item.outputs[number].read(arrays[item.item.image.number], boxes))
        for border in borders:
            at_border, inside = next(layers), next(layers)
            at = at_border.ndim - rank + border.axis
            sums[border.axis] += [
                _difference(values, at, is_labels=output.combine in LABELS)
                for values in (at_border, inside)
            ]
            pairs[border.axis] += at_border.size // 2
            corners[border.axis] += 1
    for axis in range(rank):
        if corners[axis]:
            name = job.record.images[0].spatial_axes[axis].name
            means = (sums[axis] / pairs[axis]).tolist()
            yield Seam(output.name, name, corners[axis], pairs[axis], *means)


def _selected(job: JobHandle, number: int) -> Iterator[tuple[ItemHandle, tuple[Border, ...]]]:
    """Yield the borders about each of some corners, which are evenly shared among all items."""
    rank = job.record.plan().rank
    limit = MAX_BORDERS // (rank * 2 ** (rank - 1))  # borders that meet at a corner
    counts = [count_corners(item.plan.of_output(number)) for item in job.items]
    total, wanted = sum(counts), min(sum(counts), limit)
    before = 0
    for item, count in zip(job.items, counts, strict=True):
        # As many as keep the sum of all items before at its share, rounded down.
        share = (before + count) * wanted // total - before * wanted // total if total else 0
        before += count
        pairs = 2 * MIN_PAIRS * share // wanted if wanted else 0
        for borders in select_corners(item.plan.of_output(number), share, pairs):
            yield item, borders


def _difference(values: npt.NDArray[np.generic], axis: int, *, is_labels: bool) -> float:
    """Return the sum of the differences between two layers along an axis."""
    first, second = np.split(values, 2, axis)
    if is_labels:
        return float(np.count_nonzero(first != second))
    differences = np.subtract(first, second, dtype=np.float64)
    return float(np.abs(differences, out=differences).sum())
