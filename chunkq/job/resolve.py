"""Resolve a job over a volume to its plan, or report every mistake in the job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import lcm, prod
from typing import NamedTuple

from chunkq.errors import JobError
from chunkq.geometry.box import Box
from chunkq.geometry.grid_spec import GridSpec, Shape
from chunkq.job.axis_order import (
    EITHER_ORDER,
    FIRST,
    LAST,
    WrittenOrders,
    channels_first,
    input_channels,
    order_problems,
)
from chunkq.job.fields import MAX_INTEGER, bounds_of
from chunkq.job.grid_problems import chunk_problems, coverage_problems
from chunkq.job.job_file import Job
from chunkq.job.model_config import ModelConfig
from chunkq.job.output_shapes import head_names
from chunkq.job.output_specs import NetworkOutput, ResolvedOutput
from chunkq.job.volume_problems import volume_problems
from chunkq.plan.chunk_choice import choose_chunks, inner_chunk, storage_edge
from chunkq.plan.outputs import HeadName, OutputSpec
from chunkq.plan.plan import Plan
from chunkq.plan.volume import Volume
from chunkq.storage.remedies import JOB_FILE, Remedies


def resolve(
    job: Job,
    volume: Volume,
    paths: Sequence[str] = (),
    *,
    by_channel: bool = False,
    remedies: Remedies = JOB_FILE,
) -> Plan:
    """Return the plan of a job over one of its volumes; pure and deterministic.

    Error lines name the `paths` of the volume's arrays, by default the inputs of the job, and
    `remedies` for axes. If `by_channel`, the volume is one channel of an image, whose output has
    these channels. Raises JobError with one line per mistake.
    """
    paths = paths or job.input_paths
    if problems := volume_problems(job, volume, paths, remedies):
        raise JobError(problems)
    shapes = _Shapes(job, volume, paths, remedies, by_channel=by_channel)
    if problems := shapes.problems():
        raise JobError(shapes.channels_last_problems() or problems)
    plan = shapes.plan(_region(job, volume))
    source = shapes.source
    problems = [
        line
        for output, view in zip(shapes.outputs, plan.views, strict=True)
        for lines in (
            coverage_problems(view.grid, source),
            chunk_problems(view.grid, source, output.prefix),
        )
        for line in lines
    ]
    if problems:
        raise JobError(shapes.channels_last_problems() or [*dict.fromkeys(problems)])
    return plan


def _network_output(model: ModelConfig, head: HeadName, rank: int, channels: int) -> NetworkOutput:
    """Return an array that the network returns; `model` declares the shape of this one."""
    first = channels_first(model, rank, channels)
    shape = first.output_shape or first.model_input_shape
    key = "model_input_shape" if first.output_shape is None else "model_output_shape"
    if head is not None and first.output_shape is not None:
        key = f"{key}.{head}"
    has_channels = len(shape) > rank
    return NetworkOutput(
        head, shape[0] if has_channels else 1, first.output_patch(rank), has_channels, key
    )


def _region(job: Job, volume: Volume) -> Box | None:
    """Return the region of the job, None for the whole volume; it has no problems."""
    if job.roi is None:
        return None
    pairs = [bounds_of(bounds, size) for bounds, size in zip(job.roi, volume.shape, strict=True)]
    return Box(tuple(start for start, _ in pairs), tuple(stop for _, stop in pairs))


def _channels_last(key: str, shape: tuple[int, ...], step: str) -> str:
    expected = [shape[-1], *shape[:-1]]
    return (
        f"model_config.{key}: {list(shape)} looks channels-last; expected channels first, "
        f"{expected}; if the network needs channels last, move the axis in {step}"
    )


class _Shapes:
    """Patch shapes and grids of a job over a volume.

    `volume_problems` of the job must be empty. `patch` is the input patch,
    `output` the output patch, `kept` the output patch without its margin, and `lead` the offset of
    the kept voxels in the input patch; each has one entry per spatial axis. `lost_axis` is the
    spatial axis that the network reduces to one slice, or None. Shapes that a job writes with
    channels last are read with channels first.
    """

    def __init__(
        self,
        job: Job,
        volume: Volume,
        paths: Sequence[str],
        remedies: Remedies,
        *,
        by_channel: bool,
    ) -> None:
        self.job, self.volume, self.paths, self.by_channel = job, volume, paths, by_channel
        self.remedies = remedies
        rank = len(volume.shape)
        channels = input_channels(job.model, volume)
        # Messages about shapes that all heads share are about the first one.
        written = job.model.of_head(head_names(job)[0])
        model = channels_first(written, rank, channels)
        self.orders = WrittenOrders.of(written, rank, channels)
        model_input = model.model_input_shape
        self.input_channels = model_input[0] if len(model_input) > rank else 1
        self.patch = model_input[-rank:]
        self.output = model.output_patch(rank)
        self.lost_axis = model.lost_axis(rank)
        configs = job.output_configs()
        heads = {
            name: _network_output(job.model.of_head(name), name, rank, channels)
            for name in head_names(job)
        }
        self.outputs = [
            ResolvedOutput(job, name, config, heads[config.head], by_channel)
            for name, config in configs.items()
        ]
        self.margin = job.margin or (0,) * rank
        spans = list(zip(*(output.span for output in self.outputs), strict=True))
        # Between patches are the kept voxels of the narrowest output, which must be covered too.
        self.kept = tuple(
            int(min(along)) - 2 * m for along, m in zip(spans, self.margin, strict=True)
        )
        self.lead = tuple(
            (p - int(min(along))) // 2 + m
            for p, along, m in zip(self.patch, spans, self.margin, strict=True)
        )
        self.widest = tuple(int(max(along)) for along in spans)
        self.unit = tuple(
            common_multiple(along)
            for along in zip(*(output.factors for output in self.outputs), strict=True)
        )

    @property
    def output_key(self) -> str:
        """The key that the shape of the output comes from."""
        has_own = self.job.model.model_output_shape is not None
        return "model_output_shape" if has_own else "model_input_shape"

    @property
    def source(self) -> str:
        """Where the output patch comes from, for messages."""
        margin = " without margin" if self.job.margin is not None else ""
        return f"model_config.{self.output_key}{margin}"

    def _output_entry(self, axis: int) -> int:
        """Return the index of a spatial axis in `model_output_shape` as the job has it."""
        return axis + (self.orders.output is FIRST)

    def problems(self) -> list[str]:
        """Return one line per mistake in the patch shapes and the margin."""
        channels = input_channels(self.job.model, self.volume)
        problems = [
            line
            for head in head_names(self.job)
            for line in order_problems(
                self.job.model.of_head(head), len(self.volume.shape), channels
            )
        ]
        problems += [
            *self._lost_axis_problems(),
            *(line for output in self.outputs for line in output.problems()),
        ]
        problems += self._channel_problems(channels)
        for output in self.outputs:
            problems += self._patch_problems(output)
        problems += self._multiple_problems()
        for axis, (m, q, kept) in enumerate(zip(self.margin, self.output, self.kept, strict=True)):
            if kept < 1:
                problems.append(
                    f"margin: {m} along axis {axis} removes the whole output patch ({q} in "
                    f"model_config.{self.output_key}); use at most {(q - 1) // 2}"
                )
        return [*dict.fromkeys(problems)]

    def _patch_problems(self, output: ResolvedOutput) -> list[str]:
        """Return a line for each axis along which an output is not centered in the input patch."""
        problems = []
        for axis, (p, q, span) in enumerate(
            zip(self.patch, output.head.patch, output.span, strict=True)
        ):
            unit = self.unit[axis]
            if axis == self.lost_axis or (span <= p and (p - span) % (2 * unit) == 0):
                continue
            if output.factors[axis] == 1 and (q > p or (p - q) % 2):
                problems.append(
                    f"model_config.{output.head.key}: found {q} along axis {axis} (entry "
                    f"{self._output_entry(axis)}); expected {p} as in model_input_shape, or less "
                    "by an even number, half of it on each side"
                )
            else:
                problems.append(
                    f"{output.prefix}scale: the output patch has {q} voxels along axis {axis}, "
                    f"which are {span} of the input; expected {p} as in model_input_shape, or less "
                    f"by a multiple of {2 * unit}, half of it on each side"
                )
        return problems

    def _multiple_problems(self) -> list[str]:
        """Return a line for each length of the job that is no multiple of all scales."""
        job = self.job
        lists: dict[str, Sequence[int] | None] = {
            "strides": job.strides,
            "pad_width": job.pad_width,
            "margin": job.margin,
            "chunksize": job.chunksize,
        }
        lists |= {f"offsets.{n}": offset for n, offset in enumerate(job.offsets)}
        if (region := _region(job, self.volume)) is not None:
            lists["roi"] = region.start
        return [
            f"{key}{f'.{axis}' if key == 'roi' else ''}: "
            f"{'start ' if key == 'roi' else ''}{length} along axis {axis} is no multiple of "
            f"{unit}, the least common multiple of the scales of the outputs; use "
            f"{length // unit * unit or unit}"
            for key, lengths in lists.items()
            for axis, (length, unit) in enumerate(zip(lengths or (), self.unit, strict=False))
            if length % unit
        ]

    def channels_last_problems(self) -> list[str]:
        """Return a line for each shape of a network that seems to have its channels last.

        Some valid shapes look the same, so this explains other problems and is none by itself.
        """
        rank, model = len(self.volume.shape), self.job.model
        if rank == 1 or model.runtime in EITHER_ORDER:
            return []
        problems, patch = [], self.patch
        shape = model.model_input_shape
        if len(shape) > rank and shape[-1] == 1 < shape[0]:
            problems.append(_channels_last("model_input_shape", shape, "preprocessing_protected"))
            patch = shape[:-1]
        shape = model.of_head(head_names(self.job)[0]).output_shape or ()
        if len(shape) > rank and shape[:-1] == patch != shape[1:]:
            problems.append(_channels_last("model_output_shape", shape, "postprocessing_protected"))
        return problems

    def _channel_problems(self, found: int) -> list[str]:
        """Return a line if the network takes another number of channels than it would get."""
        job = self.job
        shape, path = list(job.model.model_input_shape), self.paths[0]
        is_joined = job.model.join_dim is not None
        if self.input_channels == found:
            valid = (output for output in self.outputs if not list(output.problems()))
            several = (o.channels for o in valid if o.channel_axis and o.channels > 1)
            returned = next(several, None) if self.by_channel else None
            if returned is not None:
                return [
                    f"input: {path} has several channels, and the network takes one and returns "
                    f"{returned} for it; {self.remedies.set_channels()} to select one of them"
                ]
            return []
        count = f" in {len(self.job.input)} inputs" if len(self.job.input) > 1 else ""
        each = "each input has" if is_joined else f"{path} has"
        return [
            f"model_config.model_input_shape: {shape} has {self.input_channels} input channels, "
            f"but {each} {found}{count}; fix the shape, or {self.remedies.set_channels_or_axes()}"
        ]

    def _lost_axis_problems(self) -> list[str]:
        axis, lost = self.lost_axis, self.job.model.lost_dim
        if axis is None:
            return []
        if not 0 <= axis < len(self.patch):
            shape, rank = self.job.model.model_input_shape, len(self.patch)
            first = 0 if self.orders.input is LAST else len(shape) - rank
            return [
                f"model_config.lost_dim: {lost} is not a spatial axis of model_input_shape "
                f"{list(shape)}; use {first} to {first + rank - 1}"
            ]
        problems = []
        if self.patch[axis] % 2 == 0:
            problems.append(
                f"model_config.lost_dim: model_input_shape has {self.patch[axis]} slices along "
                f"entry {lost}; use an odd number, one slice and its neighbors on both sides"
            )
        if self.output[axis] != 1:
            problems.append(
                f"model_config.lost_dim: model_output_shape has {self.output[axis]} slices in "
                f"entry {self._output_entry(axis)}, which is this axis; use 1"
            )
        return problems

    def plan(self, region: Box | None) -> Plan:
        """Return the plan of the region, with one grid per offset."""
        job, rank = self.job, len(self.volume.shape)
        pads = job.pad_width
        if pads is None:
            pads = self.lead if job.inference_type == "crop_margin" else (0,) * rank
            if self.lost_axis is not None:
                pads = tuple(
                    self.lead[a] if a == self.lost_axis else pad for a, pad in enumerate(pads)
                )
        spec = GridSpec(
            shape=self.volume.shape,
            patch=self.patch,
            output_patch=self.widest,
            margin=self.margin,
            strides=job.strides or self.kept,
            pads=pads,
            offsets=((0,) * rank, *job.offsets),
            edge=job.step_edge,
            pad_mode=job.pad_mode,
            chunk=self.volume.shape,
            storage=self.volume.shape,
            unit=None if set(self.unit) == {1} else self.unit,
        )
        # The chunks of a region are those of the whole volume. Batches are made of the patches that
        # are not skipped, so with such patches a chunk computes all of its batches.
        skips = job.mask is not None or job.skip_empty is not None
        batch = MAX_INTEGER if skips else job.model.max_batch_size
        grid, stored = self._with_chunks(spec)
        grid = replace(grid, region=region, batch=batch)
        specs = [
            self._own_grid(output, grid, one)
            for output, one in zip(self.outputs, stored, strict=True)
        ]
        return Plan(self.volume, grid, tuple(specs))

    def _own_grid(self, output: ResolvedOutput, grid: GridSpec, stored: _Stored) -> OutputSpec:
        """Return an output with what differs from the grid of the plan."""
        spec, patch = output.spec(), output.head.patch
        if not output.is_scaled:
            spec = replace(spec, patch=() if patch == grid.output_patch else patch)
            if stored == _Stored(grid.storage, grid.shard):
                return spec
            return replace(spec, storage=stored.chunk, shard=stored.shard or ())
        return replace(
            spec,
            patch=patch,
            storage=stored.chunk,
            shard=stored.shard or (),
            scale=output.factors,
        )

    def _with_chunks(self, spec: GridSpec) -> tuple[GridSpec, list[_Stored]]:
        """Return the geometry with the shapes of chunks, and what each output stores.

        Shapes are chosen where they are not set. Those of the geometry are the smallest that all
        those of the outputs divide, in voxels of the input.
        """
        chunks, outputs = self.job.chunksize, self.outputs
        written_shapes = [
            one.in_input(written)
            for one in outputs
            if (written := one.config.storage_shards or one.config.storage_chunks)
        ]
        common = self._common_multiple(written_shapes) if written_shapes else None
        chosen = common
        if chunks is None:
            # Not the input's dtype: the same voxels in another format have the same chunks.
            output_bytes = sum(
                (2 * one.spec().sums_bytes + 8) / prod(one.factors) for one in outputs
            )
            voxel_bytes = 4 * self.volume.channels * self.volume.inputs + float(output_bytes)
            chunks, chosen = choose_chunks(spec, common, voxel_bytes)
        is_chosen = chosen is not None and chosen != common
        stored = []
        for one in outputs:
            shard, chunk = one.config.storage_shards, one.config.storage_chunks
            own = tuple(int(n / f) for n, f in zip(chunks, one.factors, strict=True))
            if chunk is None and shard is not None:
                chunk = inner_chunk(shard)
            elif chunk is None and is_chosen:
                chunk = inner_chunk(own) if one.is_scaled else chosen
            stored.append(_Stored(chunk or tuple(storage_edge(n, spec.rank) for n in own), shard))
        pairs = list(zip(outputs, stored, strict=True))
        storage = self._common_multiple([one.in_input(n.chunk) for one, n in pairs])
        shard = None
        if any(one.shard for one in stored):
            shard = self._common_multiple([one.in_input(n.shard or n.chunk) for one, n in pairs])
        return replace(spec, chunk=chunks, storage=storage, shard=shard), stored

    def _common_multiple(self, shapes: Sequence[Sequence[Fraction]]) -> Shape:
        """Return the smallest shape of whole voxels that is a multiple of shapes and scales."""
        return tuple(map(common_multiple, zip(*shapes, self.unit, strict=True)))


class _Stored(NamedTuple):
    """Shapes of a storage chunk and of a shard of an output, None without shards."""

    chunk: Shape
    shard: Shape | None


def common_multiple(lengths: Sequence[Fraction | int]) -> int:
    """Return the smallest whole number that is a multiple of all lengths."""
    return lcm(*(Fraction(length).numerator for length in lengths))
