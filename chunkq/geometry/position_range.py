"""Ranges of positions, written as `START:STOP:STEP`."""

from __future__ import annotations

import re

RANGE = re.compile(r"(\d{0,12}):(\d{0,12})(?::(0{0,11}[1-9]\d{0,11}))?")
"""A half-open range, of which all parts are optional; the step is at least 1."""


def positions_in(text: str, size: int) -> range | None:
    """Return the positions from 0 to `size` - 1 that a text names; None if it is no range."""
    match = RANGE.fullmatch(text)
    if match is None:
        return None
    return range(size)[slice(*(int(part) if part else None for part in match.groups()))]


def positions_within(text: str, size: int) -> range | None:
    """Return `positions_in`, empty if the text names an end that is larger than `size`."""
    positions = positions_in(text, size)
    is_beyond = positions is not None and int(text.split(":")[1] or 0) > size
    return range(0) if is_beyond else positions
