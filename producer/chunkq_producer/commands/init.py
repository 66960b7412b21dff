"""`chunkq init`."""

from __future__ import annotations

from pathlib import Path

import click

from chunkq.errors import ErrorCode, JobError
from chunkq.job.job_file import SCHEMA_FILE
from chunkq.system.standard_output import print_text
from chunkq.terminal import argument

SCHEMA_COMMENT = "# yaml-language-server: $schema={url}\n"
"""Comment by which editors find the schema of a YAML file. Its value contains no spaces."""
TEMPLATE = """\
# A chunkq job. Lists follow the volume's axes in storage order; lengths are in voxels.
# Relative paths are relative to this file. `chunkq explain` lists all keys, `chunkq explain KEY`
# describes one. The first line tells editors where the descriptions are on this machine.

input: volume.zarr                # Zarr, NIfTI, TIFF (slices/*.tif), HDF5 (file.h5/raw), N5,
                                  # precomputed or .npy; a path or s3://bucket/key
output: result.zarr               # becomes an OME-Zarr image

# Where patches are placed:
#   sliding_window  every `strides` voxels, so that patches overlap
#   patch           side by side, with one more grid for each entry of `offsets`
#   crop_margin     side by side after cropping `margin` from every prediction
inference_type: sliding_window
strides: [32, 32, 32]             # half the patch: 8 predictions per voxel

# How overlapping predictions are combined:
#   weighted_avg    scores, averaged
#   soft            labels of the averaged scores
#   hard            labels by majority vote
combine: soft
weight_function: [weight_gaussian]  # uniform, gaussian, linear, hann, bump, or [file.py, function]

# Several outputs of one pass, instead of combine; see `chunkq explain outputs`:
# outputs:
#   tissue: {channels: "0:3", activation: softmax, combine: soft}
#   distance: {channels: 3}

pad_width: [16, 16, 16]           # pad the volume by this many voxels on each side
pad_mode: reflect                 # constant | reflect | symmetric | edge

# chunksize: [256, 256, 256]      # voxels per task; by default chosen from the volume

model_config:
  runtime: torch
  type: class                     # or torchscript, exported; see `chunkq explain type`
  class_file: net.py              # Python file with the network
  class_name: Net
  checkpoint: net.pt              # torch.save(network.state_dict(), "net.pt")
  model_input_shape: [1, 64, 64, 64]    # one item of a batch; the leading 1 is the channel axis
  model_output_shape: [3, 64, 64, 64]   # classes first
  dtype: float32
  max_batch_size: 4
  device: cpu                     # or cuda
"""
IMAGES_TEMPLATE = """\
# A chunkq job over images. Relative paths are relative to this file. `chunkq explain` lists all
# keys, `chunkq explain KEY` describes one. The first line tells editors where the descriptions are.

input: photos/                    # folder, pattern (photos/*.jpg), or CSV or Parquet with a column
                                  # path; local or s3://bucket/key
output: predictions.parquet       # or .csv, .jsonl
inference_type: image             # the network sees each image whole

image:                            # applied in this order
  mode: RGB                       # or L, RGBA
  resize: 256                     # shorter side, or [height, width]
  crop: 224                       # from the center
  scale: 255                      # divides the pixels
  mean: [0.485, 0.456, 0.406]     # subtracted, then divided by std
  std: [0.229, 0.224, 0.225]

classes: classes.txt              # one name per line, a list of names, or their number
activation: softmax               # sigmoid, or none if the network returns probabilities
# truth: {regex: "photos/([^/]+)/"}   # true label in the path; or {column: label}
# top_k: 5
# max_errors: 100                 # images that may fail

model_config:
  runtime: torch
  type: class                     # or torchscript, exported; see `chunkq explain type`
  class_file: net.py              # Python file with the network
  class_name: Net
  checkpoint: net.pt              # torch.save(network.state_dict(), "net.pt")
  max_batch_size: 32
  device: cpu                     # or cuda
"""


@click.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("job.yaml"))
@click.option("--images", is_flag=True, help="A job over images that the network sees whole.")
def init(path: Path, images: bool) -> None:
    """Write a commented job file to PATH (default: job.yaml)."""
    template = IMAGES_TEMPLATE if images else TEMPLATE
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(SCHEMA_COMMENT.format(url=SCHEMA_FILE.as_uri()) + template)
    except FileExistsError:
        raise JobError(
            f"{path}: the file already exists; choose another name", code=ErrorCode.OUTPUT_EXISTS
        ) from None
    except OSError as error:
        raise JobError(
            f"{path}: cannot be written: {error.strerror}; choose another path",
            code=ErrorCode.STORE_UNUSABLE,
        ) from None
    print_text(f"wrote {path}; edit it, then run: chunkq plan {argument(str(path))}")
