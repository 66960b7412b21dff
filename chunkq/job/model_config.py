"""The section `model_config` of a job file: the network, and how to run it."""

from __future__ import annotations

from typing import Annotated, Literal

from chunkq.images.sleap_package import package_files
from chunkq.job.fields import (
    Dtype,
    Folders,
    NonNegative,
    OutputShape,
    Positive,
    Section,
    Shape,
    key_doc,
)
from chunkq.plan.outputs import HeadName

STOCHASTIC = "the network is random, so another run gives other bytes (model_config.stochastic)"
"""What plan and report say of a job with `stochastic`."""
HALF_PRECISIONS = ("bfloat16", "float16")
"""Precisions in which torch's autocast runs a float32 network."""
TENSORRT_PRECISIONS = ("tf32", "float16")
"""Precisions that ONNX Runtime can request of TensorRT, which has TF32 on by itself."""

SLEAP = "sleap"
"""Runtime of the networks of sleap-nn."""
PACKAGE_KEYS = frozenset(
    {"runtime", "type", "package", "model_input_shape", "max_batch_size", "device", "trusted"}
    | {"precision"}
)
"""Keys that have a meaning beside `package`."""

_FLOATING_DTYPES = ("float16", "bfloat16", "float64")
"""Dtypes of networks with floating-point weights other than float32."""


