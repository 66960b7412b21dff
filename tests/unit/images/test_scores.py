"""Columns of a classification, accuracy, and files of results."""

from __future__ import annotations

import csv
import io
import json
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from chunkq.errors import ErrorCode
from chunkq.images.image_error import ImageError
from chunkq.images.result_table import chunk_result, read_columns, write_table
from chunkq.images.scores import Accuracy, ScoreSpec

LEVELS = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 3.0])
OUTPUTS = arrays.arrays(
    np.float32, st.tuples(st.integers(0, 6), st.integers(2, 7)), elements=LEVELS
)


@given(OUTPUTS, st.sampled_from(["none", "softmax", "sigmoid"]), st.integers(1, 9))
def test_columns_are_those_of_a_plain_loop(outputs: Any, activation: Any, top_k: int) -> None:
    names = tuple("abcdefg"[: outputs.shape[1]])
    columns = ScoreSpec(activation, names, top_k).columns(outputs)
    for row, values in enumerate(outputs.astype(np.float64)):
        scores = {
            "none": values,
            "softmax": np.exp(values) / np.exp(values).sum(),
            "sigmoid": 1 / (1 + np.exp(-values)),
        }[activation]
        order = sorted(range(len(values)), key=lambda c: (-values[c], c))[:top_k]
        assert columns["prediction"][row].as_py() == order[0]
        assert columns["label"][row].as_py() == names[order[0]]
        assert columns["score"][row].as_py() == pytest.approx(scores[order[0]], abs=1e-6)
        assert columns["top_labels"][row].as_py() == [names[c] for c in order]
        assert columns["top_scores"][row].as_py() == pytest.approx(scores[order], abs=1e-6)
    assert all(len(column) == len(outputs) for column in columns.values())


def test_one_output_is_a_decision_at_one_half() -> None:
    outputs = np.array([[0.0], [-0.1], [4.0]], np.float32)
    columns = ScoreSpec("sigmoid", ("no", "yes")).columns(outputs)
    assert columns["prediction"].to_pylist() == [1, 0, 1]
    assert columns["label"].to_pylist() == ["yes", "no", "yes"]
    assert columns["top_labels"].to_pylist() == [["yes"], ["no"], ["yes"]]


@given(st.lists(st.tuples(st.sampled_from("abxy"), st.sampled_from(["a", "b", "x", None]))))
def test_accuracy_counts_every_pair(pairs: list[tuple[str, str | None]]) -> None:
    predicted, truth = ([p[0] for p in pairs], [p[1] for p in pairs])
    accuracy = Accuracy.of(pa.array(truth, pa.string()), pa.array(predicted), ("b", "a"))
    known = [pair for pair in pairs if pair[1] is not None]
    assert accuracy.labels[:2] == ("b", "a")
    assert accuracy.total == len(known)
    assert accuracy.correct == sum(p == t for p, t in known)
    for i, true in enumerate(accuracy.labels):
        for j, guess in enumerate(accuracy.labels):
            assert accuracy.counts[i, j] == sum(pair == (guess, true) for pair in known)


def listed() -> pa.Table:
    return pa.table({"path": ["/a", "/b", "/c"], "score": [1, 2, 3], "site": ["x", "y", "z"]})


def result() -> Any:
    columns = ScoreSpec("none", ("p", "q"), 2).columns(np.array([[1, 0], [0, 2]], np.float32))
    error = ImageError("read", "missing; fix the path", code=ErrorCode.IMAGE_MISSING)
    return chunk_result(listed(), 256, columns, [0, 2], [(1, error)])


def test_a_chunk_has_its_results_its_errors_and_the_columns_of_the_list() -> None:
    chunk = result()
    assert chunk.rows.column("path").to_pylist() == ["/a", "/c"]
    assert chunk.rows.column("label").to_pylist() == ["p", "q"]
    assert chunk.rows.column("score_list").to_pylist() == [1, 3]
    assert chunk.rows.column_names[-2:] == ["score_list", "site"]
    assert chunk.errors.to_pylist() == [
        {"path": "/b", "row": 257, "stage": "read", "code": "image_missing",
         "message": "missing; fix the path"}
    ]  # fmt: skip


