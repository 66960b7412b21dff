from collections import Counter
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from chunkq.box import Box
from chunkq.plan import Chunk, Index, Patch, Piece, Plan
from tests import reference as ref
from tests.strategies import Case, cases, plan_for

Mask = npt.NDArray[np.bool_]


def chunks(plan: Plan) -> dict[Index, Chunk]:
    return {index: plan.chunk(index) for index in plan.indices()}


def mark(plan: Plan, boxes: list[Box]) -> npt.NDArray[np.int64]:
    """How often each voxel of the volume lies in the boxes."""
    count = np.zeros(plan.volume.shape, dtype=np.int64)
    for box in boxes:
        count[box.slices((0,) * plan.rank)] += 1
    return count


def contributions(plan: Plan) -> dict[Index, Mask]:
    """By search: the voxels of the volume that each chunk's patches speak for."""
    return {
        index: mark(plan, [p.target for p in plan.patches(chunk)]) > 0
        for index, chunk in chunks(plan).items()
    }


@settings(max_examples=50)
@given(cases())
def test_blocks_cover_every_voxel_exactly_once(case: Case) -> None:
    plan = case.plan
    assert (mark(plan, [chunk.block for chunk in chunks(plan).values()]) == 1).all()
    assert len(list(plan.indices())) == prod(plan.blocks)


@settings(max_examples=150)
@given(cases())
def test_every_patch_of_the_reference_is_computed_exactly_once(case: Case) -> None:
    plan = case.plan
    patches = [p for chunk in chunks(plan).values() for p in plan.patches(chunk)]
    expected = [
        (grid, start, tuple(max(0, a) for a in low), tuple(map(min, high, case.volume)))
        for grid, start, (low, high) in ref.patches(case.setup)
    ]
    found = [(p.grid, p.source.start, p.target.start, p.target.stop) for p in patches]
    assert sorted(found) == sorted(expected)
    assert {p.source.shape for p in patches} == {case.patch}
    assert len({(p.grid, p.numbers) for p in patches}) == len(patches)


@settings(max_examples=50)
@given(cases())
def test_a_chunk_owns_the_patches_whose_clipped_output_starts_in_its_block(case: Case) -> None:
    plan = case.plan
    for chunk in chunks(plan).values():
        patches = list(plan.patches(chunk))
        assert len(patches) == chunk.patches
        for patch in patches:
            first = Box(patch.target.start, tuple(n + 1 for n in patch.target.start))
            assert first in chunk.block
            assert patch.target in chunk.region
            assert patch.source in chunk.halo


@settings(max_examples=50)
@given(cases())
def test_a_chunk_reaches_into_its_next_neighbours_only(case: Case) -> None:
    plan = case.plan
    for chunk in chunks(plan).values():
        up = tuple(min(i + 1, n - 1) for i, n in zip(chunk.index, plan.blocks, strict=True))
        assert chunk.region in Box(chunk.block.start, plan.chunk(up).block.stop)


@settings(max_examples=100)
@given(cases())
def test_an_interior_voxel_has_one_contributor_its_own_chunk(case: Case) -> None:
    plan = case.plan
    masks = contributions(plan)
    for index, chunk in chunks(plan).items():
        assert chunk.core in chunk.interior
        assert chunk.interior in chunk.block
        here = chunk.interior.slices((0,) * plan.rank)
        assert masks[index][here].all()
        assert not any(mask[here].any() for other, mask in masks.items() if other != index)


@given(cases(max_rank=2))
def test_a_band_is_no_wider_than_a_single_grid_needs(case: Case) -> None:
    case.keys.pop("offsets", None)
    plan = case.plan
    masks = contributions(plan)
    for index, chunk in chunks(plan).items():
        for axis in range(plan.rank):
            if chunk.interior.start[axis] > chunk.block.start[axis]:
                # The band's last voxel along this axis is another chunk's, somewhere.
                low = [0] * plan.rank
                high = list(plan.volume.shape)
                low[axis] = chunk.interior.start[axis] - 1
                high[axis] = chunk.interior.start[axis]
                slab = Box(tuple(low), tuple(high)).slices((0,) * plan.rank)
                below = [m for other, m in masks.items() if other[axis] < index[axis]]
                assert any(mask[slab].any() for mask in below)


