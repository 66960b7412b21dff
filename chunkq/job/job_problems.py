"""Rules for the keys of a job that belong together: geometry, weights, heads, outputs and paths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from chunkq.access import BUCKET_SCHEMES
from chunkq.job.fields import InferenceType
from chunkq.job.image_job import image_problems, kind_problems
from chunkq.job.input_config import InputConfig
from chunkq.job.mask_config import MaskConfig
from chunkq.job.model_problems import model_problems
from chunkq.job.output_config import OutputConfig
from chunkq.job.output_values import value_problems
from chunkq.job.printed_value import printed_value
from chunkq.paths import split_format, without_secret

if TYPE_CHECKING:
    from chunkq.job.job_file import Job


def job_problems(job: Job) -> list[str]:
    """Return one line per mistake in the combination of the keys of a job."""
    return [
        *kind_problems(job),
        *(_image_problems(job) if job.is_image else _volume_problems(job)),
        *_path_problems(job),
        *_credential_problems(job),
        *_access_problems(job),
    ]


def _volume_problems(job: Job) -> list[str]:
    """Return the problems of the keys of a job over volumes."""
    return [
        *_geometry_problems(job),
        *_weight_problems(job),
        *model_problems(job.model),
        *_input_problems(job),
        *_head_problems(job),
        *_output_problems(job),
    ]


def _image_problems(job: Job) -> list[str]:
    """Return the problems of the keys of a job over images."""
    return [*image_problems(job), *model_problems(job.model)]


def _geometry_problems(job: Job) -> list[str]:
    kind = job.inference_type
    problems = []
    if kind == "sliding_window" and job.strides is None:
        problems.append(
            "strides: missing for inference_type sliding_window; set the step along each axis"
        )
    if kind != "sliding_window" and job.strides is not None:
        problems.append(_wrong_inference_type("strides", "sliding_window", kind))
    if kind != "patch" and job.offsets:
        problems.append(_wrong_inference_type("offsets", "patch", kind))
    if kind == "crop_margin" and job.margin is None:
        problems.append(
            "margin: missing for inference_type crop_margin; set the margin to crop along each axis"
        )
    if kind != "crop_margin" and job.margin is not None:
        problems.append(_wrong_inference_type("margin", "crop_margin", kind))
    return problems


def _wrong_inference_type(key: str, expected: InferenceType, kind: InferenceType) -> str:
    return (
        f"{key}: unsupported for inference_type {kind}; remove it, or use inference_type {expected}"
    )


def _weight_problems(job: Job) -> list[str]:
    from chunkq.blend.weight_profiles import LOG_PROFILES

    names = job.weight_function
    if len(names) > 2 or (len(names) == 2 and Path(names[0]).name in LOG_PROFILES):
        return [
            "weight_function: expected [name] or [file.py, function], found "
            f"{[Path(names[0]).name, *names[1:]]}; use a value such as [weight_gaussian]"
        ]
    if len(names) == 1 and names[0].endswith(".py"):
        return [
            f"weight_function: found the file {printed_value(names[0])} without a function; use "
            f"[{names[0]}, FUNCTION]"
        ]
    if len(names) == 1 and names[0] not in LOG_PROFILES:
        from chunkq.job import hints  # for messages only

        hint = hints.value_hint("weight_function", names[0], list(LOG_PROFILES))
        return [
            f"weight_function: invalid value {printed_value(names[0])}; "
            f"expected one of {', '.join(LOG_PROFILES)}{hint}"
        ]
    return []


def _input_problems(job: Job) -> list[str]:
    model, join = job.model, job.model.join_dim
    if join is None:
        return []
    shape = model.model_input_shape
    if not 1 <= join <= len(shape):
        return [
            f"model_config.join_dim: {join} is not an axis of a batch (N, {str(shape)[1:-1]}); "
            f"use 1 to {len(shape)}"
        ]
    if join > 1 and shape[join - 1] != 1:  # the first axis can have the channels of an input
        return [
            f"model_config.join_dim: found length {shape[join - 1]} at axis {join - 1} of "
            f"model_input_shape; expected 1, because the {len(job.input)} inputs are stacked there"
        ]
    return []


def _head_problems(job: Job) -> list[str]:
    """Return the problems of the heads that outputs name, and of the shapes of heads."""
    heads = [config.head for config in job.output_configs().values()]
    names = {str(head): head for head in heads if head is not None}
    problems = []
    if names and None in heads:
        missing = [name for name, one in (job.outputs or {}).items() if one.head is None]
        problems.append(
            f"outputs.{missing[0]}.head: missing beside outputs with a head; set it, because the "
            "network returns several arrays"
        )
    if len(names) < len({head for head in heads if head is not None}):
        problems.append("outputs: two heads differ in their type only; use one of them")
    shapes = job.model.model_output_shape
    if isinstance(shapes, dict):
        problems += [
            f"model_config.model_output_shape.{head}: no output has this head; "
            + (f"use one of {', '.join(names)}" if names else "use one shape instead of a mapping")
            for head in shapes
            if head not in names
        ]
    return problems


def _output_problems(job: Job) -> list[str]:
    """Return the problems of the outputs, whatever the network returns."""
    configs = job.output_configs()
    if job.is_precomputed:
        problems = list(_precomputed_problems(job, configs.values()))
        if problems:
            return problems
    if job.zarr_format == 2 and any(config.storage_shards for config in configs.values()):
        return ["storage_shards: Zarr v2 has no shards; remove it, or set zarr_format: 3"]
    if job.outputs is None:
        return _value_problems(job, "", configs[""])
    problems = []
    for key in ("combine", "activation", "activation_after", "output_dtype", "range", "classes"):
        if getattr(job, key) != type(job).model_fields[key].default:
            problems.append(f"{key}: unsupported beside outputs; move it into an output")
    for name, config in configs.items():
        problems += _value_problems(job, f"outputs.{name}.", config)
    return problems


def _precomputed_problems(job: Job, configs: Iterable[OutputConfig]) -> Iterator[str]:
    """Yield a line for each key that a precomputed output does not have."""
    reasons = {
        "storage_shards": "blocks of a precomputed output are stored without shards",
        "codec": "labels of a precomputed output are stored as compressed_segmentation, averages "
        "without compression",
    }
    for key, reason in reasons.items():
        if any(getattr(config, key) is not None for config in configs):
            yield f"{key}: {reason}; remove it, or use a Zarr output"
    if job.zarr_format != type(job).model_fields["zarr_format"].default:
        yield "zarr_format: the output is a precomputed volume; remove it, or use a Zarr output"


def _value_problems(job: Job, prefix: str, output: OutputConfig) -> list[str]:
    return value_problems(
        prefix, output, has_mask=job.mask is not None, skips_empty=job.skip_empty is not None
    )


def _paths(job: Job) -> dict[str, str]:
    """Return every path of a job by its key."""
    inputs = job.input_paths
    paths = {f"input.{n}" if len(inputs) > 1 else "input": path for n, path in enumerate(inputs)}
    if job.mask is not None:
        paths["mask.path"] = job.mask.path
    return paths | {"output": job.output} | job.files


def _path_problems(job: Job) -> list[str]:
    """Return the problems of paths that no system call accepts: empty, with NUL, not Unicode."""
    problems = []
    for key, path in _paths(job).items():
        if not path:
            problems.append(f"{key}: empty path; set the path of a file or a folder, or a URL")
            continue
        try:
            if b"\0" not in path.encode():
                continue
        except UnicodeEncodeError:
            pass
        problems.append(f"{key}: invalid path {path!r}; remove NUL and surrogate characters")
    return problems


def _credential_problems(job: Job) -> list[str]:
    """Return the problems of paths with credentials. Paths are stored and printed."""
    return [
        f"{key}: {without_secret(path)} contains credentials; set them in the environment"
        for key, path in _paths(job).items()
        if without_secret(path) != path
    ]


def _access_problems(job: Job) -> list[str]:
    """Return the problems of arrays whose storage has no anonymous access or requester pays."""
    schemes = "s3:// and gs://"
    arrays: list[tuple[str, InputConfig | MaskConfig]] = [("input", i) for i in job.inputs]
    arrays += [] if job.mask is None else [("mask", job.mask)]
    return [
        f"{name}.{key}: unsupported for {without_secret(config.path)}; use it for {schemes} only"
        for name, config in arrays
        for key in config.access.options
        if split_format(config.path)[1].partition("://")[0] not in BUCKET_SCHEMES
    ]
