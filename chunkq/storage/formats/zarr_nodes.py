"""Zarr arrays and groups, as their own metadata documents describe them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from chunkq.access import Access, is_forbidden, sends_parts
from chunkq.errors import ErrorCode, StoreError
from chunkq.paths import (
    is_url,
    is_web,
    join,
    mask_secrets,
    open_filesystem,
    without_secret,
)
from chunkq.storage.formats.base import NUMBERS, unreadable_error
from chunkq.storage.formats.stored_objects import NOTHING, fetch_object

METADATA = ("zarr.json", ".zarray", ".zgroup")
"""Names of the documents of which each Zarr node has one, in the order in which they count."""
ARRAY_METADATA = METADATA[:2]
"""Names of the documents of which each Zarr array has one."""
ATTRIBUTES = ".zattrs"
"""Name of the document with the attributes of a Zarr v2 node."""
CONSOLIDATED = ".zmetadata"
"""Name of the document of a Zarr v2 group with those of its members."""
UNSAFE_CODECS = frozenset({"pickle", "numcodecs.pickle"})
"""Codecs that can run code from the stored bytes."""
MAX_CANDIDATES = 32
"""Folders that are examined for the list of members in a message."""
SERIES = "OME"
"""Group in a group of images that lists them and has no array."""
MAX_MEMBERS = 8
"""Members that a message lists."""
MAX_DOCUMENT_BYTES = 1 << 28
"""Bytes of a document in a bucket that are read. The consolidated metadata of a group are large."""
NO_OBJECT = "chunkq-no-such-object"
"""Name of an object that does not exist."""
FORBIDDEN_IS_MISSING = "forbidden_is_missing"
"""Option: whether the server answers 403 for objects that do not exist."""
log = logging.getLogger("chunkq.storage")


@dataclass(frozen=True)
class ZarrNode:
    """A Zarr array or group.

    `name` is that of its document. Consolidated metadata of the groups above do not count: they can
    be outdated, or name codecs of other arrays that are not installed.
    """

    path: str
    name: str
    document: dict[str, Any]
    access: Access

    @property
    def zarr_format(self) -> int:
        """Version of the Zarr format: 2 or 3."""
        return 3 if self.name == "zarr.json" else 2

    @property
    def is_array(self) -> bool:
        """Whether the node is an array. Otherwise it is a group."""
        if self.zarr_format == 3:
            return bool(self.document["node_type"] == "array")
        return self.name == ".zarray"

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """The attributes of the node. Raises StoreError if their document is invalid."""
        if self.zarr_format == 3:
            attributes = self.document.get("attributes") or {}
            if not isinstance(attributes, dict):
                raise metadata_error(self.path, self.name, "attributes are not a mapping")
            return attributes
        content = read_document(self.path, ATTRIBUTES, self.access)
        return {} if content is None else _parse(content, self.path, ATTRIBUTES)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The document of an array, in the form that every reader of Zarr knows.

        Raises StoreError if the dtype is not one of single numbers, or if a codec is unsafe.
        """
        self._check_codecs()
        if self.zarr_format == 3:
            return self.document
        dtype, fill = self._dtype(self.document.get("dtype")), self.document.get("fill_value")
        if dtype == "|b1" and fill in (0, 1):
            fill = bool(fill)
        return {**self.document, "dtype": dtype, "fill_value": fill}

    def _dtype(self, stored: Any) -> str:
        """Return a dtype of Zarr v2 with a byte order if, and only if, it has several bytes."""
        try:
            if not isinstance(stored, str):
                raise TypeError
            dtype = np.dtype(stored)
        except (TypeError, ValueError, SyntaxError):
            dtype = None
        if dtype is None or dtype.kind not in NUMBERS or dtype.shape or dtype.fields:
            raise dtype_error(join(self.path, self.name), stored)
        if dtype.itemsize == 1:
            return f"|{dtype.str[1:]}"
        return dtype.str if stored[:1] in "<>" else dtype.newbyteorder("<").str

    def _check_codecs(self) -> None:
        names = set(self.codecs()) & UNSAFE_CODECS
        if names:
            raise StoreError(
                f"input: {without_secret(self.path)}: unsupported codec {names.pop()!r}, which can "
                "run code; store the array with a numeric dtype and another codec",
                code=ErrorCode.CODEC_UNSAFE,
            )

    def codecs(self) -> Iterator[str]:
        """Yield the names of the codecs of an array, also those inside shards."""
        if self.zarr_format == 3:
            yield from _codec_names(self.document.get("codecs"))
            return
        for codec in (self.document.get("compressor"), *_listed(self.document.get("filters"))):
            if isinstance(codec, dict):
                yield str(codec.get("id"))


