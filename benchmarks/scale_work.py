"""What a job's tasks need of the store and the device, and what comes before and after them.

Bytes and patches are the totals of the job's `Plan` divided by its chunks, numbers of objects those
of a chunk in the middle of the volume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.scale_inputs import Inputs
from chunkq.executors.rq.executor import MAX_QUEUED
from chunkq.job import parse_job
from chunkq.plan import Plan, Volume
from chunkq.resolve import resolve

ASKED, SETTLED = 7, 2
"""Small requests of `infer_chunk`, one after another: the job's record and the chunk's commit
record, at the start, before the write and before the commit, and the input's metadata; then the
commit, and the removal of an earlier failure."""
ASKED_OF_BLOCK = 3
"""The same of `complete_block`: the commit record, and the job's record before write and commit."""


def plan_of(edge: int, chunk: int, *, patch: int, stride: int, storage: int) -> Plan:
    """A job of three classes over edge³ voxels of one byte each, with cubes all through."""
    cube = [patch] * 3
    job = parse_job(
        {
            "input": "/nowhere/in.zarr",
            "output": "/nowhere/out.zarr",
            "inference_type": "sliding_window",
            "strides": [stride] * 3,
            "weight_function": ["weight_gaussian"],
            "combine": "soft",
            "chunksize": [chunk] * 3,
            "storage_chunks": [storage] * 3,
            "model_config": {
                "runtime": "torch",
                "type": "torchscript",
                "ts_file": "/nowhere/model.ts",
                "model_input_shape": [1, *cube],
                "model_output_shape": [3, *cube],
            },
        }
    )
    return resolve(job, Volume((edge,) * 3, "uint8"))


@dataclass(frozen=True)
class Load:
    """What is read or written at once: bytes, the objects they lie in, bytes to (de)code."""

    bytes: float = 0.0
    objects: float = 0.0
    coded: float = 0.0


@dataclass(frozen=True)
class Task:
    """What one task needs, on average. `small` requests to the store come one after another."""

    read: Load = Load()
    patches: float = 0.0
    write: Load = Load()
    small_reads: float = 0.0
    small_writes: float = 0.0
    commits: float = 0.0

    @property
    def bytes(self) -> float:
        """Bytes moved between worker and store."""
        return self.read.bytes + self.write.bytes

    @property
    def coded(self) -> float:
        """Bytes of voxels decoded and encoded."""
        return self.read.coded + self.write.coded

    @property
    def reads(self) -> float:
        """Requests that read."""
        return self.read.objects + self.small_reads

    @property
    def writes(self) -> float:
        """Requests that make or remove an object."""
        return self.write.objects + self.small_writes


@dataclass(frozen=True)
class Work:
    """A job's two kinds of tasks: how many of each, and what one of them needs."""

    chunks: int
    infer: Task
    blocks: int
    block: Task

    @classmethod
    def of(cls, plan: Plan, input_storage: int) -> Work:
        """Take a plan's totals; the input lies in cubes of `input_storage`, read as a whole.

        Bytes are those of uncompressed voxels.
        """
        costs, chunk = plan.costs, plan.chunk(tuple(n // 2 for n in plan.blocks))
        sent, awaited = len(plan.outgoing_pieces(chunk)), len(plan.incoming_pieces(chunk))
        own = int(chunk.has_band)
        pieces = costs.piece_bytes / costs.chunks
        final = costs.finalized_voxels / math.prod(plan.volume.shape)
        output = costs.output_bytes / costs.chunks
        objects = [
            (stop - 1) // input_storage - start // input_storage + 1
            for start, stop in zip(chunk.halo.start, chunk.halo.stop, strict=True)
        ]
        read = math.prod(objects) * input_storage**plan.rank * float(plan.volume.voxel_bytes)
        stored = _objects(chunk.block.shape, plan.storage_chunks)
        core = _objects(chunk.core.shape, plan.storage_chunks)
        infer = Task(
            read=Load(read, math.prod(objects), read),
            patches=costs.patches / costs.chunks,
            write=Load(output * (1 - final) + pieces, core + sent + own, output * (1 - final)),
            small_reads=ASKED,
            small_writes=SETTLED,
            commits=1,
        )
        block = Task(
            read=Load(pieces, awaited + own),
            write=Load(output * final, stored - core, output * final),
            small_reads=ASKED_OF_BLOCK,
            small_writes=SETTLED + awaited + own,
            commits=1,
        )
        return cls(costs.chunks, infer, costs.finalized_blocks, block)


def _objects(shape: Sequence[int], storage: Sequence[int]) -> int:
    return math.prod(-(-n // s) for n, s in zip(shape, storage, strict=True))


@dataclass(frozen=True)
class Case:
    """A job of one chunk size (voxels along each axis), and what comes before and after work."""

    chunk: int
    plan: Plan
    work: Work

    @property
    def records(self) -> int:
        """Commit records, of chunks and of blocks."""
        return self.work.chunks + self.work.blocks

    def list_hours(self, inputs: Inputs) -> float:
        """Hours in which all commit records are listed."""
        return self.records / inputs.list_records_per_s / 3600

    def seal_hours(self, inputs: Inputs) -> float:
        """Hours from the last chunk to the sealed output: records are listed, then read."""
        return self.list_hours(inputs) + self.records / inputs.seal_records_per_s / 3600

    def enqueue_hours(self, inputs: Inputs, executor: str) -> float:
        """Hours that `produce` takes; workers have begun long before it ends."""
        rates = inputs.plan_chunks_per_s, inputs.queue(executor, "enqueue_per_s")
        return sum(self.work.chunks / rate for rate in rates) / 3600

    def queue_bytes(self, inputs: Inputs, executor: str) -> float:
        """Bytes of the tasks that are queued at once."""
        queued = min(self.work.chunks, MAX_QUEUED) if executor == "rq" else self.work.chunks
        return queued * inputs.queue(executor, "task_bytes")
