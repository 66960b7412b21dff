"""Job file: strict, frozen pydantic models. Validation does not read the volumes."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import Repr
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from chunkq.access import BUCKET_SCHEMES
from chunkq.errors import ArgumentError, ErrorCode, JobError
from chunkq.geometry.grids import Edge
from chunkq.geometry.padding import PadMode
from chunkq.images.image_spec import ImageSpec
from chunkq.images.sleap_package import folder_of
from chunkq.job.class_names import with_class_names
from chunkq.job.fields import (
    BY_HEAD,
    ONE_SHAPE,
    Fill,
    InferenceType,
    InputConfig,
    Inputs,
    Mask,
    MaskConfig,
    Names,
    NonNegative,
    Offsets,
    Positive,
    Region,
    Section,
    Shape,
    SkipEmpty,
    Widths,
    key_doc,
)
from chunkq.job.image_config import GUIDE, ImageConfig, Keep, PeaksConfig, TruthConfig
from chunkq.job.image_job import IMAGE, image_problems, kind_problems, with_image_defaults
from chunkq.job.job_path import canonical, without_format
from chunkq.job.model_config import ModelConfig, model_problems
from chunkq.job.output_config import (
    Classes,
    CodecConfig,
    CodecKey,
    OutputConfig,
    OutputDtype,
    Outputs,
    PyramidConfig,
    ValueRange,
    class_count,
)
from chunkq.job.output_name import check_new_output
from chunkq.job.output_values import value_problems
from chunkq.paths import absolute, absolute_input, split_format, without_secret
from chunkq.plan.outputs import Activation, Combine

MAX_FILE_BYTES = 1 << 20
"""Maximum size of a job file. A larger file is something else."""
SCHEMA_FILE = Path(__file__).with_name("job_file.schema.json")
"""JSON schema of the job file, for editors. `docs/job_file_page.py` writes it."""
MAX_VALUES = 100_000
"""Maximum number of values in a job file; each repetition by a YAML alias counts."""


class DaskConfig(Section):
    """Options to connect to a Dask cluster or to start one."""

    address: Annotated[
        str | None,
        key_doc(
            "Cluster",
            "Scheduler of a running cluster: `HOST`, `HOST:PORT` or `tcp://HOST:PORT`.",
            example="login1:8786",
            unit=None,
            omitted="none; set it for `cluster: running`",
        ),
    ] = None
    protocol: Annotated[
        Literal["tcp", "tls", "ucx"],
        key_doc(
            "Cluster",
            "Transport between the processes of the cluster. `ucx` needs the package "
            "distributed-ucxx and has no encryption.",
            example="tls",
            unit=None,
        ),
    ] = "tcp"
    interface: Annotated[
        str | None,
        key_doc(
            "Cluster",
            "Network interface between the nodes.",
            example="ib0",
            unit=None,
            omitted="chosen by Dask",
        ),
    ] = None
    scheduler_port: Annotated[
        Positive,
        key_doc(
            "Cluster",
            "Port of the scheduler. A cluster that `chunkq run` creates uses any free port unless "
            "this is set.",
            example=8787,
            unit=None,
        ),
    ] = 8786
    n_workers: Annotated[
        Positive | None,
        key_doc(
            "Cluster",
            "Worker processes on each node of a cluster that `chunkq run` creates.",
            example=4,
            unit="processes",
            omitted="one per GPU, or one without GPUs",
        ),
    ] = None
    threads_per_worker: Annotated[
        Positive | None,
        key_doc(
            "Cluster",
            "Chunks in flight in each worker process.",
            example=2,
            unit="chunks",
            omitted="the default of `--depth`",
        ),
    ] = None


class RayConfig(Section):
    """Options to connect to a Ray cluster or to start one."""

    address: Annotated[
        str | None,
        key_doc(
            "Cluster",
            "Head of a running cluster: `HOST` or `HOST:PORT`.",
            example="login1:6379",
            unit=None,
            omitted="none; set it for `cluster: running`",
        ),
    ] = None
    port: Annotated[
        Positive,
        key_doc(
            "Cluster",
            "Port of the head.",
            example=6380,
            unit=None,
        ),
    ] = 6379


class Job(Section):
    """A job: a network, the volumes and how overlapping predictions are combined.

    Lists have one entry per spatial axis of the volume, in storage order; lengths are in voxels.
    """

    input: Annotated[
        Inputs,
        key_doc(
            "Input and output",
            "Volume to read, or a list of volumes: Zarr v2 or v3, OME-Zarr (its full-resolution "
            "level), NIfTI, TIFF, HDF5, N5, Neuroglancer precomputed or `.npy`, as a path or a URL "
            "such as `s3://bucket/volume.zarr`. A path into a group or file is allowed: "
            "`volume.zarr/raw`, `data.h5/raw`; a pattern is a stack: `slices/*.tif`. With "
            "`model_config.join_dim` the volumes of a list are stacked along that axis. Without "
            "it each one is computed on its own, and `output` is a group with one image per "
            "volume, named like its file. A mapping with `path` says what is read of it and how "
            "it is accessed. With `inference_type` `image`: a folder of images, a pattern such as "
            "`photos/*.jpg`, a CSV or Parquet table with a column `path`, or a list of them.",
            example="volume.zarr",
            unit=None,
            see="guides/inputs.md",
        ),
    ]
    output: Annotated[
        str,
        key_doc(
            "Input and output",
            "OME-Zarr image to write. `precomputed://PATH` writes a Neuroglancer precomputed "
            "volume. The name of a file, `seg.nii.gz`, `seg.tif` or `seg.h5`, writes NIfTI, "
            "OME-TIFF or HDF5 when all chunks are done. With `inference_type` `image` it is a "
            "table: `.parquet`, `.csv` or `.jsonl`. The job folder is created beside it, as "
            "`OUTPUT.chunkq`.",
            example="labels.zarr",
            unit=None,
            see="guides/convert.md#the-output-of-a-job",
        ),
    ]
    queue: Annotated[
        str | None,
        key_doc(
            "Chunks and workers",
            "URL of the queue. The option `--queue` and the variable `CHUNKQ_QUEUE` come first.",
            example="redis://login1:6379",
            unit=None,
            omitted="the embedded queue, a file of this user",
            see="guides/index.md",
        ),
    ] = None
    cluster: Annotated[
        Literal["local", "slurm", "running"],
        key_doc(
            "Chunks and workers",
            "How a Dask or Ray cluster is created: `local` on this machine, `slurm` on the nodes "
            "of a SLURM allocation; `running` uses one that runs.",
            example="slurm",
            unit=None,
            see="guides/index.md#how-a-dask-or-ray-cluster-is-created",
        ),
    ] = "local"
    hardware: Annotated[
        Literal["gpu", "cpu_only"],
        key_doc(
            "Chunks and workers",
            "Devices of the workers. With `cpu_only` they use no GPU.",
            example="cpu_only",
            unit=None,
        ),
    ] = "gpu"
    combine: Annotated[
        Combine,
        key_doc(
            "Combination",
            "How overlapping predictions become one value. `weighted_avg`: the averaged scores. "
            "`soft`: labels of the averaged scores. `hard`: labels by majority vote. `std`: the "
            "standard deviation between overlapping predictions. `entropy`: that of the averaged "
            "probabilities. Averages, votes and deviations are weighted by `weight_function`.",
            example="soft",
            unit=None,
            see="concepts.md#combination",
        ),
    ] = "weighted_avg"
    inference_type: Annotated[
        InferenceType,
        key_doc(
            "Patches",
            "How patches are placed. `sliding_window`: every `strides` voxels. `patch`: edge to "
            "edge, once more for each entry of `offsets`. `crop_margin`: edge to edge after "
            "`margin` is cut from each output patch. `image`: no patches, the input is a list of "
            "images that the network sees whole.",
            example="sliding_window",
            unit=None,
            see="guides/geometry.md",
        ),
    ] = "patch"
    chunksize: Annotated[
        Shape | None,
        key_doc(
            "Chunks and workers",
            "Size of a chunk, the unit of work on the queue, along each axis. At least one output "
            "patch. With `inference_type` `image` one number, of images.",
            example=[256, 256, 256],
            unit="voxels",
            omitted="chosen from volume, patch, strides and outputs; equal on every machine",
            see="guides/geometry.md",
        ),
    ] = None
    pad_mode: Annotated[
        PadMode,
        key_doc(
            "Patches",
            "Values of the voxels outside the volume, as in `np.pad`.",
            example="reflect",
            unit=None,
        ),
    ] = "constant"
    pad_value: Annotated[
        float,
        key_doc(
            "Patches",
            "Value of the voxels outside the volume for `pad_mode` `constant`. The dtype of the "
            "input and `model_config.dtype` must be able to hold it.",
            example=-1000,
            unit="value of the input",
        ),
    ] = 0
    pad_width: Annotated[
        Widths | None,
        key_doc(
            "Patches",
            "Width along each axis by which patches reach beyond the border of the volume.",
            example=[16, 16, 16],
            unit="voxels",
            omitted="0; with `crop_margin` and along `lost_dim`, the width that covers the border",
        ),
    ] = None
    offsets: Annotated[
        Offsets,
        key_doc(
            "Patches",
            "Further grids of patches: each entry adds one that starts this many voxels later "
            "along each axis. Negative numbers are allowed. Only for `patch`.",
            example=[[32, 32, 32]],
            unit="voxels",
        ),
    ] = ()
    strides: Annotated[
        Shape | None,
        key_doc(
            "Patches",
            "Distance from one patch to the next along each axis, at most the output patch. Only "
            "for `sliding_window`, and required there.",
            example=[32, 32, 32],
            unit="voxels",
            omitted="none",
        ),
    ] = None
    margin: Annotated[
        Widths | None,
        key_doc(
            "Patches",
            "Width that is cut from each side of every output patch along each axis. Only for "
            "`crop_margin`, and required there.",
            example=[8, 8, 8],
            unit="voxels",
            omitted="none",
        ),
    ] = None
    edge: Annotated[
        Edge | None,
        key_doc(
            "Patches",
            "What happens where the last patch of an axis would extend beyond the border: `shift` "
            "moves it back so that it ends at the border, `pad` lets it extend.",
            example="shift",
            unit=None,
            omitted="`shift` for `sliding_window`, else `pad`",
        ),
    ] = None
    weight_function: Annotated[
        Names,
        key_doc(
            "Combination",
            "Weights of the voxels of an output patch: one of `weight_uniform`, "
            "`weight_gaussian`, `weight_linear`, `weight_hann`, `weight_bump`, or `[FILE.py, "
            "FUNCTION]`. The function takes the shape of the output patch and returns finite, "
            "positive weights of that shape.",
            example=["weight_gaussian"],
            unit=None,
            see="guides/geometry.md",
        ),
    ] = ("weight_uniform",)
    activation: Annotated[
        Activation,
        key_doc(
            "Combination",
            "Function that is applied to each prediction before predictions are combined.",
            example="softmax",
            unit=None,
        ),
    ] = "none"
    activation_after: Annotated[
        Activation | None,
        key_doc(
            "Combination",
            "Function that is applied to the averages, for tools that average the scores "
            "themselves, such as nnU-Net. Only for `combine` `weighted_avg`, without `activation`.",
            example="softmax",
            unit=None,
            see="guides/values.md",
            omitted="none",
        ),
    ] = None
    nan: Annotated[
        Literal["fail", "zero"],
        key_doc(
            "Combination",
            "What happens where a network returns NaN or infinity: the chunk fails (`fail`), or "
            "the value counts as 0 after the activation (`zero`).",
            example="zero",
            unit=None,
        ),
    ] = "fail"
    classes: Annotated[
        Classes | None,
        key_doc(
            "Combination",
            "Number of classes, a list of their names, or a file with one name per line. If the "
            "network returns labels, class numbers from 0 in one channel, each prediction is a "
            "vote. `soft` and `hard` store the label with the largest weighted share of votes, "
            "`weighted_avg` the shares, one channel per class. If the network returns one channel "
            "per class, it must be their number. Names are stored with the labels. Two names "
            "beside `activation` `sigmoid` are those of the labels 0 and 1 of one channel.",
            example=5,
            unit="classes",
            omitted="the network returns scores",
            see="guides/models.md#networks-that-return-labels",
        ),
    ] = None
    outputs: Annotated[
        Outputs | None,
        key_doc(
            "Outputs",
            "Named outputs of one pass of the network, instead of the keys `combine`, "
            "`activation`, `output_dtype` and `classes` of a job with one output. `output` is then "
            "a group with one OME-Zarr image per name.",
            example={
                "tissue": {"channels": "0:3", "activation": "softmax", "combine": "soft"},
                "distance": {"channels": 3},
            },
            unit=None,
            omitted="one output, which is the image `output`",
            see="guides/outputs.md",
        ),
    ] = None
    output_dtype: Annotated[
        OutputDtype | None,
        key_doc(
            "Input and output",
            "Dtype of the output. Integers store the values of `range`. Not for `combine` `soft` "
            "and `hard`.",
            example="uint8",
            unit=None,
            see="guides/values.md",
            omitted="`float32`; for labels `uint8`, for more than 256 classes `uint16`",
        ),
    ] = None
    zarr_format: Annotated[
        Literal[2, 3],
        key_doc(
            "Input and output",
            "Zarr version of the output: 3 is OME-Zarr 0.5, 2 is OME-Zarr 0.4.",
            example=2,
            unit=None,
        ),
    ] = 3
    range: Annotated[
        ValueRange | None,
        key_doc(
            "Input and output",
            "Values that become the smallest and the largest integer of an integer "
            "`output_dtype`. Values between them are rounded, others are clipped. Readers find "
            "`scale` and `offset` in the attributes.",
            example=[0, 20],
            unit="value of the prediction",
            see="guides/values.md",
            omitted="[0, 1] after softmax and sigmoid, for `entropy` [0, ln C]; else required for "
            "an integer dtype",
        ),
    ] = None
    pyramid: Annotated[
        PyramidConfig | None,
        key_doc(
            "Outputs",
            "Resolution levels of the output, which viewers need for large volumes. Workers write "
            "them while the job runs.",
            example={"levels": 5, "method": "mode"},
            unit=None,
            omitted="the full resolution only",
            see="guides/pyramids.md",
        ),
    ] = None
    storage_shards: Annotated[
        Shape | None,
        key_doc(
            "Outputs",
            "Size of the Zarr shards of the output along each axis: files that hold many storage "
            "chunks. A multiple of `storage_chunks` and a divisor of `chunksize`. Only for "
            "`zarr_format` 3.",
            example=[256, 256, 256],
            unit="voxels",
            omitted="no shards",
            see="guides/pyramids.md#shards",
        ),
    ] = None
    codec: Annotated[
        CodecKey | None,
        key_doc(
            "Outputs",
            "How the storage chunks of the output are compressed: `lz4`, `zstd`, `none`, or a "
            "mapping with name and level.",
            example="zstd",
            unit=None,
            see="guides/values.md",
            omitted="lz4",
        ),
    ] = None
    storage_chunks: Annotated[
        Shape | None,
        key_doc(
            "Input and output",
            "Size of the Zarr chunks of the output along each axis, a divisor of `chunksize`.",
            example=[64, 64, 64],
            unit="voxels",
            omitted="a divisor of `chunksize`, chosen from the volume",
        ),
    ] = None
    roi: Annotated[
        Region | None,
        key_doc(
            "Input and output",
            "Region of the volume that is computed: for each spatial axis `[start, stop]`, of "
            "which the stop is excluded, or `null` for the whole axis. Voxels are counted from 0 "
            "in the level that is read, negative ones from the end; `null` as start or stop is an "
            "end of the axis. The output has the shape of the region and the values of the output "
            "of the whole volume.",
            example=[[0, 200], [100, 900], None],
            unit="voxels",
            omitted="the whole volume",
            see="guides/regions.md",
        ),
    ] = None
    mask: Annotated[
        Mask | None,
        key_doc(
            "Empty space",
            "Mask of the volume: where the network runs. Patches without a voxel inside the mask "
            "are skipped, and voxels outside are `fill_value`. A path, or a mapping.",
            example={"path": "mask.zarr", "above": 0, "scale": [8, 8, 8]},
            unit=None,
            omitted="the whole volume",
            see="guides/empty-space.md",
        ),
    ] = None
    skip_empty: Annotated[
        SkipEmpty | None,
        key_doc(
            "Empty space",
            "Which patches are empty and are not run: those whose voxels all equal a number, with "
            "`{below: NUMBER}` those whose voxels are all less, with `missing` those whose storage "
            "chunks are all absent. Their prediction is `fill_value`.",
            example={"below": 12},
            unit="value of the input",
            omitted="no patch is skipped",
            see="guides/empty-space.md",
        ),
    ] = None
    fill_value: Annotated[
        Fill,
        key_doc(
            "Empty space",
            "Value of the output where there is no prediction: outside `mask`, and in patches that "
            "`skip_empty` skips. A class for labels. It is also the fill value of the output "
            "array.",
            example=-1,
            unit="value of the output",
            see="guides/empty-space.md",
        ),
    ] = 0
    allow_empty: Annotated[
        bool,
        key_doc(
            "Input and output",
            "Whether to accept an input without a single storage chunk. All of its voxels are the "
            "fill value, usually because the path or the names of the chunks are wrong.",
            example=True,
            unit=None,
        ),
    ] = False
    threads: Annotated[
        Positive | None,
        key_doc(
            "Chunks and workers",
            "Threads of the network in each worker process. Set it where results must be "
            "byte-identical between machines with different numbers of cores.",
            example=4,
            unit="threads",
            omitted="the cores of the machine, divided among its worker processes",
        ),
    ] = None
    image: Annotated[
        ImageConfig | None,
        key_doc(
            "Images",
            "How the pixels of an image become the input of the network: decode, resize, crop, "
            "divide by `scale`, subtract `mean`, divide by `std`. Only for `inference_type` "
            "`image`.",
            example={"resize": 256, "crop": 224, "scale": 255},
            unit=None,
            omitted="RGB pixels as they are",
            see=GUIDE,
        ),
    ] = None
    truth: Annotated[
        TruthConfig | None,
        key_doc(
            "Images",
            "Where the true label of each image is. The output then says which predictions are "
            "correct, and the report has the accuracy. Only for `inference_type` `image`.",
            example={"regex": "n[0-9]+-([^/]+)/"},
            unit=None,
            omitted="no truth",
            see=GUIDE,
        ),
    ] = None
    top_k: Annotated[
        Positive | None,
        key_doc(
            "Images",
            "Number of classes in the columns `top_labels` and `top_scores`. Only for "
            "`inference_type` `image`.",
            example=3,
            unit="classes",
            omitted="5",
            see=GUIDE,
        ),
    ] = None
    keep: Annotated[
        Keep | None,
        key_doc(
            "Images",
            "Which outputs of the network the table has: `none`, only what follows from them; "
            "`logits`, a column with them before `activation`; `features`, such a column instead "
            "of classes. Only for `inference_type` `image`.",
            example="logits",
            unit=None,
            omitted="`none`",
            see=GUIDE,
        ),
    ] = None
    peaks: Annotated[
        PeaksConfig | None,
        key_doc(
            "Images",
            "The network returns one map per keypoint, and the table has the coordinates of "
            "keypoints. `classes` has their names. `{}` stands for the defaults. Only for "
            "`inference_type` `image`.",
            example={"threshold": 0.3, "multiple": True},
            unit=None,
            omitted="the network returns scores of classes",
            see=GUIDE,
        ),
    ] = None
    max_errors: Annotated[
        NonNegative | None,
        key_doc(
            "Images",
            "Number of images that may fail. With more, the job ends without its output. It can be "
            "raised later. Only for `inference_type` `image`.",
            example=100,
            unit="images",
            omitted="any number may fail",
            see=GUIDE,
        ),
    ] = None
    price: Annotated[
        float | None,
        Field(ge=0, allow_inf_nan=False),
        key_doc(
            "Chunks and workers",
            "Price of a device for an hour, in any currency. Plan, status and report then show "
            "what the job costs.",
            example=2.1,
            unit="money per hour",
            omitted="no costs are shown",
        ),
    ] = None
    dask_config: Annotated[
        DaskConfig,
        key_doc(
            "Cluster",
            "Dask cluster to use or to create.",
            example={"n_workers": 2},
            unit=None,
            see="guides/dask.md",
        ),
    ] = DaskConfig()
    ray_config: Annotated[
        RayConfig,
        key_doc(
            "Cluster",
            "Ray cluster to use or to create.",
            example={"port": 6380},
            unit=None,
            see="guides/ray.md",
        ),
    ] = RayConfig()
    model: Annotated[
        ModelConfig,
        key_doc(
            "Network",
            "Files of the network, the shapes of its batches, and how it is run.",
            example={
                "runtime": "torch",
                "type": "class",
                "class_file": "net.py",
                "class_name": "Net",
                "checkpoint": "net.pt",
                "model_input_shape": [1, 64, 64, 64],
            },
            unit=None,
            see="guides/models.md",
        ),
    ] = Field(alias="model_config")

    @model_validator(mode="after")
    def _check_key_combinations(self) -> Job:
        problems = [
            *kind_problems(self),
            *(_image_problems(self) if self.is_image else _volume_problems(self)),
            *_class_problems(self),
            *_path_problems(self),
            *_credential_problems(self),
            *_access_problems(self),
        ]
        if problems:
            raise JobError(problems)
        return self

    @property
    def is_image(self) -> bool:
        """Whether the network sees each image of a list whole."""
        return self.inference_type == IMAGE

    @property
    def image_spec(self) -> ImageSpec:
        """How the pixels of an image become the input of the network."""
        return (self.image or ImageConfig()).spec()

    @property
    def inputs(self) -> tuple[InputConfig, ...]:
        """Each input with how it is accessed and what is read of it."""
        return tuple(InputConfig(path=i) if isinstance(i, str) else i for i in self.input)

    @property
    def input_paths(self) -> tuple[str, ...]:
        """The path of each input."""
        return tuple(config.path for config in self.inputs)

    @property
    def output_path(self) -> str:
        """Path of the output, without the name of its format."""
        return without_format(self.output)

    @property
    def is_precomputed(self) -> bool:
        """Whether the output is a Neuroglancer precomputed volume."""
        return self.output_path != self.output

    def output_configs(self) -> dict[str, OutputConfig]:
        """Return the outputs by name, with the keys of the job where they have none of their own.

        The only output of a job without the key `outputs` has the name "".
        """
        common = {
            "fill_value": self.fill_value,
            "storage_chunks": self.storage_chunks,
            "storage_shards": self.storage_shards,
            "codec": self.codec,
        }
        if self.outputs is None:
            only = OutputConfig(
                combine=self.combine,
                activation=self.activation,
                activation_after=self.activation_after,
                output_dtype=self.output_dtype,
                range=self.range,
                classes=self.classes,
            )
            return {"": only.model_copy(update=common)}
        return {
            name: one.model_copy(
                update={key: v for key, v in common.items() if getattr(one, key) is None}
            )
            for name, one in self.outputs.items()
        }

    @property
    def step_edge(self) -> Edge:
        """Placement of the last patch: `edge`, or the default of the inference type."""
        return self.edge or ("shift" if self.inference_type == "sliding_window" else "pad")

    @property
    def files(self) -> dict[str, str]:
        """Files other than the volumes that determine the result, by key path."""
        files = {f"model_config.{key}": path for key, path in self.model.files.items()}
        if len(self.weight_function) == 2:
            files["weight_function"] = self.weight_function[0]
        return files

    def with_files(self, paths: Mapping[str, str]) -> Job:
        """Return a copy of the job with the paths of some `files` replaced, by key path."""
        section = "model_config."
        model: dict[str, Any] = {}
        package = [*(self.model.package or ())]
        for key, path in paths.items():
            name = key.removeprefix(section)
            number = folder_of(name)
            if number is not None:
                package[number] = os.path.dirname(path)
            elif name != key:
                model[name] = path
        if package:
            model["package"] = tuple(package)
        update: dict[str, Any] = {"model": self.model.model_copy(update=model)}
        if "weight_function" in paths:
            update["weight_function"] = (paths["weight_function"], *self.weight_function[1:])
        return self.model_copy(update=update)

    def with_model(self, **keys: Any) -> Job:
        """Return a copy of the job with some keys of `model_config` replaced, unchecked."""
        return self.model_copy(update={"model": self.model.model_copy(update=keys)})

    def as_dict(self) -> dict[str, Any]:
        """Return the job as JSON values with the key names of the job file."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def select_job_file(job: Path | None, config: Path | None) -> Path:
    """Return the job file of a command: its argument JOB, or the value of its option -c.

    Raises JobError unless exactly one of them is given.
    """
    if job is not None and config is not None:
        raise JobError(f"-c: found {config} beside the job file {job}; use one of them")
    path = job or config
    if path is None:
        raise JobError("JOB: missing; name a YAML or JSON job file, `chunkq init` writes one")
    return path


