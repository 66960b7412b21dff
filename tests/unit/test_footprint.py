"""Compare the planned memory of a chunk with the arrays that its computation allocates."""

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.sums import Accumulator, OwnBlock, finalize_sums
from chunkq.plan.footprint import chunk_footprint, footprint
from chunkq.plan.plan import Plan
from chunkq.system import buffers
from tests.strategies import plan_for


def plan_of(combine: str, channels: int, dtype: str = "uint8", scale: int = 1) -> Plan:
    return plan_for(
        (64 * scale,) * 2,
        (8 * scale,) * 2,
        dtype,
        inference_type="sliding_window",
        strides=[6 * scale] * 2,
        chunksize=[16 * scale] * 2,
        storage_chunks=[4 * scale] * 2,
        combine=combine,
        model={"model_output_shape": [channels, 8 * scale, 8 * scale]},
    )


def base_array(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array that owns the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


@pytest.mark.parametrize(
    ("combine", "channels"),
    [("weighted_avg", 1), ("weighted_avg", 3), ("soft", 3), ("hard", 8), ("soft", 1)],
)
def test_the_footprint_of_writing_equals_the_arrays_of_a_contribution(
    combine: str, channels: int
) -> None:
    plan = plan_of(combine, channels)
    chunk = plan.chunk((1, 1))
    zeros = np.zeros((channels, *chunk.region.shape), np.float32)
    weights = PatchWeights(plan, plan.blend_weights(), np.asarray)
    result = Accumulator(plan, chunk, weights, zeros).contribution()
    assert result.own_block is not None
    pieces = [sums for _, sums in result.pieces]
    bases = map(base_array, [result.core, *result.own_block.band, *result.own_block.rest, *pieces])
    allocated = {id(base): base.nbytes for base in bases}
    copied = max(result.core.nbytes, sum(values.nbytes for values in result.own_block.rest))
    planned = chunk_footprint(plan, chunk)
    assert planned.writing == sum(allocated.values()) + copied
    assert planned.computing > planned.waiting + zeros.nbytes
    assert planned.waiting == chunk.halo.size


def test_the_footprint_of_completing_is_within_15_percent_of_the_traced_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # tracemalloc traces the allocations of NumPy, but no mappings.
    monkeypatch.setattr(buffers, "LARGE_BYTES", 1 << 40)
    plan = plan_of("weighted_avg", 3, scale=32)
    chunk = plan.chunk((1, 1))
    own_block = OwnBlock(
        tuple(np.ones((3, *box.shape), np.float32) for box in chunk.band_boxes),
        tuple(np.ones((3, *box.shape), np.uint8) for box in chunk.rest_boxes),
    )
    pieces = {p: np.ones((3, *p.box.shape), np.float32) for p in plan.incoming_pieces(chunk)}
    arrays = [*own_block.band, *own_block.rest, *pieces.values()]
    tracemalloc.start()
    for _ in finalize_sums(plan, chunk, own_block, pieces):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    planned = chunk_footprint(plan, chunk).finalizing
    assert planned == pytest.approx(sum(array.nbytes for array in arrays) + peak, rel=0.15)


def test_each_additional_chunk_in_flight_adds_the_same_memory() -> None:
    largest = footprint(plan_of("weighted_avg", 3, "float32"))
    assert largest.waiting == footprint(plan_of("weighted_avg", 3)).waiting * 4
    steps = np.diff([largest.peak_bytes(depth) for depth in (1, 2, 3, 4)])
    assert set(steps) == {max(largest.waiting, largest.writing, largest.finalizing)}
    assert largest.peak_bytes(1) == largest.computing


def test_a_chunk_without_patches_holds_only_the_pieces_of_others() -> None:
    plan = plan_for(
        (33,), (8,), inference_type="sliding_window", strides=[8], chunksize=[16],
        storage_chunks=[4], pad_width=[4],
    )  # fmt: skip
    chunk = plan.chunk((2,))
    assert not chunk.is_active
    voxels = chunk.block.size
    [piece] = plan.incoming_pieces(chunk)
    assert piece.box == chunk.block
    planned = chunk_footprint(plan, chunk)
    # The piece, the sum of the pieces and its output value, and the block, all in 4 bytes.
    assert (planned.waiting, planned.finalizing) == (0, voxels * (4 + 4 + 4 + 4))
