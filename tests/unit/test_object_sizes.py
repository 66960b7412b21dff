"""`ObjectSizes` agrees with objects that are counted one by one."""

from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq.geometry.box import Box
from chunkq.plan.item_tasks import sum_of_products
from chunkq.plan.object_sizes import ObjectSizes, StoredSize
from chunkq.storage.formats.precomputed_metadata import (
    SEGMENTATION_BLOCK,
    SEGMENTATION_HEADER_BYTES,
    segmentation_bytes,
    volume_metadata,
)
from chunkq.storage.formats.precomputed_writing import ScaleDocument, write_scale


@given(st.data())
def test_sizes_are_those_of_objects_that_are_counted_one_by_one(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))

    def edges(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(rank))

    part, shape, array = edges(1, 4), edges(1, 9), edges(1, 25)
    sizes = ObjectSizes(shape, part, 7, 3, 2)
    stored = sizes.stored(
        lambda along: sum_of_products(None, [along(a, np.array([n])) for a, n in enumerate(array)])
    )
    objects = []
    for start in product(*(range(0, n, step) for n, step in zip(array, shape, strict=True))):
        ends = [min(low + s, n) for low, s, n in zip(start, shape, array, strict=True)]
        inside = prod(len(range(a, b, p)) for a, b, p in zip(start, ends, part, strict=True))
        objects += [3 + 7 * inside] * 2
    whole = 3 + 7 * prod(len(range(0, s, p)) for s, p in zip(shape, part, strict=True))
    assert stored == StoredSize(len(objects), sum(objects), whole, True)


@given(st.integers(1, 3), st.data())
def test_a_sum_of_products_is_that_over_the_boxes(rank: int, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, 4)) for _ in range(rank))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    numbers = [rng.integers(0, 9, n) for n in shape]
    boxes = rng.random(shape) < 0.5
    expected = sum(
        prod(int(along[i]) for along, i in zip(numbers, index, strict=True))
        for index in np.ndindex(*shape)
        if boxes[index]
    )
    assert sum_of_products(boxes, numbers) == expected
    assert sum_of_products(None, numbers) == sum_of_products(np.ones(shape, np.bool_), numbers)


@pytest.mark.parametrize("count", [2, 3, 16, 17, 300, 2000])
def test_labels_of_a_volume_take_at_most_what_is_predicted(count: int, tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, count, (8, 8, 8), np.uint32)
    scale = {
        "size": [8, 8, 8],
        "resolution": [1, 1, 1],
        "voxel_offset": [0, 0, 0],
        "chunk_size": [8, 8, 8],
        "encoding": "compressed_segmentation",
        "compressed_segmentation_block_size": SEGMENTATION_BLOCK,
    }
    document = ScaleDocument(volume_metadata(labels.dtype, 1, is_labels=True), scale, (2, 1, 0))
    array = write_scale(str(tmp_path / "scale"), document)
    ((_, content),) = array._encode(Box((0, 0, 0), (8, 8, 8)), labels)
    predicted = SEGMENTATION_HEADER_BYTES + segmentation_bytes(count)
    different = len(np.unique(labels))
    assert content is not None
    assert SEGMENTATION_HEADER_BYTES + segmentation_bytes(different) == len(content) <= predicted