def load_job(
    source: str | Path | Mapping[str, Any],
    *,
    input: str | None = None,
    output: str | None = None,
) -> Job:
    """Read a job from a YAML file, a JSON file or a mapping, and make its paths absolute.

    Paths in a file are relative to the file's folder. Paths in a mapping, and the arguments
    `input` and `output`, which replace those of the job, are relative to the working directory.
    Raises JobError with one line per mistake.
    """
    values = job_values(source)
    if input is not None:
        volume = absolute_input(input, Path.cwd()) if input else ""
        mapping = values.get("input")
        values["input"] = {**mapping, "path": volume} if isinstance(mapping, dict) else volume
    if output is not None:
        values["output"] = canonical(output, Path.cwd()) if output else ""
    return _parse_with_output(values)


def job_values(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a job file or a mapping, with absolute paths and not validated.

    Raises ArgumentError for a source of another type, and JobError for an unreadable file.
    """
    if isinstance(source, Mapping):
        values, base = dict(source), Path.cwd()
    elif isinstance(source, (str, os.PathLike)):
        path = Path(os.path.expanduser(source))
        values, base = _read_file(path), path.absolute().parent
    else:
        raise ArgumentError(
            "job: expected the path of a job file or a dict of its keys, found "
            f"{type(source).__name__}"
        )
    _make_absolute(values, base)
    return with_class_names(values, base)


def _parse_with_output(values: Mapping[str, Any]) -> Job:
    """Validate a mapping, including the canonical form of its output path.

    Raises JobError with one line per mistake.
    """
    output, problem = values.get("output"), None
    if isinstance(output, str) and output:
        try:
            is_table = values.get("inference_type") == IMAGE
            check_new_output(output, Path("/"), is_table=is_table)
        except JobError as error:
            problem = error
    try:
        job = parse_job(values)
    except JobError as error:
        if problem is None or any(line.startswith("output: ") for line in error.problems):
            raise
        raise JobError([*error.problems, *problem.problems], code=error.code) from None
    if problem is not None:
        raise problem
    return job


def parse_job(values: Mapping[str, Any]) -> Job:
    """Validate a mapping with absolute paths. Raises JobError with one line per mistake."""
    values = with_image_defaults(values)
    try:
        return Job.model_validate(values)
    except ValidationError as error:
        errors = _independent(error.errors())
    has_one_input = not isinstance(values.get("input"), (list, tuple))
    for detail in errors:
        detail["loc"] = _without_branches(detail["loc"], has_one_input=has_one_input)
    lines = [_message(error) for error in errors]
    raise JobError([*lines, *_combination_problems(values, [error["loc"] for error in errors])])


def _independent(errors: list[Any]) -> list[Any]:
    """Return pydantic's errors without those of lists that are too short without invalid items."""
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or not any(e["loc"][:-1][: len(error["loc"])] == error["loc"] for e in errors)
    ]


