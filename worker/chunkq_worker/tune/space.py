"""Apply settings of `chunkq tune` to a job, and compute the costs of the changed job."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from typing import Any

from chunkq.errors import JobError
from chunkq.job.axis_order import (
    AxisOrder,
    WrittenOrders,
    channels_first,
    input_channels,
    join,
    split,
)
from chunkq.job.job_file import Job
from chunkq.job.job_parsing import parse_job
from chunkq.job.record import JobRecord
from chunkq.plan.footprint import footprint
from chunkq.plan.outputs import Activation
from chunkq.plan.plan import Plan
from chunkq.plan.sample_chunks import fullest_chunk
from chunkq_worker.tune.search import Cost, Setting, Shape

Changes = dict[tuple[str, ...], Any]
"""Key path in the job file -> new value."""
MIN_CHUNKS = 32
"""Smallest number of chunks that are tried, so that several workers share the job."""
CHUNK_SIZE_STEPS = 3
"""Number of smaller and of larger chunk shapes."""


class SearchSpace:
    """The settings of one job: the changed job record and its costs. Depth changes neither."""

    def __init__(self, record: JobRecord) -> None:
        """Raise JobError if the job itself is invalid."""
        self._record, self._plan = record, record.plan()
        self._costs: dict[Setting, Cost | None] = {}

    @property
    def activations(self) -> tuple[Activation, ...]:
        """Return the activation of each head's raw outputs; `none` if a head has several."""
        by_head = [
            {output.activation for output in self._plan.outputs if output.head == head.name}
            for head in self._plan.heads
        ]
        return tuple(kinds.pop() if len(kinds) == 1 else "none" for kinds in by_head)

    def start(self, depth: int) -> Setting:
        """Return the setting of the unchanged job with `depth` chunks in flight."""
        model = self._record.job.model
        return Setting(
            model.max_batch_size, depth, model.compile, model.channels_last, model.cuda_graph
        )

    def plain(self, depth: int) -> Setting:
        """Return the setting of the unchanged job in float32 and without options of the network.

        A network that cannot run in float32 keeps its precision.
        """
        model = self._record.job.model
        setting = Setting(model.max_batch_size, depth)
        if model.effective_precision == "float32":
            return setting
        plain = replace(setting, precision=("precision", "float32"))
        return setting if self.cost(plain) is None else plain

    def record(self, setting: Setting) -> JobRecord:
        """Return the job record with a setting; raise JobError if the setting is invalid."""
        record = self._record
        changes = self.changes(setting)
        return replace(record, job=_apply(record.job, changes))

    def cost(self, setting: Setting) -> Cost | None:
        """Return the costs of the job with a setting; None if the setting is invalid."""
        if setting not in self._costs:
            try:
                self._costs[setting] = _cost(self.record(setting).plan())
            except JobError:
                self._costs[setting] = None
        return self._costs[setting]

    def changes(self, setting: Setting) -> Changes:
        """Return the changes to the job file; the depth is not a key of the job file."""
        model = self._record.job.model
        changes: Changes = {}
        if setting.batch != model.max_batch_size:
            changes["model_config", "max_batch_size"] = setting.batch
        for key in ("compile", "channels_last", "cuda_graph"):
            if getattr(setting, key) != getattr(model, key):
                changes["model_config", key] = getattr(setting, key)
        if setting.precision is not None:
            key, value = setting.precision
            changes["model_config", key] = value
        if setting.patch is not None:
            changes |= self._patch_changes(setting.patch)
        if setting.chunk is not None:
            changes |= self._chunk_changes(setting.chunk, changes)
        return changes

    def patch(self, lengths: Sequence[int]) -> Shape:
        """Return a patch shape from one length, or from one length per spatial axis.

        A single length does not change the axis `lost_dim`. Raise JobError for another number of
        lengths.
        """
        rank, current = self._plan.rank, self._plan.input_patch
        if len(lengths) == rank:
            return tuple(lengths)
        if len(lengths) != 1:
            printed = "x".join(map(str, lengths))
            raise JobError(
                f"--patch-sizes: {printed} has {len(lengths)} lengths, expected 1 or {rank}"
            )
        channels = input_channels(self._record.job.model, self._plan.volume)
        lost_axis = channels_first(self._record.job.model, rank, channels).lost_axis(rank)
        return tuple(current[a] if a == lost_axis else lengths[0] for a in range(rank))

    @cached_property
    def chunk_shapes(self) -> list[Shape | None]:
        """Return chunk shapes from small to large, each double the previous; None is the job's.

        All are multiples of the output's storage chunks, which do not change. At least
        `min_chunks` chunks remain, so that workers can share the job.
        """
        min_chunks = min(MIN_CHUNKS, self._plan.costs.chunks)
        shapes: list[Shape | None] = [None]
        for larger in (False, True):
            shape = self._plan.chunksize
            for _ in range(CHUNK_SIZE_STEPS):
                resized = self._resized(shape, larger=larger)
                cost = self.cost(Setting(1, 1, chunk=resized))
                if resized == shape or cost is None or cost.chunks < min_chunks:
                    break
                shape = resized
                shapes.insert(len(shapes) if larger else 0, shape)
        return shapes

    def _resized(self, shape: Shape, *, larger: bool) -> Shape:
        plan, lengths = self._plan, []
        for chunk, storage, length in zip(
            shape, plan.storage_chunks, plan.volume.shape, strict=True
        ):
            if larger:
                lengths.append(chunk * 2 if chunk < length else chunk)
            else:
                lengths.append(min(chunk, -(-min(chunk, length) // 2 // storage) * storage))
        return tuple(lengths)

    def _patch_changes(self, patch: Shape) -> Changes:
        """Return the changes for another patch with the same margin and relative overlap."""
        job, plan = self._record.job, self._plan
        model, rank = job.model, plan.rank
        channels = input_channels(model, plan.volume)
        head = model.of_head(plan.heads[0].name)
        lost_axis = channels_first(head, rank, channels).lost_axis(rank)

        def resized(output: Shape) -> Shape:
            axes = enumerate(zip(patch, plan.input_patch, output, strict=True))
            return tuple(q if a == lost_axis else new - (p - q) for a, (new, p, q) in axes)

        outputs = resized(plan.output_patch)
        order = WrittenOrders.of(head, rank, channels).input
        changes: Changes = {
            ("model_config", "model_input_shape"): _with_patch(
                model.model_input_shape, order, patch
            )
        }
        by_head = {}
        for one in plan.heads:
            written = model.of_head(one.name)
            if written.output_shape is not None:
                order = WrittenOrders.of(written, rank, channels).output
                by_head[one.name] = _with_patch(written.output_shape, order, resized(one.patch))
        if isinstance(model.model_output_shape, dict):
            changes["model_config", "model_output_shape"] = by_head
        elif by_head:
            changes["model_config", "model_output_shape"] = by_head[plan.heads[0].name]

        def scaled(lengths: Sequence[int]) -> list[int]:
            sizes = zip(lengths, outputs, plan.output_patch, strict=True)
            return [round(n * new / q) for n, new, q in sizes]

        if job.strides is not None:
            changes["strides",] = [max(1, n) for n in scaled(job.strides)]
        if job.offsets:
            changes["offsets",] = [scaled(offset) for offset in job.offsets]
        return changes

    def _chunk_changes(self, chunk: Shape, other_changes: Changes) -> Changes:
        """Return the changes for another chunk shape.

        They set `storage_chunks` if the default would differ from the job's storage chunks.
        """
        changes: Changes = {("chunksize",): list(chunk)}
        storage = self._plan.storage_chunks
        if self._record.job.storage_chunks is None:
            job = _apply(self._record.job, other_changes | changes)
            default_chunks = JobRecord(job, self._record.images, {}).plan().storage_chunks
            if default_chunks != storage:
                changes["storage_chunks",] = list(storage)
        return changes


def _cost(plan: Plan) -> Cost:
    costs = plan.costs
    return Cost(
        chunks=costs.chunks,
        patches=costs.patches,
        piece_bytes=costs.piece_bytes,
        footprint=footprint(plan),
        chunk_patches=fullest_chunk(plan).patches,
        chunksize=plan.chunksize,
    )


def _apply(job: Job, changes: Changes) -> Job:
    values = deepcopy(job.as_dict())
    for (*sections, key), value in changes.items():
        section = values
        for name in sections:
            section = section[name]
        section[key] = value
    return parse_job(values)


def _with_patch(shape: Shape, order: AxisOrder | None, patch: Shape) -> list[int]:
    """Return a shape of an item with another patch; `order` says where its channels are."""
    return list(join(split(shape, order)[0], patch, order))
