"""`chunkq init`."""

from __future__ import annotations

from pathlib import Path

import click

from chunkq.errors import JobError

TEMPLATE = """\
# A chunkq job. Lists follow the volume's axes in storage order; lengths are in voxels.
# Relative paths are relative to this file. `chunkq schema` lists every key.

input: volume.zarr                # Zarr v2 or v3, OME-Zarr, or .npy; a path or s3://bucket/key
output: result.zarr               # becomes an OME-Zarr image

# How patches are laid:
#   sliding_window  step by `strides`
#   patch           edge to edge, plus one more grid for each entry of `offsets`
#   crop_margin     edge to edge after cutting `margin` from every prediction
inference_type: sliding_window
strides: [32, 32, 32]             # half the patch: every voxel is seen eight times

# How overlapping predictions become one: weighted_avg | soft | hard
combine: soft
weight_function: [weight_gaussian]  # uniform, gaussian, linear, hann, bump, or [file.py, function]

pad_width: [16, 16, 16]           # look this far beyond the volume's border ...
pad_mode: reflect                 # ... where voxels follow constant | reflect | symmetric | edge

# chunksize: [256, 256, 256]      # work per task; left out, it is chosen from memory

model_config:
  runtime: torch
  type: torchscript               # or class, with class_file, class_name, checkpoint
  ts_file: model.ts
  model_input_shape: [1, 64, 64, 64]    # one item of a batch; a leading 1 is the channel axis
  model_output_shape: [3, 64, 64, 64]   # classes first
  dtype: float32
  max_batch_size: 4
  device: cpu                     # or cuda
"""


@click.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("job.yaml"))
def init(path: Path) -> None:
    """Write a commented job file to start from, job.yaml unless PATH says otherwise."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise JobError(f"{path}: is there already; name another file") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be written: {error.strerror}") from None
    click.echo(f"wrote {path}; edit it, then: chunkq plan {path}")
