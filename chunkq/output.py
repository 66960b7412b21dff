"""Output of a job: create, check and seal its array and metadata.

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
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from chunkq import __version__
from chunkq.errors import ErrorCode, StoreError
from chunkq.objects import ObjectFolder
from chunkq.ome import axis_names, image_metadata
from chunkq.paths import is_url, join, without_secret
from chunkq.plan import Plan
from chunkq.record import EPOCH_DIGITS, JobRecord
from chunkq.stores import Array, array_metadata, open_array

SEALED_NAME = "0"
ATTRIBUTE = "chunkq"
GROUP = {2: ".zattrs", 3: "zarr.json"}
"""Zarr format -> name of the document with a group's attributes."""
ARRAY = {2: ".zarray", 3: "zarr.json"}
"""Zarr format -> name of an array's metadata document."""
OTHER_FORMAT = {2: ("zarr.json",), 3: (".zgroup", ".zattrs", ".zarray", ".zmetadata")}
"""Zarr format -> documents of the other format in the root of a store."""
LOCK_AGE = 120.0
"""Age (s) from which a temporary file of tensorstore belongs to a killed writer."""
EPOCH_NAME = re.compile(rf"{SEALED_NAME}\.[0-9a-f]{{{EPOCH_DIGITS}}}")
LOCK = ".__lock"
"""Part of the names of tensorstore's temporary files, which remain if a writer is killed."""


def new_record(record: JobRecord, plan: Plan, *, replaces: bool) -> JobRecord:
    """Return the record of a new job, with an epoch and the metadata of its array.

    Set `replaces` if the output path may have content of an earlier job or program.
    """
    epoch = record.new_epoch()
    has_final_name = is_url(record.job.output) and not replaces
    name = SEALED_NAME if has_final_name else f"{SEALED_NAME}.{epoch}"
    shape = plan.output_shape
    channels = (1,) * (len(shape) - plan.rank)
    chunks = (min(u, v) for u, v in zip(plan.storage_chunks, plan.volume.shape, strict=True))
    metadata = array_metadata(
        name,
        shape=shape,
        chunks=(*channels, *chunks),
        dtype=plan.output_dtype,
        zarr_format=record.job.zarr_format,
        axes=axis_names(len(shape), len(channels)),
    )
    return replace(record, epoch=epoch, array=name, metadata=metadata)


class Output:
    """The output store of a job. Methods raise StoreError, and OSError if the storage fails."""

    def __init__(self, path: str, record: JobRecord) -> None:
        self.path = path
        self._record = record
        self._objects = ObjectFolder(path)
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
            self._put(self._record.metadata)
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

    def open(self) -> Array:
        """Open the array of a running job for writing. Raises StoreError if it was changed."""
        self.check(self._record.array)
        return open_array(join(self.path, self._record.array), write=True)

    def check(self, name: str) -> None:
        """Raise StoreError unless the array's metadata are those that were created.

        Attributes are not compared, because users may add their own.
        """
        document = ARRAY[self._format]
        stored = _parsed(self._objects.get(f"{name}/{document}"))
        created = json.loads(self._record.metadata[f"{self._record.array}/{document}"])
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
        stored = _parsed(self._objects.get(GROUP[self._format])) or {}
        attributes = stored.get("attributes") if self._format == 3 else stored
        return isinstance(attributes, dict) and _key_values(attributes) == _key_values(
            self._attributes(state, name)
        )

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
        if self._is_described(state, name):
            return
        attributes = self._attributes(state, name)
        if self._format == 2:
            stored = _parsed(self._objects.get(".zattrs")) or {}
            self._put(
                {
                    ".zgroup": json.dumps({"zarr_format": 2}),
                    ".zattrs": _to_text(stored | attributes),
                }
            )
            return
        stored = _parsed(self._objects.get("zarr.json")) or {}
        existing = stored.get("attributes")
        existing = existing if isinstance(existing, dict) else {}
        ome = existing.get("ome")
        if isinstance(ome, dict) and "ome" in attributes:
            attributes["ome"] = ome | attributes["ome"]
        group = {"zarr_format": 3, "node_type": "group", "attributes": existing | attributes}
        self._put({"zarr.json": _to_text(group)})

    def _attributes(self, state: str, name: str) -> dict[str, Any]:
        """Return the group attributes that chunkq writes: `chunkq` and OME-Zarr metadata."""
        record = self._record
        status = {
            "state": state,
            "array": name,
            "digest": record.digest,
            "epoch": record.epoch,
            "version": __version__,
        }
        document = json.loads(record.metadata[f"{record.array}/{ARRAY[self._format]}"])
        rank, spatial = len(document["shape"]), len(record.source.volume.shape)
        names = axis_names(rank, rank - spatial)
        image = {} if names is None else image_metadata(names, record.source.space, self._format)
        _name_datasets(image, name)
        return {**image, ATTRIBUTE: status}

    def _put(self, documents: dict[str, str]) -> None:
        try:
            for name, text in documents.items():
                self._objects.put(name, text.encode())
        except OSError as error:
            reason = error.strerror or error
            raise StoreError(
                f"output: {without_secret(self.path)} cannot be written: {reason}"
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


def _name_datasets(image: dict[str, Any], name: str) -> None:
    """Set the path of the first dataset of each OME-Zarr multiscale image."""
    multiscales: Iterable[dict[str, Any]] = image.get("ome", image).get("multiscales", ())
    for multiscale in multiscales:
        multiscale["datasets"][0]["path"] = name


def _parsed(content: bytes | None) -> dict[str, Any] | None:
    try:
        values = json.loads(content or b"")
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _to_text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2)
