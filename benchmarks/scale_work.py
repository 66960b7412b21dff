"""Needs of a job's tasks for store and device, and the steps before and after the tasks.

Bytes and patches are the totals of the job's `Plan` divided by its chunks. Numbers of objects are
those of a chunk in the middle of the volume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.scale_inputs import Inputs
from chunkq.job.job_parsing import parse_job
from chunkq.job.resolve import resolve
from chunkq.plan.plan import Plan
from chunkq.plan.volume import Volume
from chunkq.queue.backends.rq.executor import MAX_QUEUED

SMALL_READS, SMALL_WRITES = 7, 2
"""Sequential small requests of `infer_chunk`. It reads the job's record and the chunk's commit
record at the start, before the write and before the commit, and the input's metadata. It writes
the commit and removes an earlier failure."""
BLOCK_SMALL_READS = 3
"""Small reads of `complete_block`: commit record, and job record before write and commit."""


def plan_of(edge: int, chunk: int, *, patch: int, stride: int, storage: int) -> Plan:
    """Return the plan of a job of three classes over edge³ voxels of one byte, with cubes only."""
    cube = [patch] * 3
    job = parse_job(
        {
            "input": "/missing/in.zarr",
            "output": "/missing/out.zarr",
            "inference_type": "sliding_window",
            "strides": [stride] * 3,
            "weight_function": ["weight_gaussian"],
            "combine": "soft",
            "chunksize": [chunk] * 3,
            "storage_chunks": [storage] * 3,
            "model_config": {
                "runtime": "torch",
                "type": "torchscript",
                "ts_file": "/missing/model.ts",
                "model_input_shape": [1, *cube],
                "model_output_shape": [3, *cube],
            },
        }
    )
    return resolve(job, Volume((edge,) * 3, "uint8"))


@dataclass(frozen=True)
class Load:
    """Data read or written at once: bytes, number of objects, bytes to decode or encode."""

    bytes: float = 0.0
    objects: float = 0.0
    coded: float = 0.0


@dataclass(frozen=True)
class Task:
    """Average needs of one task. Requests in `small_…` are sequential."""

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
        """Requests that create or delete an object."""
        return self.write.objects + self.small_writes


@dataclass(frozen=True)
class Work:
    """The two kinds of tasks of a job: their numbers and the needs of one task."""

    chunks: int
    infer: Task
    blocks: int
    block: Task

    @classmethod
    def of(cls, plan: Plan, input_storage: int) -> Work:
        """Compute the needs from a plan; complete input cubes of edge `input_storage` are read.

        Bytes are those of uncompressed voxels.
        """
        costs, chunk = plan.costs, plan.chunk(tuple(n // 2 for n in plan.blocks))
        outgoing, incoming = len(plan.outgoing_pieces(chunk)), len(plan.incoming_pieces(chunk))
        own_piece = int(chunk.has_band)
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
            write=Load(
                output * (1 - final) + pieces, core + outgoing + own_piece, output * (1 - final)
            ),
            small_reads=SMALL_READS,
            small_writes=SMALL_WRITES,
            commits=1,
        )
        block = Task(
            read=Load(pieces, incoming + own_piece),
            write=Load(output * final, stored - core, output * final),
            small_reads=BLOCK_SMALL_READS,
            small_writes=SMALL_WRITES + incoming + own_piece,
            commits=1,
        )
        return cls(costs.chunks, infer, costs.finalized_blocks, block)


def _objects(shape: Sequence[int], storage: Sequence[int]) -> int:
    return math.prod(-(-n // s) for n, s in zip(shape, storage, strict=True))


@dataclass(frozen=True)
class Case:
    """A job with one chunk size (edge in voxels), and the steps before and after its tasks."""

    chunk: int
    plan: Plan
    work: Work

    @property
    def records(self) -> int:
        """Number of commit records, of chunks and blocks."""
        return self.work.chunks + self.work.blocks

    def list_hours(self, inputs: Inputs) -> float:
        """Return the hours for listing all commit records."""
        return self.records / inputs.list_records_per_s / 3600

    def seal_hours(self, inputs: Inputs) -> float:
        """Return the hours from the last chunk to the sealed output: list and read the records."""
        return self.list_hours(inputs) + self.records / inputs.seal_records_per_s / 3600

    def enqueue_hours(self, inputs: Inputs, executor: str) -> float:
        """Return the hours of `produce`; workers start long before it ends."""
        rates = inputs.plan_chunks_per_s, inputs.queue(executor, "enqueue_per_s")
        return sum(self.work.chunks / rate for rate in rates) / 3600

    def queue_bytes(self, inputs: Inputs, executor: str) -> float:
        """Return the bytes of the tasks that are queued at once."""
        queued = min(self.work.chunks, MAX_QUEUED) if executor == "rq" else self.work.chunks
        return queued * inputs.queue(executor, "task_bytes")
