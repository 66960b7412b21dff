from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkq.errors import JobError
from chunkq.footprint import footprint
from chunkq.resolve import CHUNK_BYTES, CHUNKS_WANTED
from tests import reference as ref
from tests.strategies import Case, cases, plan_for


def problems(
    volume: tuple[int, ...], patch: tuple[int, ...], dtype: str = "uint8", **more: Any
) -> list[str]:
    with pytest.raises(JobError) as caught:
        plan_for(volume, patch, dtype, **more)
    return list(caught.value.problems)


SLIDING = {"inference_type": "sliding_window"}
CROP = {"inference_type": "crop_margin"}


@settings(max_examples=200)
@given(cases())
def test_legal_jobs_are_resolved_to_their_shapes(case: Case) -> None:
    plan = case.plan
    assert (plan.input_patch, plan.output_patch) == (case.patch, case.output)
    assert plan.channels == case.channels
    assert plan.chunksize == tuple(case.keys["chunksize"])
    assert plan.storage_chunks == tuple(case.keys["storage_chunks"])
    assert plan.margin == tuple(case.keys.get("margin", [0] * plan.rank))


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_is_1_to_4(rank: int) -> None:
    (line,) = problems((8,) * rank, (4,) * 4)
    assert line == f"input: /in.zarr has {rank} axes; 1 to 4 spatial axes can be processed"


def test_a_volume_has_voxels() -> None:
    assert problems((8, 0), (4, 4)) == ["input: /in.zarr has shape [8, 0], so no voxel"]


def test_uint64_which_no_network_takes_is_refused() -> None:
    assert problems((8, 8), (4, 4), "uint64") == [
        "input: /in.zarr holds uint64, which networks cannot take; convert it"
    ]


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "<U3", "datetime64[s]"])
def test_voxels_are_real_numbers(dtype: str) -> None:
    assert problems((8, 8), (4, 4), dtype) == [
        f"input: /in.zarr holds {dtype}; real numbers are needed"
    ]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("uint8", 256),
        ("uint8", -1),
        ("int8", 128),
        ("int16", 0.5),
        ("uint16", 65536),
        ("uint32", 2**32),
        ("int32", float("inf")),
        ("int32", float("nan")),
        ("bool", 2),
        ("bool", 0.5),
    ],
)
def test_a_pad_value_that_the_dtype_cannot_hold_is_refused(dtype: str, value: float) -> None:
    assert problems((8, 8), (4, 4), dtype, pad_value=value) == [
        f"pad_value: {value} cannot be held by the input's dtype {dtype}"
    ]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("uint8", 255),
        ("uint8", 3.0),
        ("int8", -128),
        ("uint32", 2**32 - 1),
        ("bool", 1),
        ("float32", -0.1),
        ("float16", 65504),
        ("float64", float("nan")),
    ],
)
def test_a_pad_value_that_the_dtype_can_hold_is_taken(dtype: str, value: float) -> None:
    assert plan_for((8, 8), (4, 4), dtype, pad_value=value).volume.dtype == dtype


def test_a_pad_value_past_the_largest_float16_is_refused() -> None:
    assert problems((8, 8), (4, 4), "float16", pad_value=1e6) == [
        "pad_value: 1000000 cannot be held by the input's dtype float16"
    ]


def test_lists_have_one_entry_per_axis_and_all_wrong_ones_are_named() -> None:
    assert problems(
        (8, 8),
        (4,),
        chunksize=[4],
        pad_width=[1, 1, 1],
        storage_chunks=[1],
        offsets=[[1, 1], [1]],
        model={"model_output_shape": [1, 1, 1, 4]},
    ) == [
        "chunksize: has 1 entries, the input has 2 axes",
        "pad_width: has 3 entries, the input has 2 axes",
        "storage_chunks: has 1 entries, the input has 2 axes",
        "offsets.1: has 1 entries, the input has 2 axes",
        "model_config.model_input_shape: has 1 entries, the input has 2 axes; "
        "give 2, or 3 with the channels first",
        "model_config.model_output_shape: has 4 entries, the input has 2 axes; "
        "give 2, or 3 with the channels first",
    ]


