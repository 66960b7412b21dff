"""`StoredRows`: the images of a job as its folder has them, read by groups of rows."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from threading import Lock

import pyarrow as pa
import pyarrow.parquet as pq

from chunkq.errors import ErrorCode, JobError
from chunkq.job.image_rows import ImageRows
from chunkq.job.ledger import INPUTS, Ledger
from chunkq.paths import without_secret

GROUPS_KEPT = 2
"""Groups of rows that a job of a process keeps: chunks in flight follow each other."""


class StoredRows:
    """The rows that `ImageRows.to_bytes` has written. Thread-safe.

    A group of rows is read when a row of it is needed, so memory does not depend on the number of
    rows. Every method raises JobError if the file is missing or damaged, and OSError if the storage
    fails.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._lock = ledger, Lock()
        self._groups: OrderedDict[int, ImageRows] = OrderedDict()

    def part(self, start: int, stop: int) -> ImageRows:
        """Return the rows from `start` on, without `stop`."""
        with self._lock:
            first = bisect_right(self._starts, start) - 1
            after = bisect_left(self._starts, stop)
            tables = [self._group(number).table for number in range(first, after)]
        rows = ImageRows(pa.concat_tables(tables))
        return rows.part(start - self._starts[first], stop - self._starts[first])

    def parts(self) -> Iterator[ImageRows]:
        """Yield all rows, one group after the other."""
        for number in range(self._metadata.num_row_groups):
            with self._lock:
                group = self._group(number)
            yield group

    def _group(self, number: int) -> ImageRows:
        if number not in self._groups:
            with self._opened(self._metadata) as file:
                table = file.read_row_group(number, use_threads=False)
            self._groups[number] = ImageRows(table)
            while len(self._groups) > GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(number)
        return self._groups[number]

    @cached_property
    def _metadata(self) -> pq.FileMetaData:
        with self._opened() as file:
            return file.metadata

    @cached_property
    def _starts(self) -> list[int]:
        """The number of the first row of each group."""
        groups = range(self._metadata.num_row_groups)
        counts = (self._metadata.row_group(number).num_rows for number in groups)
        return [0, *accumulate(counts)][:-1]

    @contextmanager
    def _opened(self, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
        try:
            file = self._ledger.open_inputs()
            if file is None:
                raise ValueError
            with file:
                yield pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True)
        except (ValueError, OSError) as error:  # most of pyarrow's errors are ValueErrors
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the storage fails; pyarrow's errors of damaged files have no number
            raise JobError(
                f"{without_secret(self._ledger.path)}/{INPUTS} is missing or damaged; restore the "
                "file, or run `chunkq produce --overwrite` to start again",
                code=ErrorCode.JOB_RECORD_DAMAGED,
            ) from None
