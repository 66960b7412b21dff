"""Create a job from a model file: detect the file's format, and use defaults for other keys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from chunkq.errors import JobError, ModelError
from chunkq.job.axis_order import channels_first, input_channels
from chunkq.job.hints import meant_key
from chunkq.job.job_file import Job
from chunkq.job.model_config import ModelConfig
from chunkq.job.output_shapes import head_names
from chunkq.paths import is_url, read_bytes, without_secret
from chunkq.plan.volume import Volume
from chunkq_worker.network_objects import NetworkObject
from chunkq_worker.runtimes.formats import format_of

FILE_KEYS: MappingProxyType[str, str] = MappingProxyType(
    {
        "class": "class_file",
        "torchscript": "ts_file",
        "exported": "model_file",
        "file": "model_file",
        "json": "json_file",
    }
)
"""Model type -> job key of the model file."""
RUNTIMES_AND_TYPES: MappingProxyType[str, tuple[str, str]] = MappingProxyType(
    {
        "torchscript": ("torch", "torchscript"),
        "exported": ("torch", "exported"),
        "torch_save": ("torch", "file"),
        "onnx": ("onnx", "file"),
        "keras": ("tensorflow", "file"),
        "keras_h5": ("tensorflow", "file"),
        "keras_json": ("tensorflow", "json"),
        ".onnx": ("onnx", "file"),
        ".py": ("torch", "class"),
    }
)
"""File format, or suffix where the content has no signature -> (runtime, type)."""
RUNTIME_OF_TYPE: MappingProxyType[str, str] = MappingProxyType(
    {"class": "torch", "torchscript": "torch", "exported": "torch", "json": "tensorflow"}
)
"""Type -> runtime, for types that exist in one runtime; the file is not read for these."""
DEFAULT_BATCH = 4
"""Default of `max_batch_size`; halved when a batch runs out of memory."""


def job_for_model(path: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a job that runs a model file.

    `keys` are keys of the job file or of its `model_config`. Defaults are `sliding_window`,
    `weight_gaussian` and `max_batch_size: 4`; `strides` is not set. Raise JobError if the file is
    missing or its format is unknown, and ModelError if it contains no network.
    """
    model, values = _split(keys)
    detected = model_keys(path, keys)
    return _with_defaults(values, detected | model)


def job_for_object(network: NetworkObject, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a job that runs a network object, with the defaults of a file's.

    Raise JobError if a key describes the file of a network.
    """
    model, values = _split(keys)
    return _with_defaults(values, network.model_config(model))


def _split(keys: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys of `model_config`, and those of the job file."""
    if "model_config" in keys:
        raise JobError("model_config: unsupported keyword; pass each of its keys as a keyword")
    model: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for key, value in keys.items():
        (model if _is_of_model(key) else values)[key] = value
    return model, values


def _with_defaults(values: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    values = {"inference_type": "sliding_window"} | values
    model = {"max_batch_size": DEFAULT_BATCH} | model
    if values["inference_type"] == "sliding_window":
        values = {"weight_function": ["weight_gaussian"]} | values
    return values | {"model_config": model}


def half_strides(job: Job, volume: Volume) -> list[int]:
    """Return half the smallest output patch along each spatial axis, at least 1."""
    rank, model = len(volume.shape), job.model
    first = channels_first(model, rank, input_channels(model, volume))
    patches = [first.of_head(head).output_patch(rank) for head in head_names(job)]
    strides = [max(1, min(along) // 2) for along in zip(*patches, strict=False)]
    # If the shapes do not match the volume, report that instead of an error about strides.
    return strides if len(strides) == rank else [1] * rank


def _is_of_model(key: str) -> bool:
    """Return whether a keyword, even a misspelt one, is most likely a key of `model_config`."""
    top, model = list(Job.model_fields), list(ModelConfig.model_fields)
    if key in top or key in model:
        return key in model
    meant = meant_key(key, "", {"": top, "model_config": model})
    return meant is not None and meant[0] == "model_config"


def model_keys(path: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return runtime, type and the key of a model file; detect what is missing in `keys`."""
    runtime, kind = keys.get("runtime"), keys.get("type")
    if not is_url(path) and not os.path.exists(path):
        raise JobError(f"model: no file {path}")
    runtime = runtime or RUNTIME_OF_TYPE.get(kind or "")
    if runtime is None or kind is None:
        detected = _detect_kind(path, kind)
        runtime, kind = runtime or detected[0], kind or detected[1]
    return {"runtime": runtime, "type": kind, FILE_KEYS.get(kind, "model_file"): path}


def _detect_kind(path: str, kind: str | None) -> tuple[str, str]:
    """Return the runtime and type of a model file from its content or suffix."""
    printed = without_secret(path)
    if not is_url(path) and os.path.isdir(path):
        if os.path.exists(os.path.join(path, "saved_model.pb")):
            return RUNTIMES_AND_TYPES["keras"]
        raise ModelError(
            f"model: {printed} is a folder without saved_model.pb, expected a SavedModel or a file"
        )
    try:
        detected = format_of(read_bytes(path))
    except OSError as error:
        raise JobError(f"model: {printed} cannot be read: {error}") from error
    if detected == "torch_save" and kind is None:
        raise ModelError(
            f"model: {printed} was written by torch.save and contains weights or a pickled module; "
            "pass the Python file of the class with class_name= and this file as checkpoint=, or "
            "use type='file', trusted=True for a pickled module that you trust"
        )
    runtime_and_type = RUNTIMES_AND_TYPES.get(detected or os.path.splitext(path)[1].lower())
    if runtime_and_type is None:
        raise JobError(
            f"model: {printed} has an unknown format; pass runtime= and type= (torch: class, file, "
            "torchscript, exported; tensorflow: class, file, json; onnx: file; numpy: class)"
        )
    return runtime_and_type