@pytest.mark.parametrize("key", [SLIDING | {"strides": [2]}, CROP | {"margin": [1, 1, 1]}])
def test_strides_and_margin_have_one_entry_per_axis(key: dict[str, Any]) -> None:
    name = "strides" if "strides" in key else "margin"
    (line,) = problems((8, 8), (4, 4), **key)
    assert line == f"{name}: has {len(key[name])} entries, the input has 2 axes"


def test_one_input_channel_may_be_spelt_out_and_more_are_refused() -> None:
    assert plan_for((8, 8), (1, 4, 4)).input_patch == (4, 4)
    assert problems((8, 8), (3, 4, 4)) == [
        "model_config.model_input_shape: 3 input channels are not in this version; the first of "
        "the extra entries must be 1"
    ]


@pytest.mark.parametrize(
    ("output", "axis"), [([3, 4], 0), ([4, 5], 1), ([4, 6], 1), ([7, 4, 1], 1)]
)
def test_an_output_patch_must_have_a_centred_place(output: list[int], axis: int) -> None:
    found = problems((8, 8), (4, 4), pad_width=[9, 9], model={"model_output_shape": output})
    assert found == [
        f"model_config.model_output_shape: {output[-2:][axis]} along axis {axis} cannot be "
        "centered in the input's 4; the difference must be even and not negative"
    ]


@pytest.mark.parametrize("margin", [2, 3, 99])
def test_a_margin_must_leave_something(margin: int) -> None:
    assert problems((8, 8), (4, 4), margin=[0, margin], **CROP) == [
        f"margin: {margin} on both sides leaves nothing of the output patch's 4 voxels along axis 1"
    ]


def test_a_chunk_is_at_least_an_output_patch_wide() -> None:
    assert problems((9, 9), (6, 6), chunksize=[5, 6]) == [
        "chunksize: 5 along axis 0 is smaller than the output patch's 6 voxels; make it at least 6"
    ]
    assert plan_for((9, 9), (6, 6), chunksize=[6, 6]).blocks == (2, 2)


def test_a_chunk_need_be_no_wider_than_the_volume() -> None:
    assert problems((5, 9), (6, 6), chunksize=[4, 6])[0].endswith("make it at least 5")
    assert plan_for((5, 9), (6, 6), chunksize=[5, 6]).blocks == (1, 2)


def test_a_chunk_holds_only_what_the_margin_leaves() -> None:
    keys: dict[str, Any] = CROP | {"margin": [1]}
    assert plan_for((9,), (6,), chunksize=[4], **keys).blocks == (3,)
    assert problems((9,), (6,), chunksize=[3], **keys) == [
        "chunksize: 3 along axis 0 is smaller than the output patch's 4 voxels; make it at least 4"
    ]


def test_storage_chunks_divide_the_chunk() -> None:
    assert problems((9, 9), (4, 4), chunksize=[6, 6], storage_chunks=[3, 4]) == [
        "storage_chunks: 4 along axis 1 does not divide the chunk's 6; "
        "a chunk must be a whole number of storage chunks"
    ]


def test_the_only_block_along_an_axis_may_end_inside_a_storage_chunk() -> None:
    assert plan_for((5, 9), (4, 4), chunksize=[6, 6], storage_chunks=[4, 3]).blocks == (1, 2)


@pytest.mark.parametrize(
    ("volume", "stride", "gap"),
    [  # patch 4
        (9, 5, 4),  # 0, then moved to 5
        (20, 6, 4),
        (13, 5, 4),
    ],
)
def test_strides_wider_than_the_patch_name_the_axis_and_a_voxel(
    volume: int, stride: int, gap: int
) -> None:
    assert problems((9, volume), (4, 4), strides=[4, stride], **SLIDING) == [
        f"strides: {stride} along axis 1 is wider than the 4 voxels an output patch speaks for, "
        f"so voxel {gap} is never predicted; make it at most 4"
    ]


def test_wide_strides_along_two_axes_are_both_named() -> None:
    found = problems((20, 20), (4, 4), strides=[5, 6], **SLIDING)
    assert [line.partition(" is wider")[0] for line in found] == [
        "strides: 5 along axis 0",
        "strides: 6 along axis 1",
    ]


