"""Outputs of a job: create, check and seal their arrays and metadata.

On a local disk the array is named `0.<epoch>` while the job runs, and is renamed to `0` when the
job is sealed. A suspended process of an earlier job on the same path therefore cannot write into
the array of a later job. A bucket cannot rename objects. There the first job writes `0`, and a job
that replaces another one writes `0.<epoch>` and keeps this name.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from chunkq import __version__
from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axes import Axis, channel_axis, cropped, with_unique_names
from chunkq.job.items import Image
from chunkq.job.output_documents import ATTRIBUTE, WrittenDocument, parsed, to_text
from chunkq.job.parent_groups import unlisted_in_groups
from chunkq.job.record import JobRecord
from chunkq.job.tasks import EPOCH_DIGITS
from chunkq.paths import is_url, join, without_secret
from chunkq.plan.plan import Plan
from chunkq.storage.array import Array
from chunkq.storage.formats.zarr import ZARR_FORMAT, ZarrFormat, array_metadata
from chunkq.storage.formats.zarr_writing import WritableArray
from chunkq.storage.object_grid import ObjectGrid
from chunkq.storage.objects import LOCK, ObjectFolder
from chunkq.storage.ome import image_metadata, is_image, label_metadata

SEALED_NAME = "0"
GROUP = {2: ".zattrs", 3: "zarr.json"}
"""Zarr format -> name of the document with a group's attributes."""
ARRAY = {2: ".zarray", 3: "zarr.json"}
"""Zarr format -> name of an array's metadata document."""
OTHER_FORMAT = {2: ("zarr.json",), 3: (".zgroup", ".zattrs", ".zarray", ".zmetadata")}
"""Zarr format -> documents of the other format in the root of a store."""
LOCK_AGE = 120.0
"""Age (s) from which a temporary file of tensorstore belongs to a killed writer."""
EPOCH_NAME = re.compile(rf"{SEALED_NAME}\.[0-9a-f]{{{EPOCH_DIGITS}}}")


def new_record(record: JobRecord, *, replaces: bool) -> JobRecord:
    """Return the record of a new job, with an epoch and the metadata of its arrays.

    Set `replaces` if the output path may have content of an earlier job or program.
    """
    epoch = record.new_epoch()
    has_final_name = is_url(record.job.output) and not replaces
    name = SEALED_NAME if has_final_name else f"{SEALED_NAME}.{epoch}"
    metadata: dict[str, str] = {}
    for image, plan in _named_plans(record):
        axes = output_axes(image, plan)
        leading = (1,) * (len(axes) - plan.rank)
        chunks = (min(u, v) for u, v in zip(plan.storage_chunks, plan.region.shape, strict=True))
        documents = array_metadata(
            name,
            shape=[axis.size for axis in axes],
            chunks=(*leading, *chunks),
            dtype=plan.output_dtype,
            fill_value=plan.output.fill.item(),
            zarr_format=record.job.zarr_format,
            axes=[axis.name for axis in axes] if is_image(axes) else None,
        )
        folder = image_folder(image, plan.output.name)
        metadata |= {_below(folder, path): text for path, text in documents.items()}
    return replace(record, epoch=epoch, array=name, metadata=metadata)


