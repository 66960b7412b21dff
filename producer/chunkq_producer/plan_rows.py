"""Plan of a job over volumes as text and as JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from chunkq import json_values
from chunkq.create import CheckedJob
from chunkq.geometry.axes import Axis
from chunkq.job.known_empty import MISSING
from chunkq.job.model_config import STOCHASTIC
from chunkq.job.stored_images import output_axes
from chunkq.job.tasks import chunk_count
from chunkq.paths import without_secret
from chunkq.plan.costs import Costs, total_costs
from chunkq.plan.fetches import Fetches
from chunkq.plan.footprint import largest_footprint
from chunkq.plan.object_sizes import StoredSize
from chunkq.plan.output_text import names_text, output_values, range_text
from chunkq.plan.plan import Plan
from chunkq.storage import chunk_cache
from chunkq.storage.images import ImageSource
from chunkq.units import device_cost, duration, money, si
from chunkq_producer.stored_sizes import file_rows, file_sizes, level_sizes, size_text

if TYPE_CHECKING:
    from chunkq.model_check import MemoryCheck, ModelCheck, PatchCheck

SERIES = {"time": "time points", "channel": "channels"}
MAX_SHARE_TO_FINALIZE = 0.9
"""Share of the voxels to merge above which the plan recommends larger chunks."""


@dataclass(frozen=True)
class Trial:
    """A check of the network with patches and chunks, and the peak memory of the finalizer.

    `finalizer_bytes` is None if no block is finalized, or if it could not be measured.
    """

    check: ModelCheck
    patches: PatchCheck
    memory: MemoryCheck
    finalizer_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values without nesting."""
        values = json_values.to_values(self.check)
        values |= values.pop("patches") | values.pop("values")
        memory = values.pop("memory")
        memory_error = memory.pop("error")
        return {
            "error": None,
            **values,
            **memory,
            "memory_error": memory_error,
            "finalizer_bytes": self.finalizer_bytes,
            "warnings": self.check.warnings(),
        }


def volume_plan_values(job: CheckedJob, depth: int, trial: Trial | None) -> dict[str, Any]:
    """Return the plan as JSON values; the shapes are those of the largest item."""
    plan, costs = job.largest, job.costs
    values: dict[str, Any] = {
        "volume": list(plan.volume.shape),
        "dtype": plan.volume.dtype,
        "axes": [_axes_values(source) for source in job.record.sources],
        "region": _region_values(job),
        "output_shape": list(_output_shape(job, plan.of_output(0))),
        "output_dtype": str(plan.outputs[0].dtype),
        "chunksize": list(plan.chunksize),
        "storage_chunks": list(plan.storage_chunks),
        "storage_shards": plan.storage_shards and list(plan.storage_shards),
        "pyramid": _pyramid_values(job),
        "blocks": list(plan.blocks),
        "chunks": costs.chunks,
        "blocks_to_finalize": costs.finalized_blocks,
        "patches": costs.patches,
        "recompute_factor": 1.0,
        "input_bytes": costs.input_bytes,
        "output_bytes": costs.output_bytes,
        "piece_bytes": costs.piece_bytes,
        "store_bytes": costs.store_bytes,
        "precision": job.record.job.model.effective_precision,
        "stochastic": job.record.job.model.stochastic,
        "warnings": list(job.all_warnings),
        "depth": depth,
        "staged": [
            {"path": without_secret(s.path), "reason": s.staged, "bytes": s.staged_bytes}
            for s in job.record.sources
            if s.staged
        ],
        "staged_bytes": sum(source.staged_bytes for source in job.record.sources),
        "storage_chunks_read": sum(f.storage_chunks for f in _fetches(job)) or None,
        "fetches_per_storage_chunk": _average_fetches(job),
        "cache_bytes": cache_bytes(job),
        "array_bytes": largest_footprint(job.plans).peak_bytes(depth),
        "outputs": [
            {
                **output_values(view.output),
                "shape": list(_output_shape(job, view)),
                "storage_chunks": list(view.storage_chunks),
                "bytes": sum(_output_bytes(job, number)),
                "stored": json_values.to_values(level_sizes(job, number)[0]),
                "scale": None if view.grid.scale is None else list(map(str, view.grid.scale)),
            }
            for number, view in enumerate(plan.views)
        ],
        "items": [
            {
                "name": item.name,
                "position": item.position,
                "volume": list(plan.volume.shape),
                "chunks": tasks.costs.chunks,
            }
            for item, plan, tasks in zip(job.record.items, job.plans, job.tasks, strict=True)
        ],
        "files": [
            {"path": without_secret(file.path), "stored": json_values.to_values(size)}
            for file, size in file_sizes(job)
        ],
        "skipped": _skipped_values(job),
    }
    if trial is not None:
        values["model_check"] = trial.as_dict()
        values["price"] = device_cost(_network_seconds(costs, trial), job.record.job.price)
    return values


