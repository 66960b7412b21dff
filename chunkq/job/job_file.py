"""The keys of a job file: strict, frozen pydantic models. Validation reads no volumes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from chunkq.errors import JobError
from chunkq.geometry.grids import Edge
from chunkq.geometry.padding import PadMode
from chunkq.images.image_spec import ImageSpec
from chunkq.images.sleap_package import folder_of
from chunkq.job.cluster_config import DaskConfig, RayConfig
from chunkq.job.fields import (
    Fill,
    InferenceType,
    Names,
    NonNegative,
    Offsets,
    Positive,
    Region,
    Section,
    Shape,
    Widths,
    key_doc,
)
from chunkq.job.image_config import GUIDE, ImageConfig, Keep, PeaksConfig, TruthConfig
from chunkq.job.image_job import IMAGE
from chunkq.job.input_config import InputConfig, Inputs
from chunkq.job.job_path import without_format
from chunkq.job.job_problems import job_problems
from chunkq.job.mask_config import Below, Mask, SkipEmpty
from chunkq.job.model_config import ModelConfig
from chunkq.job.output_config import (
    Classes,
    CodecKey,
    OutputConfig,
    OutputDtype,
    Outputs,
    PyramidConfig,
    ValueRange,
)
from chunkq.plan.empty_rule import EmptyRule
from chunkq.plan.outputs import Activation, Combine

SCHEMA_FILE = Path(__file__).with_name("job_file.schema.json")
"""JSON schema of the job file, for editors. `docs/job_file_page.py` writes it."""


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
        if problems := job_problems(self):
            raise JobError(problems)
        return self

    @property
    def is_image(self) -> bool:
        """Whether the network sees each image of a list whole."""
        return self.inference_type == IMAGE

    @property
    def predicts_classes(self) -> bool:
        """Whether the table of an image job has predicted classes. Else `label` is the list's."""
        return self.is_image and self.peaks is None and self.keep != "features"

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

    @property
    def has_known_empty(self) -> bool:
        """Whether chunks can be known to be empty when the job is created."""
        return self.mask is not None or self.skip_empty == "missing"

    @property
    def empty_rule(self) -> EmptyRule | None:
        """Which voxels are empty by their values, None if none is."""
        rule = self.skip_empty
        if isinstance(rule, Below):
            return EmptyRule(rule.below, is_limit=True)
        return None if rule is None or isinstance(rule, str) else EmptyRule(float(rule))

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


def job_schema() -> dict[str, Any]:
    """Return the JSON schema of the job file."""
    return Job.model_json_schema(by_alias=True)