@settings(max_examples=100)
@given(cases())
def test_core_band_and_rest_cut_the_block_along_storage_chunks(case: Case) -> None:
    plan = case.plan
    for chunk in chunks(plan).values():
        band, rest, touched = chunk.band_boxes, chunk.rest_boxes, chunk.touched_boxes
        in_block = mark(plan, [chunk.block])
        assert np.array_equal(mark(plan, [*band, chunk.interior]), in_block)
        assert np.array_equal(mark(plan, [*band, *rest, chunk.core]), in_block)
        assert np.array_equal(mark(plan, [*touched, chunk.core]), in_block)
        assert chunk.has_band == bool(band)
        for start, low, stop, storage in zip(
            chunk.core.start, chunk.block.start, chunk.block.stop, plan.storage_chunks, strict=True
        ):
            assert (start - low) % storage == 0 or start == stop


@settings(max_examples=60)
@given(cases())
def test_every_piece_has_one_writer_and_one_reader(case: Case) -> None:
    plan = case.plan
    left = [plan.outgoing_pieces(chunk) for chunk in chunks(plan).values()]
    awaited = [plan.incoming_pieces(chunk) for chunk in chunks(plan).values()]
    assert Counter(chain(*left)) == Counter(chain(*awaited))
    assert set(Counter(chain(*left)).values()) <= {1}
    assert all(len(pieces) <= 2**plan.rank - 1 for pieces in left)
    for pieces in awaited:
        assert len({piece.name for piece in pieces}) == len(pieces)


@settings(max_examples=100)
@given(cases())
def test_pieces_carry_all_that_a_chunk_adds_outside_its_block(case: Case) -> None:
    plan = case.plan
    masks = contributions(plan)
    for index, chunk in chunks(plan).items():
        boxes = [p.box for p in plan.outgoing_pieces(chunk)]
        assert all(box.size for box in boxes)
        carried = mark(plan, boxes)
        assert carried.max(initial=0) <= 1
        outside = masks[index].copy()
        outside[chunk.block.slices((0,) * plan.rank)] = False
        assert (carried[outside] == 1).all()
        for piece in plan.outgoing_pieces(chunk):
            assert piece.source == index
            assert piece.box in plan.chunk(piece.target).block
            assert piece.box in chunk.region


@settings(max_examples=60)
@given(cases(max_rank=3))
def test_a_block_waits_for_all_that_reach_into_it(case: Case) -> None:
    plan = case.plan
    masks = contributions(plan)
    for index, chunk in chunks(plan).items():
        waited = plan.contributors(index)
        assert len(set(waited)) == len(waited)
        here = chunk.block.slices((0,) * plan.rank)
        reaching = {other for other, mask in masks.items() if mask[here].any()}
        assert reaching <= set(waited)
        assert all(i - 1 <= j <= i for other in waited for i, j in zip(index, other, strict=True))


@settings(max_examples=60)
@given(cases(max_rank=3))
def test_blocks_with_a_band_are_finalized_and_no_others(case: Case) -> None:
    plan = case.plan
    banded = [index for index, chunk in chunks(plan).items() if chunk.has_band]
    assert list(plan.to_finalize()) == banded
    assert [index for index in plan.indices() if plan.has_band(index)] == banded
    assert [i for i in plan.indices() if plan.incoming_pieces(plan.chunk(i))] == banded