def test_a_column_of_the_list_keeps_its_values_whatever_its_name_is() -> None:
    table = pa.table({"path": ["/a"], "label": [1], "label_list": [2], "label_list_list": [3]})
    rows = chunk_result(table, 0, {"label": pa.array(["x"])}, [0], []).rows
    assert rows.drop_columns(["path", "label"]).to_pylist() == [
        {"label_list_list_list": 1, "label_list": 2, "label_list_list": 3}
    ]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_every_type_of_a_column_is_written_as_text(suffix: str) -> None:
    values = {
        "struct": {"a": [1]},
        "number": float("nan"),
        "list": [float("inf"), 1.0],
        "dates": [date(2020, 1, 2)],
        "bytes": b"\xff",
    }
    file = io.BytesIO()
    write_table([pa.table({name: [value] for name, value in values.items()})], suffix, file)
    text = file.getvalue().decode()
    if suffix == ".jsonl":
        row = json.loads(text, parse_constant=pytest.fail)
        assert row["number"] is None
    else:
        [row] = csv.DictReader(io.StringIO(text))
        row |= {name: json.loads(row[name]) for name in ("struct", "list", "dates", "bytes")}
    assert row["struct"] == {"a": [1]}
    assert row["list"] == [None, 1.0]
    assert row["dates"] == ["2020-01-02"]
    assert row["bytes"] == "/w=="


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (pa.array([b"\xff\xff", None], pa.binary(2)), '"//8="'),
        (
            pa.ExtensionArray.from_storage(
                pa.fixed_shape_tensor(pa.int8(), [2]),
                pa.array([[1, 2], None], pa.list_(pa.int8(), 2)),
            ),
            "[1, 2]",
        ),
    ],
    ids=["fixed size", "tensor"],
)
def test_csv_has_values_of_any_type(values: pa.Array, text: str) -> None:
    file = io.BytesIO()
    assert write_table([pa.table({"path": ["a", "b"], "key": values})], ".csv", file) == 2
    rows = csv.DictReader(io.StringIO(file.getvalue().decode()))
    assert [row["key"] for row in rows] == [text, ""]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_texts_that_look_like_missing_values_are_read_as_they_were_written(suffix: str) -> None:
    texts = ["NA", "null", "nan", "", None, "1", "true", "2020-01-01", 'a"b,\n']
    columns = pa.schema({"label": pa.string()})
    file = io.BytesIO()
    table = pa.table({"path": list("abcdefghi"), "label": pa.array(texts, pa.string())})
    write_table([table], suffix, file)
    file.seek(0)
    assert read_columns(file, suffix, columns).column("label").to_pylist() == texts


def test_equal_results_have_equal_bytes() -> None:
    assert result().to_bytes() == result().to_bytes()


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_files_of_results_are_read_by_others(suffix: str) -> None:
    rows, file = result().rows, io.BytesIO()
    empty = rows.slice(0, 0)
    assert write_table([empty, rows, empty, rows], suffix, file) == 4
    content = file.getvalue()
    if suffix == ".parquet":
        table = pq.read_table(pa.BufferReader(content))
        assert table.equals(pa.concat_tables([rows, rows]).combine_chunks())
        return
    if suffix == ".jsonl":
        read = [json.loads(line) for line in content.splitlines()]
    else:
        read = list(csv.DictReader(io.StringIO(content.decode())))
        for row in read:
            row |= {key: json.loads(row[key]) for key in ("top_labels", "top_scores")}
            row |= {key: float(row[key]) for key in ("score", "prediction", "score_list")}
    assert read == rows.to_pylist() * 2


def test_a_result_without_rows_keeps_its_columns() -> None:
    rows, file = result().rows.slice(0, 0), io.BytesIO()
    assert write_table([rows], ".parquet", file) == 0
    assert pq.read_table(pa.BufferReader(file.getvalue())).schema.equals(rows.schema)
