"""Job + volume -> Plan, or every reason why not."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, prod
from typing import Any

import numpy as np

from chunkq.box import Box
from chunkq.errors import JobError
from chunkq.grids import Axis, AxisGrid
from chunkq.job import Job
from chunkq.plan import Plan, Volume

STORAGE_EDGE = {1: 1 << 18, 2: 512, 3: 64, 4: 32}
"""Edge of an output storage chunk by rank where the job file names none, in voxels."""
LEAST_STORAGE_EDGE = 16
CHUNK_BYTES = 512 << 20
"""Memory of one chunk in flight that a chunk size chosen here stays below."""
PATCH_VOXELS = 1 << 31
"""Voxels of a patch, channels included, that no network takes or returns at once."""
CHUNKS_WANTED = 32
"""A chunk size chosen here leaves at least this many chunks, so that workers share the job."""


def resolve(job: Job, volume: Volume) -> Plan:
    """Return the plan of a job over a volume; pure and deterministic.

    Raises JobError with one line for each thing that does not fit.
    """
    problems = _volume_problems(job, volume) or _length_problems(job, volume)
    if problems:
        raise JobError(problems)
    shapes = _Shapes(job, volume)
    problems = shapes.problems()
    if problems:
        raise JobError(problems)
    axes = shapes.lay()
    problems = [*_uncovered(axes, shapes.lead), *_chunk_problems(job, axes)]
    if problems:
        raise JobError(problems)
    return shapes.plan(axes)


def _volume_problems(job: Job, volume: Volume) -> list[str]:
    rank = len(volume.shape)
    if not 1 <= rank <= 4:
        return [f"input: {job.input[0]} has {rank} axes; 1 to 4 spatial axes can be processed"]
    if min(volume.shape) == 0:
        return [f"input: {job.input[0]} has shape {list(volume.shape)}, so no voxel"]
    for path, name in zip(job.input, volume.dtypes or (volume.dtype,), strict=True):
        try:
            dtype = np.dtype(name)
        except TypeError:  # the name of a structured or string dtype
            dtype = np.dtype(object)
        if dtype == np.uint64:
            return [f"input: {path} holds uint64, which networks cannot take; convert it"]
        if dtype.kind not in "biuf":
            return [f"input: {path} holds {name}; real numbers are needed"]
        if problems := _pad_value_problems(job, dtype):
            return problems
    return []


def _pad_value_problems(job: Job, dtype: np.dtype[Any]) -> list[str]:
    value = float(job.pad_value)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        fits = limits.min <= value <= limits.max and value == int(value)
    else:
        fits = dtype.kind == "f" and (
            not np.isfinite(value) or abs(value) <= float(np.finfo(dtype).max)
        )
        fits = fits or (dtype.kind == "b" and value in (0, 1))
    shown = int(value) if value.is_integer() else value
    return [] if fits else [f"pad_value: {shown} cannot be held by the input's dtype {dtype}"]


def _length_problems(job: Job, volume: Volume) -> list[str]:
    rank = len(volume.shape)
    lists: dict[str, Sequence[int] | None] = {
        "chunksize": job.chunksize,
        "pad_width": job.pad_width,
        "strides": job.strides,
        "margin": job.margin,
        "storage_chunks": job.storage_chunks,
    }
    lists |= {f"offsets.{i}": offset for i, offset in enumerate(job.offsets)}
    problems = [
        f"{key}: has {len(value)} entries, the input has {rank} axes"
        for key, value in lists.items()
        if value is not None and len(value) != rank
    ]
    for key in ("model_input_shape", "model_output_shape"):
        shape = getattr(job.model, key)
        if shape is not None and len(shape) not in (rank, rank + 1):
            problems.append(
                f"model_config.{key}: has {len(shape)} entries, the input has {rank} axes; give "
                f"{rank}, or {rank + 1} with the channels first"
            )
        elif shape is not None and prod(shape) > PATCH_VOXELS:
            problems.append(
                f"model_config.{key}: {prod(shape)} values are too many for one patch; use at most "
                f"{PATCH_VOXELS}"
            )
    return problems


class _Shapes:
    """The patch shapes and steps a job means for a volume whose rank fits."""

    def __init__(self, job: Job, volume: Volume) -> None:
        self.job, self.volume = job, volume
        rank = len(volume.shape)
        model_input = job.model.model_input_shape
        model_output = job.model.model_output_shape or model_input
        self.input_channels = model_input[0] if len(model_input) > rank else 1
        self.patch = model_input[-rank:]
        self.output = model_output[-rank:]
        lost = job.model.lost_dim
        self.lost_axis = None if lost is None else lost - (len(model_input) - rank)
        if self.lost_axis is not None and job.model.model_output_shape is None:
            self.output = tuple(1 if a == self.lost_axis else q for a, q in enumerate(self.output))
        self.channels = model_output[0] if len(model_output) > rank else 1
        self.channel_axis = len(model_output) > rank and job.combine == "weighted_avg"
        self.margin = job.margin or (0,) * rank
        self.kept = tuple(q - 2 * m for q, m in zip(self.output, self.margin, strict=True))
        self.lead = tuple(
            (p - q) // 2 + m for p, q, m in zip(self.patch, self.output, self.margin, strict=True)
        )

    def problems(self) -> list[str]:
        found = self._lost_problems()
        if self.input_channels != 1:
            found.append(
                f"model_config.model_input_shape: {self.input_channels} input channels are not in "
                "this version; the first of the extra entries must be 1"
            )
        for axis, (p, q) in enumerate(zip(self.patch, self.output, strict=True)):
            if axis == self.lost_axis:
                continue
            if q > p or (p - q) % 2:
                found.append(
                    f"model_config.model_output_shape: {q} along axis {axis} cannot be centred in "
                    f"the input's {p}; the difference must be even and not negative"
                )
        for axis, (m, kept) in enumerate(zip(self.margin, self.kept, strict=True)):
            if kept < 1:
                found.append(
                    f"margin: {m} on both sides leaves nothing of the output patch's "
                    f"{self.output[axis]} voxels along axis {axis}"
                )
        return found

    def _lost_problems(self) -> list[str]:
        axis, lost = self.lost_axis, self.job.model.lost_dim
        if axis is None:
            return []
        if not 0 <= axis < len(self.patch):
            return [f"model_config.lost_dim: {lost} names no spatial axis of model_input_shape"]
        found = []
        if self.patch[axis] % 2 == 0:
            found.append(
                f"model_config.lost_dim: model_input_shape has {self.patch[axis]} there; a slice "
                "with its neighbours on both sides is an odd number"
            )
        if self.output[axis] != 1:
            found.append(
                f"model_config.lost_dim: model_output_shape has {self.output[axis]} there, not 1"
            )
        return found

    def lay(self) -> tuple[Axis, ...]:
        job, rank = self.job, len(self.volume.shape)
        strides = job.strides or self.kept
        pads = job.pad_width
        if pads is None:
            pads = self.lead if job.inference_type == "crop_margin" else (0,) * rank
            if self.lost_axis is not None:
                pads = tuple(
                    self.lead[a] if a == self.lost_axis else pad for a, pad in enumerate(pads)
                )
        offsets = ((0,) * rank, *job.offsets)
        grids = [
            tuple(
                AxisGrid.create(
                    volume=self.volume.shape[a],
                    patch=self.patch[a],
                    kept=self.kept[a],
                    lead=self.lead[a],
                    stride=strides[a],
                    pad=pads[a],
                    offset=offset[a],
                    edge=job.step_edge,
                )
                for offset in offsets
            )
            for a in range(rank)
        ]
        chunks, storage = self._chunks_and_storage()
        return tuple(
            Axis(self.volume.shape[a], chunks[a], storage[a], grids[a], job.pad_mode)
            for a in range(rank)
        )

    def plan(self, axes: tuple[Axis, ...]) -> Plan:
        return Plan(
            job=self.job,
            volume=self.volume,
            axes=axes,
            input_patch=self.patch,
            output_patch=self.output,
            margin=self.margin,
            channels=self.channels,
            channel_axis=self.channel_axis,
        )

    def _chunks_and_storage(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        edge = STORAGE_EDGE[len(self.volume.shape)]
        storage = self.job.storage_chunks
        if self.job.chunksize is not None:
            chunks = self.job.chunksize
            return chunks, storage or tuple(_storage_edge(c, edge) for c in chunks)
        storage = storage or tuple(min(edge, v) for v in self.volume.shape)
        return self._chosen_chunks(storage), storage

    def _chosen_chunks(self, storage: tuple[int, ...]) -> tuple[int, ...]:
        """Double axes, the one with the fewest patches first, while memory and sharing allow."""
        volume = self.volume.shape
        voxel = 4 * self.channels + 8 + self.volume.voxel_bytes
        chunks = [-(-k // s) * s for k, s in zip(self.kept, storage, strict=True)]
        while True:
            growing = [a for a, v in enumerate(volume) if chunks[a] < v]
            if not growing:
                return tuple(chunks)
            smallest = min(growing, key=lambda a: chunks[a] / self.kept[a])
            larger = [c * 2 if a == smallest else c for a, c in enumerate(chunks)]
            bytes_needed = prod(c + p for c, p in zip(larger, self.patch, strict=True)) * voxel
            count = prod(-(-v // c) for v, c in zip(volume, larger, strict=True))
            if bytes_needed > CHUNK_BYTES or count < CHUNKS_WANTED:
                return tuple(chunks)
            chunks = larger


def _storage_edge(chunk: int, most: int) -> int:
    """Return an edge that divides the chunk and is small beside it, or bands would touch all."""
    return _divisor_near(chunk, min(most, max(LEAST_STORAGE_EDGE, chunk // 4)))


def _divisor_near(number: int, target: int) -> int:
    """Return the divisor of `number` whose ratio to `target` is nearest to 1."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return min({*small, *(number // d for d in small)}, key=lambda d: (abs(log(d / target)), -d))


