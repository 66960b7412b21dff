"""Convert an image that can be read, such as a complete output, to a format that others read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from chunkq import __version__, json_values
from chunkq.errors import ChunkqError, ErrorCode, JobError, StoreError
from chunkq.job.events import Message, Sink, StageProgress, ignore
from chunkq.job.input_config import InputConfig
from chunkq.job.job_folder import JobFolder
from chunkq.job.job_path import PRECOMPUTED, SUFFIX, job_folder_of
from chunkq.job.output_documents import ATTRIBUTE, parsed
from chunkq.job.output_name import export_target
from chunkq.job.stored_images import image_folder, output_axes
from chunkq.paths import absolute_input, is_url, join, read_bytes, split_format, without_secret
from chunkq.storage.array import Array
from chunkq.storage.formats.precomputed_metadata import INFO
from chunkq.storage.formats.zarr_nodes import read_node
from chunkq.storage.images import ImageSource, find_array, source_of
from chunkq.storage.objects import ObjectFolder
from chunkq.storage.staged import Slabs, StagedCopy
from chunkq.writers.base import ExportWriter, FileWriter, ImageToWrite, StoredValues, WriterOptions
from chunkq.writers.copying import copy_image
from chunkq.writers.file_space import FileSpace, file_space
from chunkq.writers.partial import Partial, check_target, partial_output
from chunkq.writers.registry import WRITERS
from chunkq.writers.whole_image import WholeImage, whole_axes, whole_storage

CONVERTING, STAGING = "converting", "staging the input"
COMPLETE = "complete"


@dataclass(frozen=True)
class Conversion:
    """An image, and how it is written.

    source  the array that is read
    writer  the writer of the format
    target  path of the output, without the name of the format
    """

    source: ImageSource
    writer: ExportWriter
    target: str

    @property
    def identity(self) -> str:
        """A string that changes with the input and with the layout of the output."""
        writer = self.writer
        content = [
            __version__,
            self.source.identity(),
            json_values.to_values(self.source),
            type(writer).__name__,
            str(writer.dtype),
            list(writer.blocks.block),
            json_values.to_values(writer.options),
            [json_values.to_values(axis) for axis in writer.image.axes],
            writer.image.is_labels,
            writer.image.classes,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plan_conversion(
    source: Mapping[str, Any],
    target: str,
    *,
    is_labels: bool | None = None,
    dtype: str | None = None,
    options: WriterOptions,
) -> Conversion:
    """Return how an image is converted, without writing anything.

    `source` has the keys of an input of a job file. `target` is the path of the output, whose name
    names the format. `is_labels` says whether the values are labels; None for what chunkq's records
    say. `dtype` replaces that of the input. Raises JobError and StoreError in one line if the image
    cannot be read, or the format cannot hold it.
    """
    config = _input_config(source)
    format_name, path, dataset = export_target(target, Path.cwd())
    if dataset:
        options = replace(options, dataset=dataset)
    array_format, array = find_array(config.path, config.selection, config.access)
    image_source = source_of(array, config.selection, config.path, array_format)
    attributes = _chunkq_attributes(image_source, config)
    _check_complete(image_source, attributes)
    output = _chunkq_output(image_source.path)
    labels = output.is_labels if is_labels is None and output else bool(is_labels)
    axes = whole_axes(image_source)
    shape = [axis.size for axis in axes if axis.kind == "space"]
    space = file_space(image_source, shape) or (
        output.space if output and not config.level else None
    )
    if config.order or config.axes:
        space = file_space(image_source, shape)
    image = ImageToWrite(
        axes,
        dtype or image_source.dtype,
        labels,
        whole_storage(image_source),
        tuple(array.labels[n] for n in image_source.channels) if any(array.labels) else (),
        space,
        _stored_values(attributes),
        output.classes if output and labels else (),
    )
    if _overlap(path, image_source.path):
        raise StoreError(
            f"output: {without_secret(path)} would overwrite the input; choose another output"
        )
    if not is_url(path) and Path(path + SUFFIX).exists():
        raise StoreError(
            f"output: {path} belongs to a job; choose another output",
            code=ErrorCode.OUTPUT_OF_OTHER_JOB,
        )
    return Conversion(image_source, WRITERS[format_name](image, target, options), path)


def convert(
    conversion: Conversion, *, overwrite: bool = False, emit: Sink = ignore
) -> dict[str, Any]:
    """Write the output of a conversion; return what was written.

    An interrupted conversion to a format of many objects continues. Raises ChunkReadError,
    StoreError and OSError.
    """
    writer, target = conversion.writer, conversion.target
    for note in writer.notes:
        emit(Message(f"chunkq: warning: {note}"))
    is_file = isinstance(writer, FileWriter)
    check_target(target, is_file=is_file, overwrite=overwrite)
    with partial_output(target, is_file=is_file, overwrite=overwrite) as partial:
        array = WholeImage(conversion.source, _opened(conversion.source, partial, emit))
        identity = conversion.identity
        first = partial.steps(identity) if writer.is_resumable else 0
        if not first:
            partial.clear()

        def report(done: int) -> None:
            if writer.is_resumable:
                partial.record(identity, done)
            emit(StageProgress(CONVERTING, done, writer.steps))

        emit(StageProgress(CONVERTING, first, writer.steps))
        copy_image(writer, array, partial.path, report, first)
    return {
        "input": without_secret(conversion.source.path),
        "output": without_secret(target),
        "shape": [axis.size for axis in writer.image.axes],
        "axes": [axis.name for axis in writer.image.axes],
        "dtype": writer.dtype.name,
        "labels": writer.image.is_labels,
        "continued_at": first,
        "steps": writer.steps,
    }


def _opened(source: ImageSource, partial: Partial, emit: Sink) -> Array:
    """Open the array of a source; copy it first if it cannot be read by region."""
    array = source.open()
    if not source.staged:
        return array
    itemsize = np.dtype(source.dtype).itemsize
    slabs = Slabs.of(source.stored_axes, itemsize)
    folder = join(partial.staged, hashlib.sha256(str(source.identity()).encode()).hexdigest()[:16])
    copy = StagedCopy(ObjectFolder(folder), "0", slabs, source.dtype)
    copy.create()
    target, first = copy.open(write=True), copy.slabs_written()
    if first < slabs.count:
        boxes = list(slabs.boxes(first))
        for done, values in enumerate(array.read_in_order(boxes), start=first + 1):
            target.write(boxes[done - first - 1], values)
            copy.record_slabs(done)
            emit(StageProgress(STAGING, done, slabs.count))
    return copy.open()


@dataclass(frozen=True)
class ChunkqOutput:
    """What the record of a job says of one of its images."""

    is_labels: bool
    space: FileSpace | None
    classes: tuple[str, ...] = ()


def _chunkq_output(path: str) -> ChunkqOutput | None:
    """Return what is known of an array in the output of a job; None for other arrays."""
    for output, inner in _parents(path):
        record = None
        with suppress(ChunkqError, OSError):
            record = JobFolder(job_folder_of(output)).read_record()
        if record is None:
            continue
        for image in record.images:
            plan = record.image_plan(image)
            for view, spec in zip(plan.views, plan.outputs, strict=True):
                folder = image_folder(image, spec.name)
                if folder and not f"{inner}/".startswith(f"{folder}/"):
                    continue
                axes = [axis for axis in output_axes(image, view) if axis.kind == "space"]
                space = file_space(
                    image.sources[0],
                    [axis.size for axis in axes],
                    plan.region.start,
                    [float(factor) for factor in spec.scale],
                )
                classes = spec.class_names if spec.has_labels else ()
                return ChunkqOutput(spec.has_labels, space, classes)
    return None


def _parents(path: str) -> Iterator[tuple[str, str]]:
    """Yield what can be the output that is or contains an array, and the rest of the path."""
    yield path, ""
    parts = path.rstrip("/").split("/")
    for count in range(len(parts) - 1, max(0, len(parts) - 4), -1):
        yield "/".join(parts[:count]), "/".join(parts[count:])


def _chunkq_attributes(source: ImageSource, config: InputConfig) -> dict[str, Any]:
    """Return the attributes that chunkq has written for an array; empty for other arrays."""
    attributes: Any = None
    with suppress(Exception):  # no group above the array, or one that cannot be read
        if source.format == PRECOMPUTED:
            content = read_bytes(join(source.path, INFO), config.access)
            attributes = (parsed(content) or {}).get(ATTRIBUTE)
        elif source.format == "zarr":
            node = read_node(_group_of(source), config.access)
            attributes = None if node is None else node.attributes.get(ATTRIBUTE)
    return attributes if isinstance(attributes, dict) else {}


def _group_of(source: ImageSource) -> str:
    path = source.path.rstrip("/")
    return path if source.format == PRECOMPUTED else path.rpartition("/")[0]


def _check_complete(source: ImageSource, attributes: Mapping[str, Any]) -> None:
    """Raise StoreError if the array is that of a job that is not complete."""
    state = attributes.get("state", COMPLETE)
    if state != COMPLETE:
        raise StoreError(
            f"input: {without_secret(_group_of(source))} is {state}; run `chunkq finalize` first",
            code=ErrorCode.STORE_UNUSABLE,
        )


def _stored_values(attributes: Mapping[str, Any]) -> StoredValues | None:
    """Return what the integers of an array stand for, as its attributes say."""
    try:
        return StoredValues(float(attributes["scale"]), float(attributes["offset"]))
    except (KeyError, TypeError, ValueError):
        return None


def _input_config(values: Mapping[str, Any]) -> InputConfig:
    """Validate the keys of an input. Raises JobError."""
    from pydantic import ValidationError

    path = absolute_input(str(values["path"]), Path.cwd())
    try:
        return InputConfig.model_validate({**values, "path": path})
    except ValidationError as error:
        raise JobError(
            [
                f"--{'.'.join(map(str, detail['loc'][:1]))}: "
                f"{detail['msg'].removeprefix('Value error, ')}; fix the value"
                for detail in error.errors()
            ]
        ) from None


def _overlap(output: str, source: str) -> bool:
    """Return whether a path contains the other, or equals it."""
    first, second = (split_format(path)[1].rstrip("/") + "/" for path in (output, source))
    return first.startswith(second) or second.startswith(first)
