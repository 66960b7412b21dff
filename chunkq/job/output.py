"""Outputs of a job: create, check and seal their arrays and metadata.

On a local disk the array is named `0.<epoch>` while the job runs, and is renamed to `0` when the
job is sealed. A suspended process of an earlier job on the same path therefore cannot write into
the array of a later job. A bucket cannot rename objects. There the first job writes `0`, and a job
that replaces another one writes `0.<epoch>` and keeps this name. The levels of a pyramid have the
names `1`, `2`, …, and are handled alike. So are the scales of a precomputed volume, which are named
by their voxel size (`job.output_layouts`).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from chunkq import __version__
from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axes import Axis, channel_axis, cropped, reduced, scaled, with_unique_names
from chunkq.job.items import Image
from chunkq.job.output_documents import ATTRIBUTE, WrittenDocument, parsed
from chunkq.job.output_layouts import (
    OutputLayout,
    PrecomputedLayout,
    StoredImage,
    ZarrLayout,
    check_volume,
)
from chunkq.job.parent_groups import unlisted_in_groups
from chunkq.job.record import JobRecord
from chunkq.paths import is_url, join, without_secret
from chunkq.plan.plan import Plan
from chunkq.storage.array import Array
from chunkq.storage.formats.zarr_writing import WritableArray
from chunkq.storage.object_grid import ObjectGrid
from chunkq.storage.objects import LOCK, ObjectFolder
from chunkq.storage.value_metadata import range_attributes

SEALED_NAME = "0"
LOCK_AGE = 120.0
"""Age (s) from which a temporary file of tensorstore belongs to a killed writer."""


def new_record(record: JobRecord, *, replaces: bool) -> JobRecord:
    """Return the record of a new job, with an epoch and the metadata of its arrays.

    Set `replaces` if the output path may have content of an earlier job or program.
    """
    epoch = record.new_epoch()
    has_final_name = is_url(record.job.output_path) and not replaces
    name = SEALED_NAME if has_final_name else f"{SEALED_NAME}.{epoch}"
    record = replace(record, epoch=epoch, array=name)
    layout, metadata = layout_of(record), dict[str, str]()
    for image, plan in zip(record.images, record.image_plans(), strict=True):
        for number, view in enumerate(plan.views):
            folder = image_folder(image, view.output.name)
            stored = stored_image(record, image, number)
            for level, array in enumerate(_running_names(record, layout.names(stored))):
                documents = layout.array_documents(stored, level, array)
                metadata |= {_below(folder, path): text for path, text in documents.items()}
    return replace(record, metadata=metadata)


def layout_of(record: JobRecord) -> OutputLayout:
    """Return how the output of a job is laid out."""
    if record.job.is_precomputed:
        return PrecomputedLayout()
    return ZarrLayout(record.job.zarr_format)


def stored_image(record: JobRecord, image: Image, output: int) -> StoredImage:
    """Return an output of an image as it is stored."""
    plan = record.image_plan(image).of_output(output)
    scale = plan.grid.scale or (1,) * plan.rank
    return StoredImage(
        record.job,
        plan,
        tuple(level_axes(record, image, output)),
        record.levels(image, output),
        tuple(map(float, scale)),
    )


def _running_names(record: JobRecord, finals: Sequence[str]) -> tuple[str, ...]:
    """Return the names of arrays while the job runs; `finals` are those on a sealed local disk."""
    suffix = record.array.removeprefix(SEALED_NAME)
    return tuple(f"{final}{suffix}" for final in finals)


def check_outputs(record: JobRecord) -> tuple[str, ...]:
    """Return notes about what a precomputed output does not hold exactly.

    Raises StoreError and JobError if it cannot hold an output of the job.
    """
    if not record.job.is_precomputed:
        return ()
    return tuple(
        note
        for image in record.images
        for number in range(len(record.image_plan(image).outputs))
        for note in check_volume(stored_image(record, image, number), record.job.output)
    )


def level_axes(record: JobRecord, image: Image, output: int) -> Iterator[tuple[Axis, ...]]:
    """Yield the axes of the array of an output of an image, and of each level above it."""
    axes = output_axes(image, record.image_plan(image).of_output(output))
    yield axes
    for level in record.levels(image, output):
        spatial = iter(zip(level.shape, level.total, strict=True))
        yield tuple(reduced(a, *next(spatial)) if a.kind == "space" else a for a in axes)


def image_folder(image: Image, output: str) -> str:
    """Return the name in the output of the OME-Zarr image of an image and one of its outputs.

    It is empty if the output of the job is this image.
    """
    return "/".join(filter(None, (image.name, output)))


def output_axes(image: Image, plan: Plan) -> tuple[Axis, ...]:
    """Return the axes of the array of an output of an image, whose items have this plan.

    `plan` is that of the output (`Plan.of_output`). The axes are the series axes of the image, the
    channels of the network if they are stored, and the spatial axes, which begin and end with the
    region of the job.
    """
    channels = [channel_axis(plan.channels)] if plan.channel_axis else []
    region, spatial_axes = plan.region, image.spatial_axes
    if plan.grid.scale is not None:
        spatial_axes = tuple(map(scaled, spatial_axes, plan.grid.scale))
    spatial = map(cropped, spatial_axes, region.start, region.stop)
    return with_unique_names([*image.series_axes, *channels, *spatial])


def _below(folder: str, name: str) -> str:
    """Return the name in the output of an object in a folder of it."""
    return f"{folder}/{name}" if folder else name


class Output:
    """The output store of a job: one image, or a group of images.

    Several images of the input, and several outputs of each, are groups of images, one in the
    other.

    Methods raise StoreError, and OSError if the storage fails. Methods that change the output call
    `check_unchanged`, which raises if the job was replaced, before each change.
    """

    def __init__(self, path: str, record: JobRecord) -> None:
        self._path, self._record = path, record
        names = list(record.job.output_configs())
        self._by_image = tuple(
            tuple(ImageOutput(path, record, image, n) for n in range(len(names)))
            for image in record.images
        )
        self._images = tuple(output for outputs in self._by_image for output in outputs)
        folders = [image.name for image in record.images if image.name]
        outputs = [name for name in names if name]
        # Inner groups first: the outermost one decides whether the job is sealed.
        groups = [(folder, outputs) for folder in folders if outputs]
        members = [_below(folder, name) for folder in folders for name in outputs or [""]]
        members = [name.rstrip("/") for name in members] or outputs
        groups += [("", members)] if members else []
        if not layout_of(record).has_groups:
            groups = []
        self._groups = tuple(ImageGroup(path, record, folder, names) for folder, names in groups)

    def image(self, image: Image, number: int = 0) -> ImageOutput:
        """Return the output of an image, by its number among the outputs of the job."""
        return self._by_image[image.number][number]

    def images_of(self, image: Image) -> tuple[ImageOutput, ...]:
        """Return all outputs of an image."""
        return self._by_image[image.number]

    @property
    def path(self) -> str:
        """Path of the store."""
        return self._path

    @property
    def has_final_name(self) -> bool:
        """Whether an array was renamed to its final name."""
        return any(image.has_final_name for image in self._images)

    def prepare(self, *, anything_done: bool, check_unchanged: Callable[[], None]) -> None:
        """Create the missing parts of the output of a running job; delete those of earlier jobs.

        Works from any interrupted state. Raises StoreError if the metadata of an array changed, or
        if an array is missing although chunks are committed (`anything_done`).
        """
        for group in reversed(self._groups):
            group.prepare(check_unchanged)
        for image in self._images:
            image.prepare(anything_done=anything_done, check_unchanged=check_unchanged)

    def unseal(self) -> None:
        """Rename sealed arrays back to the name that they have while the job runs.

        Only the process that holds the claim on the job's record may call this: the name `0` has
        no epoch, so the array could otherwise belong to a later job.
        """
        for image in self._images:
            image.unseal()

    def check_array(self) -> None:
        """Raise StoreError unless every array, under its current name, is the one created."""
        for image in self._images:
            image.check_array()

    def mark_incomplete(self, *, check_unchanged: Callable[[], None]) -> None:
        """Write the group metadata of an output that will be read before it is complete."""
        for image in self._images:
            image.mark_incomplete(check_unchanged=check_unchanged)
        for group in self._groups:
            group.write("incomplete", check_unchanged)

    def seal(self, *, check_unchanged: Callable[[], None]) -> None:
        """Mark the output as complete; rename local arrays to their final name. Idempotent."""
        for image in self._images:
            image.seal(check_unchanged=check_unchanged)
        for group in self._groups:
            group.write("complete", check_unchanged)

    def unlisted(self) -> list[str]:
        """Return warnings for groups that contain the output and whose readers do not find it."""
        record = self._record
        if not layout_of(record).has_groups:
            return []
        epoch = "" if is_url(self._path) else record.array.removeprefix(SEALED_NAME)
        documents = {name.replace(f"{epoch}/", "/"): text for name, text in record.metadata.items()}
        return unlisted_in_groups(self._path, record.job.zarr_format, documents)

    @property
    def arrays(self) -> list[StoredArray]:
        """The arrays of the output, where they are now."""
        return [array for image in self._images for array in image.arrays]

    def documents(self, state: str) -> list[WrittenDocument]:
        """Return the metadata documents that an output in this state has."""
        documents = [document for image in self._images for document in image.documents(state)]
        return [*documents, *(one for group in self._groups for one in group.documents(state))]

    def is_sealed(self) -> bool:
        """Return whether the group metadata mark this job as complete."""
        if self._groups:
            return self._groups[-1].is_described("complete")
        return all(image.is_sealed() for image in self._images)


class ImageOutput:
    """One output of an image. Methods raise StoreError, and OSError if the storage fails."""

    def __init__(self, path: str, record: JobRecord, image: Image, number: int = 0) -> None:
        """`number` is that of the output among those of the job."""
        self._folder = image_folder(image, list(record.job.output_configs())[number])
        self.path = join(path, self._folder) if self._folder else path
        self._record, self._image, self._number = record, image, number
        prefix = _below(self._folder, "")
        self._metadata = {
            name.removeprefix(prefix): text
            for name, text in record.metadata.items()
            if name.startswith(prefix)
        }
        self._objects = ObjectFolder(self.path)
        self._local = not is_url(path)
        self._layout = layout_of(record)

    @cached_property
    def _stored(self) -> StoredImage:
        return stored_image(self._record, self._image, self._number)

    @cached_property
    def _sealed_names(self) -> tuple[str, ...]:
        """Names of the arrays of all levels on a local disk, once the job is sealed."""
        return self._layout.names(self._stored)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """Names of the arrays of all levels while the job runs."""
        return _running_names(self._record, self._sealed_names)

    def prepare(self, *, anything_done: bool, check_unchanged: Callable[[], None]) -> None:
        """Create the missing parts of the output of a running job; delete those of earlier jobs.

        Works from any interrupted state. Calls `check_unchanged`, which raises if the job was
        replaced, before each change. Raises StoreError if the array's metadata changed, or if the
        array is missing although chunks are committed (`anything_done`).
        """
        absent = [name for name in self._names if not self._exists(name)]
        if absent:
            if anything_done:
                raise StoreError(
                    f"output: {without_secret(self.path)}/{absent[0]}/"
                    f"{self._layout.array_document} is "
                    "missing although chunks are committed; restore the file, or use --overwrite "
                    "to start again",
                    code=ErrorCode.OUTPUT_CHANGED,
                )
            check_unchanged()
            for document in self._layout.other_documents:
                self._objects.delete(document)
            self._put(self._metadata)
        for name in self._names:
            self.check(name)
        self._delete_stray_arrays(check_unchanged)
        if self._local:
            delete_stale_locks(self.path, time.time() - LOCK_AGE)
        check_unchanged()
        self._write_group("incomplete", self._names)

    @property
    def has_final_name(self) -> bool:
        """Whether an array was renamed to its final name."""
        return any(map(self._was_renamed, range(len(self._names))))

    def _was_renamed(self, level: int) -> bool:
        final = self._sealed_names[level]
        return self._local and not self._exists(self._names[level]) and self._exists(final)

    def unseal(self) -> None:
        """Rename sealed arrays back to the names they have while the job runs.

        Only the process that holds the claim on the job's record may call this: the name `0` has
        no epoch, so the array could otherwise belong to a later job.
        """
        for level, name in enumerate(self._names):
            if self._was_renamed(level):
                # A late process of this job may have written under the old name.
                self._objects.discard(name)
                os.rename(join(self.path, self._sealed_names[level]), join(self.path, name))

    @property
    def arrays(self) -> list[StoredArray]:
        """The arrays of the image, where they are now."""
        names = (_below(self._folder, name) for name in self._current_names)
        folders = map(self.array_folder, range(len(self._names)))
        return list(map(StoredArray, folders, names, self.grids))

    def documents(self, state: str) -> list[WrittenDocument]:
        """Return the metadata documents that an image in this state has."""
        names = self._current_names
        group = self._layout.written(self._attributes(state, names))
        group |= self._layout.other_written(self._stored)
        current = dict(zip(self._names, names, strict=True))
        arrays = {
            f"{current[name]}/{document}": text
            for path, text in self._metadata.items()
            for name, _, document in [path.partition("/")]
        }
        return [
            WrittenDocument(
                _below(self._folder, path),
                text,
                is_array=path in arrays and path.endswith(self._layout.array_document),
            )
            for path, text in (arrays | group).items()
        ]

    @property
    def _current_names(self) -> tuple[str, ...]:
        """Names of the folders of the arrays: others than while the job runs once it is sealed.

        Judged by the folders, because documents can be missing.
        """
        return tuple(
            final
            if self._local and not self._objects.exists(name) and self._objects.exists(final)
            else name
            for name, final in zip(self._names, self._sealed_names, strict=True)
        )

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of level 0."""
        plan = self._record.image_plan(self._image).of_output(self._number)
        return output_axes(self._image, plan)

    @property
    def present_path(self) -> str:
        """Path of the array of level 0 now. A late process can have written beside a sealed one."""
        name = self._sealed_names[0] if self._was_renamed(0) else self._names[0]
        return join(self.path, name)

    def array_folder(self, level: int = 0) -> str:
        """Return the name in the output of the folder of an array, while the job runs."""
        return _below(self._folder, self._names[level])

    @cached_property
    def grids(self) -> tuple[ObjectGrid, ...]:
        """The objects of the array of each level."""
        return tuple(map(self._layout.grid, self._documents))

    @cached_property
    def _documents(self) -> tuple[str, ...]:
        """The documents of the arrays of all levels, as they were created."""
        document = self._layout.array_document
        return tuple(self._metadata[f"{name}/{document}"] for name in self._names)

    def open(self, level: int = 0) -> WritableArray:
        """Open an array of a running job for writing. Raises StoreError if it was changed."""
        name = self._names[level]
        self.check(name)
        return self._layout.open(join(self.path, name), self._documents[level])

    def open_present(self, *, cached: bool = False) -> Array:
        """Open the array of level 0 for reading, sealed or not.

        `cached` keeps storage chunks in the cache of this process. Raises StoreError.
        """
        return self._layout.open_present(self.present_path, self._documents[0], cached=cached)

    def check(self, name: str) -> None:
        """Raise StoreError unless the array's metadata are those that were created.

        Attributes are not compared, because users may add their own.
        """
        document = self._layout.array_document
        stored = parsed(self._objects.get(f"{name}/{document}"))
        names = self._names if name in self._names else self._sealed_names
        created = json.loads(self._documents[names.index(name)])
        differences = sorted(
            key
            for key in (stored or {}).keys() | created.keys()
            if key != "attributes" and (stored or {}).get(key) != created.get(key)
        )
        if stored is None or differences:
            reason = f"changed ({', '.join(differences)})" if stored and differences else "damaged"
            raise StoreError(
                f"output: {without_secret(self.path)}/{name}/{document}: {reason} since the job "
                "was produced; restore the file, or use --overwrite to start again",
                code=ErrorCode.OUTPUT_CHANGED,
            )

    def check_array(self) -> None:
        """Raise StoreError unless every array, under its current name, is the one created."""
        for level, name in enumerate(self._names):
            is_current = not self._local or self._exists(name)
            self.check(name if is_current else self._sealed_names[level])

    def mark_incomplete(self, *, check_unchanged: Callable[[], None]) -> None:
        """Write the group metadata of an output that will be read before it is complete."""
        check_unchanged()
        self._write_group("incomplete", self._names)

    def seal(self, *, check_unchanged: Callable[[], None]) -> None:
        """Mark the output as complete; rename local arrays to their final names. Idempotent."""
        names = self._final_names
        # Level 0 last. A suspended process that finds no voxels under the old name of a level
        # then writes the next one under its old name, too.
        for name, final in reversed(list(zip(self._names, names, strict=True))):
            if self._local and self._exists(name):
                self.check(name)
                check_unchanged()
                self._rename_to_final(name, final)
            self.check(final)
        self._delete_stray_arrays(check_unchanged)
        if self._local:
            for final in names:
                delete_stale_locks(join(self.path, final))
        check_unchanged()
        self._write_group("complete", names)
        check_unchanged()  # raises if this process was suspended above and the job was replaced

    @property
    def _final_names(self) -> tuple[str, ...]:
        """Names of the arrays of all levels in the sealed output."""
        return self._sealed_names if self._local else self._names

    def is_sealed(self) -> bool:
        """Return whether the group metadata mark this job as complete."""
        return self._is_described("complete", self._final_names)

    def _is_described(self, state: str, names: Sequence[str]) -> bool:
        """Return whether the group metadata are those of this job; other keys are ignored."""
        attributes = self._layout.stored_attributes(self._objects)
        expected = self._attributes(state, names)
        return _key_values(self._layout, attributes) == _key_values(self._layout, expected)

    def _exists(self, name: str) -> bool:
        return self._objects.exists(f"{name}/{self._layout.array_document}")

    def _rename_to_final(self, name: str, final: str) -> None:
        path = join(self.path, final)
        if os.path.lexists(path) and self._exists(name):
            raise StoreError(
                f"output: {path} was created by another job or program; remove it, then run the "
                "command again",
                code=ErrorCode.OUTPUT_CHANGED,
            )
        try:
            os.rename(join(self.path, name), path)
        except FileNotFoundError:
            if not self._exists(final):  # else another finalizer has renamed it
                raise

    def _delete_stray_arrays(self, check_unchanged: Callable[[], None]) -> None:
        """Delete arrays that processes of earlier jobs wrote after they were replaced."""
        # List before the check, so that the list has no array of a later job.
        strays = [name for name in self._objects.folders() if self._is_stray(name)]
        check_unchanged()
        if strays:
            self._objects.discard(*strays)
        self._objects.delete_partial_files()

    def _is_stray(self, name: str) -> bool:
        if name in self._names:
            return self._local and self._was_renamed(self._names.index(name))
        has_epoch = self._layout.epoch_name(name)
        if has_epoch is None or (self._local and name in self._sealed_names):
            return False
        if has_epoch:
            return True
        # On a local disk it may belong to a later job, and beside `0` to the user.
        return not self._local and self._record.array != SEALED_NAME

    def _write_group(self, state: str, names: Sequence[str]) -> None:
        """Write the group metadata unless they are current; keep the user's attributes."""
        if not self._is_described(state, names):
            attributes = self._attributes(state, names)
            self._put(self._layout.other_written(self._stored))
            self._put(_merged_documents(self._layout, self._objects, attributes))

    def _attributes(self, state: str, names: Sequence[str]) -> dict[str, Any]:
        """Return the attributes that chunkq writes: `chunkq`, and what readers need."""
        status = _status(self._record, state) | {"array": names[0]}
        status |= range_attributes(self._stored.plan.output)
        documents = dict(zip(names, self._documents, strict=True))
        return {**self._layout.attributes(self._stored, documents), ATTRIBUTE: status}

    def _put(self, documents: dict[str, str]) -> None:
        _put(self._objects, documents)


