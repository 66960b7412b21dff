"""Suffixes of the formats whose arrays are in single files."""

from __future__ import annotations

from types import MappingProxyType

NPY = (".npy",)
NIFTI = (".nii", ".nii.gz")
NIFTI_PAIR = (".hdr", ".img", ".hdr.gz", ".img.gz")
TIFF = (".tif", ".tiff", ".tf2", ".tf8", ".btf", ".lsm", ".stk")
HDF5 = (".h5", ".hdf5", ".hdf", ".nxs")
SUFFIXES: MappingProxyType[str, tuple[str, ...]] = MappingProxyType(
    {"npy": NPY, "nifti": (*NIFTI, *NIFTI_PAIR), "tiff": TIFF, "hdf5": HDF5}
)
"""Format -> suffixes, in lower case, of which each path that it detects contains one."""


def can_have(name: str, path: str) -> bool:
    """Return whether a format has to be asked if it detects a path.

    Formats need not be imported for paths without one of their suffixes.
    """
    suffixes = SUFFIXES.get(name)
    return suffixes is None or any(suffix in path.lower() for suffix in suffixes)