@settings(max_examples=150)
@given(cases())
def test_costs_equal_the_sums_over_all_chunks(case: Case) -> None:
    plan = case.plan
    listed = list(chunks(plan).values())
    active = [chunk for chunk in listed if chunk.is_active]
    stored = plan.stored_channels * plan.output_dtype.itemsize
    costs = plan.costs
    assert costs.chunks == len(listed)
    assert costs.patches == sum(chunk.patches for chunk in listed)
    assert costs.finalized_blocks == sum(chunk.has_band for chunk in listed)
    assert costs.finalized_voxels == sum(b.size for chunk in listed for b in chunk.touched_boxes)
    assert costs.output_bytes == prod(plan.output_shape) * plan.output_dtype.itemsize
    assert costs.input_bytes == sum(
        prod(
            int(high - low)
            for axis, i in zip(plan.axes, chunk.index, strict=True)
            for low, high in [axis.read(np.asarray(i))]
        )
        for chunk in active
    )
    sums = sum(p.box.size for chunk in listed for p in plan.outgoing_pieces(chunk))
    sums += sum(box.size for chunk in active for box in chunk.band_boxes)
    rest = sum(box.size for chunk in listed for box in chunk.rest_boxes)
    assert costs.piece_bytes == sums * 4 * plan.channels + rest * stored
    assert costs.store_bytes == costs.input_bytes + costs.output_bytes + 2 * costs.piece_bytes


@settings(max_examples=50)
@given(cases())
def test_a_chunk_without_patches_along_an_axis_is_all_band(case: Case) -> None:
    plan = case.plan
    for chunk in chunks(plan).values():
        if not chunk.is_active:
            assert chunk.patches == 0
            assert chunk.interior.size == 0
            assert plan.outgoing_pieces(chunk) == []


def test_patches_come_grid_by_grid_the_last_axis_fastest() -> None:
    plan = plan_for((4, 4), (2, 2), offsets=[[-1, 0]], chunksize=[4, 4])
    patches = list(plan.patches(plan.chunk((0, 0))))
    assert [(p.grid, p.numbers) for p in patches] == [
        *((0, n) for n in [(0, 0), (0, 1), (1, 0), (1, 1)]),
        *((1, n) for n in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]),
    ]
    assert patches[4] == Patch(1, (0, 0), Box((-1, 0), (1, 2)), Box((0, 0), (1, 2)))


def test_a_chunk_by_hand() -> None:
    # Patches of 4 start at 0, 3, 6, 9, 11 (moved back from 12); blocks are [0, 8) and [8, 15).
    plan = plan_for(
        (15,), (4,), inference_type="sliding_window", strides=[3], chunksize=[8], storage_chunks=[4]
    )
    low, high = plan.chunk((0,)), plan.chunk((1,))
    assert low.owned == ((range(3),),)
    assert high.owned == ((range(3, 5),),)
    assert (low.block, low.interior, low.core) == (Box((0,), (8,)),) * 3
    # Patch 2 speaks for [6, 10): it spills two voxels, half a storage chunk.
    assert low.region == Box((0,), (10,))
    assert (high.block, high.interior, high.core) == (
        Box((8,), (15,)),
        Box((10,), (15,)),
        Box((12,), (15,)),
    )
    assert (low.halo, high.halo) == (Box((0,), (10,)), Box((9,), (15,)))
    assert (
        plan.outgoing_pieces(low)
        == plan.incoming_pieces(high)
        == [Piece((0,), (1,), Box((8,), (10,)))]
    )
    assert plan.outgoing_pieces(high) == []
    assert high.band_boxes == (Box((8,), (10,)),)
    assert high.rest_boxes == (Box((10,), (12,)),)
    assert high.touched_boxes == (Box((8,), (12,)),)


def test_pieces_are_named_by_the_axes_they_go_up() -> None:
    plan = plan_for(
        (8, 8), (3, 3), inference_type="sliding_window", strides=[2, 2], chunksize=[4, 4]
    )
    assert [(p.source, p.name) for p in plan.incoming_pieces(plan.chunk((1, 1)))] == [
        ((1, 0), "01"),
        ((0, 1), "10"),
        ((0, 0), "11"),
    ]
    assert plan.contributors((1, 1)) == [(1, 1), (1, 0), (0, 1), (0, 0)]
    assert plan.contributors((0, 0)) == [(0, 0)]


