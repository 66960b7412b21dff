"""`ImageGroup`: the documents of a group of images in an output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from chunkq.job.output_documents import (
    ATTRIBUTE,
    WrittenDocument,
    merged_documents,
    put_documents,
    status_of,
)
from chunkq.job.record import JobRecord
from chunkq.job.stored_images import below, layout_of
from chunkq.paths import join
from chunkq.storage.objects import ObjectFolder


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
        put_documents(
            self._series, merged_documents(self._layout, self._series, self._series_attributes)
        )
        self.write("incomplete", check_unchanged)

    def documents(self, state: str) -> list[WrittenDocument]:
        """Return the documents that the group has in this state."""
        root = self._layout.written(self._attributes(state))
        series = self._layout.written(self._series_attributes)
        documents = root | {f"OME/{name}": text for name, text in series.items()}
        return [
            WrittenDocument(below(self._folder, name), text) for name, text in documents.items()
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
            put_documents(self._objects, merged_documents(self._layout, self._objects, attributes))

    def is_described(self, state: str) -> bool:
        """Return whether the group metadata are those of this job; other keys are ignored."""
        attributes = self._layout.stored_attributes(self._objects)
        return bool(attributes.get(ATTRIBUTE) == self._attributes(state)[ATTRIBUTE])

    def _attributes(self, state: str) -> dict[str, Any]:
        layout = self._versioned({"bioformats2raw.layout": 3})
        return {**layout, ATTRIBUTE: status_of(self._record, state)}

    def _versioned(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """Return attributes of OME-Zarr, which has a version since it uses Zarr v3."""
        if self._record.job.zarr_format == 2:
            return attributes
        return {"ome": {"version": "0.5", **attributes}}
