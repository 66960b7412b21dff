"""Write HDF5 files in every layout that chunkq reads."""

import io
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import fsspec
import h5py
import numpy as np
import numpy.typing as npt

Voxels = npt.NDArray[Any]
LAYOUTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "contiguous": {},
        "chunks": {"chunks": True},
        "gzip": {"chunks": True, "compression": "gzip"},
        "lzf": {"chunks": True, "compression": "lzf"},
        "shuffle": {"chunks": True, "compression": "gzip", "shuffle": True},
        "checksum": {"chunks": True, "fletcher32": True},
    }
)
"""Layout of a dataset -> options of `h5py.Group.create_dataset`."""


def write_hdf5(
    path: str | Path,
    values: Voxels,
    layout: str = "contiguous",
    *,
    name: str = "volume/raw",
    labels: str = "",
    attributes: Mapping[str, Any] | None = None,
    **options: Any,
) -> str:
    """Write an array as a dataset to a file at a path or fsspec URL; return its input path.

    `labels` has one letter per axis for DIMENSION_LABELS.
    """
    options = {**LAYOUTS[layout], **options}
    if options.get("chunks") is True:
        options["chunks"] = tuple(max(1, -(-size // 3)) for size in values.shape)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        dataset = file.create_dataset(name, data=np.asarray(values), **options)
        for number, label in enumerate(labels):
            dataset.dims[number].label = label
        dataset.attrs.update(attributes or {})
    with fsspec.open(str(path), "wb") as stream:
        stream.write(buffer.getvalue())
    return f"{path}/{name}"
