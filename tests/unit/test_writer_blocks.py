"""Boxes in which images are copied."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq.geometry.box import Box
from chunkq.writers import blocks
from chunkq.writers.blocks import reads

AXES = st.tuples(st.integers(0, 40), st.integers(1, 60), st.integers(1, 16))
"""Start, length, and edge of the storage chunks along an axis."""


@given(axes=st.lists(AXES, min_size=1, max_size=3), most=st.integers(1, 4000))
def test_a_copy_reads_every_voxel_once_and_decodes_a_bounded_part(
    axes: list[tuple[int, int, int]], most: int
) -> None:
    start, shape, edges = (tuple(values) for values in zip(*axes, strict=True))
    box = Box(start, tuple(low + size for low, size in zip(start, shape, strict=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "DECODED_BYTES", most)
        parts = list(reads(box, edges, 2))
    seen = np.zeros(box.shape, int)
    for part in parts:
        assert part in box
        seen[part.slices(box.start)] += 1
        chunks = [
            -(-high // edge) - low // edge
            for low, high, edge in zip(part.start, part.stop, edges, strict=True)
        ]
        assert prod(chunks) == 1 or prod(chunks) * prod(edges) * 2 <= most
    assert (seen == 1).all()


def test_an_array_without_storage_chunks_is_read_at_once() -> None:
    box = Box((3, 4), (300, 400))
    assert list(reads(box, (), 8)) == [box]