def _chunk_problems(job: Job, axes: tuple[Axis, ...]) -> list[str]:
    found = []
    for number, axis in enumerate(axes):
        kept = axis.grids[0].kept
        if axis.chunk < min(kept, axis.volume):
            found.append(
                f"chunksize: {axis.chunk} along axis {number} is smaller than the output patch's "
                f"{kept} voxels; make it at least {min(kept, axis.volume)}"
            )
        if axis.chunk < axis.volume and axis.chunk % axis.storage:
            found.append(
                f"storage_chunks: {axis.storage} along axis {number} does not divide the chunk's "
                f"{axis.chunk}; a chunk must be a whole number of storage chunks"
            )
    return found


def _uncovered(axes: tuple[Axis, ...], lead: tuple[int, ...]) -> list[str]:
    """Name each axis along which some voxel lies in no patch."""
    found = []
    for number, axis in enumerate(axes):
        grid = axis.grids[0]
        gap = grid.gap()
        if gap is None and grid.stride > grid.kept and grid.span()[1] < axis.volume:
            gap = grid.span()[1]  # the next patch would have been beyond the volume
        if gap is not None and len(axis.grids) == 1:
            found.append(
                f"strides: {grid.stride} along axis {number} is wider than the {grid.kept} voxels "
                f"an output patch speaks for, so voxel {gap} is never predicted; "
                f"make it at most {grid.kept}"
            )
    if found:
        return found
    volume = Box.of_shape([axis.volume for axis in axes])
    left = [volume]
    for g in range(len(axes[0].grids)):
        spans = [axis.grids[g].span() for axis in axes]
        covered = Box(tuple(s[0] for s in spans), tuple(s[1] for s in spans))
        left = [rest for box in left for rest in box.minus(covered)]
    if not left:
        return []
    for number, axis in enumerate(axes):
        low, high = axis.grids[0].span()
        if (low, high) != (0, axis.volume):
            voxel = left[0].start[number]
            found.append(
                f"pad_width: along axis {number} voxel {voxel} lies in no output patch; "
                f"{lead[number]} there would cover it"
            )
    return found
