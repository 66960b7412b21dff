"""Checksums of the objects that a task stored in the output, as text in its commit record."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np

from chunkq.storage.checksums import NOT_STORED

DTYPE = np.dtype("<u4")


def encode_checksums(checksums: Sequence[int]) -> str:
    """Return checksums as Base64 of 32-bit numbers, low byte first; empty if nothing is stored."""
    if all(checksum == NOT_STORED for checksum in checksums):
        return ""
    return base64.b64encode(np.array(checksums, DTYPE).tobytes()).decode()


def decode_checksums(text: str, count: int) -> list[int]:
    """Return the checksums of `count` objects. Raises ValueError if the text has another number."""
    if not text:
        return [NOT_STORED] * count
    content = base64.b64decode(text, validate=True)
    if len(content) != count * DTYPE.itemsize:
        raise ValueError(f"checksums of {len(content)} bytes, expected those of {count} objects")
    checksums: list[int] = np.frombuffer(content, DTYPE).tolist()
    return checksums
