"""The arrays of one output of a prediction in memory, filled region by region."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import reduce_and_cast
from chunkq.plan.plan import Plan


class OutputArrays:
    """Labels and, for averages, probabilities of one output of a volume.

    `plan` is that of the output. `series` are the lengths of the axes along which volumes are
    predicted one by one.
    """

    def __init__(self, plan: Plan, series: tuple[int, ...]) -> None:
        self._plan, self._series, self.name = plan, series, plan.output.name
        self._stored = np.zeros((*series, *plan.output_shape), plan.output_dtype)
        self.labels: npt.NDArray[Any] = self._stored
        if plan.output.is_average:
            self.labels = np.zeros((*series, *plan.region.shape), plan.output.label_dtype)

    def put(self, region: tuple[slice, ...], values: npt.NDArray[Any]) -> None:
        """Store the final values of a region of the stored array (*series, [C,] *S)."""
        plan, self._stored[region] = self._plan, values
        if plan.output.is_average:
            averages = values.reshape(plan.channels, *values.shape[-plan.rank :])
            where = (*region[: len(self._series)], *region[-plan.rank :])
            self.labels[where] = reduce_and_cast(averages, "soft", plan.output.label_dtype)

    @property
    def probabilities(self) -> npt.NDArray[Any] | None:
        """The averages (*series, C, *S), None if labels are stored."""
        plan = self._plan
        if not plan.output.is_average:
            return None
        return self._stored.reshape(*self._series, plan.channels, *plan.region.shape)
