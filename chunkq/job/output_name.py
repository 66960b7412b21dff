"""Names of outputs that promise another format than Zarr."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from chunkq.errors import ErrorCode, JobError
from chunkq.job.job_path import output_path, printable_path
from chunkq.paths import is_url

_SUFFIXES = {
    "a TIFF file": "tif tiff btf tf8 lsm svs ndpi",
    "a NIfTI file": "nii nia img hdr",
    "an HDF5 file": "h5 hdf5 hdf he5 nxs ims",
    "a NumPy file": "npy npz",
    "an N5 volume": "n5",
    "a precomputed volume": "precomputed",
    "a WEBKNOSSOS volume": "wkw",
    "an MRC file": "mrc mrcs rec",
    "an NRRD file": "nrrd nhdr",
    "a MetaImage file": "mha mhd",
    "a FreeSurfer file": "mgh mgz",
    "a MINC file": "mnc",
    "a DICOM file": "dcm dicom",
    "a NetCDF file": "nc nc4",
    "a VTK file": "vti vtk vtu",
    "a microscope's file": "czi lif nd2 oib oif vsi klb",
    "a picture": "png jpg jpeg jp2 bmp gif webp",
    "a video": "mp4 avi mov mkv webm",
    "a MATLAB file": "mat",
    "a raw file": "raw bin dat",
    "a table": "csv tsv parquet feather xlsx",
    "a text file": "txt json jsonl yaml yml xml",
    "an archive": "zip tar tgz gz bz2 xz zst 7z",
    "a network": "pt pth ts pt2 onnx keras pb pkl pickle safetensors",
}
FORMATS = MappingProxyType(
    {suffix: name for name, text in _SUFFIXES.items() for suffix in text.split()}
)
"""Suffix of a file or a folder, without the dot -> what it holds."""
COMPRESSED = frozenset({"gz", "bz2", "xz", "zst"})
SCHEMES = MappingProxyType(
    {
        "precomputed": "a precomputed volume",
        "neuroglancer-precomputed": "a precomputed volume",
        "graphene": "a graphene volume",
        "n5": "an N5 volume",
        "nifti": "a NIfTI file",
        "hdf5": "an HDF5 file",
        "tiff": "a TIFF file",
    }
)
"""Scheme of Neuroglancer and CloudVolume -> what its URLs are of."""
ZARR_SCHEMES = frozenset({"zarr", "zarr2", "zarr3"})
"""Schemes with which Neuroglancer names Zarr arrays."""


def check_new_output(output: str, base: Path) -> None:
    """Raise JobError if a path, relative to `base`, cannot be that of a new output.

    That has the name of a file of another format, or is no path of an output (`output_path`).
    """
    path = output_path(output, base)
    if problem := format_problem(path):
        raise JobError(
            f"output: {printable_path(path)} {problem}", code=ErrorCode.STORE_UNSUPPORTED
        )


def format_problem(path: str) -> str | None:
    """Return why a new output cannot have the name in a canonical path, or None if it can.

    The text continues a sentence that begins with the path.
    """
    scheme = path.partition("://")[0] if is_url(path) else ""
    if scheme in ZARR_SCHEMES:
        return f"has the scheme {scheme}://; use the path without it, the output is a Zarr image"
    stem, suffixes = _split(path.rstrip("/").rpartition("/")[2])
    last = suffixes[-1] if suffixes else ""
    if last in COMPRESSED and suffixes[-2:-1] and suffixes[-2] in FORMATS:
        last = suffixes[-2]
    found = SCHEMES.get(scheme) or FORMATS.get(last)
    if found is None:
        return None
    return f"names {found}, but this version writes Zarr only; use {stem or 'out'}.zarr"


def _split(name: str) -> tuple[str, list[str]]:
    """Return a file's name without the suffixes that name formats, and these in lower case."""
    stem, *suffixes = name.split(".")
    others = [s.lower() not in FORMATS.keys() | {"ome", "zarr"} for s in suffixes]
    kept = max((n + 1 for n, is_other in enumerate(others) if is_other), default=0)
    return ".".join([stem, *suffixes[:kept]]), [suffix.lower() for suffix in suffixes[kept:]]
