"""The output of a job: its array, its metadata, and how it is sealed.

On a local disk the array carries the job's epoch in its name, `0.<epoch>`, until the job is
sealed; then it is renamed to `0`. So a process of an earlier job on the same path, however long
it was suspended, cannot reach the voxels of a later one. In a bucket nothing can be renamed: there
the first job writes `0`, and one that replaces another writes `0.<epoch>` for good.
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
"""By Zarr format, the document that holds a group's attributes."""
ARRAY = {2: ".zarray", 3: "zarr.json"}
"""By Zarr format, the document that describes an array."""
FOREIGN = {2: ("zarr.json",), 3: (".zgroup", ".zattrs", ".zarray", ".zmetadata")}
"""By Zarr format, documents of the other format at the top of a store."""
LOCK_AGE = 120.0
"""Seconds after which a temporary file of tensorstore belongs to a killed writer."""
EPOCH_NAME = re.compile(rf"{SEALED_NAME}\.[0-9a-f]{{{EPOCH_DIGITS}}}")
LOCK = ".__lock"
"""Part of the names of files that tensorstore leaves where a process is killed as it writes."""


def new_record(record: JobRecord, plan: Plan, *, replaces: bool) -> JobRecord:
    """Return the record of a job that is created now, with its epoch and its array's metadata.

    `replaces` says whether an earlier job, or anything else, may have used the output path.
    """
    epoch = record.new_epoch()
    in_place = is_url(record.job.output) and not replaces
    name = SEALED_NAME if in_place else f"{SEALED_NAME}.{epoch}"
    shape, channels = plan.output_shape, ((1,) if plan.channel_axis else ())
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
    """The output store of one job. Methods raise StoreError in one line, and OSError."""

    def __init__(self, path: str, record: JobRecord) -> None:
        self.path = path
        self._record = record
        self._objects = ObjectFolder(path)
        self._local = not is_url(path)
        self._format = record.job.zarr_format

    def prepare(self, *, anything_done: bool, allowed: Callable[[], None]) -> None:
        """Bring the output into the state of a running job, whatever was cut off before.

        Creates what is missing and removes what earlier jobs left. `allowed` raises if the job
        was replaced; it is called before each change. Raises StoreError if the array is missing
        or changed though chunks are done.
        """
        name = self._record.array
        if not self._exists(name):
            if anything_done:
                raise StoreError(
                    f"output: {without_secret(self.path)} is damaged: it has no "
                    f"{name}/{ARRAY[self._format]}, though chunks are committed; start again with "
                    "--overwrite",
                    code=ErrorCode.OUTPUT_CHANGED,
                )
            allowed()
            for document in FOREIGN[self._format]:
                self._objects.delete(document)
            self._put(self._record.metadata)
        self.check(name)
        self._remove_strays(allowed)
        if self._local:
            delete_stale_locks(self.path, time.time() - LOCK_AGE)
        allowed()
        self._write_group("incomplete", name)

    @property
    def has_final_name(self) -> bool:
        """Whether the array is one that was renamed when it was sealed."""
        return self._local and not self._exists(self._record.array) and self._exists(SEALED_NAME)

    def unseal(self) -> None:
        """Give a sealed array the name of a running job's again.

        The name `0` says nothing of the epoch: to be called only by a process that holds the
        claim on the job's record, so that the job cannot be replaced meanwhile.
        """
        if self.has_final_name:
            os.rename(join(self.path, SEALED_NAME), join(self.path, self._record.array))

    def open(self) -> Array:
        """Open the array of a running job for writing; raises StoreError if it was changed."""
        self.check(self._record.array)
        return open_array(join(self.path, self._record.array), write=True)

    def check(self, name: str) -> None:
        """Compare the array's metadata with what was created; raises StoreError if they differ.

        Attributes that were added are the user's and do not matter.
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
                "was produced; restore the file, or start again with --overwrite",
                code=ErrorCode.OUTPUT_CHANGED,
            )

    def check_array(self) -> None:
        """Compare the array with what was created, under the name that it has now."""
        name = self._record.array
        self.check(name if not self._local or self._exists(name) else SEALED_NAME)

    def describe_incomplete(self, *, allowed: Callable[[], None]) -> None:
        """Write the metadata of an output that is read before it is complete."""
        allowed()
        self._write_group("incomplete", self._record.array)

    def seal(self, *, allowed: Callable[[], None]) -> None:
        """Give the complete array its final name and write the group's metadata; repeatable."""
        name = self._record.array
        if self._local:
            if self._exists(name):
                self.check(name)
                allowed()
                self._rename_to_final(name)
            name = SEALED_NAME
        self.check(name)
        self._remove_strays(allowed)
        if self._local:
            delete_stale_locks(join(self.path, name))
        allowed()
        self._write_group("complete", name)
        allowed()  # a process that was suspended before the line above must not report success

    def is_sealed(self) -> bool:
        """Return whether the group's metadata say that this job is complete."""
        return self._is_described("complete", SEALED_NAME if self._local else self._record.array)

    def _is_described(self, state: str, name: str) -> bool:
        """Return whether the group's metadata are those of this job; additions do not matter."""
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
                f"output: {final} was made by another job or program; remove it, then run the "
                "command again",
                code=ErrorCode.OUTPUT_CHANGED,
            )
        try:
            os.rename(join(self.path, name), final)
        except FileNotFoundError:
            if not self._exists(SEALED_NAME):  # else another finalizer was faster
                raise

    def _remove_strays(self, allowed: Callable[[], None]) -> None:
        """Remove arrays that processes of earlier jobs wrote after they were replaced.

        They are listed before `allowed` looks at the job: later jobs' arrays are not among them.
        """
        strays = [name for name in self._objects.folders() if self._is_stray(name)]
        allowed()
        if strays:
            self._objects.discard(*strays)
        self._objects.delete_partial_files()

    def _is_stray(self, name: str) -> bool:
        if name == self._record.array:
            return self._local and self.has_final_name
        if name == SEALED_NAME:  # on a local disk it may be a later job's by now
            return not self._local
        return EPOCH_NAME.fullmatch(name) is not None

    def _write_group(self, state: str, name: str) -> None:
        """Write the group's metadata, unless they fit; other attributes in it stay."""
        if self._is_described(state, name):
            return
        own = self._attributes(state, name)
        if self._format == 2:
            stored = _parsed(self._objects.get(".zattrs")) or {}
            self._put({".zgroup": json.dumps({"zarr_format": 2}), ".zattrs": _text(stored | own)})
            return
        stored = _parsed(self._objects.get("zarr.json")) or {}
        attributes = stored.get("attributes")
        others = attributes if isinstance(attributes, dict) else {}
        ome = others.get("ome")
        if isinstance(ome, dict) and "ome" in own:
            own["ome"] = ome | own["ome"]
        group = {"zarr_format": 3, "node_type": "group", "attributes": others | own}
        self._put({"zarr.json": _text(group)})

    def _attributes(self, state: str, name: str) -> dict[str, Any]:
        record = self._record
        own = {
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
        return {**image, ATTRIBUTE: own}

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
    """Remove temporary files of killed writers below a local path, if older than a Unix time."""
    for folder, _, files in os.walk(path):
        for file in files:
            name = os.path.join(folder, file)
            with suppress(FileNotFoundError):
                if LOCK in file and os.stat(name).st_mtime < older_than:
                    os.unlink(name)


def _key_values(attributes: dict[str, Any]) -> tuple[Any, ...]:
    """Return the attributes of an output's group by which chunkq recognises it."""
    own = attributes.get(ATTRIBUTE)
    own = own if isinstance(own, dict) else {}
    ome = attributes.get("ome", attributes)
    try:
        path = ome["multiscales"][0]["datasets"][0]["path"]
    except (KeyError, IndexError, TypeError):
        path = None
    return path, *(own.get(key) for key in ("state", "array", "digest", "epoch"))


def _name_datasets(image: dict[str, Any], name: str) -> None:
    images: Iterable[dict[str, Any]] = image.get("ome", image).get("multiscales", ())
    for one in images:
        one["datasets"][0]["path"] = name


def _parsed(content: bytes | None) -> dict[str, Any] | None:
    try:
        values = json.loads(content or b"")
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2)
