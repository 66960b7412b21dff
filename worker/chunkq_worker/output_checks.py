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

from chunkq.blend.combine import Array, as_float, to_numpy
from chunkq.errors import ErrorCode, ModelError
from chunkq.plan.outputs import OutputSpec
from chunkq_worker.label_outputs import LabelDetector
from chunkq_worker.network_heads import head_names, head_of, source_of_output
from chunkq_worker.random_state import random_states

MAX_DIFFERENCE = 1e-3
"""Largest difference between two runs on one batch, as a fraction of the range of the output."""
MAX_SECONDS = 5.0
"""Time after which no further repetition is started."""
PART_VALUES = 1 << 16
"""Values that are compared at a time; bounds the memory of a comparison."""
log = logging.getLogger("chunkq.worker")
Values = npt.NDArray[Any]
Arrays = Sequence[Array]
"""One array (n, C, *Q) per head."""
Repeat = Callable[[], Arrays | None]
"""Computes a batch again; returns None if batches have to be smaller."""


class OutputChecks:
    """Checks of one network in this process; all its batchers share them.

    `outputs` are those of the job; a batch has one array for each of their heads. `repeats` is the
    number of repetitions of a batch. `is_stochastic` permits that outputs differ. `warnings`
    collects what the checks found and a job may nevertheless do. `report` is called with each of
    them. `is_resolution_checked` is set by the batcher that has checked the resolution of the
    outputs.
    """

    def __init__(
        self, outputs: Sequence[OutputSpec], *, is_stochastic: bool, repeats: int = 1
    ) -> None:
        self.repeats = repeats
        self.warnings: list[str] = []
        self.report: Callable[[str], None] = log.warning
        self.is_repeated = is_stochastic
        self.is_resolution_checked = False
        self._outputs, self._heads = tuple(outputs), head_names(outputs)
        self._labels = [LabelDetector(output, source_of_output(output)) for output in outputs]
        self._states: tuple[Any, ...] = ()

    @property
    def are_done(self) -> bool:
        """Whether no further batch is examined."""
        return self.is_repeated and all(detector.is_done for detector in self._labels)

    def begin(self) -> None:
        """Take note of the random states before a batch is computed."""
        if not self.is_repeated:
            self._states = random_states()

    def examine(
        self,
        outputs: Arrays,
        inputs: Sequence[Values],
        repeat: Repeat,
        repeat_first: Repeat | None = None,
        *,
        is_repeatable: bool = False,
    ) -> None:
        """Examine the raw outputs of a batch. `inputs` are its patches; see `compare`.

        Raise ModelError if the outputs of the network are random, or labels.
        """
        for output, detector in zip(self._outputs, self._labels, strict=True):
            if detector.is_done:
                continue
            warning = detector.examine(head_of(output, outputs, self._heads), inputs)
            if warning is not None:
                self.warnings.append(warning)
                self.report(warning)
        if not self.is_repeated and any(values.min() != values.max() for values in inputs):
            is_varied = inputs[0].min() != inputs[0].max()
            first = repeat_first if is_varied else None
            self.compare(outputs, repeat, first, is_repeatable=is_repeatable)

    def compare(
        self,
        outputs: Arrays,
        repeat: Repeat,
        repeat_first: Repeat | None = None,
        *,
        is_repeatable: bool = False,
    ) -> None:
        """Repeat a batch; raise ModelError if its outputs differ.

        A batch of a network that `is_repeatable` is not repeated if no known random state has
        changed since `begin`; see `Runtime.is_repeatable`.

        `repeat_first` computes its first patch alone, in memory of its own. It is None if a runtime
        can draw from random states that are not known. If no known state has changed since `begin`,
        and the outputs of this patch agree, the others are not computed again. They may disagree
        because arithmetic depends on the batch size.
        """
        started = time.perf_counter()
        has_drawn = self._states != random_states()
        if is_repeatable and not has_drawn:
            self.is_repeated = True
            return
        first = [np.array(to_numpy(as_float(output))) for output in outputs]
        if repeat_first is not None and not has_drawn:
            again = repeat_first()
            if again is not None and self._agrees([values[:1] for values in first], again):
                self.is_repeated = True
                return
        for _ in range(self.repeats):
            again = repeat()
            if again is None:  # out of memory: batches are smaller from here on
                return
            differences = self._differences(first, again)
            difference = max(differences)
            if difference > MAX_DIFFERENCE:
                source = source_of_output(self._outputs[differences.index(difference)])
                raise ModelError(
                    f"{source} returned different outputs for one batch, by "
                    f"{difference:.3g} of their range: dropout or another random layer is active; "
                    "save it in inference mode (network.eval()) and remove random operations, or "
                    "set model_config.stochastic: true if results need not be reproducible",
                    code=ErrorCode.MODEL_RANDOM,
                )
            if time.perf_counter() - started > MAX_SECONDS:
                break
        self.is_repeated = True

    def _agrees(self, first: Sequence[Values], again: Arrays) -> bool:
        return max(self._differences(first, again)) <= MAX_DIFFERENCE

    def _differences(self, first: Sequence[Values], again: Arrays) -> list[float]:
        """Return the difference of each output; channels that no output uses may differ."""
        second = [to_numpy(as_float(values)) for values in again]
        return [
            _difference(
                head_of(output, first, self._heads), head_of(output, second, self._heads), output
            )
            for output in self._outputs
        ]


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
