"""Plan of a job over images as text and as JSON values."""

from __future__ import annotations

from math import prod
from typing import Any

import pyarrow.compute as pc

from chunkq import json_values
from chunkq.create import CheckedJob
from chunkq.images.image_spec import ImageSpec
from chunkq.job.image_rows import ImageRows
from chunkq.job.tasks import chunk_count
from chunkq.model_check import ModelCheck
from chunkq.paths import without_secret
from chunkq.plan.output_text import names_text
from chunkq.units import counted, device_cost, duration, money, si

FLOAT_BYTES = 4
AHEAD = 16
"""Images that are read ahead of the network, besides a batch; see `run_rows`."""


def image_plan_rows(job: CheckedJob, depth: int, check: ModelCheck | None) -> list[tuple[str, str]]:
    """Return the plan as rows of a label and a text. `check` is that of the network, if it ran."""
    keys, rows, spec = job.record.job, _rows(job), job.record.job.image_spec
    (count,), (size,) = job.largest.volume.shape, job.largest.chunksize
    model = keys.model
    names = [name for name in rows.listed.column_names if name != "path"]
    listed = [
        ("input", f"{counted(count, 'image', 'images')} of {_inputs(job)}"),
        ("columns", f"{', '.join(names)}, copied to the output") if names else None,
        ("images", _steps(spec)),
        ("truth", _truth(rows)) if rows.has_truth else None,
        ("classes", names_text(keys.classes)) if isinstance(keys.classes, tuple) else None,
        ("output", f"{without_secret(keys.output)}, one row per image with a result"),
        ("chunks", f"{chunk_count(job.costs.chunks)} of {counted(size, 'image', 'images')}"),
        ("batches", f"at most {model.max_batch_size} images of one shape"),
        ("precision", f"{model.effective_precision}, on {model.device}"),
        (
            "memory",
            f"about {si(memory_bytes(job, depth), 'B')} of images per worker process with {depth} "
            "chunks in flight, plus libraries and network",
        ),
        (
            "errors",
            "an image that cannot be read or predicted is a row of a table of errors"
            + ("" if keys.max_errors is None else f"; at most {keys.max_errors} may fail"),
        ),
        *(("warning", line) for line in job.all_warnings),
    ]
    if check is not None:
        listed += _check_rows(job, check)
    elif keys.price is not None:
        listed.append(("price", "unknown until --check-model has timed the network"))
    return [row for row in listed if row is not None]


def image_plan_values(job: CheckedJob, depth: int, check: ModelCheck | None) -> dict[str, Any]:
    """Return the plan as JSON values."""
    keys, rows = job.record.job, _rows(job)
    seconds = None if check is None else network_seconds(job, check)
    values: dict[str, Any] = {
        "images": len(rows),
        "columns": rows.listed.column_names,
        "truth": rows.truth is not None and len(rows) - rows.truth.null_count,
        "input_shape": list(keys.model.model_input_shape),
        "output": without_secret(keys.output),
        "chunksize": list(job.largest.chunksize),
        "chunks": job.costs.chunks,
        "max_batch_size": keys.model.max_batch_size,
        "precision": keys.model.effective_precision,
        "stochastic": keys.model.stochastic,
        "warnings": list(job.all_warnings),
        "depth": depth,
        "image_bytes": memory_bytes(job, depth),
        "network_seconds": seconds,
        "price": device_cost(seconds, keys.price),
    }
    if check is not None:
        values["model_check"] = json_values.to_values(check)
    return values


def memory_bytes(job: CheckedJob, depth: int) -> int:
    """Estimate the bytes of the inputs of the network that a worker process holds.

    Files and pixels before resizing are not counted: their sizes are unknown.
    """
    keys = job.record.job
    image = prod(keys.model.model_input_shape) * FLOAT_BYTES
    return depth * (2 * keys.model.max_batch_size + AHEAD) * image


def network_seconds(job: CheckedJob, check: ModelCheck) -> float | None:
    """Return the time of the network alone for all images on one device."""
    if check.patches is None:
        return None
    return check.patches.batch_seconds / check.patches.patches * len(_rows(job))


def _check_rows(job: CheckedJob, check: ModelCheck) -> list[tuple[str, str]]:
    rows = [
        ("network", f"on {check.device}, loaded in {check.load_seconds:.3g} s; shapes are valid")
    ]
    seconds = network_seconds(job, check)
    if seconds is not None and check.patches is not None:
        each = check.patches.batch_seconds / check.patches.patches
        rows.append(("one image", f"{each:.3g} s, in batches of {check.patches.patches}"))
        rows.append(("network alone", f"{duration(max(1, seconds))} for all images on one device"))
        if (price := device_cost(seconds, job.record.job.price)) is not None:
            rows.append(("price", f"{money(price)} for the network alone, without reading images"))
    rows += check.values.rows()
    rows += [("note", line) for line in check.notes]
    return rows + [("warning", line) for line in check.warnings()]


def _rows(job: CheckedJob) -> ImageRows:
    if job.rows is None:
        raise ValueError("the job is not over images")
    return job.rows


def _inputs(job: CheckedJob) -> str:
    paths = job.record.job.input_paths
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{without_secret(paths[0])}{more}"


def _steps(spec: ImageSpec) -> str:
    """Return what is done with the pixels, in order."""
    parts: list[str] = [spec.mode]
    if isinstance(spec.resize, tuple):
        parts.append(f"resized to {spec.resize[0]}×{spec.resize[1]}")
    elif spec.resize is not None:
        parts.append(f"shorter side resized to {spec.resize}")
    if spec.crop is not None:
        parts.append(f"cropped to {spec.crop[0]}×{spec.crop[1]}")
    if spec.scale != 1:
        parts.append(f"divided by {spec.scale:g}")
    parts += [f"{key} {list(values)}" for key, values in _normalization(spec) if values]
    return ", ".join(parts)


def _normalization(spec: ImageSpec) -> list[tuple[str, tuple[float, ...]]]:
    return [("minus", spec.mean), ("divided by", spec.std)]


def _truth(rows: ImageRows) -> str:
    truth = rows.truth
    if truth is None:
        return ""
    labels = len(pc.unique(truth.drop_null()))
    known = counted(len(rows) - truth.null_count, "image", "images")
    unknown = f", {truth.null_count} without one" if truth.null_count else ""
    return f"{counted(labels, 'different label', 'different labels')} of {known}{unknown}"
