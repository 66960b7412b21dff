"""The color of each label in figures and in the metadata of outputs."""

from __future__ import annotations

RGB = tuple[int, int, int]
PALETTE: tuple[RGB, ...] = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (127, 127, 127),
    (188, 189, 34),
    (23, 190, 207),
)
"""matplotlib's `tab10`."""


def label_color(label: int) -> RGB:
    """Return the color of a label from 1 on, from 0 to 255; colors repeat after the palette."""
    return PALETTE[(label - 1) % len(PALETTE)]
