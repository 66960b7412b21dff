"""Checks of the first batches that a process computes with a network.

A batch with different values is computed again, as a whole or only its first patch, and the outputs
must agree. Outputs of one channel must not be labels that the job averages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import Array, as_float, pick_channels, to_numpy
from chunkq.errors import ErrorCode, ModelError
from chunkq.plan.outputs import OutputSpec
from chunkq_worker.label_outputs import LabelDetector
from chunkq_worker.random_state import random_states

MAX_DIFFERENCE = 1e-3
"""Largest difference between two runs on one batch, as a fraction of the range of the output."""
MAX_SECONDS = 5.0
"""Time after which no further repetition is started."""
PART_VALUES = 1 << 16
"""Values that are compared at a time; bounds the memory of a comparison."""
log = logging.getLogger("chunkq.worker")
Values = npt.NDArray[Any]
Repeat = Callable[[], Array | None]
"""Computes a batch again; returns None if batches have to be smaller."""


class OutputChecks:
    """Checks of one network in this process; all its batchers share them.

    `repeats` is the number of repetitions of a batch. `is_stochastic` permits that outputs differ.
    `is_resolution_checked` is set by the batcher that has checked the resolution of the outputs.
    `warnings` collects what the checks found and a job may nevertheless do. `report` is called with
    each of them.
    """

    def __init__(
        self, outputs: Sequence[OutputSpec], *, is_stochastic: bool, repeats: int = 1
    ) -> None:
        self.repeats = repeats
        self.warnings: list[str] = []
        self.report: Callable[[str], None] = log.warning
        self.is_repeated = is_stochastic
        self.is_resolution_checked = False
        self._outputs = tuple(outputs)
        self._labels = [LabelDetector(output) for output in outputs]
        self._states: tuple[Any, ...] = ()

    @property
    def are_done(self) -> bool:
        """Whether no further batch is examined."""
        return self.is_repeated and all(labels.is_done for labels in self._labels)

    def begin(self) -> None:
        """Take note of the random states before a batch is computed."""
        if not self.is_repeated:
            self._states = random_states()

    def examine(
        self,
        outputs: Array,
        inputs: Sequence[Values],
        repeat: Repeat,
        repeat_first: Repeat | None = None,
    ) -> None:
        """Examine the raw outputs of a batch. `inputs` are its patches; see `compare`.

        Raise ModelError if the outputs of the network are random, or labels.
        """
        for labels, output in zip(self._labels, self._outputs, strict=True):
            warning = labels.examine(pick_channels(outputs, output.picks), inputs)
            if warning is not None:
                self.warnings.append(warning)
                self.report(warning)
        if not self.is_repeated and any(values.min() != values.max() for values in inputs):
            is_varied = inputs[0].min() != inputs[0].max()
            self.compare(outputs, repeat, repeat_first if is_varied else None)

    def compare(self, outputs: Array, repeat: Repeat, repeat_first: Repeat | None = None) -> None:
        """Repeat a batch; raise ModelError if its outputs differ.

        `repeat_first` computes its first patch alone, in memory of its own. It is None if a runtime
        can draw from random states that are not known. If no known state has changed since `begin`,
        and the outputs of this patch agree, the others are not computed again. They may disagree
        because arithmetic depends on the batch size.
        """
        started = time.perf_counter()
        first = np.array(to_numpy(as_float(outputs)))
        if repeat_first is not None and self._states == random_states():
            again = repeat_first()
            if again is not None and self._agrees(first[:1], again):
                self.is_repeated = True
                return
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

    def _agrees(self, first: Values, again: Array) -> bool:
        return self._difference(first, to_numpy(as_float(again))) <= MAX_DIFFERENCE

    def _difference(self, first: Values, second: Values) -> float:
        return max(
            _difference(pick_channels(first, o.picks), pick_channels(second, o.picks), o)
            for o in self._outputs
        )


def _difference(first: Values, second: Values, output: OutputSpec) -> float:
    """Return the difference of two results for one output; of labels, the share that differs."""
    if output.from_labels:
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
