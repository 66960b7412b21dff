"""Tables of a report of a job over images: its classes, and what each was taken for."""

from __future__ import annotations

import numpy as np

from chunkq.image_report import accuracy_of
from chunkq.images.scores import Accuracy
from chunkq.units import count
from chunkq_producer.reports.job_report import JobReport

CLASS_COLUMNS = ("class", "images", "correct", "share", "predicted", "most often taken for")
MAX_LABELS = 10
"""Labels of a confusion matrix that is shown as a table of text."""


def accuracy(report: JobReport) -> Accuracy | None:
    """Return the accuracy of a job over images, None without a true label."""
    values = None if report.images is None else report.images["accuracy"]
    return accuracy_of(values) if values is not None and values["total"] else None


def class_rows(report: JobReport) -> list[tuple[str, ...]] | None:
    """Return rows with CLASS_COLUMNS, the most frequent class first; None without classes.

    Without true labels, a row has the label and how often it was predicted.
    """
    if report.images is None or report.images["predicted"] is None:
        return None
    predicted: dict[str, int] = report.images["predicted"]
    measured = accuracy(report)
    if measured is None:
        return [(label, "", "", "", count(n), "") for label, n in predicted.items()]
    order = np.argsort(-measured.counts.sum(axis=1), kind="stable")
    return [_class_row(measured, number, predicted) for number in order.tolist()]


def _class_row(measured: Accuracy, number: int, predicted: dict[str, int]) -> tuple[str, ...]:
    row, label = measured.counts[number].copy(), measured.labels[number]
    total, correct = int(row.sum()), int(row[number])
    row[number] = 0
    other = int(row.argmax())
    mistaken = f"{measured.labels[other]} ({count(int(row[other]))})" if row[other] else ""
    share = f"{correct / total:.1%}" if total else ""
    return (label, count(total), count(correct), share, count(predicted.get(label, 0)), mistaken)


def confusion_rows(report: JobReport) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Return the headings and the rows of the confusion matrix; None if it is too large."""
    measured = accuracy(report)
    if measured is None or len(measured.labels) > MAX_LABELS:
        return None
    rows = [
        (label, *map(count, row))
        for label, row in zip(measured.labels, measured.counts.tolist(), strict=True)
    ]
    return ("", *measured.labels), rows
