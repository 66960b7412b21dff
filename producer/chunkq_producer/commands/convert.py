"""`chunkq convert`."""

from __future__ import annotations

import json
import time
from typing import Any, cast, get_args

import click

from chunkq.convert import convert as run_conversion
from chunkq.convert import plan_conversion
from chunkq.errors import JobError
from chunkq.plan.pyramid import Method
from chunkq.progress_bar import ProgressDisplay
from chunkq.system.standard_output import print_line, print_text
from chunkq.units import seconds
from chunkq.writers.base import WriterOptions
from chunkq_producer.commands.options import json_option

METHODS = get_args(Method)
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16",
          "float32", "float64")  # fmt: skip
AUTO = "auto"


@click.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option("--level", help="Resolution level of FROM, by number or name (default: 0).")
@click.option("--channels", help="Channels: 0, a range 0:3, or a list 2,DAPI (default: all).")
@click.option("--time", help="Time points: 0, a range 0:10, or a list (default: all).")
@click.option("--axes", help="One letter of t, c, z, y, x per axis of FROM.")
@click.option("--order", help="Spatial axes of FROM in another order, such as xyz.")
@click.option("--orientation", help="Directions of x, y and z of a NIfTI file, such as RAS.")
@click.option("--anonymous", is_flag=True, help="Send no credentials to the bucket of FROM.")
@click.option("--requester-pays", is_flag=True, help="Pay for the requests to the bucket of FROM.")
@click.option(
    "--labels/--image", "is_labels", default=None,
    help="What the values are (default: what the job of an output says, else an image).",
)  # fmt: skip
@click.option(
    "--levels", default=AUTO, show_default=True,
    help="Resolution levels of OME-Zarr, precomputed and TIFF, level 0 included.",
)  # fmt: skip
@click.option(
    "--method", type=click.Choice(METHODS),
    help="How a level is computed (default: mode for labels, else mean).",
)  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES), help="Dtype to store; values must fit.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@json_option
def convert(
    source: str,
    target: str,
    is_labels: bool | None,
    levels: str,
    method: str | None,
    dtype: str | None,
    overwrite: bool,
    as_json: bool,
    **keys: Any,
) -> None:
    """Write the image FROM to TO, in the format that the name of TO says.

    FROM is a complete output of chunkq, or anything that a job can read. TO is an OME-Zarr image
    (out.zarr), a Neuroglancer volume (precomputed://PATH), a NIfTI file (out.nii, out.nii.gz), an
    OME-TIFF (out.tif) or an HDF5 file (out.h5, out.h5/dataset). TO appears when it is complete. To
    continue an interrupted conversion, use the same command again.
    """
    started = time.monotonic()
    options = WriterOptions(_levels(levels), cast("Method | None", method))
    conversion = plan_conversion(
        _input(source, keys), target, is_labels=is_labels, dtype=dtype, options=options
    )
    with ProgressDisplay() as display:
        result = run_conversion(conversion, overwrite=overwrite, emit=display)
    if as_json:
        print_line(json.dumps(result, indent=1))
        return
    shape = ", ".join(
        f"{name} {size}" for name, size in zip(result["axes"], result["shape"], strict=True)
    )
    kind = "labels" if result["labels"] else "image"
    duration = seconds(time.monotonic() - started)
    print_text(f"wrote {result['output']}: {kind} {shape}, {result['dtype']} ({duration})")


def _levels(text: str) -> int | None:
    if text == AUTO:
        return None
    if not text.isdecimal() or not int(text):
        raise JobError(f"--levels: invalid value {text!r}; expected a number above 0, or auto")
    return int(text)


def _input(path: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of an input of a job file."""
    values = {key: value for key, value in keys.items() if value not in (None, False)}
    for key in ("channels", "time"):
        if key in values:
            values[key] = _picks(values[key])
    if str(values.get("level", "")).isdecimal():
        values["level"] = int(values["level"])
    return {"path": path, **values}


def _picks(text: str) -> int | str | list[int | str]:
    """Return picks as in a job file: one index, a range, or a list."""
    if ":" in text:
        return text
    entries: list[int | str] = [int(p) if p.isdecimal() else p for p in text.split(",")]
    only = entries[0]
    return only if len(entries) == 1 and isinstance(only, int) else entries
