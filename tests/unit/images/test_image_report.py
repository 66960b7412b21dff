"""Reports of jobs over images: classes, what they were taken for, and the confusion matrix."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from chunkq_producer.reports import charts
from chunkq_producer.reports.image_rows import MAX_LABELS, class_rows, confusion_rows
from chunkq_producer.reports.job_report import JobReport

from chunkq.image_report import accuracy_of, accuracy_values, image_lines
from chunkq.images.scores import Accuracy
from chunkq.timing.timing import Timing

COUNTS = np.array([[8, 2, 0], [0, 5, 0], [1, 0, 20]], np.int64)
ACCURACY = Accuracy(("cat", "dog", "cow"), COUNTS)


def report(**values: Any) -> JobReport:
    images = {
        "rows": 40,
        "computed": 40,
        "failed": 4,
        "errors": "/out.chunkq/e/errors.parquet",
        "by_code": {"image_damaged": 3, "image_missing": 1},
        "predicted": {"cow": 20, "cat": 9, "dog": 7},
        "accuracy": accuracy_values(ACCURACY),
    } | values
    timing: Timing = None  # type: ignore[assignment]
    return JobReport("/out.csv", True, {"images": images}, timing)


def test_an_accuracy_is_the_one_of_its_values() -> None:
    again = accuracy_of(accuracy_values(ACCURACY))
    assert again.labels == ACCURACY.labels
    assert np.array_equal(again.counts, COUNTS)
    assert (again.correct, again.total) == (33, 36)


def test_classes_are_listed_with_what_they_were_taken_for_the_most_frequent_first() -> None:
    assert class_rows(report()) == [
        ("cow", "21", "20", "95.2%", "20", "cat (1)"),
        ("cat", "10", "8", "80.0%", "9", "dog (2)"),
        ("dog", "5", "5", "100.0%", "7", ""),
    ]


def test_without_truth_classes_have_the_number_of_their_predictions() -> None:
    rows = class_rows(report(accuracy=None))
    assert rows is not None
    assert [(row[0], row[4]) for row in rows] == [("cow", "20"), ("cat", "9"), ("dog", "7")]
    assert class_rows(report(accuracy=None, predicted=None)) is None


@pytest.mark.parametrize(("labels", "is_shown"), [(MAX_LABELS, True), (MAX_LABELS + 1, False)])
def test_a_confusion_matrix_is_shown_as_text_while_it_fits(labels: int, is_shown: bool) -> None:
    names = tuple(f"class {n}" for n in range(labels))
    values = accuracy_values(Accuracy(names, np.eye(labels, dtype=np.int64)))
    table = confusion_rows(report(accuracy=values))
    assert (table is not None) == is_shown
    if table is not None:
        headings, rows = table
        assert headings == ("", *names)
        assert [row[1:][n] for n, row in enumerate(rows)] == ["1"] * labels


def test_lines_name_the_accuracy_and_the_images_without_a_result() -> None:
    accuracy, errors = image_lines(report().values["images"])
    assert "91.67%" in accuracy
    assert "4 of 40" in errors
    assert "/out.chunkq/e/errors.parquet" in errors
    assert image_lines(report(accuracy=None, failed=0).values["images"]) == []


def test_the_picture_of_a_confusion_matrix_names_its_labels() -> None:
    with charts.style():
        picture = str(charts.confusion_chart(ACCURACY))
    assert picture.startswith("<svg")
    assert all(f">{label}<" in picture for label in ACCURACY.labels)


def test_labels_of_a_picture_are_text_whatever_they_contain() -> None:
    labels = ["<script>", r"$\bad{$", "猫", "x" * 300]
    accuracy = Accuracy.of(pa.array(labels), pa.array(labels[::-1]))
    with charts.style():
        picture = str(charts.confusion_chart(accuracy))
    assert "<script>" not in picture
    assert picture.count(">&lt;script&gt;<") == picture.count(r">$\bad{$<") == 2
    assert picture.count(">猫<") == picture.count(f">{'x' * 23}…<") == 2
