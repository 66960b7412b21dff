from collections import Counter
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from chunkq.geometry.box import Box
from chunkq.plan.chunk import Chunk, Index, Patch, Piece
from chunkq.plan.plan import Plan
from tests import reference as ref
from tests.strategies import Case, cases, plan_for

Mask = npt.NDArray[np.bool_]


def chunks(plan: Plan) -> dict[Index, Chunk]:
    return {index: plan.chunk(index) for index in plan.indices()}


def count_boxes(plan: Plan, boxes: list[Box]) -> npt.NDArray[np.int64]:
    """Return the number of boxes that contain each voxel of the volume."""
    count = np.zeros(plan.volume.shape, dtype=np.int64)
    for box in boxes:
        count[box.slices((0,) * plan.rank)] += 1
    return count


def predicted_voxels(plan: Plan) -> dict[Index, Mask]:
    """Return for each chunk the voxels that its patches predict, by exhaustive search."""
    return {
        index: count_boxes(plan, [p.target for p in plan.patches(chunk)]) > 0
        for index, chunk in chunks(plan).items()
    }


@settings(max_examples=50)
@given(cases())
def test_blocks_cover_every_voxel_exactly_once(case: Case) -> None:
    plan = case.plan
    assert (count_boxes(plan, [chunk.block for chunk in chunks(plan).values()]) == 1).all()
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
    actual = [(p.grid, p.source.start, p.target.start, p.target.stop) for p in patches]
    assert sorted(actual) == sorted(expected)
    assert {p.source.shape for p in patches} == {case.patch}
    assert len({(p.grid, p.numbers) for p in patches}) == len(patches)


@settings(max_examples=50)
@given(cases())
def test_a_chunk_owns_the_patches_whose_clipped_target_starts_in_its_block(case: Case) -> None:
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
def test_the_region_of_a_chunk_ends_in_the_next_block_along_each_axis(case: Case) -> None:
    plan = case.plan
    for chunk in chunks(plan).values():
        up = tuple(min(i + 1, n - 1) for i, n in zip(chunk.index, plan.blocks, strict=True))
        assert chunk.region in Box(chunk.block.start, plan.chunk(up).block.stop)


@settings(max_examples=100)
@given(cases())
def test_only_the_own_chunk_contributes_to_an_interior_voxel(case: Case) -> None:
    plan = case.plan
    masks = predicted_voxels(plan)
    for index, chunk in chunks(plan).items():
        assert chunk.core in chunk.interior
        assert chunk.interior in chunk.block
        interior = chunk.interior.slices((0,) * plan.rank)
        assert masks[index][interior].all()
        assert not any(mask[interior].any() for other, mask in masks.items() if other != index)


@given(cases(max_rank=2))
def test_a_band_is_no_wider_than_a_single_grid_needs(case: Case) -> None:
    case.keys.pop("offsets", None)
    plan = case.plan
    masks = predicted_voxels(plan)
    for index, chunk in chunks(plan).items():
        for axis in range(plan.rank):
            if chunk.interior.start[axis] > chunk.block.start[axis]:
                # A lower chunk predicts a voxel in the last layer of the band along this axis.
                low = [0] * plan.rank
                high = list(plan.volume.shape)
                low[axis] = chunk.interior.start[axis] - 1
                high[axis] = chunk.interior.start[axis]
                slab = Box(tuple(low), tuple(high)).slices((0,) * plan.rank)
                below = [m for other, m in masks.items() if other[axis] < index[axis]]
                assert any(mask[slab].any() for mask in below)