def _named_plans(record: JobRecord) -> Iterator[tuple[Image, Plan]]:
    """Yield the plan of each output of each image."""
    for image, plan in zip(record.images, record.image_plans(), strict=True):
        for view in plan.views:
            yield image, view


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
    region = plan.region
    spatial = map(cropped, image.spatial_axes, region.start, region.stop)
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
        self._groups = tuple(ImageGroup(path, record, folder, names) for folder, names in groups)

    def image(self, image: Image, number: int = 0) -> ImageOutput:
        """Return the output of an image, by its number among the outputs of the job."""
        return self._by_image[image.number][number]

    def images_of(self, image: Image) -> tuple[ImageOutput, ...]:
        """Return all outputs of an image."""
        return self._by_image[image.number]

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
        final = record.array if is_url(self._path) else SEALED_NAME
        documents = {
            name.replace(f"{record.array}/", f"{final}/"): text
            for name, text in record.metadata.items()
        }
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
        self._format = record.job.zarr_format

    def prepare(self, *, anything_done: bool, check_unchanged: Callable[[], None]) -> None:
        """Create the missing parts of the output of a running job; delete those of earlier jobs.

        Works from any interrupted state. Calls `check_unchanged`, which raises if the job was
        replaced, before each change. Raises StoreError if the array's metadata changed, or if the
        array is missing although chunks are committed (`anything_done`).
        """
        name = self._record.array
        if not self._exists(name):
            if anything_done:
                raise StoreError(
                    f"output: {without_secret(self.path)}/{name}/{ARRAY[self._format]} is missing "
                    "although chunks are committed; restore the file, or use --overwrite to start "
                    "again",
                    code=ErrorCode.OUTPUT_CHANGED,
                )
            check_unchanged()
            for document in OTHER_FORMAT[self._format]:
                self._objects.delete(document)
            self._put(self._metadata)
        self.check(name)
        self._delete_stray_arrays(check_unchanged)
        if self._local:
            delete_stale_locks(self.path, time.time() - LOCK_AGE)
        check_unchanged()
        self._write_group("incomplete", name)

    @property
    def has_final_name(self) -> bool:
        """Whether the array was renamed to its final name."""
        return self._local and not self._exists(self._record.array) and self._exists(SEALED_NAME)

    def unseal(self) -> None:
        """Rename a sealed array back to the name it has while the job runs.

        Only the process that holds the claim on the job's record may call this: the name `0` has
        no epoch, so the array could otherwise belong to a later job.
        """
        if self.has_final_name:
            os.rename(join(self.path, SEALED_NAME), join(self.path, self._record.array))

    @property
    def arrays(self) -> list[StoredArray]:
        """The arrays of the image, where they are now."""
        folder = _below(self._folder, self._current_name)
        return [StoredArray(self.array_folder, folder, self.grid)]

    def documents(self, state: str) -> list[WrittenDocument]:
        """Return the metadata documents that an image in this state has."""
        name = self._current_name
        group = _written_group(self._format, self._attributes(state, name))
        created = f"{self._record.array}/"
        arrays = {
            f"{name}/{path.removeprefix(created)}": text for path, text in self._metadata.items()
        }
        return [
            WrittenDocument(
                _below(self._folder, path),
                text,
                is_array=path in arrays and path.endswith(ARRAY[self._format]),
            )
            for path, text in (arrays | group).items()
        ]

    @property
    def _current_name(self) -> str:
        """Name of the folder of the array: another one than while the job runs once it is sealed.

        Judged by the folders, because documents can be missing.
        """
        name = self._record.array
        is_renamed = not self._objects.exists(name) and self._objects.exists(SEALED_NAME)
        return SEALED_NAME if self._local and is_renamed else name

    @property
    def array_folder(self) -> str:
        """Name in the output of the folder of the array, while the job runs."""
        return _below(self._folder, self._record.array)

    @cached_property
    def grid(self) -> ObjectGrid:
        """The objects of the array."""
        document = self._metadata[f"{self._record.array}/{ARRAY[self._format]}"]
        return ObjectGrid.of_document(document, self._format)

    def open(self) -> WritableArray:
        """Open the array of a running job for writing. Raises StoreError if it was changed."""
        self.check(self._record.array)
        path = join(self.path, self._record.array)
        return ZarrFormat().open_for_writing(path, {ZARR_FORMAT: self._format})

    def open_present(self) -> Array:
        """Open the array for reading, sealed or not. Raises StoreError."""
        return ZarrFormat().open(join(self.path, self._current_name), {})

    def check(self, name: str) -> None:
        """Raise StoreError unless the array's metadata are those that were created.

        Attributes are not compared, because users may add their own.
        """
        document = ARRAY[self._format]
        stored = parsed(self._objects.get(f"{name}/{document}"))
        created = json.loads(self._metadata[f"{self._record.array}/{document}"])
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
        """Raise StoreError unless the array, under its current name, is the one created."""
        name = self._record.array
        self.check(name if not self._local or self._exists(name) else SEALED_NAME)

    def mark_incomplete(self, *, check_unchanged: Callable[[], None]) -> None:
        """Write the group metadata of an output that will be read before it is complete."""
        check_unchanged()
        self._write_group("incomplete", self._record.array)

    def seal(self, *, check_unchanged: Callable[[], None]) -> None:
        """Mark the output as complete; rename a local array to its final name. Idempotent."""
        name = self._record.array
        if self._local:
            if self._exists(name):
                self.check(name)
                check_unchanged()
                self._rename_to_final(name)
            name = SEALED_NAME
        self.check(name)
        self._delete_stray_arrays(check_unchanged)
        if self._local:
            delete_stale_locks(join(self.path, name))
        check_unchanged()
        self._write_group("complete", name)
        check_unchanged()  # raises if this process was suspended above and the job was replaced

    def is_sealed(self) -> bool:
        """Return whether the group metadata mark this job as complete."""
        return self._is_described("complete", SEALED_NAME if self._local else self._record.array)

    def _is_described(self, state: str, name: str) -> bool:
        """Return whether the group metadata are those of this job; other keys are ignored."""
        attributes = _group_attributes(self._objects, self._format)
        return _key_values(attributes) == _key_values(self._attributes(state, name))

    def _exists(self, name: str) -> bool:
        return self._objects.exists(f"{name}/{ARRAY[self._format]}")

    def _rename_to_final(self, name: str) -> None:
        final = join(self.path, SEALED_NAME)
        if os.path.lexists(final) and self._exists(name):
            raise StoreError(
                f"output: {final} was created by another job or program; remove it, then run the "
                "command again",
                code=ErrorCode.OUTPUT_CHANGED,
            )
        try:
            os.rename(join(self.path, name), final)
        except FileNotFoundError:
            if not self._exists(SEALED_NAME):  # else another finalizer has renamed it
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
        if name == self._record.array:
            return self._local and self.has_final_name
        if name == SEALED_NAME:  # on a local disk it may belong to a later job
            return not self._local
        return EPOCH_NAME.fullmatch(name) is not None

    def _write_group(self, state: str, name: str) -> None:
        """Write the group metadata unless they are current; keep the user's attributes."""
        if not self._is_described(state, name):
            self._put(_group_documents(self._objects, self._format, self._attributes(state, name)))

    def _attributes(self, state: str, name: str) -> dict[str, Any]:
        """Return the group attributes that chunkq writes: `chunkq` and OME-Zarr metadata."""
        record = self._record
        status = _status(record, state) | {"array": name}
        plan = record.image_plan(self._image).of_output(self._number)
        image = image_metadata(output_axes(self._image, plan), self._format, name)
        if image and plan.output.class_names and not plan.output.is_average:
            labels = label_metadata(plan.output.class_names, self._format)
            image |= labels | {"ome": image["ome"] | labels["ome"]} if "ome" in image else labels
        return {**image, ATTRIBUTE: status}

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
        self._record, self._format, self._members = record, record.job.zarr_format, members
        self._folder, path = folder, join(path, folder) if folder else path
        self._objects, self._series = ObjectFolder(path), ObjectFolder(join(path, "OME"))

    def prepare(self, check_unchanged: Callable[[], None]) -> None:
        """Write the metadata of a running job."""
        check_unchanged()
        for document in OTHER_FORMAT[self._format]:
            self._objects.delete(document)
        series = _group_documents(self._series, self._format, self._series_attributes)
        _put(self._series, series)
        self.write("incomplete", check_unchanged)

    def documents(self, state: str) -> list[WrittenDocument]:
        """Return the documents that the group has in this state."""
        root = _written_group(self._format, self._attributes(state))
        series = _written_group(self._format, self._series_attributes)
        documents = root | {f"OME/{name}": text for name, text in series.items()}
        return [
            WrittenDocument(_below(self._folder, name), text) for name, text in documents.items()
        ]

    @property
    def _series_attributes(self) -> dict[str, Any]:
        series: dict[str, Any] = {"series": list(self._members)}
        return {"ome": {"version": "0.5", **series}} if self._format == 3 else series

    def write(self, state: str, check_unchanged: Callable[[], None]) -> None:
        """Write the group metadata unless they are current; keep the user's attributes."""
        check_unchanged()
        if not self.is_described(state):
            documents = _group_documents(self._objects, self._format, self._attributes(state))
            _put(self._objects, documents)

    def is_described(self, state: str) -> bool:
        """Return whether the group metadata are those of this job; other keys are ignored."""
        attributes = _group_attributes(self._objects, self._format)
        return bool(attributes.get(ATTRIBUTE) == self._attributes(state)[ATTRIBUTE])

    def _attributes(self, state: str) -> dict[str, Any]:
        layout: dict[str, Any] = {"bioformats2raw.layout": 3}
        if self._format == 3:
            layout = {"ome": {"version": "0.5", **layout}}
        return {**layout, ATTRIBUTE: _status(self._record, state)}


