"""Tables of a job over images: merge the results of its chunks in the order of the list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from chunkq.errors import ErrorCode, IncompleteError, PieceError
from chunkq.images.result_table import write_table
from chunkq.job.exports import ERRORS_NUMBER, ExportedFile, exported_files
from chunkq.job.job_handle import ItemHandle, JobHandle
from chunkq.job.output_name import SLP, table_suffix
from chunkq.paths import without_secret
from chunkq.plan.chunk import Index
from chunkq.units import counted

PIECE = "rows"
"""Name of the piece of a chunk: its table of results, and that of its errors, as Parquet files."""


def put_results(item: ItemHandle, chunk: Index, tables: Sequence[bytes]) -> tuple[int, int]:
    """Store the tables of a chunk; return their size (bytes) and CRC-32."""
    arrays = [np.frombuffer(table, np.uint8) for table in tables]
    info = item.ledger.put_piece(chunk, PIECE, arrays)
    return info.size, info.crc32


def write_file(
    item: ItemHandle, file: ExportedFile, path: str, report: Callable[[int, int], None]
) -> None:
    """Write a table of a job at a temporary path. `report` gets the chunks that are merged.

    Raises PieceError if the results of chunks are lost, after deleting their commit records, and
    IncompleteError if more images failed than the job allows.
    """
    job = item.job
    if file.number != ERRORS_NUMBER:
        _check_errors(job)
    number = 0 if file.number != ERRORS_NUMBER else 1
    suffix = table_suffix(file.path)
    if suffix is None:
        raise ValueError("the output of the job is no table")
    if suffix == SLP and number == 0:
        from chunkq.stages.slp import write_keypoints  # for such outputs only

        write_keypoints(item, path, _pairs(item, report))
        return
    with open(path, "wb") as target:
        write_table(_parts(item, number, report), suffix, target)


def _parts(item: ItemHandle, number: int, report: Callable[[int, int], None]) -> Iterator[pa.Table]:
    """Yield a table of each chunk in the order of the list."""
    for tables in _tables(item, report):
        yield read_table(tables[number])


def _pairs(
    item: ItemHandle, report: Callable[[int, int], None]
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yield the tables of results and of errors of each chunk in the order of the list."""
    for tables in _tables(item, report):
        yield read_table(tables[0]), read_table(tables[1])


def read_table(content: npt.NDArray[np.uint8]) -> pa.Table:
    """Return a table of `put_results`."""
    return pq.read_table(pa.BufferReader(content.tobytes()))


def _tables(
    item: ItemHandle, report: Callable[[int, int], None]
) -> Iterator[Sequence[npt.NDArray[np.uint8]]]:
    """Yield what `put_results` has stored of each chunk, in the order of the list."""
    chunks, problems = list(item.tasks.chunks()), dict[Index, PieceError]()
    for done, chunk in enumerate(chunks):
        try:
            arrays, _ = item.ledger.get_piece(chunk, PIECE)
        except PieceError as error:
            problems[chunk] = error
            continue
        if not problems:
            yield arrays
        report(done + 1, len(chunks))
    if problems:
        item.ledger.delete_commits("infer", problems)
        lost = ", ".join(map(item.chunk_name, problems))
        raise PieceError(
            f"{next(iter(problems.values()))}; chunk {lost} must be computed again",
            tuple(problems),
        )


def _check_errors(job: JobHandle) -> None:
    """Raise IncompleteError if more images failed than the job allows."""
    limit = job.record.job.max_errors
    if limit is None:
        return
    errors = sum(c.errors for item in job.items for c in item.ledger.read_commits("infer"))
    if errors > limit:
        raise IncompleteError(
            f"max_errors: {counted(errors, 'image', 'images')} failed, more than {limit}, so the "
            f"table is not written; their errors are in {errors_path(job)}. To write it "
            "nevertheless, raise max_errors and run the job again; to compute all images again, "
            "use --overwrite",
            [],
            code=ErrorCode.TOO_MANY_ERRORS,
        )


def errors_path(job: JobHandle) -> str:
    """Return the path of the table of errors, for messages."""
    file = next(f for f in exported_files(job.record) if f.number == ERRORS_NUMBER)
    return without_secret(file.path)
