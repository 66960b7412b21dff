"""Formats that the names of outputs promise."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from chunkq.access import BUCKET_SCHEMES, WEB_SCHEMES
from chunkq.errors import ErrorCode, JobError
from chunkq.job.job_path import PRECOMPUTED, canonical, output_path, printable_path
from chunkq.paths import FORMAT_SCHEMES, LOCAL_SCHEMES, is_url

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


WRITTEN = MappingProxyType(
    {
        "nii": "nifti",
        **dict.fromkeys(("tif", "tiff", "btf", "tf8"), "tiff"),
        **dict.fromkeys(("h5", "hdf5", "hdf"), "hdf5"),
    }
)
"""Suffix of a file that can be written -> format of its writer."""
ONE_SLASH = re.compile(
    f"/((?:{'|'.join(sorted(BUCKET_SCHEMES | WEB_SCHEMES | LOCAL_SCHEMES | FORMAT_SCHEMES))}):)/"
)
"""A misspelled URL, which would be a folder with the name of a scheme."""
SLP = ".slp"
"""Suffix of SLEAP's files of keypoints."""
TABLES = (".parquet", ".csv", ".jsonl", SLP)
"""Suffixes of the tables that jobs over images write."""


@dataclass(frozen=True)
class FileName:
    """Path of a file that can be written: its folder, name, suffix, and the format it promises."""

    folder: str
    stem: str
    suffix: str
    format: str

    @classmethod
    def parse(cls, path: str) -> FileName | None:
        """Return the parts of a path; None if it is not that of a file that can be written."""
        folder, _, name = path.rstrip("/").rpartition("/")
        stem, suffixes = _split(name)
        kinds = suffixes[:-1] if suffixes[-2:] == ["nii", "gz"] else suffixes
        if not stem or not kinds or kinds[-1] not in WRITTEN:
            return None
        return cls(folder, stem, name.removeprefix(stem), WRITTEN[kinds[-1]])


def table_suffix(path: str) -> str | None:
    """Return the suffix of the path of a table that a job over images writes, None for others."""
    return next(
        (s for s in TABLES if path.lower().endswith(s) and path[-len(s) - 1 :][0] != "/"), None
    )


def export_target(target: str, base: Path) -> tuple[str, str, str]:
    """Return the format that the path of a converted image names, the path, and a dataset in it.

    A path without a suffix that names a format is that of OME-Zarr. Raises JobError for formats
    that cannot be written, and for paths that are not those of an output (`output_path`).
    """
    if is_volume(target):
        return PRECOMPUTED, output_path(target, base), ""
    file, dataset = _dataset(target)
    path = output_path(file, base)
    if (name := FileName.parse(path)) is not None:
        return name.format, path, dataset
    if problem := format_problem(path):
        raise JobError(
            f"output: {printable_path(path)} {problem}", code=ErrorCode.STORE_UNSUPPORTED
        )
    return "zarr", path, ""


def is_volume(output: str) -> bool:
    """Return whether the path of an output names a precomputed volume."""
    return output.lower().startswith(f"{PRECOMPUTED}://")


def _dataset(target: str) -> tuple[str, str]:
    """Return the file and the path inside it of a target such as `out.h5/labels`."""
    for suffix in (".h5", ".hdf5", ".hdf"):
        file, separator, dataset = target.partition(f"{suffix}/")
        if separator:
            return file + suffix, dataset.strip("/")
    return target, ""


def check_new_output(
    output: str, base: Path, *, zarr_only: bool = False, is_table: bool = False
) -> None:
    """Raise JobError if a path, relative to `base`, cannot be that of a new output.

    That has the name of a format that cannot be written, or is no path of an output
    (`output_path`). With `is_table`, the job writes a table, whose suffix the job file checks.
    """
    if output.lower() == f"{PRECOMPUTED}://":
        raise JobError(
            f"output: {output} has no path; use {PRECOMPUTED}://PATH", code=ErrorCode.PATH_INVALID
        )
    path = output_path(output, base)
    if not is_url(path) and (match := ONE_SLASH.search(path)) is not None:
        raise JobError(
            f"output: {printable_path(path)} has one slash behind {match[1]}; write {match[1]}//",
            code=ErrorCode.PATH_INVALID,
        )
    if is_table:
        return
    if is_volume(output):
        problem = _volume_problem(path, zarr_only=zarr_only)
    elif zarr_only or FileName.parse(path) is None:
        problem = format_problem(path)
    else:
        problem = None
    if problem:
        printed = printable_path(canonical(output, base))
        raise JobError(f"output: {printed} {problem}", code=ErrorCode.STORE_UNSUPPORTED)


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
    format_name = SCHEMES.get(scheme) or FORMATS.get(last)
    if format_name is None:
        return None
    if last == PRECOMPUTED:
        return f"names {format_name}; write {PRECOMPUTED}:// before it, or use {stem or 'out'}.zarr"
    if table_suffix(path) is not None:
        return (
            f"names {format_name}, which jobs with inference_type image write; set it, or use "
            f"{stem or 'out'}.zarr"
        )
    return f"names {format_name}, which cannot be written; use {stem or 'out'}.zarr"


def _volume_problem(path: str, *, zarr_only: bool) -> str | None:
    """Return why a new precomputed volume cannot have a path, as `format_problem`."""
    stem, suffixes = _split(path.rstrip("/").rpartition("/")[2])
    if zarr_only:
        return f"names a precomputed volume; use {stem or 'out'}.zarr, then chunkq convert"
    if suffixes in ([], [PRECOMPUTED]):
        return None
    format_name = FORMATS.get(suffixes[0], "a Zarr image")
    return f"names a precomputed volume and {format_name}; use {PRECOMPUTED}://{stem or 'out'}"


def _split(name: str) -> tuple[str, list[str]]:
    """Return a file's name without the suffixes that name formats, and these in lower case."""
    stem, *suffixes = name.split(".")
    others = [s.lower() not in FORMATS.keys() | {"ome", "zarr"} for s in suffixes]
    end = max((n + 1 for n, is_other in enumerate(others) if is_other), default=0)
    return ".".join([stem, *suffixes[:end]]), [suffix.lower() for suffix in suffixes[end:]]