def _status(record: JobRecord, state: str) -> dict[str, Any]:
    """Return the attribute that names the job and its state."""
    return {
        "state": state,
        "digest": record.digest,
        "epoch": record.epoch,
        "version": __version__,
    }


def _group_attributes(objects: ObjectFolder, zarr_format: int) -> dict[str, Any]:
    """Return the attributes of a group; empty if it has none or its document is damaged."""
    stored = parsed(objects.get(GROUP[zarr_format])) or {}
    attributes = stored.get("attributes") if zarr_format == 3 else stored
    return attributes if isinstance(attributes, dict) else {}


def _group_documents(
    objects: ObjectFolder, zarr_format: int, attributes: dict[str, Any]
) -> dict[str, str]:
    """Return the documents of a group with these attributes and the user's own."""
    stored = _group_attributes(objects, zarr_format)
    ome = stored.get("ome")
    if isinstance(ome, dict) and "ome" in attributes:
        attributes = attributes | {"ome": ome | attributes["ome"]}
    return _written_group(zarr_format, stored | attributes)


def _written_group(zarr_format: int, attributes: dict[str, Any]) -> dict[str, str]:
    """Return the documents of a group with these attributes."""
    if zarr_format == 2:
        return {".zgroup": json.dumps({"zarr_format": 2}), ".zattrs": to_text(attributes)}
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return {"zarr.json": to_text(group)}


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


def _key_values(attributes: dict[str, Any]) -> tuple[Any, ...]:
    """Return the attributes of a group that identify the job and its state."""
    status = attributes.get(ATTRIBUTE)
    status = status if isinstance(status, dict) else {}
    ome = attributes.get("ome", attributes)
    try:
        path = ome["multiscales"][0]["datasets"][0]["path"]
    except (KeyError, IndexError, TypeError):
        path = None
    return path, *(status.get(key) for key in ("state", "array", "digest", "epoch"))
