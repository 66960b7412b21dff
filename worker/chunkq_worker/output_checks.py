"""Checks of the first batches that a process computes with a network.

A batch with different values is computed again, and the outputs must agree. Outputs of one channel
must not be labels that the job averages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import Array, as_float, to_numpy
from chunkq.errors import ErrorCode, ModelError
from chunkq.plan.outputs import OutputSpec
from chunkq_worker.label_outputs import LabelDetector

MAX_DIFFERENCE = 1e-3
"""Largest difference between two runs on one batch, as a fraction of the range of the output."""
MAX_SECONDS = 5.0
"""Time after which no further repetition is started."""
PART_VALUES = 1 << 16
"""Values that are compared at a time; bounds the memory of a comparison."""
log = logging.getLogger("chunkq.worker")
Values = npt.NDArray[Any]


class OutputChecks:
    """Checks of one network in this process; all its batchers share them.

    `repeats` is the number of repetitions of a batch. `is_stochastic` permits that outputs differ.
    `warnings` collects what the checks found and a job may nevertheless do.
    """

    def __init__(self, output: OutputSpec, *, is_stochastic: bool, repeats: int = 1) -> None:
        self.repeats = repeats
        self.warnings: list[str] = []
        self.is_repeated = is_stochastic
        self._output, self._labels = output, LabelDetector(output)

    @property
    def are_done(self) -> bool:
        """Whether no further batch is examined."""
        return self.is_repeated and self._labels.is_done

    def examine(
        self, outputs: Array, inputs: Sequence[Values], repeat: Callable[[], Array | None]
    ) -> None:
        """Examine the raw outputs of a batch. `inputs` are its patches; `repeat` runs it again.

        Raise ModelError if the outputs of the network are random, or labels.
        """
        warning = self._labels.examine(outputs, inputs)
        if warning is not None:
            self.warnings.append(warning)
            log.warning(warning)
        if not self.is_repeated and any(values.min() != values.max() for values in inputs):
            self.compare(outputs, repeat)

    def compare(self, outputs: Array, repeat: Callable[[], Array | None]) -> None:
        """Repeat a batch; raise ModelError if its outputs differ."""
        started = time.perf_counter()
        first = np.array(to_numpy(as_float(outputs)))
        for _ in range(self.repeats):
            again = repeat()
            if again is None:  # out of memory: batches are smaller from here on
                return
            difference = self._difference(first, to_numpy(as_float(again)))
            if difference > MAX_DIFFERENCE:
                raise ModelError(
                    "the network returned different outputs for one batch, by "
                    f"{difference:.3g} of their range: dropout or another random layer is active; "
                    "save it in inference mode (network.eval()) and remove random operations, or "
                    "set model_config.stochastic: true if results need not be reproducible",
                    code=ErrorCode.MODEL_RANDOM,
                )
            if time.perf_counter() - started > MAX_SECONDS:
                break
        self.is_repeated = True

    def _difference(self, first: Values, second: Values) -> float:
        if self._output.from_labels:
            is_equal = (first == second) | (np.isnan(first) & np.isnan(second))
            return 1.0 - float(is_equal.mean())
        return relative_difference(first, second)


def relative_difference(first: Values, second: Values) -> float:
    """Return the largest difference of two arrays of a shape, as a fraction of the first's range.

    It is infinite if values are finite in one array only, or differ in infinity or NaN. The range
    of a constant array is its absolute value.
    """
    difference, low, high = 0.0, np.inf, -np.inf
    flat, other = first.reshape(-1), second.reshape(-1)
    for start in range(0, flat.size, PART_VALUES):
        part = slice(start, start + PART_VALUES)
        finite = np.isfinite(flat[part])
        if not np.array_equal(flat[part][~finite], other[part][~finite], equal_nan=True):
            return np.inf
        a, b = (values[part][finite].astype(np.float64) for values in (flat, other))
        if not np.isfinite(b).all():
            return np.inf
        difference = max(difference, float(np.abs(a - b).max(initial=0.0)))
        low, high = min(low, a.min(initial=low)), max(high, a.max(initial=high))
    if difference == 0.0:
        return 0.0
    return difference / (float(high - low) or abs(float(high)) or difference)