PLACEHOLDER_MODEL = MappingProxyType(
    {"runtime": "torch", "type": "torchscript", "model_input_shape": [1]}
)


def _combination_problems(
    values: Mapping[str, Any], invalid: list[tuple[int | str, ...]]
) -> list[str]:
    """Check the combinations of the valid keys; placeholders replace required invalid keys.

    pydantic skips these checks if any key is invalid. `invalid` has the locations of these keys.
    """
    invalid = [location for location in invalid if location]
    model = values.get("model_config")
    model = dict(model) if isinstance(model, dict) else {"ts_file": "/"}
    valid = dict(values)
    for section, *inner in invalid:
        if section == "model_config" and inner:
            model.pop(str(inner[0]), None)
        else:
            valid.pop(str(section), None)
    if "type" not in model:
        model["ts_file"] = "/"
    valid = {"input": "/", "output": "/", **valid, "model_config": {**PLACEHOLDER_MODEL, **model}}
    reported = {".".join(map(str, location[:2])) for location in invalid}
    reported |= {str(location[0]) for location in invalid if location[0] != "model_config"}
    try:
        Job.model_validate(valid)
    except JobError as error:
        # A line such as "strides: unsupported for inference_type patch" may come from the default
        # that replaced an invalid inference_type.
        keys = "|".join(re.escape(str(location[-1])) for location in invalid) or "(?!)"
        reason = re.compile(rf"\bfor ({keys})\b")
        return [
            line
            for line in error.problems
            if line.partition(":")[0] not in reported and not reason.search(line)
        ]
    except ValidationError:
        pass
    return []


