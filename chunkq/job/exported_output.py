"""Outputs that are files: they are assembled from a Zarr store in the job folder."""

from __future__ import annotations

from collections.abc import Callable

from typing_extensions import override

from chunkq.errors import ErrorCode, StoreError
from chunkq.job.exports import ExportedFile, exported_files
from chunkq.job.image_output import StoredArray
from chunkq.job.ledger import Ledger
from chunkq.job.output import Output
from chunkq.job.output_documents import WrittenDocument
from chunkq.job.record import JobRecord
from chunkq.job.task_records import EXPORT, FILE_SIZE
from chunkq.paths import open_filesystem, without_secret
from chunkq.storage.objects import ObjectFolder


class ExportedOutput(Output):
    """The files of a job, and the Zarr store from which they are assembled.

    The store is deleted when all files have appeared.
    """

    def __init__(self, record: JobRecord, ledger: Ledger) -> None:
        super().__init__(ledger.store, record)
        self._ledger = ledger
        self.files = tuple(exported_files(record))

    @property
    @override
    def has_final_name(self) -> bool:
        return False

    @override
    def unseal(self) -> None:
        pass

    @override
    def check_array(self) -> None:
        if not self._ledger.is_sealed():
            super().check_array()

    @override
    def mark_incomplete(self, *, check_unchanged: Callable[[], None]) -> None:
        if ObjectFolder(self.path).folders():
            super().mark_incomplete(check_unchanged=check_unchanged)
        else:  # the files are to be made again
            self.prepare(anything_done=False, check_unchanged=check_unchanged)

    @property
    @override
    def arrays(self) -> list[StoredArray]:
        return [] if self._ledger.is_sealed() else super().arrays

    @override
    def documents(self, state: str) -> list[WrittenDocument]:
        return [] if self._ledger.is_sealed() else super().documents(state)

    @override
    def seal(self, *, check_unchanged: Callable[[], None]) -> None:
        missing = [file for file in self.files if not self._is_written(file)]
        if missing:
            raise StoreError(
                f"output: {without_secret(missing[0].path)} is missing or was changed since it was "
                "written; use --overwrite to start again",
                code=ErrorCode.OUTPUT_CHANGED,
            )
        check_unchanged()
        self._ledger.delete_store()

    @override
    def unlisted(self) -> list[str]:
        return []

    @override
    def is_sealed(self) -> bool:
        return all(map(self._is_written, self.files))

    def _is_written(self, file: ExportedFile) -> bool:
        """Return whether a file has the size that its commit record has."""
        item = self._ledger.item(first_item(self._record, file))
        commits = item.commits(EXPORT, [(file.number,)])
        filesystem, inner = open_filesystem(file.path)
        try:
            size = filesystem.info(inner)["size"]
        except FileNotFoundError:
            return False
        return bool(commits) and commits[0].moved.get(FILE_SIZE) == size


def first_item(record: JobRecord, file: ExportedFile) -> int:
    """Return the number of the first item of a file's image, whose tasks write the file."""
    return next(item.number for item in record.items if item.image.number == file.image.number)
