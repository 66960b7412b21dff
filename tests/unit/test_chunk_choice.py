"""The chunks of a job whose file sets no `chunksize`."""

from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkq.plan.chunk_choice import MAX_CHUNK_BYTES, STORAGE_EDGE
from chunkq.plan.footprint import footprint
from tests.strategies import JobPlan, plan_for

VOLUMES = [
    (3,),
    (70_000,),
    (10**12,),
    (521, 97),
    (100_000, 3000),
    (64, 600, 600),
    (3000, 3000, 3000),
]


def sliding(volume: tuple[int, ...], patch: int | tuple[int, ...], **keys: Any) -> JobPlan:
    """Return the plan of half-overlapping patches."""
    shape = patch if isinstance(patch, tuple) else (patch,) * len(volume)
    keys.setdefault("strides", [max(1, n // 2) for n in shape])
    return plan_for(volume, shape, inference_type="sliding_window", **keys)


def patches_per_chunk(plan: JobPlan) -> list[int]:
    """Return the numbers of patches of all chunks that own any."""
    return [plan.chunk(index).patches for index in plan.active_indices()]


@pytest.mark.parametrize("volume", [*VOLUMES, (5, 70, 70, 70), (300, 90, 800, 800)])
@pytest.mark.parametrize("storage", [None, 5])
def test_the_default_chunk_size_is_valid_and_deterministic(
    volume: tuple[int, ...], storage: int | None
) -> None:
    patch = (16, 24, 8, 8)[: len(volume)]
    keys = {"storage_chunks": [storage] * len(volume)} if storage else {}
    plan = plan_for(volume, patch, "uint16", **keys)
    again = plan_for(volume, patch, "uint16", **keys)
    assert plan.axes == again.axes
    explicit = plan_for(
        volume,
        patch,
        "uint16",
        chunksize=list(plan.chunksize),
        storage_chunks=list(plan.storage_chunks),
    )
    assert explicit.axes == plan.axes
    assert all(c % s == 0 for c, s in zip(plan.chunksize, plan.storage_chunks, strict=True))


@settings(max_examples=50)
@given(st.data())
def test_any_volume_and_patch_have_valid_default_chunks(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 4))
    longest, widest = {1: (10**6, 80), 2: (3000, 80), 3: (700, 80), 4: (90, 24)}[rank]
    volume = tuple(data.draw(st.integers(1, longest)) for _ in range(rank))
    patch = tuple(data.draw(st.integers(1, widest)) for _ in range(rank))
    strides = [data.draw(st.integers(max(1, p // 3), p)) for p in patch]
    plan = sliding(volume, patch, strides=strides)  # raises JobError if they are invalid
    assert max(plan.storage_chunks) <= STORAGE_EDGE[rank]
    assert footprint(plan).computing <= MAX_CHUNK_BYTES
    assert footprint(plan).finalizing <= MAX_CHUNK_BYTES


@pytest.mark.parametrize("volume", [(3000,) * 3, (700, 3000, 3000)])
def test_large_volumes_have_the_largest_chunks_that_fit(volume: tuple[int, ...]) -> None:
    plan = plan_for(volume, (64, 64, 64), "uint16")
    assert MAX_CHUNK_BYTES / 8 < footprint(plan).computing <= MAX_CHUNK_BYTES
    assert plan.storage_chunks == (64, 64, 64)


@pytest.mark.parametrize(
    ("volume", "chunks"),
    [
        ((130, 130, 130), 8),
        ((192, 192, 192), 27),
        ((200, 200, 150), 18),
        ((200, 200, 200), 27),
        ((256, 256, 256), 32),
        ((512, 512, 512), 45),
        ((1024, 1024, 1024), 64),
    ],
)
def test_chunks_share_the_patches_evenly_and_hold_several_along_each_axis(
    volume: tuple[int, ...], chunks: int
) -> None:
    plan = sliding(volume, 64)
    patches = patches_per_chunk(plan)
    assert (plan.costs.chunks, len(patches)) == (chunks, chunks)
    assert sum(patches) == plan.costs.patches
    assert max(patches) >= 8  # two along each axis
    assert max(patches) <= 3 * plan.costs.patches / chunks


@pytest.mark.parametrize("edge", [64, 96, 100, 127])
def test_a_volume_of_less_than_two_patches_along_each_axis_is_one_block(edge: int) -> None:
    plan = sliding((edge,) * 3, 64)
    assert plan.blocks == (1, 1, 1)
    assert plan.costs.piece_bytes == plan.costs.finalized_blocks == 0


@pytest.mark.parametrize(
    ("volume", "patch"),
    [
        ((20, 512, 512), (1, 512, 512)),
        ((100, 512, 512), (1, 512, 512)),
        ((40, 1024, 1024), (8, 128, 128)),
        ((300, 300, 300), (80, 80, 80)),
        ((2048, 2048), (256, 256)),
        ((50_000,), (1000,)),
    ],
)
def test_stacks_and_anisotropic_volumes_are_shared_too(
    volume: tuple[int, ...], patch: tuple[int, ...]
) -> None:
    patches = patches_per_chunk(sliding(volume, patch))
    assert len(patches) >= 5
    assert max(patches) <= 2.2 * sum(patches) / len(patches)
    assert min(patches) >= 2


def test_few_patches_that_do_not_overlap_are_shared_in_chunks_of_several() -> None:
    plan = sliding((256, 256, 256), 64, strides=[64, 64, 64])
    assert patches_per_chunk(plan) == [4] * 16
    assert plan.costs.piece_bytes == 0


@pytest.mark.parametrize("edge", [4, 8, 10, 12])
def test_chunks_of_a_tiny_volume_have_more_than_one_patch(edge: int) -> None:
    plan = plan_for((edge, edge), (4, 4))
    patches = patches_per_chunk(plan)
    assert max(patches) >= min(2, plan.costs.patches)
    assert len(patches) >= plan.costs.patches / 4


def test_the_default_chunk_size_does_not_depend_on_the_dtype_of_the_input() -> None:
    shapes = {
        plan_for((900, 900, 900), (64, 64, 64), dtype).chunksize
        for dtype in ("uint8", "uint16", "float32", "float64")
    }
    assert len(shapes) == 1


def test_more_channels_make_smaller_chunks() -> None:
    one, many = (
        sliding((1024,) * 3, 64, model={"model_output_shape": [channels, 64, 64, 64]})
        for channels in (1, 50)
    )
    assert prod(many.chunksize) < prod(one.chunksize)
