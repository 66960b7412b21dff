"""Rows of jobs over images: true labels, the stored table, the plan of the rows."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq.errors import ErrorCode, JobError, StoreError
from chunkq.job import image_rows
from chunkq.job.image_rows import ImageRows, find_rows, sample_rows
from chunkq.job.job_file import Job
from chunkq.job.job_reading import load_job
from chunkq.job.ledger import INPUTS, Ledger
from chunkq.job.row_plan import default_rows, row_plan
from chunkq.job.stored_rows import StoredRows
from chunkq.plan.footprint import footprint
from chunkq.plan.volume import Volume


def job(table: Path, **keys: Any) -> Job:
    return load_job(
        {
            "input": str(table),
            "output": "/out.csv",
            "inference_type": "image",
            "image": {"crop": 8},
            "model_config": {
                "runtime": "numpy", "type": "class", "class_file": "/n.py", "class_name": "n",
            },
        }
        | keys
    )  # fmt: skip


@pytest.fixture
def table(tmp_path: Path) -> Path:
    columns = {
        "path": ["cat/1.png", "dog/2.png", "3.png"],
        "label": ["cat", "dog", None],
        "number": pa.array([0, 1, None], pa.int16()),
        "size": [1.5, 2.5, 3.5],
        "wrong": [0, 1, 2],
    }
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    return tmp_path / "list.parquet"


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        ({"truth": {"column": "label"}}, ["cat", "dog", None]),
        ({"truth": {"column": "number"}}, ["0", "1", None]),
        ({"truth": {"column": "number"}, "classes": ["cat", "dog"]}, ["cat", "dog", None]),
        ({"truth": {"regex": "(cat|dog)/"}, "classes": ["cat", "dog"]}, ["cat", "dog", None]),
    ],
)
def test_true_labels_are_names_numbers_or_parts_of_the_path(
    table: Path, keys: dict[str, Any], labels: list[Any]
) -> None:
    rows = find_rows(job(table, **keys))
    assert rows.truth is not None
    assert rows.truth.to_pylist() == labels
    assert rows.listed.column_names == ["path", "label", "number", "size", "wrong"]


@pytest.mark.parametrize(
    "keys",
    [
        {"truth": {"column": "missing"}},
        {"truth": {"column": "size"}},
        {"truth": {"column": "label"}, "classes": ["cat", "cow"]},
        {"truth": {"column": "wrong"}, "classes": ["cat", "dog"]},
        {"truth": {"regex": "(nowhere)"}},
    ],
)
def test_truth_that_does_not_fit_the_list_is_refused(table: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(JobError) as caught:
        find_rows(job(table, **keys))
    assert caught.value.code is ErrorCode.IMAGE_LIST_INVALID


def test_stored_rows_are_read_back_and_damage_is_found(table: Path, tmp_path: Path) -> None:
    rows = find_rows(job(table, truth={"column": "label"}))
    content = rows.to_bytes()
    middle = len(content) // 4
    broken = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    ledger = Ledger(str(tmp_path), "00000000")
    for stored in (None, broken, content[: len(content) // 2], b""):
        if stored is not None:
            ledger.objects.put(INPUTS, stored)
        with pytest.raises(JobError) as caught:
            StoredRows(ledger).part(0, 3)
        assert caught.value.code is ErrorCode.JOB_RECORD_DAMAGED
    ledger.objects.put(INPUTS, content)
    assert StoredRows(ledger).part(0, 3).table.equals(rows.table)


def test_a_chunk_reads_its_groups_of_rows_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_rows, "GROUP_ROWS", 10)
    columns = {"path": [f"/{n}.png" for n in range(95)], "frame": range(95)}
    rows, ledger = ImageRows(pa.table(columns)), Ledger(str(tmp_path), "00000000")
    ledger.put_inputs(rows.to_bytes())
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counted(file: pq.ParquetFile, number: int, **options: Any) -> pa.Table:
        read.append(number)
        return original(file, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    stored = StoredRows(ledger)
    for start, stop in [(0, 8), (8, 16), (16, 24), (40, 75), (90, 95), (94, 95)]:
        part = stored.part(start, stop)
        assert part.table.equals(rows.part(start, stop).table)
        assert part.paths == rows.paths[start:stop]
    assert read == [0, 1, 2, 4, 5, 6, 7, 9]
    assert [path for part in stored.parts() for path in part.paths] == rows.paths


def test_the_source_changes_with_every_cell_of_the_list(table: Path) -> None:
    def identity() -> str | None:
        return find_rows(job(table)).source("/list").identity()

    before = identity()
    assert identity() == before
    columns = pq.read_table(table)
    pq.write_table(columns.set_column(3, "size", pa.array([1.5, 2.5, 3.25])), table)
    assert identity() != before


def test_a_sample_is_spread_over_the_list() -> None:
    paths = [str(n) for n in range(1000)]
    source = ImageRows(pa.table({"path": paths})).source("/list")
    sample = [int(path) for path, _, _ in sample_rows(source)]
    assert (sample[0], sample[-1]) == (0, 999)
    assert max(b - a for a, b in pairwise(sample)) < 100


def test_a_chunk_of_rows_needs_no_memory_to_be_finalized() -> None:
    plan = row_plan(job(Path("/list.csv")), Volume((100,), "uint8"))
    assert footprint(plan).finalizing == 0


KEYS = job(Path("/list.csv"))


@given(st.integers(1, 10**5), st.integers(1, 300))
def test_chunks_are_whole_batches_and_cover_each_row_once(rows: int, batch: int) -> None:
    size = default_rows(rows, batch)
    assert size == rows or size % batch == 0
    assert size < 1024 + batch
    plan = row_plan(KEYS.model_copy(update={"chunksize": (size,)}), Volume((rows,), "uint8"))
    assert plan.costs.chunks == -(-rows // size)
    assert plan.costs.patches == rows
    assert plan.costs.finalized_blocks == 0
    last = plan.chunk((plan.costs.chunks - 1,))
    assert (last.block.start[0], last.block.stop[0]) == (rows - last.patches, rows)


def test_a_pattern_that_matches_the_output_of_the_last_run_names_the_same_rows(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.png").touch()
    keys = {"input": str(tmp_path / "*"), "output": str(tmp_path / "out.csv")}
    before = find_rows(job(tmp_path / "*", **keys))
    (tmp_path / "out.csv").touch()
    (tmp_path / "out.csv.chunkq").mkdir()
    after = find_rows(job(tmp_path / "*", **keys))
    assert before.source("").options == after.source("").options
    (tmp_path / "a.png").unlink()
    with pytest.raises(StoreError) as caught:
        find_rows(job(tmp_path / "*", **keys))
    assert caught.value.code == ErrorCode.IMAGE_LIST_INVALID