def job_schema() -> dict[str, Any]:
    """Return the JSON schema of the job file."""
    return Job.model_json_schema(by_alias=True)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = _read_content(path).decode("utf-8-sig")  # editors on Windows write a mark
    except FileNotFoundError:
        raise JobError(
            f"{path}: no such job file; fix the path, or run `chunkq init` to write a job file",
            code=ErrorCode.JOB_FILE_MISSING,
        ) from None
    except UnicodeDecodeError as error:
        problem = f"not text in UTF-8 (byte {error.start}); save a YAML or JSON file as UTF-8"
        raise _unreadable(path, problem) from None
    except (OSError, ValueError) as error:  # ValueError: an invalid path
        reason = getattr(error, "strerror", None) or error
        raise _unreadable(path, f"cannot be read: {reason}; use a YAML or JSON file") from None
    import yaml  # imported here because most commands read no job file

    from chunkq.job import yaml_values

    try:
        values = (
            json.loads(text, object_pairs_hook=yaml_values.unique)
            if path.suffix == ".json"
            else yaml_values.load(text)
        )
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise _unreadable(path, f"not JSON: {error.msg} at {position}; fix the syntax") from None
    except yaml.YAMLError as error:
        raise _unreadable(path, f"not YAML: {_yaml_reason(error)}") from None
    except yaml_values.DuplicateKeyError as error:
        raise _unreadable(path, str(error)) from None
    except RecursionError:
        raise _unreadable(path, "lists or mappings are nested too deeply; remove levels") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        # PyYAML and json raise these for a number of 5000 digits, or `!!timestamp 2001-99-99`.
        reason = " ".join(str(error).split())
        raise _unreadable(path, f"a value cannot be read: {reason}; fix the value") from None
    if not isinstance(values, dict):
        content = "no content" if values is None else _printed(values)
        advice = "run `chunkq init` to write a job file"
        if isinstance(values, str) and ":" in values:
            advice = "write a space after each colon"
        raise _unreadable(path, f"expected a mapping of keys to values, found {content}; {advice}")
    _check_size(path, values)
    return values


