"""Memory of the pieces that wait for their block while a volume is produced in one process."""

import tracemalloc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from chunkq.blend import sums
from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.streaming import OutputStream, regions
from chunkq.blend.sums import Accumulator, Contribution
from chunkq.plan.chunk import Chunk
from chunkq.system import buffers
from tests.strategies import JobPlan, plan_for

WIDTH = 4096
"""Voxels along the last axis, for which 64 rows of sums in float32 have the size of a mapping."""


def plan_of(channels: int) -> JobPlan:
    """Return a plan of four chunks, of which three send a piece of at least 1 MiB to the next."""
    return plan_for(
        (512, WIDTH),
        (128, WIDTH),
        "uint8",
        inference_type="sliding_window",
        strides=[64, WIDTH],
        chunksize=[128, WIDTH],
        storage_chunks=[64, WIDTH],
        model={"model_output_shape": [channels, 128, WIDTH]},
    )


class ComputedChunks:
    """The chunks of a plan, each computed when it is needed; `sums` refers to their sums."""

    def __init__(self, plan: JobPlan) -> None:
        self._plan = plan
        self._weights = PatchWeights(plan, plan.blend_weights(), np.asarray)
        self.sums: list[weakref.ref[npt.NDArray[Any]]] = []

    def __iter__(self) -> Iterator[tuple[Chunk, list[Contribution]]]:
        return map(self._compute, self._plan.indices())

    def _compute(self, index: tuple[int, ...]) -> tuple[Chunk, list[Contribution]]:
        plan, chunk = self._plan, self._plan.chunk(index)
        zeros = buffers.zeros((plan.channels, *chunk.region.shape), np.float32)
        assert isinstance(zeros.base, np.ndarray)
        self.sums.append(weakref.ref(zeros.base))  # the array that all views of the sums refer to
        accumulator = Accumulator(plan, chunk, self._weights, zeros)
        for patch in plan.patches(chunk):
            accumulator.add([patch], np.ones((1, plan.channels, *plan.output_patch), np.float32))
        return chunk, [accumulator.contribution()]


def piece_bytes(plan: JobPlan) -> list[int]:
    chunks = map(plan.chunk, plan.indices())
    pieces = [piece for chunk in chunks for piece in plan.outgoing_pieces(chunk)]
    return [4 * plan.channels * piece.box.size for piece in pieces]


def consume(plan: JobPlan, computed: Any) -> None:
    """Produce the volume; assert that all voxels are the average of ones."""
    voxels = 0
    for _, box, values in regions([OutputStream(plan)], computed):
        assert values.min() == pytest.approx(1)
        assert values.max() == pytest.approx(1)
        voxels += box.size
    assert voxels == 512 * WIDTH


@pytest.mark.parametrize(
    ("channels", "copied_pieces"),
    [
        (2, 0),  # a piece has a copy of its sums already, one channel after the other
        (1, 3),  # a piece is a view of its chunk's sums
    ],
)
def test_only_pieces_that_are_views_are_copied(
    monkeypatch: pytest.MonkeyPatch, channels: int, copied_pieces: int
) -> None:
    plan = plan_of(channels)
    computed, copied, cast = list(ComputedChunks(plan)), [], buffers.cast

    def counting_cast(array: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        copied.append(array.nbytes)
        return cast(array, dtype)

    monkeypatch.setattr(buffers, "cast", counting_cast)
    consume(plan, computed)
    assert copied == piece_bytes(plan)[:copied_pieces]


@pytest.mark.parametrize("channels", [1, 2])
def test_waiting_pieces_are_not_on_the_heap(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    monkeypatch.setattr(sums, "SLAB_BYTES", 1 << 16)  # the sums of a slab are on the heap
    plan = plan_of(channels)
    computed = list(ComputedChunks(plan))
    assert min(piece_bytes(plan)) >= buffers.LARGE_BYTES
    tracemalloc.start()
    consume(plan, computed)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < buffers.LARGE_BYTES


@pytest.mark.parametrize("channels", [1, 2])
def test_a_waiting_piece_does_not_keep_the_sums_of_its_chunk(channels: int) -> None:
    plan = plan_of(channels)
    computed = ComputedChunks(plan)
    produced = regions([OutputStream(plan)], computed)
    next(box for _, box, _ in produced if box.start[0] >= 256)  # of the third chunk
    assert [reference() is None for reference in computed.sums] == [True, True, False]
