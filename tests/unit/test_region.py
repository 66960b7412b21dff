"""Regions of a job: the same values as in the output of the whole volume, from fewer patches."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkq.blend.weights import ArrayWeights
from chunkq.errors import JobError
from chunkq.geometry.box import Box
from chunkq.geometry.padding import source_indices
from chunkq.plan.chunk import Patch
from chunkq.plan.fetches import axis_fetches
from chunkq.plan.plan import Plan
from tests import reference as ref
from tests.harness.memory_run import ToDevice, in_numpy, in_torch, run
from tests.strategies import (
    BUILT_INS,
    Case,
    JobPlan,
    cases,
    plan_for,
    user_weights,
    without_margin,
)

Starts = set[tuple[int, tuple[int, ...]]]
"""Patches by grid and start of their input."""


@dataclass(frozen=True)
class RegionCase:
    """A valid job, and a region of its volume. Batches have `batch` patches."""

    whole: Case
    roi: list[list[int] | None]
    batch: int

    def plan(self, *, whole: bool = False) -> JobPlan:
        """Return the plan of the region, or of the whole volume."""
        model = self.whole.keys["model"] | {"max_batch_size": self.batch}
        keys = self.whole.keys | {"model": model} | ({} if whole else {"roi": self.roi})
        return plan_for(self.whole.volume, self.whole.patch, **keys)

    @property
    def region(self) -> Box:
        """The region, computed without chunkq."""
        sizes = self.whole.volume
        ranges = [
            range(size)[slice(*(bounds or ()))] if bounds else range(size)
            for bounds, size in zip(self.roi, sizes, strict=True)
        ]
        return Box(tuple(r.start for r in ranges), tuple(r.stop for r in ranges))

    def needed(self) -> Starts:
        """Return the patches whose kept voxels lie in the region, by exhaustive search."""
        return {
            (grid, start)
            for grid, start, (low, high) in ref.patches(self.whole.setup)
            if all(
                a < r_stop and r_start < b
                for a, b, r_start, r_stop in zip(
                    low, high, self.region.start, self.region.stop, strict=True
                )
            )
        }


@st.composite
def region_cases(draw: st.DrawFn, *, aligned: bool | None = None, max_rank: int = 3) -> RegionCase:
    """Draw a job and a region that starts at storage chunks, at other voxels, or at either."""
    case = draw(cases(max_rank))
    storage = case.keys["storage_chunks"]
    is_aligned = draw(st.booleans()) if aligned is None else aligned
    roi: list[list[int] | None] = []
    for size, step in zip(case.volume, storage, strict=True):
        start = draw(st.integers(0, (size - 1) // step)) * step if is_aligned else None
        start = draw(st.integers(0, size - 1)) if start is None else start
        stop = draw(st.integers(start + 1, size))
        bounds = [start - size * draw(st.booleans()), stop - size * (draw(st.booleans()))]
        bounds = [bounds[0], stop if stop == size else bounds[1]]
        roi.append(None if (start, stop) == (0, size) else bounds)
    return RegionCase(case, roi, draw(st.integers(1, 5)))


def of_starts(patches: list[Patch]) -> Starts:
    return {(patch.grid, patch.source.start) for patch in patches}


def computed(plan: Plan) -> list[Patch]:
    chunks = map(plan.chunk, plan.active_indices())
    return [patch for chunk in chunks for patch in plan.patches(chunk)]


def with_traces(predictions: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return predictions that depend on the other patches of their batch, and on their order."""
    ranks = np.arange(1, len(predictions) + 1).reshape(-1, *(1,) * (predictions.ndim - 1))
    return predictions + 1e-3 * (predictions * ranks).sum(axis=0, keepdims=True)


def outputs(
    case: RegionCase, weight: str, to_device: ToDevice, *, traces: bool
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], ref.Predict]:
    """Return the output of the region, and the crop of the whole output."""
    whole = case.whole
    plans = [case.plan(), case.plan(whole=True)]
    volume = np.random.default_rng(0).integers(0, 6, whole.volume).astype(np.uint8)
    predict = ref.predictor("position_dependent", whole.channels, whole.output)
    weights = None
    if weight == "user":
        weights = ArrayWeights(without_margin(user_weights(whole.output), plans[0].margin))
    of_batch = {"of_batch": with_traces} if traces else {}
    part, full = (run(plan, volume, predict, weights, to_device, **of_batch) for plan in plans)
    return part, full[case.region.index((0,) * plans[0].rank)], predict