@settings(max_examples=100)
@given(cases())
def test_band_rest_and_core_partition_the_block_along_storage_chunks(case: Case) -> None:
    plan = case.plan
    for chunk in chunks(plan).values():
        band, rest, touched = chunk.band_boxes, chunk.rest_boxes, chunk.touched_boxes
        in_block = count_boxes(plan, [chunk.block])
        assert np.array_equal(count_boxes(plan, [*band, chunk.interior]), in_block)
        assert np.array_equal(count_boxes(plan, [*band, *rest, chunk.core]), in_block)
        assert np.array_equal(count_boxes(plan, [*touched, chunk.core]), in_block)
        assert chunk.has_band == bool(band)
        for start, low, stop, storage in zip(
            chunk.core.start, chunk.block.start, chunk.block.stop, plan.storage_chunks, strict=True
        ):
            assert (start - low) % storage == 0 or start == stop


@settings(max_examples=60)
@given(cases())
def test_every_piece_has_one_writer_and_one_reader(case: Case) -> None:
    plan = case.plan
    outgoing = [plan.outgoing_pieces(chunk) for chunk in chunks(plan).values()]
    incoming = [plan.incoming_pieces(chunk) for chunk in chunks(plan).values()]
    assert Counter(chain(*outgoing)) == Counter(chain(*incoming))
    assert set(Counter(chain(*outgoing)).values()) <= {1}
    assert all(len(pieces) <= 2**plan.rank - 1 for pieces in outgoing)
    for pieces in incoming:
        assert len({piece.name for piece in pieces}) == len(pieces)


@settings(max_examples=100)
@given(cases())
def test_pieces_cover_every_voxel_that_a_chunk_predicts_outside_its_block(case: Case) -> None:
    plan = case.plan
    masks = predicted_voxels(plan)
    for index, chunk in chunks(plan).items():
        boxes = [p.box for p in plan.outgoing_pieces(chunk)]
        assert all(box.size for box in boxes)
        covered = count_boxes(plan, boxes)
        assert covered.max(initial=0) <= 1
        outside = masks[index].copy()
        outside[chunk.block.slices((0,) * plan.rank)] = False
        assert (covered[outside] == 1).all()
        for piece in plan.outgoing_pieces(chunk):
            assert piece.source == index
            assert piece.box in plan.chunk(piece.target).block
            assert piece.box in chunk.region


@settings(max_examples=60)
@given(cases(max_rank=3))
def test_the_contributors_of_a_block_include_every_chunk_that_predicts_its_voxels(
    case: Case,
) -> None:
    plan = case.plan
    masks, active = predicted_voxels(plan), set(plan.active_indices())
    for index, chunk in chunks(plan).items():
        contributors = plan.contributors(index)
        assert len(set(contributors)) == len(contributors) > 0
        assert all(other in active for other in contributors)
        assert (contributors[0] == index) == (index in active)
        block = chunk.block.slices((0,) * plan.rank)
        assert {other for other, mask in masks.items() if mask[block].any()} <= set(contributors)
        for other in contributors:
            assert all(i - 1 <= j <= i for i, j in zip(index, other, strict=True))


@settings(max_examples=60)
@given(cases(max_rank=3))
def test_exactly_the_blocks_with_a_band_are_finalized(case: Case) -> None:
    plan = case.plan
    with_band = [index for index, chunk in chunks(plan).items() if chunk.has_band]
    assert list(plan.to_finalize()) == with_band
    assert [index for index in plan.indices() if plan.has_band(index)] == with_band
    assert [i for i in plan.indices() if plan.incoming_pieces(plan.chunk(i))] == with_band


