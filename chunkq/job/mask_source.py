"""The mask of a job: where it is, and how it lies on an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from chunkq.casts import REAL
from chunkq.errors import JobError, StoreError
from chunkq.geometry.axes import Axis
from chunkq.geometry.box import Box
from chunkq.geometry.cells import CellAxis
from chunkq.job.mask_config import MaskConfig
from chunkq.paths import without_secret
from chunkq.storage.array import Array
from chunkq.storage.images import ImageSource, find_source
from chunkq.storage.mask import Mask


def find_mask(config: MaskConfig, *, allow_empty: bool = False) -> ImageSource:
    """Find the array of a mask. Raises StoreError and JobError."""
    with mask_errors():
        source = find_source(config.path, config.selection, config.access, allow_empty=allow_empty)
    check_mask(source)
    return source


def check_mask(source: ImageSource) -> None:
    """Raise JobError if a mask has several channels, or no real numbers."""
    path = without_secret(source.path)
    if len(source.channels) > 1:
        raise JobError(
            f"mask: {path} has {len(source.channels)} channels; use a mask without channels, or "
            "set axes in mask"
        )
    if np.dtype(source.dtype).kind not in REAL:
        raise JobError(f"mask: {path} has unsupported dtype {source.dtype}; use real numbers")


@contextmanager
def mask_errors() -> Iterator[None]:
    """Name the mask, and not an input, in errors of the search for an array."""
    try:
        yield
    except (StoreError, JobError) as error:
        message = str(error).replace("input: ", "mask: ").replace(" in input", " in mask")
        raise type(error)(message, code=error.code) from error


def mask_axes(
    source: ImageSource, image: ImageSource, scale: Sequence[float] | None
) -> tuple[CellAxis, ...]:
    """Return how the voxels of a mask lie on an image, along each axis of the network's order.

    Raises JobError if they cannot be aligned.
    """
    prefix = f"mask: {without_secret(source.path)}"
    cells, voxels = spatial_axes(source, image), image.spatial_axes
    shape, expected = [axis.size for axis in cells], [axis.size for axis in voxels]
    if len(cells) != len(voxels):
        raise JobError(
            f"{prefix} has {len(cells)} spatial axes, but the input has {len(voxels)}; use a mask "
            "with the same axes, or set axes in mask"
        )
    _check_orientations(source, image, prefix)
    if scale is not None:
        if len(scale) != len(voxels):
            raise JobError(
                f"mask.scale: found {len(scale)} entries; expected {len(voxels)}; set one per "
                "spatial axis of the input"
            )
        return tuple(CellAxis(axis.size, s) for axis, s in zip(cells, scale, strict=True))
    if _has_positions(cells) and _has_positions(voxels):
        _check_units(cells, voxels, prefix)
        return tuple(CellAxis.between(v, c) for v, c in zip(voxels, cells, strict=True))
    if any(size < 1 or whole % size for size, whole in zip(shape, expected, strict=True)):
        raise JobError(
            f"{prefix} has shape {shape}, which does not divide that of the input, {expected}; set "
            "scale in mask, the voxels of the input per voxel of the mask along each axis"
        )
    return tuple(CellAxis(n, v / n) for n, v in zip(shape, expected, strict=True))


def mask_doubts(
    source: ImageSource, image: ImageSource, scale: Sequence[float] | None, region: Box
) -> tuple[str, ...]:
    """Return a line if a mask does not cover the region that is computed of an image.

    Also return one if `scale` makes the mask longer than the image. One voxel of the mask more or
    less is no doubt, and neither is a mask whose metadata have a position. Raises JobError if mask
    and image cannot be aligned.
    """
    axes = mask_axes(source, image, scale)
    if scale is None and any(axis.translation for axis in spatial_axes(source, image)):
        return ()
    covered = [axis.covered for axis in axes]
    doubtful = [
        start > first + max(axis.scale, 1)
        or stop < last - max(axis.scale, 1)
        or (scale is not None and stop > size + max(axis.scale, 1))
        for axis, (start, stop), size, first, last in zip(
            axes, covered, image.shape, region.start, region.stop, strict=True
        )
    ]
    if not any(doubtful):
        return ()
    ranges = ", ".join(f"{start:g}:{stop:g}" for start, stop in covered)
    advice = (
        "correct scale in mask if it lies elsewhere"
        if scale is not None
        else "set scale in mask if both begin at the same corner"
    )
    return (
        f"mask: {without_secret(source.path)} covers the voxels [{ranges}] of an input of shape "
        f"{list(image.shape)}, and what it does not cover is outside; {advice}",
    )


def nothing_inside(fill_value: float, *, has_mask: bool) -> str:
    """Return a line about a job whose chunks are all known to be empty."""
    if has_mask:
        cause, keys = "mask: no patch has a voxel inside", "path, above, level and scale of mask"
    else:
        cause, keys = "skip_empty: the storage chunks of all patches are missing", "input"
    return (
        f"{cause}, so the network does not run and the whole output is fill_value "
        f"({fill_value:g}); check {keys}, and roi if it is set"
    )


def check_mask_times(source: ImageSource, image: ImageSource) -> None:
    """Raise JobError unless the mask has no time axis, or one as long as that of the image."""
    if len(source.time) <= 1:
        return
    times = _stored_times(image)
    if len(source.time) != times:
        expected = f"{times} time points" if times else "no time axis"
        raise JobError(
            f"mask: {without_secret(source.path)} has {len(source.time)} time points, but the "
            f"input has {expected}; use one mask for all, or one per time point"
        )


def mask_time(source: ImageSource, image: ImageSource, time: int) -> int:
    """Return which time point of the mask a selected time point of the image has.

    It is 0 if the mask has no time axis.
    """
    return image.time[time] if len(source.time) > 1 else 0


def mask_of(
    source: ImageSource, array: Array, image: ImageSource, time: int, config: MaskConfig
) -> Mask:
    """Return the mask of a selected time point of an image. Raises JobError.

    `array` is the open array of the source.
    """
    view = in_order_of(source, image).present(array, mask_time(source, image, time))
    return Mask(view, mask_axes(source, image, config.scale), config.above)


def in_order_of(source: ImageSource, image: ImageSource) -> ImageSource:
    """Return the source of a mask with its spatial axes in the network's order of an image."""
    return replace(source, order=_order(source, image))


