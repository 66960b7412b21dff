"""Where the inputs of a job are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from chunkq.access import DEFAULT_ACCESS, Access
from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axes import Axis, color_letters, picked, starts_like_color
from chunkq.geometry.grids import AxisGeometry
from chunkq.paths import split_format, without_secret
from chunkq.plan.fetches import Fetches, axis_fetches, picked_fetches
from chunkq.plan.volume import Volume
from chunkq.storage.array import Array
from chunkq.storage.axes_view import AxesView
from chunkq.storage.formats.base import AFFINE, CACHED, ORIENTATION, ArrayInfo, Options
from chunkq.storage.formats.registry import format_named, format_of
from chunkq.storage.oriented import Orientation, OrientedArray
from chunkq.storage.remedies import JOB_FILE, Remedies
from chunkq.storage.selection import EVERYTHING, Selection, select
from chunkq.storage.stored_chunks import StoredCells, StoredChunks

IMAGE_LIST, DIGEST = "image_list", "digest"
"""Format of a source that is a list of images, and the option with the hash of the list."""


@dataclass(frozen=True)
class ImageSource:
    """Where one array is, and everything that determines the voxels that are read of it.

    `path` is that of the array itself, after groups and resolution levels are resolved. `axes` are
    all axes in stored order, or if there is an `orientation`, in the order in which it presents
    them. `dtype` is in native byte order. `options` belong to the format.

    `channels` and `time` are the indices that are read along the channel and the time axis, in
    their order; they are empty if there is no such axis. `order` has the numbers of the spatial
    axes in the order of the network; empty for the stored order. `named_by` says what names the
    axes; empty if nothing does. `storage` is the shape of a storage chunk as `axes`, empty if
    the format has none. `staged` says why workers read a copy in Zarr of the array instead; empty
    if they read the array. `storage` is then that of the copy.

    A source of the format `IMAGE_LIST` is no array: its only axis has the images.
    """

    format: str
    path: str
    axes: tuple[Axis, ...]
    dtype: str
    options: Options = field(default_factory=dict, hash=False)
    channels: tuple[int, ...] = ()
    time: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    named_by: str = ""
    storage: tuple[int, ...] = ()
    staged: str = ""
    orientation: Orientation = ()

    @property
    def stored_axes(self) -> tuple[Axis, ...]:
        """All axes in stored order."""
        return _stored(self.axes, self.orientation)

    @property
    def spatial_axes(self) -> tuple[Axis, ...]:
        """The spatial axes in the order of the network."""
        return tuple(self.axes[number] for number in self.spatial_numbers)

    @property
    def time_axis(self) -> Axis | None:
        """The time axis with the selected time points, or None without one."""
        number = self.number("time")
        return None if number is None else picked(self.axes[number], self.time)

    @property
    def channel_axis(self) -> Axis | None:
        """The channel axis with the selected channels, or None without one."""
        number = self.number("channel")
        return None if number is None else picked(self.axes[number], self.channels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the spatial axes, in the order of the network."""
        return tuple(axis.size for axis in self.spatial_axes)

    @property
    def staged_bytes(self) -> int:
        """Size (bytes) of the copy in Zarr before compression; 0 if the array is read itself."""
        size = prod(axis.size for axis in self.axes) * np.dtype(self.dtype).itemsize
        return size if self.staged else 0

    @property
    def volume(self) -> Volume:
        """Spatial shape, dtype and number of channels, for the planner."""
        return Volume(self.shape, self.dtype, channels=len(self.channels) or 1)

    def doubts(self, remedies: Remedies = JOB_FILE) -> tuple[str, ...]:
        """Return a line if nothing names the axes, and the first one can be colour."""
        shape = [axis.size for axis in self.axes]
        if self.named_by or not starts_like_color(shape):
            return ()
        letters = color_letters(len(shape), first=True)
        return (
            f"input: {without_secret(self.path)} has shape {shape} without names of its axes, so "
            f"all are spatial; if the first one is channels, {remedies.set_axes(letters)}",
        )

    def file_doubts(self) -> tuple[str, ...]:
        """Return a line for each property of the files that can be a mistake.

        Raises StoreError and OSError.
        """
        has_format = self.format not in ("", IMAGE_LIST)
        lines = format_named(self.format).doubts(self.path, self.options) if has_format else ()
        return tuple(f"input: {without_secret(self.path)}: {line}" for line in lines)

    def lost_position(self) -> tuple[str, ...]:
        """Return a line if the axes cannot hold the position of a NIfTI image."""
        if AFFINE not in self.options:
            return ()
        from chunkq.storage.formats.nifti import lost_position  # for such images only

        sizes = [axis.size for axis in self.axes if axis.kind == "space"]
        how = lost_position(self.options, sizes[::-1])
        line = (
            f"{without_secret(self.path)}: its axes are {how} relative to those of the scanner; "
            "the output has the voxel sizes and no position; `chunkq convert` to NIfTI writes it "
            "with the whole affine"
        )
        return (line,) if how else ()

    def open(self, *, cached: bool = False) -> Array:
        """Open all of the array, as it is stored. Raises StoreError if it cannot be opened.

        `cached` is whether its storage chunks may be kept in the cache of this process.
        """
        options = {**self.options, CACHED: True} if cached else self.options
        return format_named(self.format).open(self.path, options)

    def fetches(self, axes: Sequence[AxisGeometry], *, by_channel: bool = False) -> Fetches | None:
        """Return how often blocks read the array's storage chunks; None if it has none.

        `axes` are the blocks of a plan. `by_channel` is whether each channel is an item.
        """
        if not self.storage:
            return None
        along = [
            axis_fetches(axis, self.storage[number])
            for axis, number in zip(axes, self.spatial_numbers, strict=True)
        ]
        for kind, picks, at_once in (
            ("channel", self.channels, not by_channel),
            ("time", self.time, False),
        ):
            if (number := self.number(kind)) is not None:
                along.insert(0, picked_fetches(picks, self.storage[number], at_once=at_once))
        return Fetches(tuple(along), prod(self.storage) * np.dtype(self.dtype).itemsize)

    def present(self, array: Array, time: int = 0, channel: int | None = None) -> Array:
        """Return a view ([C,] *S) of the open array.

        `time` is the number of a selected time point. `channel` is the number of a selected
        channel, or None for all of them; a single channel has no axis.
        """
        if self.orientation:
            array = OrientedArray(array, self.orientation)
        fixed = {}
        time_axis, channel_axis = self.number("time"), self.number("channel")
        if time_axis is not None:
            fixed[time_axis] = self.time[time]
        if channel_axis is not None and (channel is not None or len(self.channels) == 1):
            fixed[channel_axis] = self.channels[channel or 0]
            channel_axis = None
        is_stored = self.spatial_numbers == tuple(range(len(self.axes)))
        if channel_axis is None and not fixed and is_stored:
            return array
        return AxesView(array, self.spatial_numbers, fixed, channel_axis, self.channels)

    def stored_chunks(self) -> StoredChunks | None:
        """Return the storage chunks that exist; None if format or storage cannot tell.

        Raises StoreError and OSError.
        """
        return format_named(self.format).stored_chunks(self.path, self.options)

    def stored_cells(
        self, stored: StoredChunks, time: int = 0, channel: int | None = None
    ) -> StoredCells:
        """Return which of these are read by the view that `present` returns."""
        read: dict[int, tuple[int, ...]] = {}
        time_axis, channel_axis = self.number("time"), self.number("channel")
        if time_axis is not None:
            read[time_axis] = (self.time[time],)
        if channel_axis is not None:
            read[channel_axis] = self.channels if channel is None else (self.channels[channel],)
        return stored.spatial(self.spatial_numbers, read)

    def identity(self) -> str | None:
        """Return a string that changes when the array is replaced; None if it is missing.

        Covers metadata only, see `Format.identity`. That of a list of images, which is stored with
        the job, never changes. Raises OSError, and StoreError if the format is not installed.
        """
        if self.format == IMAGE_LIST:
            return str(self.options[DIGEST])
        return format_named(self.format).identity(self.path, self.options)

    @property
    def spatial_numbers(self) -> tuple[int, ...]:
        """Numbers of the stored spatial axes, in the order of the network."""
        stored = (number for number, axis in enumerate(self.axes) if axis.kind == "space")
        return self.order or tuple(stored)

    def number(self, kind: str) -> int | None:
        """Return the number of the stored axis of a kind, or None without one."""
        return next((number for number, axis in enumerate(self.axes) if axis.kind == kind), None)