def _codec_names(codecs: Any) -> Iterator[str]:
    for codec in _listed(codecs):
        if isinstance(codec, dict):
            yield str(codec.get("name"))
            configuration = codec.get("configuration")
            if isinstance(configuration, dict):
                yield from _codec_names(configuration.get("codecs"))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def read_node(path: str, access: Access) -> ZarrNode | None:
    """Return the Zarr node at a path, or None if there is none.

    Raises StoreError if its document is invalid, and the storage's error if it cannot be read.
    """
    document = first_document(path, access)
    return None if document is None else _node(path, *document, access)


def first_document(
    path: str, access: Access, names: Sequence[str] = METADATA
) -> tuple[str, bytes] | None:
    """Return the first document of a node that exists, with its name, or None if none exists.

    A server may answer 403 for documents that do not exist, if one exists. Raises the storage's
    error otherwise.
    """
    refusal: Exception | None = None
    for name in names:
        try:
            return name, fetch_document(path, name, access)
        except NOTHING:
            continue
        except Exception as error:  # each file system raises different errors
            if not is_url(path) or not is_forbidden(error):
                raise
            refusal = error
    if refusal is not None:
        raise refusal
    return None


def read_document(path: str, name: str, access: Access) -> bytes | None:
    """Return a document of a node, or None if it is missing or a server answers 403."""
    try:
        return fetch_document(path, name, access)
    except NOTHING:
        return None
    except Exception as error:  # each file system raises different errors
        if is_url(path) and is_forbidden(error):
            return None
        raise


def fetch_document(path: str, name: str, access: Access) -> bytes:
    """Return the content of a document of a node. Raises the storage's error."""
    return fetch_object(join(path, name), access, MAX_DOCUMENT_BYTES)


def access_options(path: str, access: Access) -> dict[str, str | int | bool]:
    """Return the options of a format for the access to an array.

    Warn if the server answers 403 for objects that do not exist.
    """
    options: dict[str, str | int | bool] = {**access.options}
    if forbids_missing_objects(path, access):
        options[FORBIDDEN_IS_MISSING] = True
        log.warning(
            "%s: the server answers 403 for missing objects; chunks that it refuses are read as "
            "the fill value",
            without_secret(path),
        )
    return options


def forbids_missing_objects(path: str, access: Access) -> bool:
    """Return whether the server of a URL answers 403 for objects that do not exist."""
    if not is_url(path):
        return False
    try:
        fetch_document(path, NO_OBJECT, access)
    except Exception as error:  # each file system raises different errors
        return is_forbidden(error)
    return False


def require_parts(path: str, name: str, access: Access) -> None:
    """Raise StoreError if a web server does not send parts of files, such as chunks of a shard.

    `name` is that of a document of the array.
    """
    document = join(path, name)
    try:
        is_enough = sends_parts(*open_filesystem(document, access))
    except Exception as error:  # each file system raises different errors
        raise unreadable_error(document, error) from error
    if not is_enough:
        raise StoreError(
            f"input: {without_secret(path)}: the server does not send parts of files, which "
            "an array with shards needs; download the array",
            code=ErrorCode.STORE_UNSUPPORTED,
        )


def _node(path: str, name: str, content: bytes, access: Access) -> ZarrNode:
    document = _parse(content, path, name)
    if name == "zarr.json" and (
        document.get("zarr_format") != 3 or document.get("node_type") not in ("array", "group")
    ):
        raise metadata_error(path, name, "expected zarr_format 3, and node_type array or group")
    if name != "zarr.json" and document.get("zarr_format", 2) != 2:
        raise metadata_error(path, name, f"expected zarr_format 2, found {document['zarr_format']}")
    return ZarrNode(path, name, document, access)