def test_wide_strides_are_taken_where_the_volume_leaves_no_gap() -> None:
    # 0, then moved back to 8 - 4 = 4: each voxel once.
    assert plan_for((8,), (4,), strides=[7], **SLIDING).costs.patches == 2


@pytest.mark.parametrize(
    ("keys", "voxel", "cover"),
    [
        ({"model": {"model_output_shape": [4]}}, 0, 2),
        ({"model": {"model_output_shape": [4]}, "pad_width": [1]}, 0, 2),
        (CROP | {"margin": [1], "pad_width": [0]}, 0, 1),
        (
            CROP | {"margin": [1], "model": {"model_output_shape": [6]}, "pad_width": [1]},
            0,
            2,
        ),
        (SLIDING | {"strides": [2], "model": {"model_output_shape": [6]}}, 0, 1),
    ],
)
def test_an_uncovered_border_names_the_pad_width_that_covers_it(
    keys: dict[str, Any], voxel: int, cover: int
) -> None:
    # 18 voxels: the output ends before the volume does, whatever the stride above.
    assert problems((18,), (8,), **keys) == [
        f"pad_width: along axis 0 voxel {voxel} lies in no output patch; "
        f"{cover} there would cover it"
    ]
    assert plan_for((18,), (8,), **keys | {"pad_width": [cover]}).blocks == (1,)


def test_offset_grids_may_cover_what_the_first_leaves_open() -> None:
    # Output 4 of 8. Grid 0 speaks for [2, 18), grid 1, from -4 on, for [-2, 18).
    keys: dict[str, Any] = {"model": {"model_output_shape": [4]}}
    assert problems((18,), (8,), **keys)
    assert plan_for((18,), (8,), offsets=[[-4]], **keys).blocks == (1,)


def test_an_open_high_end_is_refused_though_an_offset_grid_covers_the_low_end() -> None:
    # Output 4 of 8: grid 0 speaks for [2, 14), grid 1, from -3 on, for [-1, 15).
    keys: dict[str, Any] = {"model": {"model_output_shape": [4]}, "offsets": [[-3]]}
    (line,) = problems((16,), (8,), **keys)
    assert line.endswith("; 2 there would cover it")
    assert plan_for((16,), (8,), pad_width=[2], **keys).blocks == (1,)


def test_the_open_voxel_named_is_open_in_every_grid() -> None:
    (line,) = problems((16,), (8,), model={"model_output_shape": [4]}, offsets=[[-3]])
    assert "voxel 15 " in line


@settings(max_examples=200)
@given(cases(max_rank=2), st.data())
def test_refusals_for_open_voxels_are_right_and_their_remedy_works(
    case: Case, data: st.DataObject
) -> None:
    pad = [data.draw(st.integers(0, 2)) for _ in case.volume]
    keys = case.keys | {"pad_width": pad}
    tight = Case(case.volume, case.patch, case.output, keys)
    if ref.covered(tight.setup).all():
        assert tight.plan.costs.patches == len(ref.patches(tight.setup))
        return
    found = problems(case.volume, case.patch, **keys)
    assert all(line.startswith("pad_width: along axis ") for line in found)
    uncovered = np.argwhere(~ref.covered(tight.setup))
    for line in found:
        words = line.split()
        axis, voxel = int(words[3]), int(words[5])
        assert case.keys.get("offsets") or voxel in uncovered[:, axis]
        pad[axis] = int(words[words.index("there") - 1])
    assert Case(case.volume, case.patch, case.output, keys | {"pad_width": pad}).plan.axes