class StoredArray(NamedTuple):
    """An array of an output: its objects, and its folder.

    `running` is the name of the folder while the job runs, `folder` the present one.
    """

    running: str
    folder: str
    grid: ObjectGrid


class ImageGroup:
    """A group of images, or of such groups, laid out as bioformats2raw does (layout 3)."""

    def __init__(self, path: str, record: JobRecord, folder: str, members: Sequence[str]) -> None:
        """`folder` is the path of the group in the output, `members` the images in the group."""
        self._record, self._layout, self._members = record, layout_of(record), members
        self._folder, path = folder, join(path, folder) if folder else path
        self._objects, self._series = ObjectFolder(path), ObjectFolder(join(path, "OME"))

    def prepare(self, check_unchanged: Callable[[], None]) -> None:
        """Write the metadata of a running job."""
        check_unchanged()
        for document in self._layout.other_documents:
            self._objects.delete(document)
        _put(self._series, _merged_documents(self._layout, self._series, self._series_attributes))
        self.write("incomplete", check_unchanged)

    def documents(self, state: str) -> list[WrittenDocument]:
        """Return the documents that the group has in this state."""
        root = self._layout.written(self._attributes(state))
        series = self._layout.written(self._series_attributes)
        documents = root | {f"OME/{name}": text for name, text in series.items()}
        return [
            WrittenDocument(_below(self._folder, name), text) for name, text in documents.items()
        ]

    @property
    def _series_attributes(self) -> dict[str, Any]:
        series: dict[str, Any] = {"series": list(self._members)}
        return self._versioned(series)

    def write(self, state: str, check_unchanged: Callable[[], None]) -> None:
        """Write the group metadata unless they are current; keep the user's attributes."""
        check_unchanged()
        if not self.is_described(state):
            attributes = self._attributes(state)
            _put(self._objects, _merged_documents(self._layout, self._objects, attributes))

    def is_described(self, state: str) -> bool:
        """Return whether the group metadata are those of this job; other keys are ignored."""
        attributes = self._layout.stored_attributes(self._objects)
        return bool(attributes.get(ATTRIBUTE) == self._attributes(state)[ATTRIBUTE])

    def _attributes(self, state: str) -> dict[str, Any]:
        layout = self._versioned({"bioformats2raw.layout": 3})
        return {**layout, ATTRIBUTE: _status(self._record, state)}

    def _versioned(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """Return attributes of OME-Zarr, which has a version since it uses Zarr v3."""
        if self._record.job.zarr_format == 2:
            return attributes
        return {"ome": {"version": "0.5", **attributes}}


def _status(record: JobRecord, state: str) -> dict[str, Any]:
    """Return the attribute that names the job and its state."""
    return {
        "state": state,
        "digest": record.digest,
        "epoch": record.epoch,
        "version": __version__,
    }


def _merged_documents(
    layout: OutputLayout, objects: ObjectFolder, attributes: dict[str, Any]
) -> dict[str, str]:
    """Return the documents of an image or a group with these attributes and the user's own."""
    return layout.written(layout.merged(layout.stored_attributes(objects), attributes))


def _put(objects: ObjectFolder, documents: dict[str, str]) -> None:
    try:
        for name, text in documents.items():
            objects.put(name, text.encode())
    except OSError as error:
        reason = error.strerror or error
        raise StoreError(
            f"output: {without_secret(objects.path)} cannot be written: {reason}"
        ) from error


def delete_stale_locks(path: str, older_than: float = math.inf) -> None:
    """Delete tensorstore's temporary files below a local path that are older than a Unix time."""
    for folder, _, files in os.walk(path):
        for file in files:
            name = os.path.join(folder, file)
            with suppress(FileNotFoundError):
                if LOCK in file and os.stat(name).st_mtime < older_than:
                    os.unlink(name)


def _key_values(layout: OutputLayout, attributes: dict[str, Any]) -> tuple[Any, ...]:
    """Return the attributes of an image that identify the job and its state."""
    status = attributes.get(ATTRIBUTE)
    status = status if isinstance(status, dict) else {}
    try:
        names = layout.array_names(attributes)
    except (KeyError, IndexError, TypeError):
        names = []
    return names, *(status.get(key) for key in ("state", "array", "digest", "epoch"))