def volume_plan_rows(job: CheckedJob, depth: int, trial: Trial | None) -> list[tuple[str, str]]:
    """Return the plan as rows of a label and a text. `trial` is that of the network, if it ran."""
    plan, costs, count = job.largest, job.costs, len(job.plans)
    voxels = sum(plan.region.size for plan in job.plans)
    total = total_costs(job.plans)
    per_voxel = sum(map(_predictions, job.plans)) / voxels
    share = costs.finalized_voxels / sum(plan.stored_voxels for plan in job.plans)
    several = _items(job) if count > 1 else ""
    model = job.record.job.model
    rows = [
        ("input", f"{several}{_shape(plan.volume.shape)} {plan.volume.dtype}"),
        ("axes", _axes_text(job.record.sources)),
        *([("region", _region_text(job))] if plan.grid.region else []),
        *_output_rows(job),
        *_pyramid_rows(job),
        *file_rows(job),
        ("chunks", _chunks(plan, total, is_alone=count == 1)),
        ("precision", f"{model.effective_precision}, on {model.device}"),
        ("patches", f"{total.patches}, each computed once; {per_voxel:.1f} per voxel on average"),
        *_skipped_rows(job, trial),
        (
            "to merge",
            f"overlaps of {costs.finalized_blocks} of {costs.blocks} blocks, {share:.0%} of the "
            "voxels",
        ),
        *_staged_rows(job.record.sources),
        ("read", f"{si(costs.input_bytes, 'B')} of input{_fetches_text(job)}"),
        ("write", f"{si(costs.output_bytes, 'B')} of output"),
        ("pieces", f"{si(costs.piece_bytes, 'B')} of temporary files"),
        (
            "memory",
            f"at most {si(largest_footprint(job.plans).peak_bytes(depth), 'B')} of arrays per "
            f"worker process with {depth} chunks in flight{_cache_text(job)}, plus libraries and "
            "network" + ("" if trial else " (--check-model measures the total)"),
        ),
    ]
    if padding := _padding_text(job):
        rows.append(("note", padding))
    if model.stochastic:
        rows.append(("note", STOCHASTIC))
    rows += [("warning", line) for line in job.all_warnings]
    if trial is not None:
        rows += _trial_rows(costs, trial, job.record.job.price)
    elif job.record.job.price is not None:
        rows.append(("price", "unknown until --check-model has timed the network"))
    if share > MAX_SHARE_TO_FINALIZE:
        rows.append(
            (
                "note",
                f"{share:.0%} of the voxels need merging ({si(costs.piece_bytes, 'B')} of "
                f"temporary files); set a larger chunksize or smaller {_stored_key(job)}",
            )
        )
    return rows


def _predictions(plan: Plan) -> int:
    """Return the number of predicted voxels; of a patch larger than the volume those inside."""
    shape = plan.volume.shape
    inside = prod(min(lengths) for lengths in zip(plan.output_patch, shape, strict=True))
    return plan.costs.patches * inside


def _padding_text(job: CheckedJob) -> str:
    """Return which axes are shorter than the patch, and what the rest of it is filled with."""
    keys, names = job.record.job, [axis.name for axis in job.record.images[0].spatial_axes]
    shorter = [
        {
            n: (p, s)
            for n, p, s in zip(names, plan.input_patch, plan.volume.shape, strict=True)
            if p > s
        }
        for plan in job.plans
    ]
    if not any(shorter):
        return ""
    axes = next(filter(None, shorter))
    texts = [f"{name} ({patch} of {size} voxels)" for name, (patch, size) in axes.items()]
    count = sum(map(bool, shorter))
    several = f" for {count} of {len(shorter)} volumes" if len(shorter) > 1 else ""
    filled = (
        f"{keys.pad_value:g} (pad_value)"
        if keys.pad_mode == "constant"
        else f"voxels of the volume (pad_mode {keys.pad_mode})"
    )
    return (
        f"the patch is larger than the volume along {', '.join(texts)}{several}; the rest of it is "
        f"filled with {filled}"
    )


