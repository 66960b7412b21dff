"""Open the mask that a caller of a predictor passes: an array-like, a path, or keys of `mask`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chunkq.errors import JobError
from chunkq.geometry.box import Box
from chunkq.job.mask_config import MaskConfig
from chunkq.job.mask_source import (
    check_mask,
    check_mask_times,
    find_mask,
    in_order_of,
    mask_doubts,
    mask_errors,
    mask_of,
    mask_time,
)
from chunkq.paths import absolute_input
from chunkq.storage.array import Array
from chunkq.storage.formats.base import AFFINE, ArrayInfo
from chunkq.storage.images import ImageSource, source_of
from chunkq.storage.mask import Mask
from chunkq.storage.remedies import PYTHON
from chunkq.storage.selection import EVERYTHING
from chunkq_worker.input_objects import open_object
from chunkq_worker.inputs import NAMED_BY, OpenedInput

NAME = "the mask"


@dataclass(frozen=True)
class MaskInput:
    """A mask, where its array is, and how it lies on a volume. `config.path` may be empty."""

    config: MaskConfig
    source: ImageSource
    array: Array

    def doubts(self, volume: OpenedInput, region: Box) -> tuple[str, ...]:
        """Return what is doubtful about how the mask lies on a region of an opened volume.

        Raises JobError if it does not fit.
        """
        check_mask_times(self.source, volume.source)
        return mask_doubts(self.source, _image(volume), self.config.scale, region)

    def time(self, volume: OpenedInput, time: int) -> int:
        """Return which time point of the mask a selected time point of an opened volume has."""
        return mask_time(self.source, volume.source, time)

    def on(self, volume: OpenedInput, time: int = 0) -> Mask:
        """Return the mask of a selected time point of an opened volume.

        Raises JobError if it cannot be aligned.
        """
        return mask_of(self.source, self.array, _image(volume), time, self.config)

    def stored(self, volume: OpenedInput) -> tuple[OpenedInput, dict[str, Any]]:
        """Return the mask as an input that can be written to a file, and its keys of a job.

        The path is missing from the keys. The axes of what is written lie like those of the job's
        volume, which is written with the axes ([t,] [c,] *S) that are read of it if it has no path.
        """
        values = self.config.model_dump(exclude_none=True, exclude={"path"})
        has_times = len(self.source.time) > 1
        if self.config.path and (volume.path or not has_times):
            return OpenedInput(self.array, self.source, path=self.config.path), values
        image = _image(volume)
        source = in_order_of(self.source, replace(image, order=()) if volume.path else image)
        if has_times and not volume.path:
            source = replace(source, time=tuple(source.time[n] for n in volume.source.time))
        keys = {key: value for key, value in values.items() if key in ("above", "scale")}
        return OpenedInput(self.array, source), keys


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
    stored = open_object(mask, NAME)
    named_by = "the object" if stored.is_named else ""
    # A mask has no colour, so its axes are spatial unless it names them.
    info = ArrayInfo(NAME, stored.axes, str(stored.array.dtype), named_by=named_by or NAME)
    with mask_errors():
        source = source_of(info, EVERYTHING, NAME, remedies=PYTHON)
    source = replace(source, named_by=named_by)
    if stored.affine is not None and stored.lost:
        source = replace(source, options={AFFINE: json.dumps(stored.affine.tolist())})
    check_mask(source)
    return MaskInput(MaskConfig(path=""), source, stored.array)


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
    """Return the source on which a mask lies: that of a job with the volume."""
    source = volume.source
    return source if volume.path else replace(source, named_by=source.named_by or NAMED_BY)