def find_source(
    path: str,
    selection: Selection = EVERYTHING,
    access: Access = DEFAULT_ACCESS,
    *,
    allow_empty: bool = False,
    remedies: Remedies = JOB_FILE,
) -> ImageSource:
    """Find the array of an input path: an array, or a level of a multiscale image.

    The path can begin with the scheme of a format, as in `n5://PATH`.
    Raises StoreError if the path does not exist or is not an array in a known format, and unless
    `allow_empty` if none of its storage chunks exists. Raises JobError if the selection does not
    fit the array or its axes have no clear meaning.
    """
    name, array = find_array(path, selection, access, allow_empty=allow_empty)
    return source_of(array, selection, path, name, remedies)


def find_array(
    path: str, selection: Selection, access: Access, *, allow_empty: bool = False
) -> tuple[str, ArrayInfo]:
    """Return the format of an input path, and the array. Raises StoreError, see `find_source`."""
    options: Options = access.options
    level = selection.level
    if selection.orientation is not None:
        options = {**options, ORIENTATION: selection.orientation}
    named, inner = split_format(path)
    name = named or format_of(inner, options)
    known = format_named(name)
    array = known.find(inner, options) if level is None else known.find_level(inner, level, options)
    if array.is_empty and not allow_empty:
        raise StoreError(
            f"input: {without_secret(array.path)} has no storage chunk under any name, so every "
            "voxel would be the fill value; fix the path, or set allow_empty: true",
            code=ErrorCode.INPUT_EMPTY,
        )
    return name, array