@settings(max_examples=100)
@given(
    region_cases(aligned=True),
    st.sampled_from((*BUILT_INS[:2], "user")),
    st.sampled_from((in_numpy, in_torch)),
)
def test_a_region_that_starts_at_storage_chunks_has_the_bytes_of_the_whole_output(
    case: RegionCase, weight: str, to_device: ToDevice
) -> None:
    if weight != "user":
        case.whole.keys["weight_function"] = [weight]
    assert case.plan().grid.is_aligned
    part, crop, _ = outputs(case, weight, to_device, traces=True)
    assert part.dtype == crop.dtype
    assert part.shape == crop.shape
    assert part.tobytes() == np.ascontiguousarray(crop).tobytes()


@settings(max_examples=100)
@given(region_cases(aligned=False), st.sampled_from((*BUILT_INS[:2], "user")))
def test_any_region_equals_the_whole_output(case: RegionCase, weight: str) -> None:
    if weight != "user":
        case.whole.keys["weight_function"] = [weight]
    part, crop, predict = outputs(case, weight, in_numpy, traces=False)
    assert part.shape == crop.shape
    keys = case.whole.keys
    if keys["combine"] == "weighted_avg":
        scale = np.maximum(1.0, np.abs(crop))
        assert (np.abs(part.astype(np.float64) - crop) <= 1e-5 * scale).all()
        return
    volume = np.random.default_rng(0).integers(0, 6, case.whole.volume).astype(np.uint8)
    expected = ref.reference(
        case.whole.setup,
        volume,
        predict,
        keys["combine"],
        user_weights if weight == "user" else weight,
        activation=keys["activation"],
    )
    inside = case.region.slices((0,) * part.ndim)
    is_clear = expected.margin_of_decision[inside] > 1e-5
    np.testing.assert_array_equal(part[is_clear], crop[is_clear])
    np.testing.assert_array_equal(part[is_clear], expected.labels[inside][is_clear])


@settings(max_examples=100)
@given(region_cases())
def test_exactly_the_patches_of_needed_batches_are_computed_once(case: RegionCase) -> None:
    plan, whole, needed = case.plan(), case.plan(whole=True), case.needed()
    if plan.grid.is_aligned:
        batches = [
            patches[n : n + case.batch]
            for chunk in map(whole.chunk, whole.active_indices())
            for patches in [list(whole.patches(chunk))]
            for n in range(0, len(patches), case.batch)
        ]
        expected = [b for b in batches if of_starts(b) & needed]
        in_batches = {p for batch in expected for p in of_starts(batch)}
    else:
        in_batches = needed
    patches = computed(plan)
    assert of_starts(patches) == in_batches
    assert len(patches) == len(in_batches) == plan.costs.patches


@settings(max_examples=60)
@given(region_cases())
def test_the_tasks_are_the_chunks_that_write_into_the_region(case: RegionCase) -> None:
    plan, needed = case.plan(), case.needed()
    writers = [
        index
        for index in plan.indices()
        if of_starts(list(plan.patches(plan.chunk(index)))) & needed
    ]
    assert list(plan.active_indices()) == writers
    assert plan.count_patches(writers) == plan.costs.patches
    assert all(plan.is_active(index) == (index in writers) for index in plan.indices())
    if plan.grid.is_aligned:
        whole = case.plan(whole=True)
        of_whole = [
            index
            for index in whole.active_indices()
            if of_starts(list(whole.patches(whole.chunk(index)))) & needed
        ]
        assert writers == of_whole


@settings(max_examples=60)
@given(region_cases())
def test_blocks_cover_the_region_exactly_once_in_whole_storage_chunks(case: RegionCase) -> None:
    plan, region = case.plan(), case.region
    assert plan.region == region
    assert plan.output_shape[-plan.rank :] == region.shape
    count = np.zeros(region.shape, np.int64)
    for index in plan.indices():
        block = plan.chunk(index).block
        count[block.slices(region.start)] += 1
        for low, high, start, stop, size in zip(
            block.start, block.stop, region.start, region.stop, plan.storage_chunks, strict=True
        ):
            assert block.size == 0 or (low - start) % size == 0
            assert block.size == 0 or high == stop or (high - start) % size == 0
    assert (count == 1).all()


