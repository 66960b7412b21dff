"""Rules for the keys of `model_config` that belong together."""

from __future__ import annotations

from chunkq.job.model_config import FLOATING_DTYPES, HALF_PRECISIONS, SLEAP, ModelConfig

TENSORRT_PRECISIONS = ("tf32", "float16")
"""Precisions that ONNX Runtime can request of TensorRT, which has TF32 on by itself."""
PACKAGE_KEYS = frozenset(
    {"runtime", "type", "package", "model_input_shape", "max_batch_size", "device", "trusted"}
    | {"precision"}
)
"""Keys that have a meaning beside `package`."""

_REQUIRED_KEYS = {
    "class": ("class_file", "class_name"),
    "torchscript": ("ts_file",),
    "file": ("model_file",),
    "exported": ("model_file",),
    "json": ("json_file",),
    "package": ("package",),
}


_CLASS_HINTS = {
    "class_file": ", or set class_name to the full name of a class of an installed package, such "
    "as monai.networks.nets.BasicUNet"
}


_TYPES = {
    "torch": ("class", "file", "torchscript", "exported"),
    "tensorflow": ("class", "file", "json"),
    "onnx": ("file",),
    "numpy": ("class",),
    SLEAP: ("package",),
}


_TORCH_ONLY = ("compile", "channels_last", "cuda_graph")


def model_problems(model: ModelConfig) -> list[str]:
    """Return one line per mistake in the combination of the keys."""
    runtime, legal = model.runtime, _TYPES[model.runtime]
    problems = [
        f"model_config.{key}: missing for type {model.type}; set it{_CLASS_HINTS.get(key, '')}"
        for key in _REQUIRED_KEYS[model.type]
        if getattr(model, key) is None and not (key == "class_file" and model.class_package)
    ]
    if model.type not in legal:
        problems = [
            f"model_config.type: unsupported value {model.type!r} for runtime {runtime}; "
            f"expected {'one of ' if len(legal) > 1 else ''}{', '.join(legal)}"
        ]
    if runtime != "torch":
        problems += [
            f"model_config.{key}: unsupported for runtime {runtime}; "
            "remove it, or use runtime torch"
            for key in _TORCH_ONLY
            if getattr(model, key)
        ]
        if model.dtype == "bfloat16":
            problems.append(
                f"model_config.dtype: unsupported value 'bfloat16' for runtime {runtime}; "
                "use float32"
            )
    elif model.cuda_graph and model.device != "cuda":
        problems.append(
            f"model_config.cuda_graph: unsupported for device {model.device}; "
            "remove it, or use device cuda"
        )
    if model.provider is not None:
        problems += _provider_problems(model)
    if runtime == "numpy":
        problems += _numpy_problems(model)
    if model.package is not None:
        problems += _package_problems(model)
    return problems + precision_problems(model)


def _package_problems(model: ModelConfig) -> list[str]:
    """Return one line per key that does not fit `package`."""
    if model.runtime != SLEAP or model.type != "package":
        return ["model_config.package: found runtime and type beside it; remove these two keys"]
    fields = ModelConfig.model_fields
    return [
        f"model_config.{key}: unsupported beside package, whose folders define the network; "
        "remove it"
        for key in fields
        if key not in {*PACKAGE_KEYS, *_TORCH_ONLY} and getattr(model, key) != fields[key].default
    ]


def precision_problems(model: ModelConfig) -> list[str]:
    """Return one line if the network cannot compute in `precision`."""
    key, value = "model_config.precision", model.precision
    if value is None:
        return []
    if model.provider == "tensorrt" and value not in TENSORRT_PRECISIONS:
        return [
            f"{key}: unsupported value {value!r} for provider tensorrt; use "
            f"{' or '.join(TENSORRT_PRECISIONS)}, or use provider cuda"
        ]
    if value in HALF_PRECISIONS and model.provider != "tensorrt" and model.runtime != "torch":
        return [
            f"{key}: unsupported value {value!r} for runtime {model.runtime}; use float32, or use "
            "runtime torch"
        ]
    if value == "tf32" and model.device == "cpu":
        return [f"{key}: unsupported value 'tf32' for device cpu; use float32, or use device cuda"]
    is_float32 = model.dtype == "float32" or (
        model.dtype not in FLOATING_DTYPES and value not in HALF_PRECISIONS
    )
    if not is_float32 and model.dtype != value:
        return [
            f"{key}: {value} requires a float32 network, found dtype {model.dtype}; use dtype: "
            "float32, or remove precision"
        ]
    return []


def _provider_problems(model: ModelConfig) -> list[str]:
    key = f"model_config.provider: unsupported value {model.provider!r} for"
    if model.runtime != "onnx":
        return [f"{key} runtime {model.runtime}; remove it, or use runtime onnx"]
    if model.device != "cuda":
        return [f"{key} device {model.device}; remove it, or use device cuda"]
    return []


def _numpy_problems(model: ModelConfig) -> list[str]:
    problems = []
    if model.checkpoint is not None:
        problems.append(
            "model_config.checkpoint: unsupported for runtime numpy; "
            "remove it, and load the weights in class_file"
        )
    if model.device == "cuda":
        problems.append("model_config.device: unsupported value 'cuda' for runtime numpy; use cpu")
    return problems
