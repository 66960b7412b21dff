"""The arrays of one output of a prediction in memory, filled region by region."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import to_labels
from chunkq.plan.plan import Plan
from chunkq.plan.value_range import ValueRange


class OutputArrays:
    """The arrays of a `Prediction`: what one output of a volume stores, and the labels of averages.

    `plan` is that of the output. `series` are the lengths of the axes along which volumes are
    predicted one by one.
    """

    def __init__(self, plan: Plan, series: tuple[int, ...]) -> None:
        self._plan, self._series, self.name = plan, series, plan.output.name
        self._stored = np.zeros((*series, *plan.output_shape), plan.output_dtype)
        self.labels: npt.NDArray[Any] | None = None
        if plan.output.is_average:
            self.labels = np.zeros((*series, *plan.region.shape), plan.output.label_dtype)
        elif plan.output.has_labels:
            self.labels = self._stored

    def put(self, region: tuple[slice, ...], values: npt.NDArray[Any]) -> None:
        """Store the final values of a region of the stored array (*series, [C,] *S)."""
        plan, self._stored[region] = self._plan, values
        if plan.output.is_average and self.labels is not None:
            if self.range is not None:
                values = self.range.values(values)
            averages = values.reshape(plan.channels, *values.shape[-plan.rank :])
            where = (*region[: len(self._series)], *region[-plan.rank :])
            self.labels[where] = to_labels(averages, plan.output.label_dtype)

    @property
    def probabilities(self) -> npt.NDArray[Any] | None:
        """The averages (*series, C, *S), None if something else is stored."""
        plan = self._plan
        if not plan.output.is_average:
            return None
        return self._stored.reshape(*self._series, plan.channels, *plan.region.shape)

    @property
    def values(self) -> npt.NDArray[Any] | None:
        """The standard deviations or the entropy (*series, [C,] *S), None of other outputs."""
        return self._stored if self._plan.output.kind.is_spread else None

    @property
    def range(self) -> ValueRange | None:
        """How averages, deviations or entropies are stored as integers; None if they are not."""
        return self._plan.output.value_range
