"""Outputs that are labels: class numbers, which must not be averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import Array, namespace, to_numpy
from chunkq.errors import ErrorCode, ModelError
from chunkq.plan.outputs import OutputSpec

ADVICE = (
    "set classes to the number of classes, so that each prediction is a vote, or return the "
    "probabilities of the classes"
)
MAX_BATCHES = 16
"""Batches whose values are examined until one is neither 0 nor 1."""
PART_VALUES = 1 << 16
"""Values that are examined at a time, of which the first part usually decides, and of a sample."""
MAX_CLASSES = 256
"""Number of distinct values above which whole numbers are amounts."""


def check_output_dtype(dtype: str, output: OutputSpec, source: str = "the network") -> None:
    """Raise ModelError if the dtype shows that a job would average labels.

    `dtype` is that of the output's head, and `source` what returned it. Integers of one channel are
    labels. Bool is the vote for one of two classes. Integers of several channels are votes or
    scores of the channels.
    """
    if (
        output.returned_channels == 1
        and not output.from_labels
        and dtype.startswith(("int", "uint"))
    ):
        raise ModelError(
            f"{source} returns {dtype} in one channel, which are labels; {ADVICE}; if they are "
            "amounts, return float32",
            code=ErrorCode.OUTPUT_IS_LABELS,
        )
    if dtype == "bool" and output.activation != "none":
        raise ModelError(
            f"{source} returns bool, and activation: {output.activation} expects logits; remove "
            "activation, or return the logits",
            code=ErrorCode.OUTPUT_IS_LABELS,
        )


def invalid_labels(labels: Array, classes: int) -> Array:
    """Return where values (N, 1, *Q) are no whole numbers from 0 to `classes` - 1."""
    xp = namespace(labels)
    return (labels != xp.floor(labels)) | (labels < 0) | (labels >= classes)


def _has_amounts(values: npt.NDArray[Any]) -> bool:
    """Return whether some finite values are negative or no whole numbers."""
    finite = values[np.isfinite(values)]
    return bool(((finite < 0) | (finite != np.rint(finite))).any())


def _distinct(values: npt.NDArray[Any]) -> int:
    """Return the number of distinct values in a sample; NaN is one of them.

    Its step is odd, so that it does not follow the rows of a patch.
    """
    ordered = np.sort(values[:: values.size // PART_VALUES | 1], axis=None)
    # `np.unique` would import numpy.ma, which takes 10 ms.
    is_new = (ordered[1:] != ordered[:-1]) & ~np.isnan(ordered[:-1])
    return min(1, ordered.size) + int(np.count_nonzero(is_new))


class LabelDetector:
    """Detects floating-point outputs of one channel that hold labels, from the first batches."""

    def __init__(self, output: OutputSpec, source: str = "the network") -> None:
        """`source` names what returns the outputs."""
        self._output, self._source = output, source
        self._batches = MAX_BATCHES
        if output.network_channels > 1 or output.from_labels:
            self._batches = 0

    @property
    def is_done(self) -> bool:
        """Whether no further batch is examined."""
        return self._batches == 0

    def examine(self, outputs: Array, inputs: Sequence[npt.NDArray[Any]]) -> str | None:
        """Examine the outputs of a batch; return a warning if labels are probably averaged.

        `inputs` are the patches of the batch. Raise ModelError if the job compares labels with the
        threshold 0.5. Nothing is read once a batch has decided.
        """
        if self._batches == 0:
            return None
        self._batches -= 1
        values = to_numpy(outputs).reshape(-1)
        if any(map(_has_amounts, np.split(values, range(PART_VALUES, values.size, PART_VALUES)))):
            self._batches = 0
            return None
        values = values[np.isfinite(values)]
        if values.size == 0 or ((values == 0) | (values == 1)).all():
            return None
        self._batches = 0
        if self._output.has_labels:
            raise ModelError(
                f"{self._source} returns whole numbers up to {values.max():.6g} in one channel, "
                f"which are labels, and combine: {self._output.combine} compares one channel with "
                f"0.5; {ADVICE}",
                code=ErrorCode.OUTPUT_IS_LABELS,
            )
        count = _distinct(values)
        if count > MAX_CLASSES or 2 * count >= _distinct(np.stack(inputs).reshape(-1)):
            return None
        return (
            f"{self._source} returns whole numbers from 0 to {values.max():.6g} in one channel; if "
            f"they are labels, combine: weighted_avg averages them: {ADVICE}"
        )
