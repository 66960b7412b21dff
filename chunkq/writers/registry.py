"""The writers, by the name of their format."""

from __future__ import annotations

from types import MappingProxyType

from chunkq.writers.base import ExportWriter
from chunkq.writers.hdf5 import Hdf5Writer
from chunkq.writers.nifti import NiftiWriter
from chunkq.writers.precomputed import PrecomputedWriter
from chunkq.writers.tiff import TiffWriter
from chunkq.writers.zarr import ZarrWriter

WRITERS: MappingProxyType[str, type[ExportWriter]] = MappingProxyType(
    {
        "zarr": ZarrWriter,
        "precomputed": PrecomputedWriter,
        "nifti": NiftiWriter,
        "tiff": TiffWriter,
        "hdf5": Hdf5Writer,
    }
)
"""Formats by name."""
