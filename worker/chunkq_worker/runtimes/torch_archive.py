"""Members of the zip files that torch writes, and the operators that reach files."""

from __future__ import annotations

import io
import zipfile

END = b"PK\x05\x06"
END_SIZE = 22
UNSAFE_OPERATORS = frozenset({"from_file", "load", "rpc_async", "rpc_remote", "rpc_sync", "save"})
"""Operators of any namespace that reach files or other processes."""


def member_names(content: bytes) -> list[str] | None:
    """Return the members of a zip file; None if readers can disagree about what it holds.

    torch reads it with a library of its own, which ignores the case of names and takes the first
    of equal names, where Python takes the last. Raises zipfile.BadZipFile.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
    if not content[-END_SIZE:].startswith(END):
        return None  # a comment follows, in which another end can hide
    return names if len({name.lower() for name in names}) == len(names) else None