def _stored_key(job: CheckedJob) -> str:
    """Return the key with the shape of what is written at once."""
    return "storage_chunks" if job.largest.storage_shards is None else "storage_shards"


def _shards_text(plan: Plan) -> str:
    return f" in shards {_shape(plan.storage_shards)}" if plan.storage_shards else ""


def _pyramid_values(job: CheckedJob) -> list[dict[str, Any]]:
    """Return the levels of each output, with shapes of the largest item and costs of all items."""
    largest = job.pyramids[job.record.largest_item.number]
    values = []
    for output, pyramid in enumerate(largest):
        sizes = level_sizes(job, output)
        for number, level in enumerate(pyramid.levels):
            costs = [p[output].costs[number] for p in job.pyramids if number < len(p[output].costs)]
            values.append(
                {
                    "output": pyramid.plan.output.name,
                    "level": number + 1,
                    "shape": list(level.shape),
                    "method": pyramid.method,
                    "tasks": sum(c.tasks for c in costs),
                    "bytes_read": sum(c.bytes_read for c in costs),
                    "bytes": sum(c.bytes_written for c in costs),
                    "stored": json_values.to_values(sizes[number + 1]),
                }
            )
    return values


def _pyramid_rows(job: CheckedJob) -> list[tuple[str, str]]:
    """Return a row with the levels of each output."""
    rows, values = [], _pyramid_values(job)
    for name in dict.fromkeys(level["output"] for level in values):
        levels = [level for level in values if level["output"] == name]
        shapes = ", ".join(_shape(tuple(level["shape"])) for level in levels)
        size = StoredSize.total(StoredSize(**level["stored"]) for level in levels)
        text = f"{len(levels) + 1} levels by {levels[0]['method']}, above the output {shapes}: "
        text += size_text(size)
        rows.append((f"pyramid {name}".rstrip(), text))
    return rows


def _staged_rows(sources: Sequence[ImageSource]) -> list[tuple[str, str]]:
    """Return which inputs are copied to Zarr first, and the disk space for them."""
    staged = [source for source in sources if source.staged]
    if not staged:
        return []
    which = "the input" if len(sources) == 1 else f"{len(staged)} of {len(sources)} inputs"
    reasons = ", ".join(dict.fromkeys(source.staged for source in staged))
    size = si(sum(source.staged_bytes for source in staged), "B")
    text = (
        f"{which} cannot be read by region: {reasons}; copied to Zarr first, which takes at most "
        f"{size} in the job folder until the output is complete"
    )
    return [("staging", text)]


def _skipped_values(job: CheckedJob) -> dict[str, Any] | None:
    """Return what is not computed because it is known to be empty; None if no key skips patches.

    `is_exact` says that no further patch can turn out to be empty.
    """
    keys, total = job.record.job, total_costs(job.plans)
    if keys.mask is None and keys.skip_empty is None:
        return None
    return {
        "chunks": total.chunks - job.costs.chunks,
        "patches": total.patches - job.costs.patches,
        "store_bytes": total.store_bytes - job.costs.store_bytes,
        "is_exact": keys.skip_empty is None or keys.skip_empty == MISSING,
    }


def _skipped_rows(job: CheckedJob, trial: Trial | None) -> list[tuple[str, str]]:
    """Return a row with what the keys for empty space save, if there is one."""
    values = _skipped_values(job)
    if values is None:
        return []
    total = total_costs(job.plans)
    parts = []
    if job.record.job.has_known_empty:
        text = (
            f"{values['patches']} of {total.patches} patches and {values['chunks']} of "
            f"{total.chunks} chunks are skipped, which saves "
            f"{si(values['store_bytes'], 'B')} to read and write"
        )
        if trial is not None and values["patches"]:
            seconds = trial.patches.batch_seconds / trial.check.batch * values["patches"]
            text += f" and {duration(max(1, seconds))} on one device"
        parts.append(text)
    if not values["is_exact"]:
        parts.append("how many patches skip_empty skips is unknown until their voxels are read")
    return [("empty space", "; ".join(parts))]


def _fetches(job: CheckedJob) -> list[Fetches]:
    return [fetches for image in job.record.images for fetches in job.record.fetches(image)]


