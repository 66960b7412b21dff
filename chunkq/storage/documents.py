"""Encode and decode small JSON documents that contain a checksum of their values."""

from __future__ import annotations

import json
from typing import Any

from zlib_ng import zlib_ng

KEY = "checksum"


def encode(values: dict[str, Any], indent: int | None = None) -> bytes:
    """Return a mapping of JSON values as a document with its checksum."""
    return json.dumps({KEY: _checksum(values), **values}, indent=indent).encode()


def decode(content: bytes) -> dict[str, Any] | None:
    """Return the values of a document, or None if it is damaged or not a document."""
    try:
        values = json.loads(content)
        checksum = values.pop(KEY)
        return values if checksum == _checksum(values) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _checksum(values: dict[str, Any]) -> str:
    """Return the CRC-32 of the values; whitespace and the order of keys do not affect it."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return f"{zlib_ng.crc32(text.encode()):08x}"
