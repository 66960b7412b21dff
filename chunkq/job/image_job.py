"""Rules of jobs with `inference_type: image`: which keys they have, and what fits together."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

from chunkq.errors import JobError
from chunkq.images.image_spec import ImageSpec
from chunkq.job.fields import InferenceType
from chunkq.job.model_config import SLEAP
from chunkq.job.output_name import SLP, table_suffix
from chunkq.job.output_values import class_problems
from chunkq.paths import without_secret

if TYPE_CHECKING:
    from chunkq.job.job_file import Job

IMAGE = "image"
"""The inference type of jobs whose network sees each image whole."""
IMAGE_KEYS = frozenset({"image", "truth", "top_k", "keep", "max_errors", "peaks"})
"""Keys that only these jobs have."""
SHARED_KEYS = frozenset(
    {
        "input", "output", "queue", "cluster", "hardware", "inference_type", "chunksize",
        "activation", "classes", "threads", "dask_config", "ray_config", "price", "model",
    }
)  # fmt: skip
"""Keys that have a meaning in both kinds of jobs."""
PACKAGE_MODEL = MappingProxyType(
    {
        "runtime": SLEAP,
        "type": "package",
        "model_input_shape": [3, 256, 256],
        "max_batch_size": 4,
    }
)
"""Keys of `model_config` beside `package`: frames of any size, and sleap-nn's own batch size."""
VOLUME_MODEL_KEYS = ("lost_dim", "join_dim")
"""Keys of `model_config` that only jobs over volumes have."""
VOLUME_INPUT_KEYS = ("axes", "level", "channels", "time", "order", "orientation")
"""Keys of `input` that only jobs over volumes have."""


def is_over_images(values: Mapping[str, Any]) -> bool:
    """Return whether the keys are those of a job over images.

    Of one whose inference type is misspelled, nothing but that is reported.
    """
    kind = values.get("inference_type")
    return kind == IMAGE or (kind not in get_args(InferenceType) and "image" in values)


