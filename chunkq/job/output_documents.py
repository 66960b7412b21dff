"""Metadata documents of an output: what chunkq writes into them, and what users may add."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from chunkq import __version__
from chunkq.errors import StoreError
from chunkq.job.attributes import contains, restored
from chunkq.paths import without_secret

if TYPE_CHECKING:
    from chunkq.job.output_layouts import OutputLayout
    from chunkq.job.record import JobRecord
    from chunkq.storage.objects import ObjectFolder

Damage = Literal["missing", "damaged", "changed"]
ATTRIBUTE = "chunkq"
"""Attribute of a group that names the job, its state and the version of chunkq."""


@dataclass(frozen=True)
class WrittenDocument:
    """A document as chunkq writes it.

    `name` is the one in the output. In a document of an array, only the attributes can have
    additions. The version of chunkq is not compared.
    """

    name: str
    text: str
    is_array: bool = False

    @property
    def values(self) -> dict[str, Any]:
        """The values that chunkq writes."""
        values: dict[str, Any] = json.loads(self.text)
        return values

    def damage(self, content: bytes | None) -> Damage | None:
        """Return what is wrong with the content of the stored document, None if nothing is."""
        if content is None:
            return "missing"
        stored = parsed(content)
        if stored is None:
            return "damaged"
        written = _without_version(self.values)
        if not contains(stored, written):
            return "changed"
        has_unknown_keys = bool(stored.keys() - written.keys() - {"attributes"})
        return "changed" if self.is_array and has_unknown_keys else None

    def repaired(self, content: bytes | None) -> str:
        """Return the text of the document, with the additions of users in its stored content."""
        stored = parsed(content)
        if stored is None:
            return self.text
        if self.is_array:
            stored = {key: stored[key] for key in ("attributes",) if key in stored}
            values = restored(self.values | stored, self.values)
        else:
            values = restored(stored, self.values)
        return self.text if values == self.values else to_text(values)


def parsed(content: bytes | None) -> dict[str, Any] | None:
    """Return the values of a JSON document, or None if it is missing or damaged."""
    try:
        values = json.loads(content or b"")
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def to_text(values: dict[str, Any]) -> str:
    """Return values as a document."""
    return json.dumps(values, indent=2)


def _without_version(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a document without the version of chunkq among its attributes."""
    if isinstance(attributes := values.get("attributes"), dict):
        return values | {"attributes": _without_version(attributes)}
    if isinstance(status := values.get(ATTRIBUTE), dict):
        return values | {ATTRIBUTE: {k: v for k, v in status.items() if k != "version"}}
    return values


def status_of(record: JobRecord, state: str) -> dict[str, Any]:
    """Return the attribute that names the job and its state."""
    return {
        "state": state,
        "digest": record.digest,
        "epoch": record.epoch,
        "version": __version__,
    }


def merged_documents(
    layout: OutputLayout, objects: ObjectFolder, attributes: dict[str, Any]
) -> dict[str, str]:
    """Return the documents of an image or a group with these attributes and the user's own."""
    return layout.written(layout.merged(layout.stored_attributes(objects), attributes))


def put_documents(objects: ObjectFolder, documents: dict[str, str]) -> None:
    """Write documents by their names. Raises StoreError."""
    try:
        for name, text in documents.items():
            objects.put(name, text.encode())
    except OSError as error:
        reason = error.strerror or error
        raise StoreError(
            f"output: {without_secret(objects.path)} cannot be written: {reason}"
        ) from error