def _average_fetches(job: CheckedJob) -> float | None:
    """Return how often one worker fetches a storage chunk, on average; None if that is unknown."""
    fetches, sources = _fetches(job), job.record.sources
    if not fetches or len(fetches) < len(sources):
        return None
    share = chunk_cache.size() // max(len(image.sources) for image in job.record.images)
    total = sum(f.average(share) * f.storage_chunks for f in fetches)
    return total / sum(f.storage_chunks for f in fetches)


def _fetches_text(job: CheckedJob) -> str:
    average = _average_fetches(job)
    if average is None:
        return ""
    times = "once" if average == 1 else f"{average:.2f} times on average"
    return f"; one worker fetches each storage chunk {times}"


def cache_bytes(job: CheckedJob) -> int:
    """Return the size up to which a worker process keeps storage chunks of the inputs."""
    return min(chunk_cache.size(), job.record.cacheable_bytes)


def _cache_text(job: CheckedJob) -> str:
    size = cache_bytes(job)
    return f" and {si(size, 'B')} of cached storage chunks" if size else ""


def _chunks(plan: Plan, costs: Costs, *, is_alone: bool) -> str:
    """Return the number of chunks and blocks of a job; `plan` is that of its largest item."""
    shape, blocks = _shape(plan.chunksize), f" ({_shape(plan.blocks)})" if is_alone else ""
    if costs.chunks == costs.blocks:
        return f"{costs.chunks}{blocks} of {shape}"
    if plan.grid.region is not None:
        return f"{costs.chunks} of {shape}, for {costs.blocks} blocks{blocks} in the region"
    without = costs.blocks - costs.chunks
    return f"{costs.chunks} of {shape}; {costs.blocks} blocks{blocks}, {without} without patches"


def _region_values(job: CheckedJob) -> dict[str, Any] | None:
    """Return the region of the largest item as JSON values, None for the whole volume."""
    plan = job.largest
    if plan.grid.region is None:
        return None
    return {
        "start": list(plan.region.start),
        "stop": list(plan.region.stop),
        "same_bytes": all(plan.grid.is_aligned for plan in job.plans),
        "aligned_start": list(_aligned_start(plan)),
    }


def _region_text(job: CheckedJob) -> str:
    """Return the region of the largest item, and how its output compares with a whole one."""
    plan = job.largest
    bounds = ", ".join(
        f"{low}:{high}" for low, high in zip(plan.region.start, plan.region.stop, strict=True)
    )
    text = f"[{bounds}], {plan.region.size / prod(plan.volume.shape):.2g} of the volume; "
    other = next((plan for plan in job.plans if not plan.grid.is_aligned), None)
    if other is None:
        return f"{text}same bytes as in the output of the whole volume"
    start = ", ".join(map(str, _aligned_start(other)))
    return (
        f"{text}same values, within 1e-5, as in the output of the whole volume; for the same bytes "
        f"start where storage chunks start, here at [{start}]"
    )


def _aligned_start(plan: Plan) -> tuple[int, ...]:
    """Return the largest start of storage chunks that is not after the region's start."""
    return tuple(n - n % s for n, s in zip(plan.region.start, plan.grid.aligned_steps, strict=True))


def _output_rows(job: CheckedJob) -> list[tuple[str, str]]:
    """Return a row for each output of the largest item."""
    rows = []
    for number, view in enumerate(job.largest.views):
        text = (
            f"{_shape(_output_shape(job, view))} {view.output_dtype}{range_text(view.output)}, "
            f"storage chunks {_shape(view.storage_chunks)}{_shards_text(view)}"
        )
        if view.output.name:
            text = f"{view.output.name}: {text}"
        if job.record.file_name is None:
            text += f", {size_text(level_sizes(job, number)[0])}"
        if view.grid.scale is not None:
            text += f", one voxel per {_shape(view.grid.scale)} of the input"
        rows.append(("output", text))
        if view.output.class_names:
            rows.append(("classes", names_text(view.output.class_names)))
    return rows


def _output_bytes(job: CheckedJob, number: int) -> Iterator[int]:
    """Yield the size of an output for each item, in bytes of uncompressed voxels."""
    for plan in job.plans:
        view = plan.of_output(number)
        yield view.region.size * view.output.voxel_bytes


