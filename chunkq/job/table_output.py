"""Output of a job over images: a table, merged from the results of chunks."""

from __future__ import annotations

from collections.abc import Callable

from typing_extensions import override

from chunkq.job.exported_output import ExportedOutput
from chunkq.job.image_output import StoredArray
from chunkq.job.output_documents import WrittenDocument


class TableOutput(ExportedOutput):
    """The table of a job, and the one of its errors. No other object belongs to the output."""

    @property
    @override
    def arrays(self) -> list[StoredArray]:
        return []

    @override
    def documents(self, state: str) -> list[WrittenDocument]:
        return []

    @override
    def prepare(self, *, anything_done: bool, check_unchanged: Callable[[], None]) -> None:
        pass

    @override
    def check_array(self) -> None:
        pass

    @override
    def mark_incomplete(self, *, check_unchanged: Callable[[], None]) -> None:
        pass