@settings(max_examples=150)
@given(cases())
def test_costs_equal_the_sums_over_all_chunks(case: Case) -> None:
    plan = case.plan
    all_chunks = list(chunks(plan).values())
    active = [chunk for chunk in all_chunks if chunk.is_active]
    output_voxel = plan.stored_channels * plan.output_dtype.itemsize
    costs = plan.costs
    assert costs.chunks == len(active)
    assert costs.blocks == len(all_chunks)
    assert costs.patches == sum(chunk.patches for chunk in all_chunks)
    assert costs.finalized_blocks == sum(chunk.has_band for chunk in all_chunks)
    touched = [box for chunk in all_chunks for box in chunk.touched_boxes]
    assert costs.finalized_voxels == sum(box.size for box in touched)
    assert costs.output_bytes == prod(plan.output_shape) * plan.output_dtype.itemsize
    assert costs.input_bytes == sum(
        prod(
            int(high - low)
            for axis, i in zip(plan.axes, chunk.index, strict=True)
            for low, high in [axis.read(np.asarray(i))]
        )
        for chunk in active
    )
    sums = sum(p.box.size for chunk in all_chunks for p in plan.outgoing_pieces(chunk))
    sums += sum(box.size for chunk in active for box in chunk.band_boxes)
    rest = sum(box.size for chunk in all_chunks for box in chunk.rest_boxes)
    assert costs.piece_bytes == sums * 4 * plan.channels + rest * output_voxel
    assert costs.store_bytes == costs.input_bytes + costs.output_bytes + 2 * costs.piece_bytes


@settings(max_examples=50)
@given(cases())
def test_a_block_without_patches_is_all_band_and_sends_nothing(case: Case) -> None:
    plan = case.plan
    for chunk in chunks(plan).values():
        assert chunk.is_active == plan.is_active(chunk.index) == (chunk.patches > 0)
        if not chunk.is_active:
            assert chunk.interior.size == 0
            assert plan.has_band(chunk.index)
            assert plan.outgoing_pieces(chunk) == []


@settings(max_examples=150)
@given(cases())
def test_exactly_the_chunks_that_own_patches_are_listed_in_order(case: Case) -> None:
    plan = case.plan
    listed = list(plan.active_indices())
    assert listed == [index for index, chunk in chunks(plan).items() if chunk.patches]
    assert plan.count_patches(listed) == plan.costs.patches
    assert [plan.count_patches([i]) for i in plan.indices()] == [
        chunk.patches for chunk in chunks(plan).values()
    ]


def test_chunks_that_do_not_exist_own_no_patch() -> None:
    plan = plan_for((9, 9), (4, 4), chunksize=[4, 4])
    assert plan.count_patches([]) == 0
    assert plan.count_patches([(0, 99), (7, 0), (1, 1, 1), (0,)]) == 0
    assert not plan.is_active((0, 99))


def test_a_chunk_that_owns_starts_of_different_grids_along_each_axis_owns_no_patch() -> None:
    # Blocks are [0, 9) and [9, 10). Only patches of grid 1 start in the second block along axis 0,
    # only patches of grid 2 along axis 1.
    plan = plan_for((10, 10), (4, 4), chunksize=[9, 9], offsets=[[1, 0], [0, 1]])
    assert list(plan.active_indices()) == [(0, 0), (0, 1), (1, 0)]
    chunk = plan.chunk((1, 1))
    assert (chunk.patches, chunk.is_active, chunk.interior.size) == (0, False, 0)
    assert plan.contributors((1, 1)) == [(1, 0), (0, 1), (0, 0)]
    assert (plan.costs.chunks, plan.costs.blocks) == (3, 4)


def test_patches_are_ordered_by_grid_then_with_the_last_axis_fastest() -> None:
    plan = plan_for((4, 4), (2, 2), offsets=[[-1, 0]], chunksize=[4, 4])
    patches = list(plan.patches(plan.chunk((0, 0))))
    assert [(p.grid, p.numbers) for p in patches] == [
        *((0, n) for n in [(0, 0), (0, 1), (1, 0), (1, 1)]),
        *((1, n) for n in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]),
    ]
    assert patches[4] == Patch(1, (0, 0), Box((-1, 0), (1, 2)), Box((0, 0), (1, 2)))


def test_a_chunk_computed_by_hand() -> None:
    # Patches of 4 start at 0, 3, 6, 9, 11 (moved back from 12); blocks are [0, 8) and [8, 15).
    plan = plan_for(
        (15,), (4,), inference_type="sliding_window", strides=[3], chunksize=[8], storage_chunks=[4]
    )
    low, high = plan.chunk((0,)), plan.chunk((1,))
    assert low.owned == ((range(3),),)
    assert high.owned == ((range(3, 5),),)
    assert (low.block, low.interior, low.core) == (Box((0,), (8,)),) * 3
    # Patch 2 predicts [6, 10): its upper overlap is two voxels, half a storage chunk.
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