def _yaml_reason(error: Exception) -> str:
    """Return what is wrong with a YAML file, where, and what to do."""
    problem = getattr(error, "problem", None)
    mark = getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return f"{' '.join(str(error).split())}; fix the syntax"
    position = f"line {mark.line + 1}, column {mark.column + 1}"
    if r"'\t'" in problem:
        return f"tab at {position}; use spaces"
    context, begin = getattr(error, "context", None), getattr(error, "context_mark", None)
    if "expected ':'" in problem and begin is not None:
        return f"line {begin.line + 1} has no colon with a space behind its key; add it"
    start = "" if begin is None or begin.line == mark.line else f" of line {begin.line + 1}"
    advice = next((a for text, a in _YAML_ADVICE.items() if text in problem), "fix the syntax")
    return f"{f'{context}{start}: ' if context else ''}{problem} at {position}; {advice}"


_YAML_ADVICE = {
    "cannot start any token": "put the value in quotes",
    "undefined alias": "put a value with * in quotes",
    "alphabetic or numeric": "put a value with * in quotes",
    "unknown escape": "use single quotes, in which a backslash is a character",
    "mapping values are not allowed": "fix the indentation, or put a value with a colon in quotes",
}
"""Part of a message of PyYAML -> what to do."""


def _unreadable(path: Path, problem: str) -> JobError:
    return JobError(f"{path}: {problem}", code=ErrorCode.JOB_FILE_UNREADABLE)