class ModelConfig(Section):
    """The network: its files, its input and output shapes, and how to run it."""

    runtime: Annotated[
        Literal["torch", "tensorflow", "onnx", "numpy", "sleap"],
        key_doc(
            "Network",
            "Framework that runs the network. With `package` it is `sleap`.",
            example="torch",
            unit=None,
            see="guides/models.md",
        ),
    ]
    type: Annotated[
        Literal["class", "file", "torchscript", "exported", "json", "package"],
        key_doc(
            "Network",
            "Kind of the files that hold the network: `class`, a Python class or function, with a "
            "checkpoint where it needs one; `file`, a model file of the runtime; `torchscript`, a "
            "TorchScript file; `exported`, a torch.export program; `json`, Keras JSON; `package`, "
            "the folders of `package`.",
            example="class",
            unit=None,
            see="guides/models.md",
        ),
    ]
    model_input_shape: Annotated[
        Shape,
        key_doc(
            "Batches",
            "Shape of one item of a batch as the network receives it. One entry per spatial "
            "axis, or one more with the number of channels first. With runtime `tensorflow` or "
            "`onnx` the channel axis can also be the last. In a job over images it follows from "
            "`image.crop`, or `image.resize` of two numbers; else set the shape of one image, such "
            "as `[3, 48, 64]`.",
            example=[1, 64, 64, 64],
            unit="voxels",
            see="guides/models.md#where-the-channels-are",
        ),
    ]
    model_output_shape: Annotated[
        OutputShape | None,
        key_doc(
            "Batches",
            "Shape of one item of a batch as the network returns it. One entry per axis, or one "
            "more with the channels first, with runtime `tensorflow` or `onnx` first or last. An "
            "output that is smaller than the input is centered in it. With `outputs` that name a "
            "`head`, a mapping has one shape per head.",
            example=[3, 64, 64, 64],
            unit="voxels; channels for the first of one more entry",
            omitted="that of the input; with `outputs`, found by running one batch",
        ),
    ] = None
    dtype: Annotated[
        Dtype,
        key_doc(
            "Batches",
            "Dtype of the batches. Values that it cannot hold are refused. `bfloat16` is for "
            "torch.",
            example="float16",
            unit=None,
            see="guides/models.md#speed-and-precision",
        ),
    ] = "float32"
    max_batch_size: Annotated[
        Positive,
        key_doc(
            "Batches",
            "Patches that the network computes together. A worker that runs out of memory halves "
            "it.",
            example=4,
            unit="patches",
        ),
    ] = 1
    device: Annotated[
        Literal["cpu", "cuda"],
        key_doc(
            "Device and speed",
            "Device that runs the network.",
            example="cuda",
            unit=None,
        ),
    ] = "cpu"
    processing_steps: Annotated[
        str | None,
        key_doc(
            "Batches",
            "Python file with functions that run before and after the network.",
            example="steps.py",
            unit=None,
            omitted="no steps",
            see="guides/models.md#steps-around-the-network",
        ),
    ] = None
    lost_dim: Annotated[
        NonNegative | None,
        key_doc(
            "Batches",
            "Index in `model_input_shape` of the axis that is 1, or missing, in the output of a "
            "2.5-D network.",
            example=0,
            unit="index of an axis",
            omitted="the output has all axes",
        ),
    ] = None
    join_dim: Annotated[
        NonNegative | None,
        key_doc(
            "Batches",
            "Axis of a batch along which several inputs are stacked. The batch axis counts as 0. "
            "`model_input_shape` has the length of one input there.",
            example=1,
            unit="index of an axis",
            omitted="inputs are not stacked; each one is computed on its own",
        ),
    ] = None
    class_file: Annotated[
        str | None,
        key_doc(
            "Network",
            "Python file with the class or function. For type `class`.",
            example="net.py",
            unit=None,
            omitted="the package that `class_name` names",
        ),
    ] = None
    class_name: Annotated[
        str | None,
        key_doc(
            "Network",
            "Name of the class or function in `class_file`. Without `class_file`, the full name "
            "of a class of an installed package.",
            example="UNet",
            unit=None,
            omitted="none; required for type `class`",
        ),
    ] = None
    kwargs_file: Annotated[
        str | None,
        key_doc(
            "Network",
            "Python file with a dict `kwargs` of arguments for the class or function.",
            example="kwargs.py",
            unit=None,
            omitted="no arguments",
        ),
    ] = None
    checkpoint: Annotated[
        str | None,
        key_doc(
            "Network",
            "File with the weights that are loaded into the class.",
            example="net.pt",
            unit=None,
            omitted="the weights that the code sets",
            see="guides/models.md",
        ),
    ] = None
    model_file: Annotated[
        str | None,
        key_doc(
            "Network",
            "Model file. For types `file` and `exported`.",
            example="model.onnx",
            unit=None,
            omitted="none; required for types `file` and `exported`",
        ),
    ] = None
    ts_file: Annotated[
        str | None,
        key_doc(
            "Network",
            "TorchScript file. For type `torchscript`.",
            example="model.ts",
            unit=None,
            omitted="none; required for type `torchscript`",
        ),
    ] = None
    json_file: Annotated[
        str | None,
        key_doc(
            "Network",
            "Keras JSON file. For type `json`.",
            example="model.json",
            unit=None,
            omitted="none; required for type `json`",
        ),
    ] = None
    package: Annotated[
        Folders | None,
        key_doc(
            "Network",
            "Folder of a network of sleap-nn: of a trained model, or of an export to ONNX. A list "
            "of two folders is a top-down model: the one of the centers, then the one of the "
            "crops. `runtime`, `type` and `model_input_shape` follow from it. Only for "
            "`inference_type` `image`.",
            example=["models/centroid", "models/centered_instance"],
            unit=None,
            omitted="the network is in the files that `type` names",
            see="guides/images.md#networks-of-sleap-nn",
        ),
    ] = None
    trusted: Annotated[
        bool,
        key_doc(
            "Network",
            "Whether to load a model file that can run code or reach other files.",
            example=True,
            unit=None,
            see="security.md#model-files",
        ),
    ] = False
    stochastic: Annotated[
        bool,
        key_doc(
            "Network",
            "Whether to permit a network that returns different outputs for one batch. Results "
            "can then not be reproduced. Random weights are refused nevertheless.",
            example=True,
            unit=None,
            see="guides/models.md#reproducible-results",
        ),
    ] = False
    precision: Annotated[
        Literal["tf32", "float32", "bfloat16", "float16"] | None,
        key_doc(
            "Device and speed",
            "Precision of the network's arithmetic. `bfloat16` is for torch, `float16` for torch "
            "and TensorRT.",
            example="bfloat16",
            unit=None,
            omitted="`dtype` if that is `float16`, `bfloat16` or `float64`; `tf32` for torch on "
            "`cuda` and for TensorRT; else `float32`",
            see="guides/models.md#speed-and-precision",
        ),
    ] = None
    provider: Annotated[
        Literal["cuda", "tensorrt"] | None,
        key_doc(
            "Device and speed",
            "Library that runs an ONNX graph on `cuda`: the kernels of ONNX Runtime (`cuda`) or "
            "TensorRT.",
            example="tensorrt",
            unit=None,
            omitted="`cuda`",
            see="guides/models.md#tensorrt",
        ),
    ] = None
    compile: Annotated[
        bool,
        key_doc(
            "Device and speed",
            "Whether to compile the network with `torch.compile`. The result is kept in the "
            "user's cache folder.",
            example=True,
            unit=None,
        ),
    ] = False
    channels_last: Annotated[
        bool,
        key_doc(
            "Device and speed",
            "Whether to use the memory format channels last of torch.",
            example=True,
            unit=None,
        ),
    ] = False
    cuda_graph: Annotated[
        bool,
        key_doc(
            "Device and speed",
            "Whether to record one batch as a CUDA graph and replay it. For torch on `cuda`.",
            example=True,
            unit=None,
        ),
    ] = False

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
        is_torch_on_gpu = self.runtime in ("torch", SLEAP) and self.device == "cuda"
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
        files = {key: path for key in keys if (path := getattr(self, key)) is not None}
        return files | package_files(self.package or ())

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

    def of_head(self, head: HeadName) -> ModelConfig:
        """Return the keys with the output shape of one head of the network, if it is declared."""
        shapes = self.model_output_shape
        if not isinstance(shapes, dict):
            return self
        return self.model_copy(update={"model_output_shape": shapes.get(str(head))})

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """`model_output_shape` of a network with one head, None if it is missing.

        Raises ValueError if there are several; see `of_head`.
        """
        if isinstance(self.model_output_shape, dict):
            raise ValueError("the network has several heads")
        return self.model_output_shape

    def output_patch(self, rank: int) -> tuple[int, ...]:
        """Return the shape that the network returns along the `rank` spatial axes."""
        if self.output_shape is not None:
            return self.output_shape[-rank:]
        lost = self.lost_axis(rank)
        return tuple(1 if a == lost else p for a, p in enumerate(self.model_input_shape[-rank:]))


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
