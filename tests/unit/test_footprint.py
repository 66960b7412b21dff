"""The arrays of a chunk, counted beside those that computing it really leaves."""

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from chunkq import buffers
from chunkq.blend import Accumulator, OwnBlock, WeightCache, finalize_sums
from chunkq.footprint import chunk_footprint, footprint
from chunkq.plan import Plan
from chunkq.user_code import load_blend_weights
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


def whole(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array whose memory a view keeps."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


@pytest.mark.parametrize(
    ("combine", "channels"),
    [("weighted_avg", 1), ("weighted_avg", 3), ("soft", 3), ("hard", 8), ("soft", 1)],
)
def test_what_a_chunk_holds_while_it_is_written_is_counted(combine: str, channels: int) -> None:
    plan = plan_of(combine, channels)
    chunk = plan.chunk((1, 1))
    zeros = np.zeros((channels, *chunk.region.shape), np.float32)
    weights = WeightCache(plan, load_blend_weights(plan), np.asarray)
    left = Accumulator(plan, chunk, weights, zeros).contribution()
    assert left.own is not None
    arrays = [left.core, *left.own.band, *left.own.rest, *(sums for _, sums in left.pieces)]
    held = {id(whole(array)): whole(array).nbytes for array in arrays}
    copied = max(left.core.nbytes, sum(values.nbytes for values in left.own.rest))
    counted = chunk_footprint(plan, chunk)
    assert counted.writing == sum(held.values()) + copied
    assert counted.computing > counted.waiting + zeros.nbytes
    assert counted.waiting == chunk.halo.size


def test_what_completing_a_block_holds_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    # tracemalloc knows of what NumPy allocates.
    monkeypatch.setattr(buffers, "LARGE_BYTES", 1 << 40)
    plan = plan_of("weighted_avg", 3, scale=32)
    chunk = plan.chunk((1, 1))
    own = OwnBlock(
        tuple(np.ones((3, *box.shape), np.float32) for box in chunk.band_boxes),
        tuple(np.ones((3, *box.shape), np.uint8) for box in chunk.rest_boxes),
    )
    pieces = {p: np.ones((3, *p.box.shape), np.float32) for p in plan.incoming_pieces(chunk)}
    arrays = [*own.band, *own.rest, *pieces.values()]
    tracemalloc.start()
    for _ in finalize_sums(plan, chunk, own, pieces):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    counted = chunk_footprint(plan, chunk).completing
    assert counted == pytest.approx(sum(array.nbytes for array in arrays) + peak, rel=0.15)


def test_each_chunk_more_in_flight_adds_the_same() -> None:
    found = footprint(plan_of("weighted_avg", 3, "float32"))
    assert found.waiting == footprint(plan_of("weighted_avg", 3)).waiting * 4
    steps = np.diff([found.peak_bytes(depth) for depth in (1, 2, 3, 4)])
    assert set(steps) == {max(found.waiting, found.writing, found.completing)}
    assert found.peak_bytes(1) == found.computing
