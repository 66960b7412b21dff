"""The section `model_config` of a job file: the network, and how to run it."""

from __future__ import annotations

from typing import Literal

from chunkq.job.fields import Dtype, NonNegative, Positive, Section, Shape

STOCHASTIC = "the network is random, so another run gives other bytes (model_config.stochastic)"
"""What plan and report say of a job with `stochastic`."""
HALF_PRECISIONS = ("bfloat16", "float16")
"""Precisions in which torch's autocast runs a float32 network."""
TENSORRT_PRECISIONS = ("tf32", "float16")
"""Precisions that ONNX Runtime can request of TensorRT, which has TF32 on by itself."""

_FLOATING_DTYPES = ("float16", "bfloat16", "float64")
"""Dtypes of networks with floating-point weights other than float32."""


class ModelConfig(Section):
    """The network: its files, its input and output shapes, and how to run it."""

    runtime: Literal["torch", "tensorflow", "onnx", "numpy"]
    type: Literal["class", "file", "torchscript", "exported", "json"]
    model_input_shape: Shape
    model_output_shape: Shape | None = None
    dtype: Dtype = "float32"
    max_batch_size: Positive = 1
    device: Literal["cpu", "cuda"] = "cpu"
    processing_steps: str | None = None
    lost_dim: NonNegative | None = None
    join_dim: NonNegative | None = None
    class_file: str | None = None
    class_name: str | None = None
    kwargs_file: str | None = None
    checkpoint: str | None = None
    model_file: str | None = None
    ts_file: str | None = None
    json_file: str | None = None
    trusted: bool = False
    stochastic: bool = False
    precision: Literal["tf32", "float32", "bfloat16", "float16"] | None = None
    provider: Literal["cuda", "tensorrt"] | None = None
    compile: bool = False
    channels_last: bool = False
    cuda_graph: bool = False

    @property
    def effective_precision(self) -> str:
        """Precision of the network's arithmetic: `precision`, or its default.

        The default is the dtype of a network that is not float32, else tf32 for torch on a GPU
        and for TensorRT, else float32.
        """
        if self.precision is not None:
            return self.precision
        if self.dtype in _FLOATING_DTYPES:
            return self.dtype
        is_torch_on_gpu = self.runtime == "torch" and self.device == "cuda"
        return "tf32" if is_torch_on_gpu or self.provider == "tensorrt" else "float32"

    @property
    def allows_tf32(self) -> bool:
        """Whether a GPU may round the factors of float32 products to TF32.

        Where a network computes in 16 bits, its remaining float32 operations may.
        """
        return self.effective_precision in ("tf32", *HALF_PRECISIONS)

    @property
    def files(self) -> dict[str, str]:
        """Files of the network, by key."""
        keys = (
            "class_file",
            "kwargs_file",
            "checkpoint",
            "ts_file",
            "model_file",
            "json_file",
            "processing_steps",
        )
        return {key: path for key in keys if (path := getattr(self, key)) is not None}

    @property
    def class_package(self) -> str | None:
        """Top-level package of a class or function that is imported by its full name, or None."""
        parts = (self.class_name or "").split(".")
        is_full_name = len(parts) > 1 and all(part.isidentifier() for part in parts)
        is_package = self.type == "class" and self.class_file is None
        return parts[0] if is_package and is_full_name else None

    def lost_axis(self, rank: int) -> int | None:
        """Return the spatial axis that the network reduces to one slice, None without `lost_dim`.

        `rank` is the number of spatial axes, which are the last entries of `model_input_shape`.
        The result is out of their range if `lost_dim` names no spatial axis.
        """
        return None if self.lost_dim is None else self.lost_dim - len(self.model_input_shape) + rank

    def output_patch(self, rank: int) -> tuple[int, ...]:
        """Return the shape that the network returns along the `rank` spatial axes."""
        if self.model_output_shape is not None:
            return self.model_output_shape[-rank:]
        lost = self.lost_axis(rank)
        return tuple(1 if a == lost else p for a, p in enumerate(self.model_input_shape[-rank:]))


_REQUIRED_KEYS = {
    "class": ("class_file", "class_name"),
    "torchscript": ("ts_file",),
    "file": ("model_file",),
    "exported": ("model_file",),
    "json": ("json_file",),
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
    return problems + precision_problems(model)


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
        model.dtype not in _FLOATING_DTYPES and value not in HALF_PRECISIONS
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