@settings(max_examples=150)
@given(cases(max_rank=1), st.data())
def test_refusals_for_wide_strides_are_right_and_their_remedy_works(
    case: Case, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, case.output[0] + 3))
    keys = {k: v for k, v in case.keys.items() if k not in ("offsets", "margin", "chunksize")}
    keys |= SLIDING | {"strides": [stride], "storage_chunks": [1]}
    keys["pad_width"] = [(case.patch[0] - case.output[0]) // 2]
    wide = Case(case.volume, case.patch, case.output, keys)
    covered = ref.covered(wide.setup)
    if covered.all():
        assert wide.plan.costs.patches == len(ref.patches(wide.setup))
        return
    if np.flatnonzero(covered)[-1] + 1 == covered.sum():
        # Open at the high end only: see the next test.
        return
    (line,) = problems(case.volume, case.patch, **keys)
    words = line.replace(",", "").split()
    assert words[0] == "strides:"
    assert not covered[int(words[words.index("voxel") + 1])]
    repaired = Case(case.volume, case.patch, case.output, keys | {"strides": [int(words[-1])]})
    assert repaired.plan.axes


def test_a_stride_that_steps_over_the_end_of_the_volume_is_named() -> None:
    # Patches start at 0 and 5, where 5 voxels end: voxel 4 is open, whatever the pad_width.
    (line,) = problems((5,), (4,), strides=[5], edge="pad", **SLIDING)
    assert line.startswith("strides: 5 along axis 0 ")


VOLUMES = [(3,), (70_000,), (521, 97), (100_000, 3000), (64, 600, 600), (3000, 3000, 3000)]


@pytest.mark.parametrize("volume", [*VOLUMES, (5, 70, 70, 70), (300, 90, 800, 800)])
@pytest.mark.parametrize("storage", [None, 5])
def test_a_chunk_size_left_out_is_chosen_legal_and_the_same_every_time(
    volume: tuple[int, ...], storage: int | None
) -> None:
    patch = (16, 24, 8, 8)[: len(volume)]
    keys = {"storage_chunks": [storage] * len(volume)} if storage else {}
    plan = plan_for(volume, patch, "uint16", **keys)
    again = plan_for(volume, patch, "uint16", **keys)
    assert plan.axes == again.axes
    given = plan_for(
        volume,
        patch,
        "uint16",
        chunksize=list(plan.chunksize),
        storage_chunks=list(plan.storage_chunks),
    )
    assert given.axes == plan.axes
    assert all(c % s == 0 for c, s in zip(plan.chunksize, plan.storage_chunks, strict=True))


def test_a_chosen_chunk_fits_in_memory_and_leaves_enough_to_share() -> None:
    plan = plan_for((3000, 3000, 3000), (64, 64, 64), "uint16")
    assert plan.costs.chunks >= CHUNKS_WANTED
    assert CHUNK_BYTES / 8 < footprint(plan).computing <= CHUNK_BYTES


@pytest.mark.parametrize(
    ("chunk", "storage"),
    [
        (1024, 64),  # never more than 64 in 3-D
        (1000, 50),
        (128, 32),  # a quarter
        (96, 24),
        (100, 25),
        (48, 16),  # never less than 16 where that divides
        (8, 8),
        (1, 1),
        (61, 61),  # primes
        (521, 521),
    ],
)
def test_storage_chunks_left_out_divide_the_chunk_and_are_small_beside_it(
    chunk: int, storage: int
) -> None:
    plan = plan_for((5000, 9, 9), (1, 1, 1), chunksize=[chunk, 9, 9])
    assert plan.storage_chunks[0] == storage
    assert chunk % plan.storage_chunks[0] == 0


@pytest.mark.parametrize(
    ("keys", "dtype", "shape"),
    [
        ({"model": {"model_output_shape": [3, 4, 4]}}, "float32", (3, 8, 9)),
        ({}, "float32", (8, 9)),
        ({"model": {"model_output_shape": [1, 4, 4]}}, "float32", (1, 8, 9)),
        ({"output_dtype": "float16"}, "float16", (8, 9)),
        ({"combine": "soft"}, "uint8", (8, 9)),
        ({"combine": "soft", "model": {"model_output_shape": [256, 4, 4]}}, "uint8", (8, 9)),
        ({"combine": "hard", "model": {"model_output_shape": [257, 4, 4]}}, "uint16", (8, 9)),
    ],
)
def test_the_output_has_channels_where_averages_are_stored(
    keys: dict[str, Any], dtype: str, shape: tuple[int, ...]
) -> None:
    plan = plan_for((8, 9), (4, 4), **keys)
    assert (plan.output_dtype, plan.output_shape) == (np.dtype(dtype), shape)
    assert plan.stored_channels == (shape[0] if len(shape) == 3 else 1)
