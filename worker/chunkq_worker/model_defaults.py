"""A job around nothing but a model file: its kind, and what is usual for the rest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from chunkq.errors import JobError, ModelError, nearest
from chunkq.job import Job, ModelConfig
from chunkq.paths import is_url, read_bytes, without_secret
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
"""Type of a model -> the job key of its file."""
KINDS: MappingProxyType[str, tuple[str, str]] = MappingProxyType(
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
"""Format of a file, or its suffix where content says nothing -> runtime and type."""
ONLY_RUNTIME: MappingProxyType[str, str] = MappingProxyType(
    {"class": "torch", "torchscript": "torch", "exported": "torch", "json": "tensorflow"}
)
"""Types for which the file need not be looked at."""
BATCH = 4
"""Patches in a batch, unless given; running out of memory halves it."""


def job_for_model(path: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job's keys for a model file and keys of the job file or its `model_config`.

    Patches slide with gaussian weights, unless `keys` say otherwise; strides are left to who
    knows the volume. Raises JobError where there is no file or its kind is not to be told,
    ModelError where it is a file that holds no network.
    """
    if "model_config" in keys:
        raise JobError("model_config: give each of its keys as a keyword of its own")
    model = _model_keys(path, keys.get("runtime"), keys.get("type")) | {"max_batch_size": BATCH}
    values: dict[str, Any] = {"inference_type": "sliding_window"}
    for key, value in keys.items():
        (model if _is_of_model(key) else values)[key] = value
    if values["inference_type"] == "sliding_window":
        values = {"weight_function": ["weight_gaussian"]} | values
    return values | {"model_config": model}


def half_strides(model: ModelConfig, rank: int) -> list[int]:
    """Return half the output patch along each spatial axis, at least 1."""
    shape = (model.model_output_shape or model.model_input_shape)[-rank:]
    strides = [max(1, n // 2) for n in shape]
    if model.lost_dim is not None and model.model_output_shape is None:
        axis = model.lost_dim - len(model.model_input_shape) + rank
        strides = [1 if a == axis else n for a, n in enumerate(strides)]
    # Where the shapes do not fit the volume, that alone is to be complained of.
    return strides if len(strides) == rank else [1] * rank


def _is_of_model(key: str) -> bool:
    """Tell whether a keyword belongs to `model_config`, also if it is misspelt."""
    top, model = list(Job.model_fields), list(ModelConfig.model_fields)
    if key in top or key in model:
        return key in model
    return not nearest(key, top) and bool(nearest(key, model))


def _model_keys(path: str, runtime: str | None, kind: str | None) -> dict[str, Any]:
    """Return runtime, type and the file's own key; what is given goes before what it looks like."""
    if not is_url(path) and not os.path.exists(path):
        raise JobError(f"model: no file {path}")
    runtime = runtime or ONLY_RUNTIME.get(kind or "")
    if runtime is None or kind is None:
        found = _recognise(path, kind)
        runtime, kind = runtime or found[0], kind or found[1]
    return {"runtime": runtime, "type": kind, FILE_KEYS.get(kind, "model_file"): path}


def _recognise(path: str, kind: str | None) -> tuple[str, str]:
    shown = without_secret(path)
    if not is_url(path) and os.path.isdir(path):
        if os.path.exists(os.path.join(path, "saved_model.pb")):
            return KINDS["keras"]
        raise ModelError(
            f"model: {shown} is a folder without saved_model.pb, so no SavedModel; name a file"
        )
    try:
        found = format_of(read_bytes(path))
    except OSError as error:
        raise JobError(f"model: {shown} cannot be read: {error}") from error
    if found == "torch_save" and kind is None:
        raise ModelError(
            f"model: {shown} was written by torch.save, which keeps no network that runs by "
            "itself; pass the class's Python file with class_name= and this as checkpoint=, or if "
            "it is a whole module that you trust: type='file', trusted=True"
        )
    known = KINDS.get(found or os.path.splitext(path)[1].lower())
    if known is None:
        raise JobError(
            f"model: the kind of {shown} is not to be told; pass runtime= and type= (torch: "
            "class, file, torchscript, exported; tensorflow: class, file, json; onnx: file; "
            "numpy: class)"
        )
    return known
