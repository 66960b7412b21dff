"""Describe files that stand for a model file: pointers, web pages, archives and error replies."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterable
from types import MappingProxyType

from chunkq_worker.runtimes.formats import USES, format_of

DOWNLOAD = "download the file itself"
POINTERS = MappingProxyType(
    {
        b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, which names the file but "
        "does not contain it; run git lfs pull in the repository, or " + DOWNLOAD,
        b"version https://hawser.github.com/spec/": "a Git LFS pointer, which names the file but "
        "does not contain it; run git lfs pull in the repository, or " + DOWNLOAD,
        b"/annex/objects/": "a git-annex pointer, which names the file but does not contain it; "
        "run git annex get in the repository",
    }
)
"""First bytes of a small file -> what it is, and what to do."""
WEB_PAGE = f"a web page (HTML), not a model file; {DOWNLOAD}, which may require a login"
XML = f"an XML document, such as the error reply of a server; {DOWNLOAD}"
JSON = f"a JSON document, such as the error reply of a server; {DOWNLOAD}"
INDEX = (
    "the index of a checkpoint in several files; save the weights as one file, with torch.save or "
    "safetensors.torch.save_file"
)
CUT_OFF = "an incomplete zip file; copy or download it again"
ARCHIVE = "an archive; extract it and use the model file inside"
COMPRESSED = "a compressed file; decompress it and use the file inside"
COMPRESSIONS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
ARCHIVES = (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07")
TAR_MAGIC = slice(257, 262)
MAX_POINTER = 1 << 12
"""Largest size of a pointer in bytes."""
HEAD = 1 << 12
"""Bytes at the start of a file that are examined."""


def describe(content: bytes) -> str | None:
    """Return what a file is if it has another format than expected, and what to do about it.

    The result ends an error message after `is`. It is None for unknown formats and empty files.
    """
    name = format_of(content)
    if name is not None:
        return USES[name]
    if (problem := stand_in(content)) is not None:
        return problem
    if content.startswith(COMPRESSIONS):
        return COMPRESSED
    if content.startswith(ARCHIVES) or content[TAR_MAGIC] == b"ustar":
        return ARCHIVE
    if content.startswith(b"PK\x03\x04"):
        return ARCHIVE if zipfile.is_zipfile(io.BytesIO(content)) else CUT_OFF
    return None


def stand_in(content: bytes) -> str | None:
    """Return what a pointer, a web page or a JSON document is, None for any other file."""
    if len(content) <= MAX_POINTER:
        for start, text in POINTERS.items():
            if content.startswith(start):
                return text
    head = content[:HEAD].removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"<"):
        is_page = re.search(rb"<(!doctype\s+html|html|head|body)\b", head, re.IGNORECASE)
        return WEB_PAGE if is_page else XML
    return _json_document(content) if head.startswith(b"{") else None


def first_stand_in(paths: Iterable[str]) -> str | None:
    """Return the name of the first local file that is a stand-in, and what it is, or None."""
    for path in paths:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if (problem := stand_in(file.read(HEAD))) is not None:
                return f"{os.path.basename(path)} is {problem}"
    return None


def _json_document(content: bytes) -> str | None:
    try:
        values = json.loads(content)
    except ValueError:
        return None
    return INDEX if isinstance(values.get("weight_map"), dict) else JSON