def test_a_piece_name_has_a_1_for_each_axis_along_which_the_target_is_above() -> None:
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
    # Patches at 0, 4, 5 (moved back from 8), all owned by block 0; the last block is [8, 9).
    plan = plan_for(
        (9,), (4,), inference_type="sliding_window", strides=[4], chunksize=[8], storage_chunks=[1]
    )
    first, last = plan.chunk((0,)), plan.chunk((1,))
    assert (first.patches, last.patches) == (3, 0)
    assert not last.is_active
    assert last.halo.size == last.interior.size == last.core.size == 0
    assert last.band_boxes == last.touched_boxes == (last.block,)
    assert (last.rest_boxes, list(plan.patches(last)), plan.outgoing_pieces(last)) == ((), [], [])
    assert plan.contributors((1,)) == [(0,)]
    assert list(plan.to_finalize()) == [(1,)]
    # Chunk 0 stores sums of one voxel, 4 bytes; chunk 1 stores none.
    assert (plan.costs.patches, plan.costs.piece_bytes) == (3, 4)


def test_no_block_expects_a_piece_from_a_chunk_without_patches() -> None:
    # Along axis 0 block 1 owns no patch, so chunk (1, 0) sends nothing to block (1, 1).
    plan = plan_for(
        (9, 9), (4, 4), inference_type="sliding_window", strides=[4, 3], chunksize=[8, 5]
    )
    assert not plan.chunk((1, 0)).is_active
    assert [piece.source for piece in plan.incoming_pieces(plan.chunk((1, 1)))] == [(0, 1), (0, 0)]


@pytest.mark.parametrize(
    "keys",
    [
        {"inference_type": "crop_margin", "margin": [1, 1]},
        {"inference_type": "sliding_window", "strides": [4, 4], "edge": "pad"},
        {},
    ],
)
def test_jobs_without_overlap_have_no_bands_if_chunks_are_multiples_of_patches(
    keys: dict[str, Any],
) -> None:
    plan = plan_for((21, 19), (4, 4), chunksize=[8, 8], **keys)
    assert plan.costs.piece_bytes == plan.costs.finalized_blocks == 0
    assert list(plan.to_finalize()) == []
    assert all(chunk.core == chunk.block for chunk in chunks(plan).values())


def test_costs_of_ten_million_chunks_are_computed_without_enumerating_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a chunk was enumerated")

    monkeypatch.setattr(Plan, "chunk", fail)
    monkeypatch.setattr(Plan, "indices", fail)
    monkeypatch.setattr(Plan, "active_indices", fail)
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
    assert costs.chunks == costs.blocks == 10_000_000
    assert costs.patches == prod((v - 32) // 16 + 1 for v in volume)
    # Every block but the last along an axis reads 16 voxels beyond its own.
    assert (
        costs.input_bytes == prod(v + 16 * (n - 1) for v, n in zip(volume, blocks, strict=True)) * 2
    )
    # Every block but those at index 0 on all axes has a band.
    assert costs.finalized_blocks == costs.chunks - 1
    assert costs.output_bytes == prod(volume) * 4


def test_costs_of_a_million_blocks_along_one_axis_are_computed_in_batches() -> None:
    plan = plan_for(
        (4 * 10**6 + 1,), (3,), inference_type="sliding_window", strides=[2], chunksize=[4]
    )
    costs = plan.costs
    # Starts 0, 2, …, 4·10⁶ - 2, the last one exactly at the end: only the first block has no band.
    assert (costs.chunks, costs.blocks, costs.patches) == (10**6, 10**6 + 1, 2 * 10**6)
    assert costs.finalized_blocks == 10**6


def test_a_chunk_in_the_middle_of_an_exavoxel_volume_is_computed_directly() -> None:
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