def _read_content(path: Path) -> bytes:
    """Return the content of a job file. Raises OSError if it is too large or not a file."""
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):  # reading a device may never end
            raise OSError("not a regular file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return content


def _check_size(path: Path, values: Any) -> None:
    """Raise JobError if there are more than `MAX_VALUES` values.

    YAML aliases can expand a few lines into 10^11 values, or into a list that contains itself.
    """
    count, pending = 0, [values]
    while pending:
        value = pending.pop()
        count += 1
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            pending.extend(value)
        if count + len(pending) > MAX_VALUES:
            raise _unreadable(
                path,
                f"contains more than {MAX_VALUES} values, or an alias that contains itself; "
                "remove values or aliases",
            )


def _make_absolute(values: dict[str, Any], base: Path) -> None:
    """Make every path in the mapping absolute, in place.

    Empty paths and values of a wrong type stay unchanged.
    """
    if isinstance(output := values.get("output"), str) and output:
        values["output"] = canonical(output, base)
    inputs = values.get("input")
    if isinstance(inputs, (list, tuple)):
        values["input"] = [_absolute_input(value, base) for value in inputs]
    elif inputs is not None:
        values["input"] = _absolute_input(inputs, base)
    if (mask := values.get("mask")) is not None:
        values["mask"] = _absolute_input(mask, base)
    weights = values.get("weight_function")
    if isinstance(weights, (list, tuple)) and len(weights) == 2 and isinstance(weights[0], str):
        values["weight_function"] = [absolute(weights[0], base), weights[1]]
    model = values.get("model_config")
    if isinstance(model, dict):
        paths = {"processing_steps"} | {k for k in ModelConfig.model_fields if k.endswith("_file")}
        values["model_config"] = {
            key: absolute(value, base)
            if key in paths | {"checkpoint"} and isinstance(value, str) and value
            else value
            for key, value in model.items()
        }
        if (package := model.get("package")) is not None:
            values["model_config"]["package"] = _absolute_folders(package, base)


def _absolute_folders(value: object, base: Path) -> object:
    """Return one folder, or a list of folders, with absolute paths; other values as they are."""
    if isinstance(value, str):
        return [absolute(value, base)] if value else value
    if isinstance(value, (list, tuple)):
        return [absolute(v, base) if isinstance(v, str) and v else v for v in value]
    return value


def _absolute_input(value: object, base: Path) -> object:
    """Return an input with an absolute path; a value of a wrong type stays unchanged."""
    if isinstance(value, str) and value:
        return absolute_input(value, base)
    if isinstance(value, dict) and isinstance(value.get("path"), str) and value["path"]:
        return {**value, "path": absolute_input(value["path"], base)}
    return value


SECTIONS: Mapping[str, type[Section]] = MappingProxyType(
    {
        "": Job,
        "model_config": ModelConfig,
        "input": InputConfig,
        "mask": MaskConfig,
        "dask_config": DaskConfig,
        "ray_config": RayConfig,
        "outputs": OutputConfig,
        "image": ImageConfig,
        "truth": TruthConfig,
        "pyramid": PyramidConfig,
        "codec": CodecConfig,
    }
)
"""Key of a section, '' for the top level -> its model."""


def _names(section: type[Section]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _key_of(location: Sequence[int | str]) -> tuple[str, str]:
    """Return the section and the key of a value of the job file."""
    names = [part for part in location if isinstance(part, str)]
    if names[:1] == ["outputs"]:
        del names[1:2]  # the name of an output
    is_inner = len(names) > 1 and names[0] in SECTIONS
    return (names[0], names[1]) if is_inner else ("", names[0] if names else "")


def _example(location: Sequence[int | str]) -> str:
    """Return `; use a value such as EXAMPLE` for a key, or ''."""
    example = _example_value(location)
    if isinstance(example, dict):
        return f"; `chunkq explain {_key_of(location)[1]}` has an example"
    return "" if example is None else f"; use a value such as {json.dumps(example)}"


def _example_value(location: Sequence[int | str]) -> object:
    section, key = _key_of(location)
    fields = SECTIONS[section].model_fields
    field = next((f for name, f in fields.items() if key == (f.alias or name)), None)
    return None if field is None or not field.examples else field.examples[0]


_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "model_type": "a mapping",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than_equal": "a number of at most {le}",
    "too_short": "a list of at least {min_length} item",
}
"""pydantic's error type -> the expected value."""
_LITERAL = re.compile(r"'[^']*'|\d+")
_REPLACED_KEYS = {"model_config.autocast": "precision"}
"""Key of an earlier version -> the key that has its values."""


def _without_branches(
    location: tuple[int | str, ...], *, has_one_input: bool
) -> tuple[int | str, ...]:
    """Return pydantic's location of an error without the parts that name a branch of a union."""
    if location[:1] == ("input",):
        first = 1 if has_one_input else 2
        location = (*location[:first], *location[3:])
    kept = 2 if location[:1] == ("outputs",) else 0  # an output can have any name
    branches = ("int", "float", ONE_SHAPE, BY_HEAD)
    rest = (part for part in location[kept:] if part not in branches)
    return (*location[:kept], *rest)


def _message(error: Any) -> str:
    """Format one of pydantic's errors as `key.path: what is wrong; what to do`."""
    from chunkq.job import hints  # for messages only

    location = error["loc"]
    path = ".".join(map(str, location)) or "a key"
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    section, key = _key_of(location)
    if kind == "extra_forbidden":
        if path in _REPLACED_KEYS:
            return f"{path}: unknown key; did you mean {_REPLACED_KEYS[path]!r}?"
        names = {one: _names(model) for one, model in SECTIONS.items()}
        return f"{path}: unknown key{hints.key_hint(str(location[-1]), section, names)}"
    if kind == "missing":
        return f"{path}: missing; set it (`chunkq explain {path}` has an example)"
    found = "no value" if value is None else _printed(value)
    if kind == "literal_error":
        texts = _LITERAL.findall(str(context["expected"]))
        legal = [text.strip("'") if text.startswith("'") else int(text) for text in texts]
        hint = hints.value_hint(key, value, legal)
        problem = "missing value" if value is None else f"invalid value {found}"
        return f"{path}: {problem}; expected one of {', '.join(map(repr, legal))}{hint}"
    if kind in _EXPECTED:
        expected = _EXPECTED[kind].format(**context)
        if path == "input" and kind == "tuple_type":
            expected = "a path, a mapping with path, or a list of them"
        return f"{path}: expected {expected}, found {found}{_typed_hint(location, kind, value)}"
    message, hint = str(error["msg"]), ""
    if kind == "picks":
        hint = hints.picks_hint(value, has_labels=key == "channels")
    elif kind == "letters":
        hint = hints.letters_hint(value)
    elif kind == "classes" and isinstance(value, (str, float)):
        hint = hints.number_hint(value, is_integer=True)
    hint = hint or _example(location)
    return f"{path}: {message[0].lower()}{message[1:]}, found {found}{hint}"


def _typed_hint(location: Sequence[int | str], kind: str, value: object) -> str:
    """Return what to do about a value of a wrong type or out of its range."""
    from chunkq.job import hints  # for messages only

    if kind == "bool_type":
        return hints.flag_hint(value) or ("; set one, or remove the key" if value is None else "")
    example = _example_value(location)
    is_of_integers = isinstance(example, list) and all(isinstance(n, int) for n in example)
    if kind == "tuple_type" and is_of_integers and (hint := hints.list_hint(value)):
        return hint
    if kind in ("int_type", "float_type") and isinstance(value, (str, float)):
        return hints.number_hint(value, is_integer=kind == "int_type") or _example(location)
    return _example(location)


def _printed(value: object) -> str:
    """Return a value for a message: shortened, with the password of a URL masked."""
    if isinstance(value, tuple):
        value = list(value)
    return VALUES.repr(without_secret(value) if isinstance(value, str) else value)


class _ShortRepr(Repr):
    """Representation of a value with at most 8 entries per list and 3 levels."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxlevel, self.maxstring, self.maxlong = 3, 120, 60

    def repr_int(self, x: int, level: int) -> str:
        """Format an integer. Python cannot format one of more than 4300 digits."""
        return super().repr_int(x, level) if abs(x) < 10**1000 else "a number of over 1000 digits"


VALUES = _ShortRepr()


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


def _class_problems(job: Job) -> list[str]:
    """Return the problems of a single class, which is the name of a keypoint only."""
    if job.peaks is not None:
        return []
    of_outputs = {f"outputs.{name}.classes": one.classes for name, one in _named_outputs(job)}
    return [
        f"{key}: found 1 class; expected 2 or more; one name is that of a keypoint, which needs "
        f"inference_type {IMAGE} and peaks"
        for key, classes in {"classes": job.classes, **of_outputs}.items()
        if class_count(classes) == 1
    ]


def _named_outputs(job: Job) -> Iterable[tuple[str, OutputConfig]]:
    return () if job.outputs is None else job.outputs.items()


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
    from chunkq.blend.weights import LOG_PROFILES

    names = job.weight_function
    if len(names) > 2 or (len(names) == 2 and Path(names[0]).name in LOG_PROFILES):
        return [
            "weight_function: expected [name] or [file.py, function], found "
            f"{[Path(names[0]).name, *names[1:]]}; use a value such as [weight_gaussian]"
        ]
    if len(names) == 1 and names[0].endswith(".py"):
        return [
            f"weight_function: found the file {_printed(names[0])} without a function; use "
            f"[{names[0]}, FUNCTION]"
        ]
    if len(names) == 1 and names[0] not in LOG_PROFILES:
        from chunkq.job import hints  # for messages only

        hint = hints.value_hint("weight_function", names[0], list(LOG_PROFILES))
        return [
            f"weight_function: invalid value {_printed(names[0])}; "
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
        if getattr(job, key) != Job.model_fields[key].default:
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
    if job.zarr_format != Job.model_fields["zarr_format"].default:
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
