"""The writers, by the name of their format."""

from __future__ import annotations

from chunkq.lazy_imports import LazyClasses
from chunkq.writers.base import ExportWriter, FileWriter

_FILES = {
    "nifti": "chunkq.writers.nifti:NiftiWriter",
    "tiff": "chunkq.writers.tiff:TiffWriter",
    "hdf5": "chunkq.writers.hdf5:Hdf5Writer",
}
FILE_WRITERS: LazyClasses[FileWriter] = LazyClasses(_FILES)
"""Writers of files."""
WRITERS: LazyClasses[ExportWriter] = LazyClasses(
    {
        "zarr": "chunkq.writers.zarr:ZarrWriter",
        "precomputed": "chunkq.writers.precomputed:PrecomputedWriter",
        **_FILES,
    }
)
"""Writers of all formats."""
