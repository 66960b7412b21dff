"""Read the member names of torch's zip files; list the operators that reach files."""

from __future__ import annotations

import io
import zipfile

END = b"PK\x05\x06"
END_SIZE = 22
UNSAFE_OPERATORS = frozenset({"from_file", "load", "rpc_async", "rpc_remote", "rpc_sync", "save"})
"""Operators of any namespace that reach files or other processes."""


def member_names(content: bytes) -> list[str] | None:
    """Return the member names of a zip file, None if zip readers can differ on its members.

    The reader of torch ignores the case of names and uses the first of equal names. Python uses
    the last. Raise zipfile.BadZipFile for a damaged file.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
    if not content[-END_SIZE:].startswith(END):
        return None  # a trailing comment can hide a second end-of-directory record
    return names if len({name.lower() for name in names}) == len(names) else None