def _parse(content: bytes, path: str, name: str) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise metadata_error(path, name, f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise metadata_error(path, name, "not a mapping")
    return document


def member_names(path: str, access: Access) -> list[str]:
    """Return the names of some Zarr nodes directly inside a folder or group, for a message.

    Storage that cannot be listed is replaced by the consolidated metadata of the group.
    """
    try:
        filesystem, inner = open_filesystem(path, access)
        entries = [] if is_web(path) else filesystem.ls(inner, detail=True)
        folders = [entry for entry in entries if entry["type"] == "directory"]
        names = sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in folders)
        names = names[:MAX_CANDIDATES] or _consolidated_names(path, access)
        nodes = [name for name in names if name != SERIES]
        return [name for name in nodes if _is_node(join(path, name), access)][:MAX_MEMBERS]
    except Exception:  # a message without this list is better than another error
        return []


def _is_node(path: str, access: Access) -> bool:
    try:
        return read_node(path, access) is not None
    except StoreError:
        return True


def _consolidated_names(path: str, access: Access) -> list[str]:
    names = (name.partition("/")[0] for name in consolidated_documents(path, access) or ())
    return [name for name in dict.fromkeys(names) if name not in (*METADATA, ATTRIBUTES)]


def missing_documents(path: str, access: Access) -> str:
    """Return which document a folder without metadata lacks, for a message; empty if unknown.

    Its group can have consolidated metadata that list it, and it can contain storage chunks.
    """
    try:
        parent, _, name = path.rstrip("/").rpartition("/")
        documents = consolidated_documents(parent, access) or {}
        for document in METADATA:
            if f"{name}/{document}" in documents:
                return f"{document}, which the consolidated metadata of its group list"
        if read_document(path, CONSOLIDATED, access) is not None:
            return ".zgroup, beside its consolidated metadata"
        if read_document(path, ATTRIBUTES, access) is not None:
            return ".zarray or .zgroup, beside its .zattrs"
    except Exception:  # a message without this reason is better than another error
        return ""
    return ""


def consolidated_documents(path: str, access: Access) -> dict[str, Any] | None:
    """Return the documents in a group's consolidated metadata by name; None without these.

    Names are relative to the group, such as `raw/.zarray` or `raw/zarr.json`. Raises StoreError if
    they are not JSON.
    """
    for name in ("zarr.json", CONSOLIDATED):
        content = read_document(path, name, access)
        if content is None:
            continue
        document = _parse(content, path, name)
        if name == CONSOLIDATED:
            documents = document.get("metadata")
            return documents if isinstance(documents, dict) else {}
        consolidated = document.get("consolidated_metadata")
        if isinstance(consolidated, dict):
            nodes = consolidated.get("metadata")
            nodes = nodes if isinstance(nodes, dict) else {}
            return {join(key, "zarr.json"): node for key, node in nodes.items()}
        return None
    return None


def metadata_error(path: str, name: str, reason: str, of: str = "Zarr") -> StoreError:
    """Return the error for a document of a format that is invalid."""
    reason = mask_secrets(" ".join(reason.split()), path)
    return StoreError(
        f"input: {without_secret(join(path, name))}: invalid {of} metadata: {reason}; restore or "
        "repair the file",
        code=ErrorCode.STORE_UNSUPPORTED,
    )


def level_error(path: str, level: int | str | None, reason: str) -> StoreError:
    """Return the error for a level that does not exist."""
    return StoreError(
        f"input: {without_secret(path)} {reason}; found level {level!r}; use a level of the image, "
        "or remove level",
        code=ErrorCode.STORE_UNSUPPORTED,
    )


def dtype_error(path: str, dtype: Any) -> StoreError:
    """Return the error for an array that does not consist of single numbers."""
    return StoreError(
        f"input: {without_secret(path)}: unsupported dtype {dtype!r}; store the array with a dtype "
        "of numbers, such as uint8 or float32",
        code=ErrorCode.STORE_UNSUPPORTED,
    )
