"""Per-process cache of open jobs: folder, plan and arrays."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy.typing as npt

from chunkq.box import Box
from chunkq.errors import ChunkReadError, ErrorCode, MissingJobError, StoreError
from chunkq.ledger import JobFolder, Ledger
from chunkq.output import Output
from chunkq.paths import without_secret
from chunkq.plan import Chunk, Plan
from chunkq.record import JobRecord
from chunkq.stores import Array, input_identity, open_array, read_padded

JOBS_CACHED = 8


@dataclass(frozen=True)
class JobHandle:
    """The folder, record and plan of a job. Inputs and output are opened on first use."""

    folder: JobFolder
    record: JobRecord
    plan: Plan

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger of the job's epoch."""
        return self.folder.ledger(self.record.epoch)

    @cached_property
    def output(self) -> Output:
        """The output store."""
        return Output(self.folder.output, self.record)

    @cached_property
    def sources(self) -> tuple[Array, ...]:
        """The input arrays in the order of the job. Raises ChunkReadError if one was replaced."""
        self.check_inputs()
        try:
            return tuple(open_array(source.array_path) for source in self.record.sources)
        except StoreError as error:
            raise ChunkReadError(str(error), code=ErrorCode.INPUT_MISSING) from error

    @cached_property
    def target(self) -> Array:
        """The output array for writing. Raises MissingJobError if the job was replaced."""
        self.check_unchanged()
        return self.output.open()

    def check_unchanged(self) -> None:
        """Raise MissingJobError if the job folder was deleted or belongs to another job."""
        record = self.folder.read_record()
        if record is None or record.epoch != self.record.epoch:
            raise MissingJobError(
                f"{without_secret(self.folder.output)}: the job was deleted or replaced while it "
                "ran; its results are discarded",
                code=ErrorCode.JOB_REPLACED,
            )

    @contextmanager
    def check_replaced_on_error(self) -> Iterator[None]:
        """Raise MissingJobError instead of any other error if the job was replaced."""
        try:
            yield
        except Exception:
            self.check_unchanged()
            raise

    def check_inputs(self) -> None:
        """Raise ChunkReadError if an input is missing or was replaced since the job was produced.

        Compares metadata (`stores.input_identity`), so it does not detect changed voxels.
        """
        for source, identity in zip(self.record.sources, self.record.identities, strict=True):
            path = without_secret(source.array_path)
            current = input_identity(source.array_path)
            if current is None:
                raise ChunkReadError(
                    f"input: {path} is missing; restore it", code=ErrorCode.INPUT_MISSING
                )
            if current != identity:
                raise ChunkReadError(
                    f"input: {path} was replaced since the job was produced; restore it, or use "
                    "--overwrite to start again",
                    code=ErrorCode.INPUT_CHANGED,
                )

    def read_halos(self, chunk: Chunk) -> tuple[npt.NDArray[Any], ...]:
        """Read the padded region of each input that a chunk's patches cover.

        Each array has the shape `chunk.halo.shape` and the dtype of its input.
        """
        job = self.plan.job
        return tuple(
            read_padded(source, chunk.halo, job.pad_mode, job.pad_value) for source in self.sources
        )

    def write(self, box: Box, values: npt.NDArray[Any]) -> int:
        """Write the final voxels of whole storage chunks; return their size (bytes).

        `values` has the shape ([C,] *box.shape).
        """
        if not box.size:
            return 0
        self.target.write(self.plan.output_box(box), values)
        return values.nbytes


_cache: OrderedDict[str, JobHandle] = OrderedDict()
_lock = threading.Lock()


def open_job(path: str) -> JobHandle:
    """Return the handle of a job folder; cached per process until the job's epoch changes.

    Raises MissingJobError if there is no job.
    """
    folder = JobFolder(path)
    record = folder.require_record()
    with _lock:
        handle = _cache.get(path)
        if handle is None or handle.record.epoch != record.epoch:
            handle = JobHandle(folder, record, record.plan())
            _cache[path] = handle
        _cache.move_to_end(path)
        while len(_cache) > JOBS_CACHED:
            _cache.popitem(last=False)
        return handle
