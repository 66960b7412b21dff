"""Rules for a job over one of its volumes: dtype, number of axes, region."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from chunkq.casts import REAL, misfit
from chunkq.geometry.axes import color_letters, starts_like_color
from chunkq.job.axis_order import EITHER_ORDER
from chunkq.job.fields import bounds_of, printed_bounds
from chunkq.job.job_file import Job
from chunkq.job.output_shapes import declared_shapes, unknown_heads
from chunkq.job.output_specs import MAX_PATCH_VALUES
from chunkq.plan.volume import Volume
from chunkq.storage.remedies import Remedies


def volume_problems(
    job: Job, volume: Volume, paths: Sequence[str], remedies: Remedies
) -> list[str]:
    """Return one line per mistake, about the volume's array first, the region of the job last.

    Lines name the `paths` of the volume's arrays, and `remedies` for axes.
    """
    return (
        _array_problems(job, volume, paths, remedies)
        or _shape_problems(job)
        or _length_problems(job, volume, paths[0], remedies)
        or _region_problems(job, volume, paths[0])
    )


def _array_problems(
    job: Job, volume: Volume, paths: Sequence[str], remedies: Remedies
) -> list[str]:
    rank = len(volume.shape)
    if not 1 <= rank <= 4:
        return [
            f"input: {paths[0]} has {rank} spatial axes; expected 1 to 4; use an array with fewer, "
            f"or {remedies.set_axes()} if some are channels or time"
        ]
    if min(volume.shape) == 0:
        return [
            f"input: {paths[0]} has shape {list(volume.shape)} and no voxels; "
            "use a volume with at least one voxel"
        ]
    for path, name in zip(paths, volume.dtypes or (volume.dtype,), strict=True):
        try:
            dtype = np.dtype(name)
        except TypeError:  # the name of a structured or string dtype
            dtype = np.dtype(object)
        if advice := _dtype_advice(dtype):
            return [f"input: {path} has unsupported dtype {name}; convert it to {advice}"]
        if problems := [*_pad_value_problems(job, dtype), *_skip_empty_problems(job, dtype)]:
            return problems
    return []


def _dtype_advice(dtype: np.dtype[Any]) -> str | None:
    """Return to what to convert an input of an unsupported dtype, None for a supported one."""
    if dtype == np.uint64:
        return "uint32 or float32"
    if dtype.kind not in REAL:
        return "real numbers"
    return "float64" if dtype.itemsize > 8 else None


def _pad_value_problems(job: Job, dtype: np.dtype[Any]) -> list[str]:
    """Return a problem if the dtype, of kind b, i, u or f, cannot hold the job's pad value."""
    value = float(job.pad_value)
    if dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        fits = low <= value <= high and value == int(value)
        legal = f"an integer from {low} to {high}"
    elif dtype.kind == "b":
        fits, legal = value in (0, 1), "0 or 1"
    else:
        largest = float(np.finfo(dtype).max)
        fits = not np.isfinite(value) or abs(value) <= largest
        legal = f"a value from {-largest:g} to {largest:g}"
    printed = int(value) if value.is_integer() else value
    if not fits:
        return [f"pad_value: {printed} does not fit the input's dtype {dtype}; use {legal}"]
    # A step can convert the values before they are cast.
    if job.model.processing_steps is None and misfit(np.array([value], dtype), job.model.dtype):
        return [
            f"pad_value: {printed} does not fit model_config.dtype {job.model.dtype}; use another "
            "value or dtype"
        ]
    return []


def _skip_empty_problems(job: Job, dtype: np.dtype[Any]) -> list[str]:
    """Return a problem if no voxel of the dtype can be empty as the job says."""
    rule = job.empty_rule
    if rule is None or rule.fits(dtype):
        return []
    if rule.is_limit:
        return ["skip_empty.below: expected a number, found nan"]
    return [
        f"skip_empty: {rule.value:g} does not fit the input's dtype {dtype}; use a value of the "
        "input, or {below: NUMBER}"
    ]


def _shape_problems(job: Job) -> list[str]:
    """Return a line for each head whose shape is not known."""
    return [
        f"model_config.model_output_shape{'' if head is None else f'.{head}'}: missing; set the "
        "shape that the network returns"
        for head in unknown_heads(job)
    ]


def _length_problems(job: Job, volume: Volume, path: str, remedies: Remedies) -> list[str]:
    rank, hint = len(volume.shape), _axes_hint(volume.shape, remedies)
    lists: dict[str, Sequence[object] | None] = {
        "chunksize": job.chunksize,
        "pad_width": job.pad_width,
        "strides": job.strides,
        "margin": job.margin,
        "storage_chunks": job.storage_chunks,
        "storage_shards": job.storage_shards,
        "roi": job.roi,
    }
    lists |= {f"offsets.{i}": offset for i, offset in enumerate(job.offsets)}
    for name, output in (job.outputs or {}).items():
        for key in ("storage_chunks", "storage_shards", "scale"):
            lists[f"outputs.{name}.{key}"] = getattr(output, key)
    problems = [
        f"{key}: found {len(value)} entries; expected {rank}; set one per spatial axis of "
        f"{path}, whose lengths are {list(volume.shape)}{hint if len(value) < rank else ''}"
        for key, value in lists.items()
        if value is not None and len(value) != rank
    ]
    shapes = {"model_input_shape": job.model.model_input_shape} | declared_shapes(job.model)
    for key, shape in shapes.items():
        if shape is not None and len(shape) not in (rank, rank + 1):
            problems.append(
                f"model_config.{key}: found {len(shape)} entries; expected {rank} or {rank + 1}; "
                f"set one per spatial axis of {path}, whose lengths are {list(volume.shape)}, "
                f"and {_channel_place(job.model.runtime)}{hint if len(shape) < rank else ''}"
            )
        elif shape is not None and prod(shape) > MAX_PATCH_VALUES:
            problems.append(
                f"model_config.{key}: {prod(shape)} values per patch are unsupported; use at most "
                f"{MAX_PATCH_VALUES}"
            )
    return problems


def _axes_hint(shape: Sequence[int], remedies: Remedies) -> str:
    """Return what to do if an axis that a job counts as spatial is another one."""
    if starts_like_color(shape):
        letters = color_letters(len(shape), first=True)
        return f"; if its first axis is channels, {remedies.set_axes(letters)}"
    return f"; if an axis is channels or time, {remedies.set_axes()}"


def _channel_place(runtime: str) -> str:
    if runtime in EITHER_ORDER:
        return "the number of channels first or last if there is one"
    return "the number of channels first if there is one"


def _region_problems(job: Job, volume: Volume, path: str) -> list[str]:
    """Return one line for each axis along which the region does not lie in the volume."""
    problems = []
    for axis, (bounds, size) in enumerate(zip(job.roi or (), volume.shape, strict=False)):
        if bounds is None:
            continue
        start, stop = bounds_of(bounds, size)
        written = f"roi.{axis}: {printed_bounds(bounds)}"
        if not (0 <= start <= size and 0 <= stop <= size):
            problems.append(
                f"{written} lies outside of axis {axis} of {path}, which has {size} voxels; "
                f"use a start and a stop from {-size} to {size}"
            )
        elif start >= stop:
            reason = "is empty" if start == stop else "stops before it starts"
            problems.append(
                f"{written} {reason} (voxels {start} to {stop} of {size}); use a stop after the "
                "start"
            )
    return problems
