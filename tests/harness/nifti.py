"""Write NIfTI images of arrays in the order of a job."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader

AFFINE = np.array([[0.5, 0, 0, -7], [0, 1.5, 0, 3], [0, 0, 2, 11], [0, 0, 0, 1]])
"""Voxel sizes 0.5, 1.5 and 2 mm along x, y and z."""
TURNED = np.array([[0, 0, -2.0, 40], [0.5, 0, 0, -7], [0, -1.5, 0, 3], [0, 0, 0, 1]])
"""The same voxel sizes; x, y and z of the file run to anterior, inferior and left."""


def nifti_bytes(
    values: npt.NDArray[Any],
    *,
    version: int = 1,
    endianness: str = "<",
    affine: npt.NDArray[Any] = AFFINE,
    slope: float | None = None,
    inter: float = 0.0,
    units: tuple[str, str] = ("mm", "sec"),
    **header_fields: Any,
) -> bytes:
    """Return a NIfTI file of an array ([c,] [t,] z, y, x), whose voxels are stored unchanged.

    With `slope`, the header says that values are stored * slope + inter.
    """
    klass = Nifti1Header if version == 1 else Nifti2Header
    header = klass(endianness=endianness)
    header.set_data_shape(values.shape[::-1])
    header.set_data_dtype(values.dtype)
    header.set_sform(affine, code=1)
    header.set_qform(None, code=0)
    header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    header.set_xyzt_units(*units)
    for name, value in header_fields.items():
        header[name] = value
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset
    if slope is not None:
        header["scl_slope"], header["scl_inter"] = slope, inter
    stored = values.astype(values.dtype.newbyteorder(endianness))
    padding = b"\0" * (header.single_vox_offset - header.sizeof_hdr)
    return bytes(header.binaryblock) + padding + stored.tobytes()


def write_nifti(path: str | Path, values: npt.NDArray[Any], **options: Any) -> None:
    """Write a NIfTI file at a path or URL, compressed if its name ends in `.gz`."""
    content = nifti_bytes(values, **options)
    if str(path).endswith(".gz"):
        content = gzip.compress(content, 1)
    with fsspec.open(str(path), "wb") as file:
        file.write(content)


def write_pair(path: str | Path, values: npt.NDArray[Any], **options: Any) -> None:
    """Write a pair of files; `path` names the one with the voxels, `.img` or `.img.gz`."""
    content = bytearray(nifti_bytes(values, **options))
    version = options.get("version", 1)
    header, offset = (348, 352) if version == 1 else (540, 544)
    klass = Nifti1PairHeader if version == 1 else Nifti2PairHeader
    head = klass(bytes(content[:header]), check=False)
    head["magic"], head["vox_offset"] = head.pair_magic, 0
    files = {".hdr": bytes(head.binaryblock), ".img": bytes(content[offset:])}
    for suffix, part in files.items():
        with fsspec.open(str(path).replace(".img", suffix), "wb") as file:
            file.write(gzip.compress(part, 1) if str(path).endswith(".gz") else part)