def source_of(
    array: ArrayInfo,
    selection: Selection,
    path: str,
    format_name: str = "",
    remedies: Remedies = JOB_FILE,
) -> ImageSource:
    """Return the source of an array that a format has found. `path` is the user's name of it.

    Raises JobError if the selection does not fit it or its axes have no clear meaning.
    """
    selected = select(array, selection, without_secret(path), remedies)
    return ImageSource(
        format_name,
        array.path,
        selected.axes,
        array.dtype,
        array.options,
        selected.channels,
        selected.time,
        selected.order,
        selected.named_by,
        _storage(array, selected.axes),
        array.staged,
        array.orientation,
    )


def _storage(array: ArrayInfo, axes: tuple[Axis, ...]) -> tuple[int, ...]:
    """Return the shape of a storage chunk of what workers read, in the order of `axes`."""
    if not array.staged:
        return array.storage
    from chunkq.storage.staged import Slabs  # for files that cannot be read by region

    slabs = Slabs.of(_stored(axes, array.orientation), np.dtype(array.dtype).itemsize)
    order = [number for number, _ in array.orientation] or range(len(axes))
    return tuple(slabs.chunks[number] for number in order)


def _stored(axes: tuple[Axis, ...], orientation: Orientation) -> tuple[Axis, ...]:
    """Return presented axes in stored order."""
    if not orientation:
        return axes
    presented = [number for number, _ in orientation]
    return tuple(axes[presented.index(number)] for number in range(len(axes)))
