"""The jobs that `chunkq tune` may make of one job, each checked as any job is."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

from chunkq.errors import JobError
from chunkq.footprint import footprint
from chunkq.job import Job, parse_job
from chunkq.plan import Chunk, Plan
from chunkq.record import JobRecord
from chunkq.resolve import CHUNKS_WANTED
from chunkq_worker.tune.search import Cost, Setting, Shape

Changes = dict[tuple[str, ...], Any]
"""Keys of the job file, as paths, and what they become."""
FEW_CHUNKS = 1000
NEAREST_CHUNKS = 3
"""Of a job with more, so many blocks on each side of the middle one are looked at."""
CHUNK_SIZES = 3
"""Steps of the ladder of chunk sizes, in each direction."""


class SearchSpace:
    """A job, and what each setting makes of it."""

    def __init__(self, record: JobRecord) -> None:
        """Raises JobError if the job cannot be done as it is."""
        self._record, self._plan = record, record.plan()
        self._costs: dict[Setting, Cost | None] = {}

    def start(self, depth: int) -> Setting:
        """Return the job's own setting."""
        model = self._record.job.model
        return Setting(model.max_batch_size, depth, compile=model.compile)

    def record(self, setting: Setting) -> JobRecord:
        """Return the record of the job with a setting; raises JobError where there is none."""
        before = self._record
        changes = self.changes(setting)
        return replace(before, job=_changed(before.job, changes))

    def cost(self, setting: Setting) -> Cost | None:
        """Return what a setting means for the whole job, None if the job cannot be done so."""
        if setting not in self._costs:
            try:
                self._costs[setting] = _cost(self.record(setting).plan())
            except JobError:
                self._costs[setting] = None
        return self._costs[setting]

    def changes(self, setting: Setting) -> Changes:
        """Return what a setting changes in the job file; the depth is no key of it."""
        model = self._record.job.model
        found: Changes = {}
        if setting.batch != model.max_batch_size:
            found["model_config", "max_batch_size"] = setting.batch
        if setting.compile != model.compile:
            found["model_config", "compile"] = setting.compile
        if setting.precision is not None:
            key, value = setting.precision
            found["model_config", key] = value
        if setting.patch is not None:
            found |= self._of_patch(setting.patch)
        if setting.chunk is not None:
            found |= self._of_chunk(setting.chunk, found)
        return found

    def patch(self, given: Sequence[int]) -> Shape:
        """Return a whole patch shape for one length, or for one per spatial axis.

        One length leaves the axis of `lost_dim` as it is. Raises JobError for another number.
        """
        rank, now = self._plan.rank, self._plan.input_patch
        if len(given) == rank:
            return tuple(given)
        if len(given) != 1:
            shown = "x".join(map(str, given))
            raise JobError(
                f"--patch-sizes: {shown} has {len(given)} lengths, the input {rank} axes"
            )
        lost = self._lost_axis
        return tuple(now[a] if a == lost else given[0] for a in range(rank))

    @cached_property
    def ladder(self) -> list[Shape | None]:
        """Chunk shapes from small to large, each twice the one before; None is the job's own.

        All are whole numbers of the output's storage chunks, which stay as they are. There are
        never fewer chunks than workers can share, or than the job has by itself.
        """
        least = min(CHUNKS_WANTED, self._plan.costs.chunks)
        found: list[Shape | None] = [None]
        for larger in (False, True):
            shape = self._plan.chunksize
            for _ in range(CHUNK_SIZES):
                further = self._resized(shape, larger=larger)
                cost = self.cost(Setting(1, 1, chunk=further))
                if further == shape or cost is None or cost.chunks < least:
                    break
                shape = further
                found.insert(len(found) if larger else 0, shape)
        return found

    def _resized(self, shape: Shape, *, larger: bool) -> Shape:
        plan, found = self._plan, []
        for chunk, storage, length in zip(
            shape, plan.storage_chunks, plan.volume.shape, strict=True
        ):
            if larger:
                found.append(chunk * 2 if chunk < length else chunk)
            else:
                found.append(min(chunk, -(-min(chunk, length) // 2 // storage) * storage))
        return tuple(found)

    @property
    def _lost_axis(self) -> int | None:
        model = self._record.job.model
        if model.lost_dim is None:
            return None
        return model.lost_dim - (len(model.model_input_shape) - self._plan.rank)

    def _of_patch(self, patch: Shape) -> Changes:
        """Return the shapes for another patch, which loses as much rim and overlaps as much."""
        job, plan = self._record.job, self._plan
        model, rank = job.model, plan.rank
        outputs = tuple(
            q if a == self._lost_axis else new - (p - q)
            for a, (new, p, q) in enumerate(
                zip(patch, plan.input_patch, plan.output_patch, strict=True)
            )
        )
        found: Changes = {
            ("model_config", "model_input_shape"): [*model.model_input_shape[:-rank], *patch]
        }
        if model.model_output_shape is not None:
            found["model_config", "model_output_shape"] = [
                *model.model_output_shape[:-rank],
                *outputs,
            ]

        def scaled(lengths: Sequence[int]) -> list[int]:
            sizes = zip(lengths, outputs, plan.output_patch, strict=True)
            return [round(n * new / q) for n, new, q in sizes]

        if job.strides is not None:
            found["strides",] = [max(1, n) for n in scaled(job.strides)]
        if job.offsets:
            found["offsets",] = [scaled(offset) for offset in job.offsets]
        return found

    def _of_chunk(self, chunk: Shape, others: Changes) -> Changes:
        """Return the keys for another chunk; storage chunks are named if they would change."""
        found: Changes = {("chunksize",): list(chunk)}
        storage = self._plan.storage_chunks
        if self._record.job.storage_chunks is None:
            job = _changed(self._record.job, others | found)
            alone = JobRecord(job, self._record.sources, {}).plan().storage_chunks
            if alone != storage:
                found["storage_chunks",] = list(storage)
        return found


def near_middle(plan: Plan) -> list[Chunk]:
    """Return chunks that have something to compute, the nearest to the volume's middle first."""
    middle = [blocks // 2 for blocks in plan.blocks]
    ranges = [range(blocks) for blocks in plan.blocks]
    if prod(plan.blocks) > FEW_CHUNKS:
        ranges = [
            range(max(0, m - NEAREST_CHUNKS), min(blocks, m + NEAREST_CHUNKS + 1))
            for m, blocks in zip(middle, plan.blocks, strict=True)
        ]
    chunks = [chunk for index in product(*ranges) if (chunk := plan.chunk(index)).is_active]
    return sorted(
        chunks,
        key=lambda chunk: sum(abs(i - m) for i, m in zip(chunk.index, middle, strict=True)),
    )


def fullest(plan: Plan) -> Chunk:
    """Return the chunk nearest to the middle among those with the most patches there."""
    return max(near_middle(plan), key=lambda chunk: chunk.patches)


def _cost(plan: Plan) -> Cost:
    costs = plan.costs
    return Cost(
        chunks=costs.chunks,
        patches=costs.patches,
        piece_bytes=costs.piece_bytes,
        footprint=footprint(plan),
        chunk_patches=fullest(plan).patches,
        chunksize=plan.chunksize,
    )


def _changed(job: Job, changes: Changes) -> Job:
    values = deepcopy(job.as_dict())
    for (*sections, key), value in changes.items():
        section = values
        for name in sections:
            section = section[name]
        section[key] = value
    return parse_job(values)
