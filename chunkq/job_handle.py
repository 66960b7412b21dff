"""A job as a process holds it: folder, plan and arrays, each opened once."""

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
    """One job's folder and plan, with its inputs and output opened when first needed."""

    folder: JobFolder
    record: JobRecord
    plan: Plan

    @cached_property
    def ledger(self) -> Ledger:
        """What the job has done."""
        return self.folder.ledger(self.record.epoch)

    @cached_property
    def output(self) -> Output:
        """The output store."""
        return Output(self.folder.output, self.record)

    @cached_property
    def sources(self) -> tuple[Array, ...]:
        """The input volumes, in the job's order; raises ChunkReadError if one was replaced."""
        self.check_inputs()
        try:
            return tuple(open_array(source.array_path) for source in self.record.sources)
        except StoreError as error:
            raise ChunkReadError(str(error), code=ErrorCode.INPUT_MISSING) from error

    @cached_property
    def target(self) -> Array:
        """The output volume, for writing; raises MissingJobError if the job was replaced."""
        self.check_unchanged()
        return self.output.open()

    def check_unchanged(self) -> None:
        """Raise MissingJobError if the job folder was removed or now belongs to another job."""
        now = self.folder.read_record()
        if now is None or now.epoch != self.record.epoch:
            raise MissingJobError(
                f"{without_secret(self.folder.output)}: the job was replaced meanwhile; what was "
                "computed for the old one is dropped",
                code=ErrorCode.JOB_REPLACED,
            )

    @contextmanager
    def unless_replaced(self) -> Iterator[None]:
        """Raise MissingJobError in place of any error that follows from the job's replacement."""
        try:
            yield
        except Exception:
            self.check_unchanged()
            raise

    def check_inputs(self) -> None:
        """Raise ChunkReadError if an input is gone or was replaced since the job was produced.

        Goes by metadata (`stores.input_identity`): changed voxels alone are not noticed.
        """
        for source, identity in zip(self.record.sources, self.record.identities, strict=True):
            shown = without_secret(source.array_path)
            now = input_identity(source.array_path)
            if now is None:
                raise ChunkReadError(f"input: {shown} is gone", code=ErrorCode.INPUT_MISSING)
            if now != identity:
                raise ChunkReadError(
                    f"input: {shown} was replaced since the job was produced; restore it, or start "
                    "again with --overwrite",
                    code=ErrorCode.INPUT_CHANGED,
                )

    def read_halos(self, chunk: Chunk) -> tuple[npt.NDArray[Any], ...]:
        """Return what a chunk's patches read of each input, padded; shapes `chunk.halo.shape`."""
        job = self.plan.job
        return tuple(
            read_padded(source, chunk.halo, job.pad_mode, job.pad_value) for source in self.sources
        )

    def write(self, box: Box, values: npt.NDArray[Any]) -> int:
        """Write final voxels ([C,] *box.shape) of whole storage chunks; returns the bytes."""
        if not box.size:
            return 0
        if self.plan.channel_axis:
            box = Box((0, *box.start), (self.plan.channels, *box.stop))
        self.target.write(box, values)
        return values.nbytes


_cache: OrderedDict[str, JobHandle] = OrderedDict()
_lock = threading.Lock()


def open_job(path: str) -> JobHandle:
    """Return the job of a job folder; opened once per process while its record stays the same.

    Raises MissingJobError where there is no job.
    """
    folder = JobFolder(path)
    record = folder.require_record()
    with _lock:
        held = _cache.get(path)
        if held is None or held.record.epoch != record.epoch:
            held = JobHandle(folder, record, record.plan())
            _cache[path] = held
        _cache.move_to_end(path)
        while len(_cache) > JOBS_CACHED:
            _cache.popitem(last=False)
        return held
