"""Attributes that chunkq writes into a document, among those that users add."""

from __future__ import annotations

from typing import Any


def contains(stored: Any, written: Any) -> bool:
    """Return whether stored attributes have all that chunkq has written, and maybe more.

    Users may add keys to mappings, and entries to the end of lists, such as further levels.
    """
    match written:
        case dict():
            return isinstance(stored, dict) and all(
                key in stored and contains(stored[key], value) for key, value in written.items()
            )
        case list():
            return (
                isinstance(stored, list)
                and len(stored) >= len(written)
                and all(map(contains, stored, written))
            )
    # Not by value alone: true equals 1.
    return type(stored) is type(written) and bool(stored == written)


def restored(stored: Any, written: Any) -> Any:
    """Return attributes that contain `written`, with what users have added to `stored`."""
    match written:
        case dict() if isinstance(stored, dict):
            return stored | {key: restored(stored.get(key), v) for key, v in written.items()}
        case list() if isinstance(stored, list):
            padded = [*stored, *[None] * (len(written) - len(stored))]
            return [*map(restored, padded, written), *stored[len(written) :]]
    return written
