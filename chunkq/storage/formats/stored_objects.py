"""Contents of the objects of which a stored array consists: one request for each."""

from __future__ import annotations

from chunkq.access import S3_SCHEMES, Access
from chunkq.paths import is_url, open_filesystem, read_bytes

NOTHING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors of storage for names that do not exist."""
MAX_OBJECT_BYTES = 1 << 31
"""Bytes of an object in a bucket that are read."""


def fetch_object(path: str, access: Access, limit: int = MAX_OBJECT_BYTES) -> bytes:
    """Return the content of an object, at most `limit` bytes in a bucket.

    Raises the storage's error.
    """
    if not is_url(path):
        return read_bytes(path)  # fsspec takes longer to import than most commands take
    filesystem, inner = open_filesystem(path, access)
    # One GET. Without a range, s3fs asks for the size before, and such an error has no message.
    limits = {"start": 0, "end": limit} if path.partition("://")[0] in S3_SCHEMES else {}
    content: bytes = filesystem.cat_file(inner, **limits)
    return content