def test_the_last_block_may_own_no_patch() -> None:
    # Patches at 0, 4, 5 (moved back from 8); the last block [8, 9) is patches 1 and 2 of block 0.
    plan = plan_for(
        (9,), (4,), inference_type="sliding_window", strides=[4], chunksize=[8], storage_chunks=[1]
    )
    first, last = plan.chunk((0,)), plan.chunk((1,))
    assert (first.patches, last.patches) == (3, 0)
    assert not last.is_active
    assert last.halo.size == last.interior.size == last.core.size == 0
    assert last.band_boxes == last.touched_boxes == (last.block,)
    assert (last.rest_boxes, list(plan.patches(last)), plan.outgoing_pieces(last)) == ((), [], [])
    assert plan.contributors((1,)) == [(1,), (0,)]
    assert list(plan.to_finalize()) == [(1,)]
    # Sums of one voxel from chunk 0 only, 4 bytes: chunk 1 leaves none of its own.
    assert (plan.costs.patches, plan.costs.piece_bytes) == (3, 4)


@pytest.mark.parametrize(
    "keys",
    [
        {"inference_type": "crop_margin", "margin": [1, 1]},
        {"inference_type": "sliding_window", "strides": [4, 4], "edge": "pad"},
        {},
    ],
)
def test_jobs_without_overlap_have_no_bands_where_patches_fit_the_chunks(
    keys: dict[str, Any],
) -> None:
    plan = plan_for((21, 19), (4, 4), chunksize=[8, 8], **keys)
    assert plan.costs.piece_bytes == plan.costs.finalized_blocks == 0
    assert list(plan.to_finalize()) == []
    assert all(chunk.core == chunk.block for chunk in chunks(plan).values())


def test_ten_million_chunks_are_costed_without_listing_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def listed(*_: object) -> None:
        raise AssertionError("a chunk was looked at")

    monkeypatch.setattr(Plan, "chunk", listed)
    monkeypatch.setattr(Plan, "indices", listed)
    blocks = (200, 250, 200)
    volume = tuple(64 * n for n in blocks)
    plan = plan_for(
        volume,
        (32, 32, 32),
        "uint16",
        inference_type="sliding_window",
        strides=[16, 16, 16],
        chunksize=[64, 64, 64],
        storage_chunks=[32, 32, 32],
    )
    costs = plan.costs
    assert costs.chunks == 10_000_000
    assert costs.patches == prod((v - 32) // 16 + 1 for v in volume)
    # Along an axis every block but the last reads 16 voxels more than its own.
    assert (
        costs.input_bytes == prod(v + 16 * (n - 1) for v, n in zip(volume, blocks, strict=True)) * 2
    )
    # Every block but those at index 0 on all axes has a band.
    assert costs.finalized_blocks == costs.chunks - 1
    assert costs.output_bytes == prod(volume) * 4


def test_a_million_blocks_along_one_axis_are_costed_in_slabs() -> None:
    plan = plan_for(
        (4 * 10**6 + 1,), (3,), inference_type="sliding_window", strides=[2], chunksize=[4]
    )
    costs = plan.costs
    # Starts 0, 2, …, 4·10⁶ - 2, the last exactly at the end: no block but the first lacks a band.
    assert (costs.chunks, costs.patches) == (10**6 + 1, 2 * 10**6)
    assert costs.finalized_blocks == 10**6


def test_one_chunk_far_inside_a_petavoxel_volume_is_had_at_once() -> None:
    plan = plan_for(
        (10**6, 10**6, 10**6),
        (64, 64, 64),
        inference_type="sliding_window",
        strides=[32, 32, 32],
        chunksize=[512, 512, 512],
    )
    chunk = plan.chunk((900, 1000, 1100))
    assert chunk.block == Box((460800, 512000, 563200), (461312, 512512, 563712))
    assert chunk.patches == 16**3
    assert len(plan.incoming_pieces(chunk)) == 7
