"""Small JSON documents that carry a checksum of their values."""

from __future__ import annotations

import json
from typing import Any

import google_crc32c

KEY = "checksum"


def encode(values: dict[str, Any], indent: int | None = None) -> bytes:
    """Return the document of a mapping of JSON values."""
    return json.dumps({KEY: _checksum(values), **values}, indent=indent).encode()


def decode(content: bytes) -> dict[str, Any] | None:
    """Return the values of a document, or None if it is damaged or another kind of file."""
    try:
        values = json.loads(content)
        stored = values.pop(KEY)
        return values if stored == _checksum(values) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _checksum(values: dict[str, Any]) -> str:
    """Return the CRC-32C of the values, whatever the document's layout and order of keys."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return f"{google_crc32c.value(text.encode()):08x}"
