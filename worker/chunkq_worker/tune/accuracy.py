"""Compare the outputs of two settings for the same patches: values and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.plan.outputs import Activation

Outputs = npt.NDArray[Any]
"""Raw outputs of a head of a network (n, C, *Q)."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How the outputs of a setting differ from those of a reference.

    `difference` is the largest difference of a value divided by the reference's range, infinite if
    other values are finite. `agreement` is the share of voxels with the same label.
    """

    difference: float
    agreement: float


def compare(
    reference: Sequence[Outputs], outputs: Sequence[Outputs], activations: Sequence[Activation]
) -> Accuracy | None:
    """Return the accuracy of the raw outputs of all heads: that of the worst head.

    `activations` are those of the heads. None if shapes differ, because the patches do.
    """
    heads = list(zip(reference, outputs, activations, strict=True))
    if any(expected.shape != actual.shape for expected, actual, _ in heads):
        return None
    agreements = (
        float(np.mean(_labels(expected, activation) == _labels(actual, activation)))
        for expected, actual, activation in heads
    )
    differences = (_difference(expected, actual) for expected, actual, _ in heads)
    return Accuracy(max(differences), min(agreements))


def _labels(outputs: Outputs, activation: Activation) -> npt.NDArray[Any]:
    """Return labels (n, *Q): the largest channel, or whether a single channel is at least 0.5."""
    if outputs.shape[1] > 1:
        return np.asarray(outputs.argmax(axis=1))
    return np.asarray(outputs[:, 0] >= (0.0 if activation == "sigmoid" else 0.5))


def _difference(reference: Outputs, outputs: Outputs) -> float:
    finite = np.isfinite(reference)
    if not np.array_equal(finite, np.isfinite(outputs)):
        return float("inf")
    if not finite.any():
        return 0.0
    expected, actual = reference[finite].astype(np.float64), outputs[finite].astype(np.float64)
    value_range = float(np.ptp(expected)) or float(np.abs(expected).max()) or 1.0
    return float(np.abs(expected - actual).max()) / value_range
