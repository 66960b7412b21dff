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

SLEAP = "sleap"
"""Runtime of the networks of sleap-nn."""
FLOATING_DTYPES = ("float16", "bfloat16", "float64")
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
        if self.dtype in FLOATING_DTYPES:
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