def spatial_axes(source: ImageSource, image: ImageSource) -> tuple[Axis, ...]:
    """Return the spatial axes of a mask in the network's order of an image."""
    return tuple(source.axes[number] for number in _order(source, image))


def _order(source: ImageSource, image: ImageSource) -> tuple[int, ...]:
    """Return the numbers of the mask's spatial axes in the network's order of an image.

    Axes with the same names correspond, else those at the same place of the stored order.
    """
    own = [number for number, axis in enumerate(source.axes) if axis.kind == "space"]
    stored = [number for number, axis in enumerate(image.axes) if axis.kind == "space"]
    if len(own) != len(stored):
        return tuple(own)
    by_name = {source.axes[number].name: number for number in own}
    wanted = image.order or tuple(stored)
    names = [image.axes[number].name for number in wanted]
    if source.named_by and image.named_by and set(names) == set(by_name):
        return tuple(by_name[name] for name in names)
    return tuple(own[stored.index(number)] for number in wanted)


def _has_positions(axes: Sequence[Axis]) -> bool:
    """Return whether metadata say the size or the position of voxels."""
    return any(axis.scale != 1 or axis.translation != 0 or axis.unit for axis in axes)


def _check_orientations(source: ImageSource, image: ImageSource, prefix: str) -> None:
    """Raise JobError if mask and image are NIfTI, and not set to one orientation."""
    from chunkq.storage.formats.nifti import orientation_of

    own, expected = orientation_of(source.options), orientation_of(image.options)
    if own is None or expected is None or own == expected:
        return
    advice = f"set orientation: {expected} in mask" if expected else "remove orientation in mask"
    raise JobError(
        f"{prefix} has {_orientation_text(own)}, but the input has {_orientation_text(expected)}; "
        f"{advice}"
    )


def _orientation_text(codes: str) -> str:
    return f"orientation {codes}" if codes else "no orientation set"


def _check_units(cells: Sequence[Axis], voxels: Sequence[Axis], prefix: str) -> None:
    for cell, voxel in zip(cells, voxels, strict=True):
        if cell.unit and voxel.unit and cell.unit != voxel.unit:
            raise JobError(
                f"{prefix} has voxel sizes in {cell.unit} along {cell.name}, the input in "
                f"{voxel.unit}; set scale in mask"
            )
        if cell.scale * voxel.scale <= 0:  # both are negative if both positions fall
            raise JobError(
                f"{prefix} has voxel size {cell.scale:g} along {cell.name}, the input "
                f"{voxel.scale:g}; flip one of them, or set scale in mask"
            )


def _stored_times(image: ImageSource) -> int:
    return next((axis.size for axis in image.axes if axis.kind == "time"), 0)
