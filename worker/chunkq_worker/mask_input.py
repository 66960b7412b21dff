"""Open the mask that a caller of a predictor passes: an array-like, a path, or keys of `mask`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chunkq.errors import ArgumentError, JobError
from chunkq.geometry.axes import plain_axes
from chunkq.job.fields import MaskConfig
from chunkq.job.mask_source import check_mask, find_mask, mask_axes, mask_errors, mask_of
from chunkq.paths import absolute_input
from chunkq.storage.array import Array
from chunkq.storage.formats.base import ArrayInfo
from chunkq.storage.images import ImageSource, source_of
from chunkq.storage.mask import Mask
from chunkq.storage.selection import EVERYTHING
from chunkq_worker.input_objects import OpenedInput, open_object

NAME = "the mask"


@dataclass(frozen=True)
class MaskInput:
    """A mask, where its array is, and how it lies on a volume. `config.path` may be empty."""

    config: MaskConfig
    source: ImageSource
    array: Array

    def on(self, volume: OpenedInput) -> Mask:
        """Return the mask of an opened volume. Raises JobError if it cannot be aligned."""
        return mask_of(self.source, self.array, _image(volume), 0, self.config)

    def stored(self, volume: OpenedInput) -> tuple[OpenedInput, dict[str, Any]]:
        """Return the mask as an input that can be written to a file, and its keys of a job.

        The path is missing from the keys. Raises ArgumentError if the file could not say where the
        mask lies.
        """
        values = self.config.model_dump(exclude_none=True, exclude={"path"})
        if self.config.path:
            return OpenedInput(self.array, volume.geometry, path=self.config.path), values
        axes = mask_axes(self.source, _image(volume), self.config.scale)
        if any(axis.shift for axis in axes):
            raise ArgumentError(
                "mask: an object whose first voxel is not at that of the volume cannot be stored; "
                "pass the path of the mask"
            )
        view = OpenedInput(self.on(volume).array, volume.geometry)
        return view, values | {"scale": [axis.scale for axis in axes]}


def open_mask(
    mask: Any, config: MaskConfig | None, *, allow_empty: bool = False
) -> MaskInput | None:
    """Open a mask; by default that of the job, if its `config` is not None.

    Raises ArgumentError for an object that is no array, and JobError and StoreError for a path.
    """
    if isinstance(mask, (str, os.PathLike)):
        config = MaskConfig(path=absolute_input(os.fspath(mask), Path.cwd()))
    elif isinstance(mask, Mapping):
        config = _config(mask)
    elif mask is not None:
        return _open_object(mask)
    if config is None:
        return None
    source = find_mask(config, allow_empty=allow_empty)
    return MaskInput(config, source, source.open())


def _open_object(mask: Any) -> MaskInput:
    opened = open_object(mask, NAME)
    described = opened.axes or plain_axes(opened.array.shape)
    named_by = "the object" if opened.axes else ""
    info = ArrayInfo(NAME, described, str(opened.array.dtype), named_by=named_by)
    with mask_errors():
        # A mask has no colour, so its axes are spatial unless it names them.
        source = source_of(replace(info, named_by=named_by or "the mask"), EVERYTHING, NAME)
    source = replace(source, named_by=named_by)
    check_mask(source)
    if len(source.time) > 1:
        raise JobError(f"mask: {NAME} has {len(source.time)} time points; use one of them")
    return MaskInput(MaskConfig(path=""), source, opened.array)


def _config(values: Mapping[str, Any]) -> MaskConfig:
    values = {key: _as_tuple(value) for key, value in values.items()}
    if isinstance(values.get("path"), str):
        values["path"] = absolute_input(values["path"], Path.cwd())
    try:
        return MaskConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise JobError(f"mask.{name}: {first['msg'].lower()}") from None


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _image(volume: OpenedInput) -> ImageSource:
    """Return the spatial axes of an opened volume as a source."""
    axes = volume.geometry.axes
    dtype, options = str(volume.array.dtype), volume.options
    return ImageSource("", "", tuple(axes), dtype, options, named_by="the volume")
