"""The stage that writes files: assemble them from the Zarr store of a job."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override
from zlib_ng import zlib_ng

from chunkq.errors import ErrorCode, QueueError, StoreError
from chunkq.job.job_handle import ItemHandle
from chunkq.job.object_checksums import encode_checksums
from chunkq.job.task_records import EXPORT, FILE_SIZE, Commit
from chunkq.paths import is_url, join, open_filesystem, without_secret
from chunkq.plan.chunk import Index
from chunkq.queue.contract.executor import Attempt
from chunkq.stages.base import Report, Stage, not_reported
from chunkq.storage.checksums import object_checksum
from chunkq.system.memory import peak_bytes

if TYPE_CHECKING:
    from chunkq.job.exports import ExportedFile

PART_BYTES = 1 << 20
"""Bytes of a file whose checksum is computed at a time."""


class ExportStage(Stage):
    """One task per file. The tasks of an image are those of its first item.

    They read the whole output, so they wait for all other tasks of the job, and the finalizer runs
    them.
    """

    kind: ClassVar[str] = EXPORT
    label: ClassVar[str] = "writing files"
    is_final: ClassVar[bool] = True

    @override
    def chunks(self, item: ItemHandle) -> Iterator[Index]:
        for file in _files(item):
            yield (file.number,)

    @override
    def count(self, item: ItemHandle) -> int:
        return len(_files(item))

    @override
    def run(self, item: ItemHandle, chunk: Index, attempt: Attempt) -> bool:
        self.run_with_progress(item, chunk, attempt, not_reported)
        return False

    @override
    def run_with_progress(
        self, item: ItemHandle, chunk: Index, attempt: Attempt, report: Report
    ) -> None:
        """Write a file, which appears at once, and commit it with its checksum.

        Raises QueueError if the job has no such file, ChunkReadError if a part of the output is
        damaged, and MissingJobError if the job was replaced.
        """
        files = {(file.number,): file for file in _files(item)}
        if chunk not in files:
            raise QueueError(
                f"{EXPORT} {item.chunk_name(chunk)} is not a task of the job; use a queue that "
                "only chunkq writes to",
                code=ErrorCode.TASK_INVALID,
            )
        with item.job.check_replaced_on_error():
            _export(item, files[chunk], attempt, report)


def _files(item: ItemHandle) -> list[ExportedFile]:
    """Return the files that tasks of an item write."""
    if not item.job.record.has_files or any(item.item.point):
        return []
    from chunkq.job.exports import exported_files

    files = exported_files(item.job.record)
    return [file for file in files if file.image.number == item.item.image.number]


def _export(item: ItemHandle, file: ExportedFile, attempt: Attempt, report: Report) -> None:
    started, job = time.time(), item.job
    if job.ledger.is_sealed():
        raise StoreError(
            f"output: {without_secret(file.path)} cannot be written again, because the voxels of a "
            "complete job are deleted; use --overwrite to start again",
            code=ErrorCode.OUTPUT_CHANGED,
        )
    name = f"{uuid.uuid4().hex}.partial"
    if is_url(file.path):
        from chunkq.system.scratch import scratch_folder  # for URLs only

        with scratch_folder(EXPORT) as folder:
            path = str(folder / name)
            size, checksum = _write(item, file, path, report)
            job.check_unchanged()
            filesystem, inner = open_filesystem(file.path)
            filesystem.put_file(path, inner)
    else:
        path = join(job.ledger.exports, name)
        for parent in (path, file.path):
            os.makedirs(os.path.dirname(parent), exist_ok=True)
        size, checksum = _write(item, file, path, report)
        job.check_unchanged()
        replace_file(path, file.path)
    job.check_unchanged()
    finished = time.time()
    item.ledger.commit(
        Commit(
            kind=EXPORT,
            item=item.number,
            chunk=(file.number,),
            attempt=attempt.number,
            worker=attempt.worker,
            started=started,
            finished=finished,
            seconds={"write": finished - started},
            moved={FILE_SIZE: size},
            stored=encode_checksums([checksum]),
            peak_rss=peak_bytes(),
        )
    )


def replace_file(path: str, target: str) -> None:
    """Let a file appear at its path."""
    os.replace(path, target)


def _write(item: ItemHandle, file: ExportedFile, path: str, report: Report) -> tuple[int, int]:
    """Write a file at a temporary path and flush it; return its size and its checksum."""
    label = f"writing {file.path.rpartition('/')[2]}"
    if item.job.record.job.is_image:
        from chunkq.stages.tables import write_file  # for such jobs only

        write_file(item, file, path, partial(report, label))
    else:
        _write_image(item, file, path, report, label)
    with open(path, "rb") as content:
        os.fsync(content.fileno())
        size, crc32 = 0, 0
        while part := content.read(PART_BYTES):
            size, crc32 = size + len(part), zlib_ng.crc32(part, crc32)
    return size, object_checksum(crc32)


def _write_image(
    item: ItemHandle, file: ExportedFile, path: str, report: Report, label: str
) -> None:
    """Write the outputs of an image that a file contains."""
    from chunkq.job.exports import writers
    from chunkq.writers.copying import copy_image

    file_writers = writers(item.job.record, file)
    total, before = sum(writer.steps for writer in file_writers), 0
    for number, writer in zip(file.outputs, file_writers, strict=True):
        array = item.job.output.image(file.image, number).open()
        copy_image(writer, array, path, _shifted(report, label, before, total))
        before += writer.steps


def _shifted(report: Report, label: str, before: int, total: int) -> Callable[[int], None]:
    """Return a function that reports steps of one of several writers."""
    return lambda done: report(label, before + done, total)
