"""`ImageOutput`: create, check and seal the arrays and documents of one output of an image."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axes import Axis
from chunkq.job.items import Image
from chunkq.job.output_documents import (
    ATTRIBUTE,
    WrittenDocument,
    merged_documents,
    parsed,
    put_documents,
    status_of,
)
from chunkq.job.output_layouts import (
    OutputLayout,
    StoredImage,
)
from chunkq.job.record import JobRecord
from chunkq.job.stored_images import (
    SEALED_NAME,
    below,
    image_folder,
    layout_of,
    output_axes,
    running_names,
    stored_image,
)
from chunkq.paths import is_url, join, without_secret
from chunkq.storage.array import Array
from chunkq.storage.formats.zarr_writing import WritableArray
from chunkq.storage.object_grid import ObjectGrid
from chunkq.storage.objects import LOCK, ObjectFolder
from chunkq.storage.value_metadata import range_attributes

LOCK_AGE = 120.0
"""Age (s) from which a temporary file of tensorstore belongs to a killed writer."""


class ImageOutput:
    """One output of an image. Methods raise StoreError, and OSError if the storage fails."""

    def __init__(self, path: str, record: JobRecord, image: Image, number: int = 0) -> None:
        """`number` is that of the output among those of the job."""
        self._folder = image_folder(image, list(record.job.output_configs())[number])
        self.path = join(path, self._folder) if self._folder else path
        self._record, self._image, self._number = record, image, number
        prefix = below(self._folder, "")
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
        return running_names(self._record, self._sealed_names)

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
            put_documents(self._objects, self._metadata)
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
        names = (below(self._folder, name) for name in self._current_names)
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
                below(self._folder, path),
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
        return below(self._folder, self._names[level])

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

    def open_present(self) -> Array:
        """Open the array of level 0 for reading, sealed or not. Raises StoreError."""
        return self._layout.open_present(self.present_path, self._documents[0])

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
            put_documents(self._objects, self._layout.other_written(self._stored))
            put_documents(self._objects, merged_documents(self._layout, self._objects, attributes))

    def _attributes(self, state: str, names: Sequence[str]) -> dict[str, Any]:
        """Return the attributes that chunkq writes: `chunkq`, and what readers need."""
        status = status_of(self._record, state) | {"array": names[0]}
        status |= range_attributes(self._stored.plan.output)
        documents = dict(zip(names, self._documents, strict=True))
        return {**self._layout.attributes(self._stored, documents), ATTRIBUTE: status}


class StoredArray(NamedTuple):
    """An array of an output: its objects, and its folder.

    `running` is the name of the folder while the job runs, `folder` the present one.
    """

    running: str
    folder: str
    grid: ObjectGrid


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
