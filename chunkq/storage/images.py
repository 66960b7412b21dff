"""Where the inputs of a job are."""

from __future__ import annotations

from dataclasses import dataclass, field

from chunkq.access import DEFAULT_ACCESS, Access
from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axes import Axis, as_spatial
from chunkq.paths import without_secret
from chunkq.plan.plan import Volume
from chunkq.storage.array import Array
from chunkq.storage.formats.base import Options
from chunkq.storage.formats.registry import format_named, format_of


@dataclass(frozen=True)
class ImageSource:
    """Where one array is, and everything that determines its voxels.

    `path` is that of the array itself, after groups and resolution levels are resolved. `axes` are
    all axes in stored order. `dtype` is in native byte order. `options` belong to the format.
    """

    format: str
    path: str
    axes: tuple[Axis, ...]
    dtype: str
    options: Options = field(default_factory=dict, hash=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the spatial axes."""
        return tuple(axis.size for axis in self.axes if axis.kind == "space")

    @property
    def volume(self) -> Volume:
        """Spatial shape and dtype, for the planner."""
        return Volume(self.shape, self.dtype)

    def open(self) -> Array:
        """Open the array for reading. Raises StoreError if it cannot be opened."""
        return format_named(self.format).open(self.path, self.options)

    def identity(self) -> str | None:
        """Return a string that changes when the array is replaced; None if it is missing.

        Covers metadata only, see `Format.identity`. Raises OSError, and StoreError if the format is
        not installed.
        """
        return format_named(self.format).identity(self.path, self.options)


def find_source(
    path: str, access: Access = DEFAULT_ACCESS, *, allow_empty: bool = False
) -> ImageSource:
    """Find the array of an input path: an array, or level 0 of an OME-Zarr image.

    Jobs have spatial axes only, so every axis counts as spatial. Raises StoreError if the path does
    not exist or is not an array in a known format, and unless `allow_empty` if none of its storage
    chunks exists.
    """
    name = format_of(path, access.options)
    array = format_named(name).find(path, access.options)
    if array.is_empty and not allow_empty:
        raise StoreError(
            f"input: {without_secret(array.path)} has no storage chunk under any name, so every "
            "voxel would be the fill value; fix the path, or set allow_empty: true",
            code=ErrorCode.INPUT_EMPTY,
        )
    return ImageSource(name, array.path, as_spatial(array.axes), array.dtype, array.options)
