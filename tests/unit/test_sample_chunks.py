"""The chunks that represent a plan."""

from math import inf
from typing import Any

import pytest

from chunkq.plan.chunk import Chunk
from chunkq.plan.footprint import Footprint, chunk_footprint, footprint
from chunkq.plan.plan import Plan
from chunkq.plan.sample_chunks import MAX_CHUNKS, fullest_chunk, sample_chunks
from tests.strategies import plan_for


def plan_of(*blocks: int, stride: int = 6, rest: int = 0, **keys: Any) -> Plan:
    """Return a plan with so many blocks of 16 voxels per axis; the last one lacks `rest` voxels."""
    rank = len(blocks)
    return plan_for(
        tuple(16 * n - rest for n in blocks),
        (8,) * rank,
        "uint8",
        inference_type="sliding_window",
        strides=[stride] * rank,
        chunksize=[16] * rank,
        storage_chunks=[4] * rank,
        **keys,
    )


def distances(chunks: list[Chunk], plan: Plan) -> list[int]:
    """Return how many blocks each chunk is from the middle, along the axis where it is farthest."""
    middle = [blocks // 2 for blocks in plan.blocks]
    return [max(abs(i - m) for i, m in zip(c.index, middle, strict=True)) for c in chunks]


@pytest.mark.parametrize("blocks", [(1,), (MAX_CHUNKS,), (18, 19), (7, 7, 7), (3, 1, 4, 5)])
def test_a_plan_of_few_chunks_is_represented_by_all_of_them(blocks: tuple[int, ...]) -> None:
    plan = plan_of(*blocks)
    chunks = sample_chunks(plan)
    assert sorted(chunk.index for chunk in chunks) == list(plan.indices())
    assert all(chunk == plan.chunk(chunk.index) for chunk in chunks)


@pytest.mark.parametrize("blocks", [(MAX_CHUNKS + 1,), (20, 20), (400, 2), (9, 9, 9)])
def test_a_plan_of_many_chunks_is_represented_at_its_borders_and_in_its_middle(
    blocks: tuple[int, ...],
) -> None:
    chunks = sample_chunks(plan_of(*blocks))
    for axis, n in enumerate(blocks):
        expected = {0, 1, n // 2 - 1, n // 2, n // 2 + 1, n - 2, n - 1} & set(range(n))
        assert {chunk.index[axis] for chunk in chunks} == expected
    assert len(chunks) == len({chunk.index for chunk in chunks}) <= 7 ** len(blocks)


@pytest.mark.parametrize("blocks", [(1,), (2,), (3, 3), (18, 20), (2, 5, 40), (8, 8, 8)])
def test_the_first_chunks_complete_the_middle_block_and_surround_it(
    blocks: tuple[int, ...],
) -> None:
    plan = plan_of(*blocks)
    chunks = sample_chunks(plan)
    contributors = plan.contributors(tuple(n // 2 for n in blocks))
    assert [chunk.index for chunk in chunks[:1]] == contributors[:1]
    assert {chunk.index for chunk in chunks[: len(contributors)]} == set(contributors)
    assert distances(chunks, plan) == sorted(distances(chunks, plan))


@pytest.mark.parametrize(
    ("rest", "keys"),
    [
        (0, {}),
        (5, {}),
        (13, {"edge": "shift"}),
        (3, {"stride": 8, "edge": "shift"}),
        (15, {"stride": 8}),  # the last blocks own no patch
    ],
)
def test_no_chunk_needs_more_memory_than_the_samples(rest: int, keys: dict[str, Any]) -> None:
    plan = plan_of(30, 30, rest=rest, pad_width=[4, 4], **keys)
    every_chunk = [chunk_footprint(plan, plan.chunk(index)) for index in plan.indices()]
    largest = [max(getattr(chunk, stage) for chunk in every_chunk) for stage in Footprint.__slots__]
    assert footprint(plan) == Footprint(*largest)


def test_the_fullest_chunk_is_the_nearest_of_those_with_enough_patches() -> None:
    plan = plan_of(4, 4, rest=15)
    patches = {index: plan.chunk(index).patches for index in plan.indices()}
    most = max(patches.values())
    assert len(set(patches.values())) > 1
    assert fullest_chunk(plan).patches == most
    assert fullest_chunk(plan, enough=inf) == fullest_chunk(plan)
    assert fullest_chunk(plan, enough=1) == sample_chunks(plan)[0]
    has_most = [chunk for chunk in sample_chunks(plan) if chunk.patches == most]
    assert fullest_chunk(plan, enough=most) == has_most[0]