@pytest.mark.parametrize(
    ("roi", "is_aligned", "starts"),
    [
        ([[8, 40], [12, 40]], True, [(8, 12), (8, 24), (8, 36), (12, 12)]),
        ([[8, 40], [13, 40]], False, [(8, 13), (8, 25), (8, 37), (20, 13)]),
        ([[9, 40], [12, 40]], False, [(9, 12), (9, 24), (9, 36), (21, 12)]),
    ],
)
def test_blocks_start_with_the_region_if_one_axis_starts_between_storage_chunks(
    roi: list[list[int]], is_aligned: bool, starts: list[tuple[int, ...]]
) -> None:
    keys: dict[str, Any] = {"chunksize": [12, 12], "storage_chunks": [4, 4]}
    plan = plan_for((40, 40), (6, 6), roi=roi, **keys)
    blocks = [plan.chunk(index).block for index in plan.indices()]
    assert plan.grid.is_aligned is is_aligned
    assert [block.start for block in blocks if block.size][:4] == starts


@settings(max_examples=60)
@given(region_cases())
def test_pieces_that_are_sent_are_those_that_are_awaited(case: RegionCase) -> None:
    plan = case.plan()
    chunks = [plan.chunk(index) for index in plan.indices()]
    sent = [piece for chunk in chunks for piece in plan.outgoing_pieces(chunk)]
    awaited = [piece for chunk in chunks for piece in plan.incoming_pieces(chunk)]
    assert len(set(sent)) == len(sent)
    assert set(sent) == set(awaited)
    assert all(piece.box.size and piece.box in plan.region for piece in sent)
    finalized = list(plan.to_finalize())
    assert finalized == [chunk.index for chunk in chunks if chunk.has_band]
    assert {piece.target for piece in sent} <= set(finalized)
    assert [plan.has_band(chunk.index) for chunk in chunks] == [c.has_band for c in chunks]


@settings(max_examples=60)
@given(region_cases())
def test_costs_of_a_region_equal_the_sums_over_all_chunks(case: RegionCase) -> None:
    plan, costs = case.plan(), case.plan().costs
    chunks = [plan.chunk(index) for index in plan.indices()]
    active = [chunk for chunk in chunks if chunk.is_active]
    blocks = [chunk for chunk in chunks if chunk.block.size]
    assert costs.chunks == len(active)
    assert costs.blocks == len(blocks) == prod(plan.blocks)
    assert costs.patches == sum(chunk.patches for chunk in chunks)
    assert costs.finalized_blocks == sum(chunk.has_band for chunk in chunks)
    touched = [box for chunk in blocks for box in chunk.touched_boxes]
    assert costs.finalized_voxels == sum(box.size for box in touched)
    assert costs.output_bytes == prod(plan.output_shape) * plan.output_dtype.itemsize
    assert costs.input_bytes == sum(voxels_read(plan, chunk.halo) for chunk in active)
    sums = sum(p.box.size for chunk in chunks for p in plan.outgoing_pieces(chunk))
    sums += sum(b.size for c in active if c.has_band for b in c.band_boxes)
    rest = sum(box.size for chunk in blocks for box in chunk.rest_boxes)
    assert costs.piece_bytes == sums * 4 * plan.channels + rest * plan.output.voxel_bytes


def voxels_read(plan: Plan, halo: Box) -> int:
    """Return the voxels that a window reads; those that the padding repeats are counted once."""
    lengths = []
    for axis, low, high in zip(plan.axes, halo.start, halo.stop, strict=True):
        inside = source_indices(low, high, axis.volume, axis.pad_mode)
        inside = inside[inside >= 0]
        lengths.append(int(inside.max() - inside.min()) + 1)
    return prod(lengths) * plan.volume.voxel_bytes


@settings(max_examples=100)
@given(region_cases())
def test_a_chunk_reads_and_sums_what_its_patches_cover(case: RegionCase) -> None:
    plan = case.plan()
    for chunk in map(plan.chunk, plan.active_indices()):
        for patch in plan.patches(chunk):
            assert patch.source in chunk.halo
            assert patch.target in chunk.region
        assert chunk.block in chunk.region


