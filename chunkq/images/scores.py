"""Scores of classes: what a classification stores of the outputs of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Activation = Literal["none", "softmax", "sigmoid"]


@dataclass(frozen=True)
class ScoreSpec:
    """How the outputs of a classifier become columns.

    activation  applied to the outputs; scores are its results
    names       names of the classes, by number; empty if they have none
    top_k       classes of the columns `top_labels` and `top_scores`, at most
    """

    activation: Activation = "softmax"
    names: tuple[str, ...] = ()
    top_k: int = 5

    def columns(self, outputs: npt.NDArray[Any]) -> dict[str, pa.Array]:
        """Return the columns of outputs (n, C) of a network: prediction, label, scores.

        The prediction is the class with the largest score, the lowest one in a tie. With one
        output it is 1 where the score is at least 0.5, else 0, and the score is the output's; it is
        also the only entry of the lists.
        """
        scores = activate_rows(np.asarray(outputs, np.float32), self.activation)
        count, predictions = scores.shape[1], predicted_classes(scores)
        best = scores[np.arange(len(scores)), predictions] if count > 1 else scores[:, 0]
        # A stable sort of the negated scores: equal scores stay in the order of the classes.
        order = np.argsort(-scores, axis=1, kind="stable")[:, : min(self.top_k, count)]
        top = np.take_along_axis(scores, order, axis=1)
        offsets = np.arange(len(scores) + 1, dtype=np.int32) * order.shape[1]
        numbers = order.reshape(-1).astype(np.int32) if count > 1 else predictions
        return {
            "prediction": pa.array(predictions, pa.int32()),
            "label": self._labels(predictions),
            "score": pa.array(best, pa.float32()),
            "top_labels": pa.ListArray.from_arrays(offsets, self._labels(numbers)),
            "top_scores": pa.ListArray.from_arrays(offsets, pa.array(top.reshape(-1))),
        }

    def _labels(self, numbers: npt.NDArray[np.int32]) -> pa.Array:
        if not self.names:
            return pa.array([str(n) for n in numbers], pa.string())
        return pa.array(self.names, pa.string()).take(pa.array(numbers))


def predicted_classes(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Return the class of each row of scores (n, C), see `ScoreSpec.columns`."""
    if scores.shape[1] == 1:
        return (scores[:, 0] >= 0.5).astype(np.int32)
    best: npt.NDArray[np.int32] = scores.argmax(axis=1).astype(np.int32)
    return best


def activate_rows(outputs: npt.NDArray[np.float32], activation: Activation) -> Any:
    """Return the activated outputs (n, C), float32; softmax runs over C."""
    if activation == "none":
        return outputs
    if activation == "sigmoid":
        return (np.tanh(outputs / 2) + 1) / 2
    powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Accuracy:
    """Predictions beside the truth: counts of each pair of a true and a predicted label.

    labels  all labels, those of `names` first, then others in alphabetical order
    counts  number of images by true label (row) and predicted label (column), int64
    """

    labels: tuple[str, ...]
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, truth: pa.Array, predicted: pa.Array, names: Sequence[str] = ()) -> Accuracy:
        """Count the rows of two columns of labels; rows without a true label are left out."""
        columns = [
            column.filter(truth.is_valid()).cast(pa.string()) for column in (truth, predicted)
        ]
        others = {label for column in columns for label in column.unique().to_pylist()} - {*names}
        labels = (*names, *sorted(others))
        known, size = pa.array(labels, pa.string()), len(labels)
        true, guess = (
            pc.index_in(column, known).to_numpy(zero_copy_only=False).astype(np.int64)
            for column in columns
        )
        counts = np.bincount(true * size + guess, minlength=size * size)
        return cls(labels, counts.reshape(size, size).astype(np.int64))

    @property
    def total(self) -> int:
        """Number of images with a true label."""
        return int(self.counts.sum())

    @property
    def correct(self) -> int:
        """Number of images whose prediction is their true label."""
        return int(np.trace(self.counts))

    @property
    def share(self) -> float:
        """Share of correct predictions; 0 without an image."""
        return self.correct / self.total if self.total else 0.0
