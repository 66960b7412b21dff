"""Write TIFF files in every layout that chunkq reads."""

import io
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import tifffile

Voxels = npt.NDArray[Any]
LAYOUTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "contiguous": {},
        "pages": {},
        "strips": {"rowsperstrip": 3},
        "tiles": {"tile": (16, 16)},
        "volumetric tiles": {"tile": (16, 16, 16), "volumetric": True},
        "BigTIFF": {"bigtiff": True, "rowsperstrip": 5},
        "OME-TIFF": {"ome": True, "tile": (16, 16)},
    }
)
"""Layout of the pages -> options of `tifffile.imwrite`; those of "pages" are written one by one."""
COMPRESSIONS = ("none", "zlib", "lzw", "zstd", "packbits", "lzma")
"""Lossless compressions for all dtypes."""
PREDICTED = ("zlib", "lzw")
"""Compressions that are written with a predictor, too."""


def write_tiff(
    path: str | Path,
    values: Voxels,
    layout: str = "contiguous",
    *,
    compression: str = "none",
    axes: str | None = None,
    **options: Any,
) -> None:
    """Write an array, whose byte order is that of the file, to a path or fsspec URL.

    `axes` has one of tifffile's letters per axis; without it the axes have no names.
    """
    big = values.dtype.byteorder == ">"
    options = {**LAYOUTS[layout], **options}
    if compression != "none":
        options["compression"] = compression
    metadata = dict(options.pop("metadata", {}))
    if axes is not None:
        metadata["axes"] = axes
    if "S" not in (axes or ""):
        options.setdefault("photometric", "minisblack")
    buffer = io.BytesIO()
    bigtiff, ome = options.pop("bigtiff", False), options.pop("ome", None)
    byteorder = ">" if big else "<"
    with tifffile.TiffWriter(buffer, bigtiff=bigtiff, byteorder=byteorder, ome=ome) as writer:
        if layout == "pages":
            for page in values.reshape(-1, *values.shape[-2:]):
                writer.write(page, metadata=None, contiguous=False, **options)
        else:
            writer.write(values, metadata=metadata, **options)
    with fsspec.open(str(path), "wb") as file:
        file.write(buffer.getvalue())


def write_stack(folder: str | Path, slices: Voxels, **options: Any) -> str:
    """Write each slice of an array to a file of its own; return the pattern of the files."""
    filesystem, inner = fsspec.core.url_to_fs(str(folder))
    filesystem.makedirs(inner, exist_ok=True)
    for number, values in enumerate(slices):
        write_tiff(f"{folder}/z{number}.tif", np.asarray(values), **options)
    return f"{folder}/*.tif"