def _output_shape(job: CheckedJob, plan: Plan) -> tuple[int, ...]:
    """Return the shape of the image of an output of the largest item, which has this plan."""
    image = job.record.largest_item.image
    return tuple(axis.size for axis in output_axes(image, plan))


def _items(job: CheckedJob) -> str:
    """Return how many items a job has, and of which kind."""
    images = job.record.images
    if len(images) > 1:
        return f"{len(job.plans)} volumes, the largest "
    axes = [f"{axis.size} {SERIES[axis.kind]}" for axis in images[0].series_axes]
    return f"{' of '.join(axes)} of "


def _axes_values(source: ImageSource) -> dict[str, Any]:
    """Return what is read of a source, as JSON values."""
    return {
        "path": without_secret(source.path),
        "names": [axis.name for axis in source.axes],
        "kinds": [axis.kind for axis in source.axes],
        "shape": [axis.size for axis in source.axes],
        "channels": list(source.channels),
        "time": list(source.time),
        "order": [axis.name for axis in source.spatial_axes],
        "named_by": source.named_by,
    }


def _axes_text(sources: Sequence[ImageSource]) -> str:
    """Return the axes of the first source, what names them, and what is read along them."""
    source = sources[0]
    parts = [", ".join(f"{axis.name} {axis.size}" for axis in source.axes)]
    parts[0] += f", named by {source.named_by}" if source.named_by else ", without names: spatial"
    parts += [
        f"{name} {', '.join(map(str, picks[:8]))}{', …' if len(picks) > 8 else ''}"
        for axis, name, picks in (
            (source.channel_axis, "channels", source.channels),
            (source.time_axis, "time points", source.time),
        )
        if axis is not None and picks != tuple(range(_size(source, axis)))
    ]
    stored = [axis for axis in source.axes if axis.kind == "space"]
    if list(source.spatial_axes) != stored:
        parts.append(f"order {''.join(axis.name for axis in source.spatial_axes)}")
    return "; ".join(parts)


def _size(source: ImageSource, selected: Axis) -> int:
    """Return the stored size of an axis of which positions are selected."""
    return next(axis.size for axis in source.axes if axis.kind == selected.kind)


def _network_seconds(costs: Costs, trial: Trial) -> float:
    """Return the time of the network alone for all patches on one device."""
    return costs.patches * trial.patches.batch_seconds / trial.check.batch


def _trial_rows(costs: Costs, trial: Trial, price: float | None) -> list[tuple[str, str]]:
    check, patches = trial.check, trial.patches
    seconds_per_patch = patches.batch_seconds / check.batch
    seconds = _network_seconds(costs, trial)
    cost = device_cost(seconds, price)
    rows = [
        ("network", f"on {check.device}, loaded in {check.load_seconds:.3g} s; shapes are valid"),
        ("one patch", f"{seconds_per_patch:.3g} s, in batches of {check.batch}"),
        (
            "network alone",
            f"{duration(max(1, seconds))} for all patches on one device",
        ),
        *([] if cost is None else [("price", f"{money(cost)} for the network alone")]),
        ("peak memory", peak_memory(trial, finalizes=costs.finalized_blocks > 0)),
        *check.values.rows(),
    ]
    rows += [("note", line) for line in check.notes]
    return rows + [("warning", line) for line in check.warnings()]


def peak_memory(trial: Trial, *, finalizes: bool) -> str:
    """Return the peak memory of a worker process, the finalizer and the device as text."""
    check, memory = trial.check, trial.memory
    if memory.worker_bytes is None or memory.chunks is None:
        parts = [f"of a worker process: unknown, chunks could not be run ({memory.error})"]
    else:
        parts = [
            f"{si(memory.worker_bytes, 'B')} in total per worker process with {memory.depth} "
            f"chunks in flight ({si(check.loaded_bytes, 'B')} of it libraries and network), "
            f"measured on {chunk_count(memory.chunks)}"
        ]
    if trial.finalizer_bytes is not None:
        parts.append(f"{si(trial.finalizer_bytes, 'B')} in total to finalize blocks")
    elif finalizes:
        parts.append("of finalizing: unknown, blocks could not be completed")
    if check.device_bytes is not None:
        parts.append(f"{si(check.device_bytes, 'B')} on the device")
    return "; ".join(parts)


def _shape(shape: Sequence[object]) -> str:
    return "×".join(map(str, shape))
