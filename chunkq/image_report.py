"""What a report says of a job over images: rows, errors, predicted classes and accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from chunkq.images.result_table import read_columns
from chunkq.images.scores import Accuracy
from chunkq.job.exports import ERRORS_NUMBER, TABLE_NUMBER, exported_files
from chunkq.job.job_handle import JobHandle
from chunkq.job.output_name import table_suffix
from chunkq.job.task_records import EXPORT
from chunkq.paths import open_filesystem, without_secret
from chunkq.units import counted

LABEL, TRUTH = "label", "truth"
"""Columns of the table from which classes and accuracy are counted."""


def image_values(job: JobHandle) -> dict[str, Any]:
    """Return the figures of a job over images as JSON values.

    rows         images of the list
    computed     those of the chunks that are done
    failed       those of them without a result
    errors       path of the table of errors, None if it is not written
    by_code      number of failed images by error code
    predicted    number of images by predicted label, None without classes or before the table
    accuracy     None without truth, see `accuracy_values`
    """
    [item] = job.items
    commits = list(item.ledger.read_commits("infer"))
    written = item.ledger.committed(EXPORT)
    values: dict[str, Any] = {
        "rows": item.plan.volume.shape[0],
        "computed": sum(commit.patches for commit in commits),
        "failed": sum(commit.errors for commit in commits),
        "errors": None,
        "by_code": {},
        "predicted": None,
        "accuracy": None,
    }
    files = {file.number: file.path for file in exported_files(job.record)}
    if (ERRORS_NUMBER,) in written:
        values["errors"] = without_secret(files[ERRORS_NUMBER])
        codes = _read(files[ERRORS_NUMBER], "code")
        if codes is not None:
            values["by_code"] = _counts(codes.column("code"))
    if (TABLE_NUMBER,) in written and job.record.job.predicts_classes:
        table = _read(files[TABLE_NUMBER], LABEL, TRUTH)
        if table is not None and LABEL in table.column_names:
            labels = table.column(LABEL).combine_chunks()
            values["predicted"] = _counts(labels)
            if TRUTH in table.column_names and job.record.job.truth is not None:
                truth = table.column(TRUTH).combine_chunks()
                classes = job.record.job.classes
                names = classes if isinstance(classes, tuple) else ()
                values["accuracy"] = accuracy_values(Accuracy.of(truth, labels, names))
    return values


def accuracy_values(accuracy: Accuracy) -> dict[str, Any]:
    """Return an accuracy as JSON values: `pairs` are [true, predicted, count], by label number."""
    true, predicted = np.nonzero(accuracy.counts)
    counts = accuracy.counts[true, predicted]
    return {
        "total": accuracy.total,
        "correct": accuracy.correct,
        "share": accuracy.share,
        "labels": list(accuracy.labels),
        "pairs": np.stack([true, predicted, counts], axis=1).tolist(),
    }


def accuracy_of(values: dict[str, Any]) -> Accuracy:
    """Return the accuracy of these values, inverse of `accuracy_values`."""
    labels = tuple(values["labels"])
    counts = np.zeros((len(labels), len(labels)), np.int64)
    for true, predicted, count in values["pairs"]:
        counts[true, predicted] = count
    return Accuracy(labels, counts)


def image_lines(values: dict[str, Any]) -> list[str]:
    """Return the figures as lines of text: accuracy, and how many images failed."""
    lines = []
    if (accuracy := values["accuracy"]) is not None:
        lines.append(
            f"accuracy: {accuracy['share']:.2%}, {accuracy['correct']} of {accuracy['total']} "
            "images with a true label"
        )
    if failed := values["failed"]:
        codes = ", ".join(f"{count} {code}" for code, count in values["by_code"].items())
        where = f", see {values['errors']}" if values["errors"] else ""
        images = counted(values["computed"], "image", "images")
        share = f"{failed} of {images} {'has' if failed == 1 else 'have'} no result"
        if nothing_predicted(values):
            share = f"none of {images} has a result"
        lines.append(f"errors: {share}{f' ({codes})' if codes else ''}{where}")
    return lines


def nothing_predicted(values: dict[str, Any]) -> bool:
    """Return whether all images have failed."""
    return bool(values["failed"]) and values["failed"] == values["computed"]


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    """Return how often each value occurs, the most frequent first."""
    counts = pc.value_counts(values)
    pairs = zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)
    return dict(sorted(pairs, key=lambda pair: -pair[1]))


def _read(path: str, *names: str) -> pa.Table | None:
    """Return columns of texts of a table of the job; None if it is missing or cannot be read."""
    suffix = table_suffix(path)
    filesystem, inner = open_filesystem(path)
    try:
        with filesystem.open(inner, "rb") as file:
            return read_columns(file, suffix or "", pa.schema(dict.fromkeys(names, pa.string())))
    except (OSError, pa.ArrowInvalid):
        return None
