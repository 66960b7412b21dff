"""Result of an image job: Parquet files of chunks, and the table that is made of them."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import isfinite
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from chunkq.images.image_error import ImageError
from chunkq.images.image_list import CSV, PATH

TAKEN = "_list"
"""Suffix of a column of the list whose name the result has itself."""
ERROR_SCHEMA = pa.schema(
    [(PATH, pa.string()), ("row", pa.int64()), ("stage", pa.string()), ("code", pa.string()),
     ("message", pa.string())]
)  # fmt: skip
"""Columns of `errors.parquet`: one row per image without a result; `row` counts from 0."""
COMPRESSION = "zstd"
LONGEST_LINE = 1 << 24
"""Bytes of a line of JSON that can be read."""


@dataclass(frozen=True)
class ChunkResult:
    """Rows of one chunk: those with a result, and those that failed, both in the list's order."""

    rows: pa.Table
    errors: pa.Table

    def to_bytes(self) -> tuple[bytes, bytes]:
        """Return both tables as Parquet files."""
        return to_parquet(self.rows), to_parquet(self.errors)


def chunk_result(
    listed: pa.Table,
    first: int,
    columns: dict[str, pa.Array],
    good: Sequence[int],
    failed: Sequence[tuple[int, ImageError]],
) -> ChunkResult:
    """Return the result of a chunk.

    `listed` has its rows of the list, `first` is the number of the first one. `columns` have the
    results of the rows `good`, and `failed` the errors of the others; both count from `first`.
    """
    rows = listed.take(pa.array(good, pa.int64()))
    content = {PATH: rows.column(PATH)} | columns
    taken = {*content, *rows.column_names}
    for name in rows.column_names:
        if name != PATH:
            free = name
            while name in columns and free in taken:
                free += TAKEN
            content[free] = rows.column(name)
            taken.add(free)
    table = pa.table(content)
    paths = listed.column(PATH)
    errors = pa.table(
        {
            PATH: [paths[row].as_py() for row, _ in failed],
            "row": [first + row for row, _ in failed],
            "stage": [error.stage for _, error in failed],
            "code": [str(error.code) for _, error in failed],
            "message": [str(error) for _, error in failed],
        },
        schema=ERROR_SCHEMA,
    )
    return ChunkResult(table, errors)


def to_parquet(table: pa.Table) -> bytes:
    """Return a table as a Parquet file; equal tables have equal bytes."""
    sink = BytesIO()
    pq.write_table(table, sink, compression=COMPRESSION)
    return sink.getvalue()


def write_table(chunks: Iterable[pa.Table], suffix: str, file: IO[bytes]) -> int:
    """Write tables of one schema as one file, by its suffix; return the number of rows.

    `.parquet` has one row group per table that has rows, `.csv` one line per row, and `.jsonl` one
    JSON object per row. Lists and structs are JSON texts in CSV. At least one table is required.
    """
    stream = iter(chunks)
    first = next(stream)
    write = {".parquet": _write_parquet, ".csv": _write_csv, ".jsonl": _write_jsonl}[suffix]
    return write(first.schema, _counted(first, stream), file)


def read_columns(file: IO[bytes], suffix: str, columns: pa.Schema) -> pa.Table:
    """Read columns of a file of `write_table`; those that it lacks are left out.

    Lists of a CSV file stay JSON texts. Raises pyarrow.ArrowInvalid if the file is no such table.
    """
    if suffix == ".parquet":
        parquet = pq.ParquetFile(file)
        return parquet.read([name for name in columns.names if name in parquet.schema_arrow.names])
    if suffix == ".csv":
        options = pa.csv.ConvertOptions(
            column_types={field.name: _csv_type(field) for field in columns},
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,  # texts are quoted: a class can be named "NA"
        )
        table = pa.csv.read_csv(file, parse_options=CSV, convert_options=options)
    else:
        parse = pa.json.ParseOptions(explicit_schema=columns, unexpected_field_behavior="ignore")
        blocks = pa.json.ReadOptions(block_size=LONGEST_LINE)
        table = pa.json.read_json(file, read_options=blocks, parse_options=parse)
    return table.select([name for name in columns.names if name in table.column_names])


def to_rows(table: pa.Table, columns: pa.Schema) -> list[dict[str, Any]]:
    """Return the rows of a table of `read_columns`, with the lists of a CSV file as lists."""
    rows: list[dict[str, Any]] = table.to_pylist()
    texts = [
        name
        for name in table.column_names
        if pa.types.is_string(table.schema.field(name).type) and _is_json(columns.field(name).type)
    ]
    for row in rows:
        row |= {name: None if row[name] is None else json.loads(row[name]) for name in texts}
    return rows


def _counted(first: pa.Table, others: Iterator[pa.Table]) -> Iterator[pa.Table]:
    if first.num_rows:
        yield first
    for table in others:
        if table.num_rows:
            yield table.cast(first.schema)


def _write_parquet(schema: pa.Schema, tables: Iterator[pa.Table], file: IO[bytes]) -> int:
    rows = 0
    with pq.ParquetWriter(file, schema, compression=COMPRESSION) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            rows += table.num_rows
    return rows


def _csv_type(field: pa.Field) -> pa.DataType:
    """Return the type of a column in a CSV file, where lists are JSON texts."""
    return pa.string() if _is_json(field.type) else field.type


def _write_csv(schema: pa.Schema, tables: Iterator[pa.Table], file: IO[bytes]) -> int:
    fields = [field.with_type(_csv_type(field)) for field in schema]
    rows = 0
    with pa.csv.CSVWriter(file, pa.schema(fields)) as writer:
        for table in tables:
            columns = [
                pa.array([None if v is None else _json(v) for v in column.to_pylist()], pa.string())
                if _is_json(column.type)
                else column
                for column in table.columns
            ]
            writer.write_table(pa.table(columns, schema=pa.schema(fields)))
            rows += table.num_rows
    return rows


def _is_json(kind: pa.DataType) -> bool:
    """Return whether a CSV file has the values of a type as JSON."""
    if isinstance(kind, pa.BaseExtensionType):
        return True
    types = (
        pa.types.is_nested,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
    )
    return any(is_type(kind) for is_type in types)


def _write_jsonl(schema: pa.Schema, tables: Iterator[pa.Table], file: IO[bytes]) -> int:
    rows = 0
    for table in tables:
        for row in table.to_pylist():
            file.write(_json(row).encode() + b"\n")
            rows += 1
    return rows


def _json(value: Any) -> str:
    """Return a value as JSON. NaN and infinity, which JSON does not have, are null."""
    try:
        return json.dumps(value, default=_json_value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), default=_json_value, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _json_value(value: Any) -> str:
    """Return a value that JSON does not have, such as a date, as text, and bytes as base64."""
    return b64encode(value).decode() if isinstance(value, bytes) else str(value)
