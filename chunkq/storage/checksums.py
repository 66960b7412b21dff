"""Checksum of a stored object, as a commit record has it."""

from __future__ import annotations

NOT_STORED = 0
"""In place of a checksum: the object does not exist, because all its voxels are the fill value."""


def object_checksum(crc32: int) -> int:
    """Return the checksum of an object that has this CRC-32: the same, but never `NOT_STORED`."""
    return crc32 or 1