def with_image_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a job with those that follow from others in an image job.

    Scores are those of `softmax`, and the input of the network has the size of `image`. Other
    jobs, and values of a wrong type, stay unchanged.
    """
    result = dict(values)
    if not is_over_images(values):
        return result
    model, image = values.get("model_config"), values.get("image", {})
    has_package = isinstance(model, Mapping) and model.get("package") is not None
    has_scores = values.get("peaks") is None and not has_package
    result.setdefault("activation", "softmax" if has_scores else "none")
    if isinstance(model, Mapping) and has_package:
        if not {"runtime", "type"} & model.keys():
            result["model_config"] = {**PACKAGE_MODEL, **model}
        result.setdefault("peaks", {})
        return result
    if isinstance(model, Mapping) and "model_input_shape" not in model:
        shape = _input_shape(image)
        if shape is not None:
            result["model_config"] = {**model, "model_input_shape": shape}
    return result


def _input_shape(image: object) -> list[int] | None:
    """Return the shape [C, h, w] of the section `image`; None if sizes vary.

    An invalid section, which is refused, has any shape: the missing one is no mistake of its own.
    """
    from chunkq.job.image_config import ImageConfig

    try:
        spec = ImageConfig.model_validate(image).spec()
    except ValueError:
        return [3, 1, 1]
    return None if spec.size is None else [spec.channels, *spec.size]


def kind_problems(job: Job) -> list[str]:
    """Return one line per key that belongs to the other kind of job."""
    fields = type(job).model_fields
    if job.inference_type != IMAGE:
        problems = [
            f"{key}: unsupported for inference_type {job.inference_type}; remove it, or use "
            f"inference_type {IMAGE}"
            for key in sorted(IMAGE_KEYS)
            if getattr(job, key) != fields[key].default
        ]
        if job.model.package is not None:
            problems.append(
                f"model_config.package: unsupported for inference_type {job.inference_type}; use "
                f"inference_type {IMAGE}"
            )
        if any(config.frames is not None for config in job.inputs):
            problems.append(
                f"input.frames: unsupported for inference_type {job.inference_type}; use time, or "
                f"inference_type {IMAGE}"
            )
        return problems
    problems = [
        f"{fields[key].alias or key}: unsupported for inference_type {IMAGE}, whose images are not "
        "cut into patches; remove it"
        for key in fields
        if key not in SHARED_KEYS | IMAGE_KEYS and getattr(job, key) != fields[key].default
    ]
    problems += [
        f"model_config.{key}: unsupported for inference_type {IMAGE}; remove it"
        for key in VOLUME_MODEL_KEYS
        if getattr(job.model, key) is not None
    ]
    problems += [
        f"input.{key}: unsupported for inference_type {IMAGE}; remove it"
        for config in job.inputs
        for key in VOLUME_INPUT_KEYS
        if getattr(config, key) is not None
    ]
    return list(dict.fromkeys(problems))


def image_problems(job: Job) -> list[str]:
    """Return one line per mistake in the keys of an image job."""
    problems = [] if job.image is None else job.image.problems()
    if job.truth is not None:
        problems += job.truth.problems()
    for config in job.inputs:
        frames = config.frames if isinstance(config.frames, tuple) else (config.frames,)
        is_list = isinstance(config.frames, tuple)
        if names := [n for n in frames if isinstance(n, str) and (is_list or ":" not in n)]:
            problems.append(f"input.frames: found {names[0]!r}; expected numbers, or a range")
    if job.chunksize is not None and len(job.chunksize) != 1:
        problems.append(
            f"chunksize: found {len(job.chunksize)} entries; expected 1, the number of images of "
            "a chunk"
        )
    if len({config.access for config in job.inputs}) > 1:
        problems.append(
            "input: anonymous and requester_pays differ between the inputs; use equal ones, or a "
            "job for each"
        )
    if job.is_precomputed or table_suffix(job.output) is None:
        problems.append(
            f"output: {without_secret(job.output)} is no table; use a name that ends in .parquet, "
            ".csv or .jsonl, or in .slp for keypoints"
        )
    elif table_suffix(job.output) == SLP and job.peaks is None:
        problems.append(
            f"output: {without_secret(job.output)} holds keypoints, which this job does not have; "
            "set peaks, or use a name that ends in .parquet, .csv or .jsonl"
        )
    elif table_suffix(job.output) == SLP and job.classes is None and job.model.package is None:
        problems.append(
            "classes: missing for an output in .slp, whose keypoints have names; set it to a list "
            "of them"
        )
    if job.keep == "features":
        used = {"classes": job.classes, "truth": job.truth}
        problems += [
            f"{key}: unsupported beside keep: features, which stores the outputs of the network "
            "and no classes; remove one of them"
            for key, value in used.items()
            if value is not None
        ]
    problems += class_problems(job.classes) if job.peaks is None else _peak_problems(job)
    if job.model.type == "package":
        return problems + _package_problems(job)
    if not problems:
        problems += _shape_problems(job, job.image_spec)
    return problems


def _peak_problems(job: Job) -> list[str]:
    """Return one line per key that jobs with keypoints do not have."""
    used = {"truth": job.truth, "top_k": job.top_k, "keep": job.keep}
    problems = [
        f"{key}: unsupported beside peaks, whose table has keypoints and no classes; remove one of "
        "them"
        for key, value in used.items()
        if value not in (None, "none")
    ]
    if job.activation == "softmax":
        problems.append(
            "activation: unsupported value 'softmax' beside peaks; use none, or sigmoid for maps "
            "of logits"
        )
    return problems


def _package_problems(job: Job) -> list[str]:
    """Return one line per key that a network of sleap-nn has itself."""
    used = {
        "image": job.image is not None,
        "classes": job.classes is not None,
        "activation": job.activation not in ("none", "softmax"),
        "peaks.stride": job.peaks is not None and job.peaks.stride is not None,
        "peaks.multiple": job.peaks is not None and job.peaks.multiple,
    }
    return [
        f"{key}: unsupported beside model_config.package, whose network defines it; remove it"
        for key, is_used in used.items()
        if is_used
    ]


def check_package(job: Job) -> None:
    """Raise JobError in one line if the folders of a job are no network of sleap-nn."""
    if job.model.package is None:
        return
    from chunkq.images.sleap_package import read_package  # for such jobs only

    package, peaks = read_package(job.model.package), job.peaks
    if package.is_export and peaks is not None and peaks.is_changed:
        raise JobError(
            "peaks: an export of sleap-nn has a fixed threshold and no refinement; remove peaks, "
            "or use the folder of the trained model"
        )


def _shape_problems(job: Job, spec: ImageSpec) -> list[str]:
    """Return a line if the network's input cannot be what `image` makes of a picture."""
    shape, size = job.model.model_input_shape, spec.size
    key = "model_config.model_input_shape"
    if len(shape) != 3:
        return [
            f"{key}: found {len(shape)} entries, {list(shape)}; expected the channels, the height "
            "and the width of an image"
        ]
    orders = [shape] if job.model.runtime in ("torch", "numpy") else [shape, shape[-1:] + shape[:2]]
    fitting = [one for one in orders if one[0] == spec.channels]
    if not fitting:
        return [
            f"{key}: {list(shape)} has {shape[0]} channels first, but images have {spec.channels} "
            f"in mode {spec.mode}; set image.mode, or fix the shape"
        ]
    if size is not None and all(one[1:] != size for one in fitting):
        return [
            f"{key}: {list(shape)} does not have the size of the images, {list(size)} after "
            "image.resize and image.crop; fix one of them, or remove the shape"
        ]
    return []