@settings(max_examples=60)
@given(region_cases(max_rank=1), st.integers(1, 9))
def test_fetched_storage_chunks_are_those_in_the_windows_of_the_chunks(
    case: RegionCase, storage: int
) -> None:
    plan = RegionCase(case.whole, case.roi, batch=1).plan()
    read = []
    for chunk in map(plan.chunk, plan.active_indices()):
        axis = plan.axes[0]
        inside = source_indices(chunk.halo.start[0], chunk.halo.stop[0], axis.volume, axis.pad_mode)
        inside = inside[inside >= 0]
        read.append(set(range(inside.min() // storage, inside.max() // storage + 1)))
    fetches = axis_fetches(plan.axes[0], storage)
    assert fetches.fetched == sum(map(len, read))
    assert fetches.most == max(map(len, read))
    assert fetches.used == len(set().union(*read))


def test_the_chunks_of_a_large_region_are_those_of_the_whole_volume() -> None:
    keys: dict[str, Any] = {
        "inference_type": "sliding_window",
        "strides": [48, 48, 48],
        "model": {"max_batch_size": 4},
    }
    whole = plan_for((2000, 2000, 2000), (96, 96, 96), **keys)
    plan = plan_for((2000, 2000, 2000), (96, 96, 96), roi=[[0, 300], [-100, None], None], **keys)
    assert (plan.chunksize, plan.storage_chunks) == (whole.chunksize, whole.storage_chunks)
    assert plan.region == Box((0, 1900, 0), (300, 2000, 2000))


def test_costs_of_a_region_of_ten_million_chunks_are_counted_by_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys: dict[str, Any] = {
        "inference_type": "sliding_window",
        "strides": [16, 16, 16],
        "chunksize": [64, 64, 64],
        "storage_chunks": [32, 32, 32],
        "model": {"max_batch_size": 4},
    }
    plan = plan_for((64_000, 64_000, 64_000), (32, 32, 32), roi=[[32, 12_832]] * 3, **keys)

    def fail(*_: Any) -> None:
        raise AssertionError("a chunk was enumerated")

    monkeypatch.setattr(Plan, "chunk", fail)
    # Blocks 0 to 200 along each axis; patches from -16 + 32 to the one that starts at 12 816.
    assert plan.costs.chunks == plan.costs.blocks == 201**3
    assert plan.costs.patches >= 801**3


MESSAGES = [
    ([[0, 5]], "roi: "),
    ([[5, 5], None], "roi.0: [5, 5] is empty"),
    ([None, [7, 3]], "roi.1: [7, 3] stops before it starts"),
    ([None, [-3, 2]], "roi.1: [-3, 2] stops before it starts"),
    ([[0, 21], None], "roi.0: [0, 21] lies outside of axis 0"),
    ([[-21, 3], None], "roi.0: [-21, 3] lies outside of axis 0"),
    ([[30, 40], [0, 99]], "roi.0: [30, 40] lies outside of axis 0"),
    ([[0, 5], None, None], "roi: "),
]


@pytest.mark.parametrize(("roi", "start"), MESSAGES)
def test_a_region_outside_of_the_volume_is_refused_by_key(roi: Any, start: str) -> None:
    with pytest.raises(JobError) as error:
        plan_for((20, 30), (4, 4), roi=roi)
    assert error.value.problems[0].startswith(start)


@pytest.mark.parametrize(
    "roi",
    [
        "all",
        5,
        [],
        [0, 5],
        [[0, 5, 1], None],
        [[True, 5], None],
        [[0.0, 5.0], None],
        [["0", 5], None],
        {"z": [0, 5]},
        [[0, 1 << 41], None],
    ],
)
def test_values_that_are_no_region_are_refused(roi: Any) -> None:
    with pytest.raises(JobError) as error:
        plan_for((20, 30), (4, 4), roi=roi)
    [line] = error.value.problems
    assert line.startswith("roi: ")


def test_each_axis_outside_is_one_line() -> None:
    with pytest.raises(JobError) as error:
        plan_for((20, 30), (4, 4), roi=[[0, 99], [3, 3]])
    assert [line.partition(":")[0] for line in error.value.problems] == ["roi.0", "roi.1"]


def test_null_and_negative_bounds_count_from_the_ends() -> None:
    plan = plan_for((20, 30), (4, 4), roi=[[-5, None], [None, -10]])
    assert plan.region == Box((15, 0), (20, 20))


def test_voxels_without_a_prediction_are_refused_in_the_region_only() -> None:
    # Without padding, a valid network predicts no voxel of the border.
    keys: dict[str, Any] = {"model": {"model_output_shape": [4]}, "pad_width": [0]}
    with pytest.raises(JobError) as error:
        plan_for((32,), (8,), **keys)
    assert error.value.problems[0].startswith("pad_width: ")
    assert plan_for((32,), (8,), roi=[[2, 20]], **keys).costs.patches == 5
    with pytest.raises(JobError):
        plan_for((32,), (8,), roi=[[1, 20]], **keys)
    gaps: dict[str, Any] = {"inference_type": "sliding_window", "strides": [6]}
    assert plan_for((30,), (4,), roi=[[6, 10]], **gaps).costs.patches == 1
    for roi in ([5, 10], [6, 11], [4, 6]):
        with pytest.raises(JobError) as error:
            plan_for((30,), (4,), roi=[roi], **gaps)
        assert error.value.problems[0].startswith("strides: ")
