import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkq.errors import ErrorCode, JobError
from chunkq.geometry.box import Box
from tests import reference as ref
from tests.strategies import Case, cases, plan_for


def problems(
    volume: tuple[int, ...], patch: tuple[int, ...], dtype: str = "uint8", **more: Any
) -> list[str]:
    """Return the lines of the JobError that these values raise."""
    with pytest.raises(JobError) as error:
        plan_for(volume, patch, dtype, **more)
    assert error.value.code is ErrorCode.JOB_INVALID
    return list(error.value.problems)


def numbers_in(line: str) -> list[str]:
    return re.findall(r"-?\d+(?:\.\d+)?", line)


def assert_problem(line: str, key: str, *words: object) -> None:
    """Assert that a line starts with the key and contains these values as separate words."""
    assert line.startswith(f"{key}: "), line
    for word in words:
        assert re.search(rf"(?<![\w.-]){re.escape(str(word))}(?![\w]|\.\d)", line), (line, word)


SLIDING = {"inference_type": "sliding_window"}
CROP = {"inference_type": "crop_margin"}


@settings(max_examples=200)
@given(cases())
def test_valid_jobs_are_resolved_to_their_shapes(case: Case) -> None:
    plan = case.plan
    assert (plan.input_patch, plan.output_patch) == (case.patch, case.output)
    assert plan.channels == case.channels
    assert plan.chunksize == tuple(case.keys["chunksize"])
    assert plan.storage_chunks == tuple(case.keys["storage_chunks"])
    assert plan.margin == tuple(case.keys.get("margin", [0] * plan.rank))


@pytest.mark.parametrize("rank", [0, 5])
def test_a_volume_must_have_1_to_4_axes(rank: int) -> None:
    (line,) = problems((8,) * rank, (4,) * 4)
    assert_problem(line, "input", "/in.zarr", f"{rank} spatial axes", "1 to 4")


def test_a_volume_must_have_voxels() -> None:
    (line,) = problems((8, 0), (4, 4))
    assert_problem(line, "input", "/in.zarr", "shape [8, 0]")


def test_an_input_of_uint64_is_rejected() -> None:
    (line,) = problems((8, 8), (4, 4), "uint64")
    assert_problem(line, "input", "/in.zarr", "dtype uint64", "float32")


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "<U3", "datetime64[s]"])
def test_voxels_must_be_real_numbers(dtype: str) -> None:
    (line,) = problems((8, 8), (4, 4), dtype)
    assert_problem(line, "input", "/in.zarr")
    assert f"dtype {dtype};" in line


@pytest.mark.parametrize(
    ("dtype", "value", "limits"),
    [
        ("uint8", 256, (0, 255)),
        ("uint8", -1, (0, 255)),
        ("int8", 128, (-128, 127)),
        ("int16", 0.5, (-32768, 32767)),
        ("uint16", 65536, (0, 65535)),
        ("uint32", 2**32, (0, 2**32 - 1)),
        ("int32", float("inf"), (-(2**31), 2**31 - 1)),
        ("int32", float("nan"), (-(2**31), 2**31 - 1)),
        ("bool", 2, (0, 1)),
        ("bool", 0.5, (0, 1)),
    ],
)
def test_a_pad_value_that_the_dtype_cannot_hold_is_rejected_with_the_limits(
    dtype: str, value: float, limits: tuple[int, int]
) -> None:
    (line,) = problems((8, 8), (4, 4), dtype, pad_value=value)
    assert_problem(line, "pad_value", value, dtype, *limits)


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
def test_a_pad_value_that_the_dtype_can_hold_is_accepted(dtype: str, value: float) -> None:
    assert plan_for((8, 8), (4, 4), dtype, pad_value=value).volume.dtype == dtype


def test_a_pad_value_above_the_largest_float16_is_rejected() -> None:
    (line,) = problems((8, 8), (4, 4), "float16", pad_value=1e6)
    assert_problem(line, "pad_value", 1000000, "float16", -65504, 65504)


def test_every_list_without_one_entry_per_axis_is_reported() -> None:
    lines = problems(
        (8, 8),
        (4,),
        chunksize=[4],
        pad_width=[1, 1, 1],
        storage_chunks=[1],
        offsets=[[1, 1], [1]],
        model={"model_output_shape": [1, 1, 1, 4]},
    )
    parts = [line.partition(": ") for line in lines]
    assert [(key, numbers_in(text)) for key, _, text in parts] == [
        ("chunksize", ["1", "2", "8", "8"]),
        ("pad_width", ["3", "2", "8", "8"]),
        ("storage_chunks", ["1", "2", "8", "8"]),
        ("offsets.1", ["1", "2", "8", "8"]),
        ("model_config.model_input_shape", ["1", "2", "3", "8", "8"]),
        ("model_config.model_output_shape", ["4", "2", "3", "8", "8"]),
    ]


@pytest.mark.parametrize("key", [SLIDING | {"strides": [2]}, CROP | {"margin": [1, 1, 1]}])
def test_strides_and_margin_must_have_one_entry_per_axis(key: dict[str, Any]) -> None:
    name = "strides" if "strides" in key else "margin"
    (line,) = problems((8, 8), (4, 4), **key)
    assert_problem(line, name, f"{len(key[name])} entries", 2)


@pytest.mark.parametrize(
    ("model_input", "model_output", "expected"),
    [
        ((8, 8), [8, 8, 3], {"model_output_shape": [3, 8, 8]}),
        ((1, 8, 8), [8, 8, 3], {"model_output_shape": [3, 8, 8]}),
        ((8, 8, 1), [3, 8, 8], {"model_input_shape": [1, 8, 8]}),
        ((8, 8, 1), [8, 8, 3], {"model_input_shape": [1, 8, 8], "model_output_shape": [3, 8, 8]}),
    ],
)
def test_shapes_with_channels_last_are_reported_with_the_right_order(
    model_input: tuple[int, ...], model_output: list[int], expected: dict[str, list[int]]
) -> None:
    lines = problems((16, 16), model_input, model={"model_output_shape": model_output})
    for line, (key, shape) in zip(lines, expected.items(), strict=True):
        assert_problem(line, f"model_config.{key}")
        assert f"expected channels first, {shape};" in line


def test_a_valid_shape_that_looks_like_channels_last_is_accepted() -> None:
    plan = plan_for((16, 16), (8, 8), pad_width=[0, 2], model={"model_output_shape": [8, 8, 4]})
    assert (plan.channels, plan.output_patch) == (8, (8, 4))


KERAS = {"runtime": "tensorflow", "type": "file", "ts_file": None, "model_file": "m.keras"}
ONNX = {"runtime": "onnx", "type": "file", "ts_file": None, "model_file": "m.onnx"}


@pytest.mark.parametrize("runtime", [KERAS, ONNX])
@pytest.mark.parametrize(
    ("model_input", "model_output"),
    [((8, 8, 1), [6, 8, 3]), ((1, 8, 8), [3, 6, 8]), ((8, 8), [6, 8, 3]), ((8, 8), [3, 6, 8])],
)
def test_shapes_of_keras_and_onnx_networks_give_one_plan_in_either_order(
    runtime: dict[str, Any], model_input: tuple[int, ...], model_output: list[int]
) -> None:
    model = runtime | {"model_output_shape": model_output}
    plan = plan_for((16, 16), model_input, pad_width=[1, 0], model=model)
    assert (plan.input_patch, plan.output_patch, plan.channels) == ((8, 8), (6, 8), 3)
    assert plan.output_shape == (3, 16, 16)


def test_a_shape_that_can_be_read_in_both_orders_is_reported_with_those_to_set() -> None:
    (line,) = problems((16, 16), (1, 8, 1), model=KERAS)
    assert_problem(line, "model_config.model_input_shape")
    for shape in ([1, 8, 1], [8, 1], [1, 8]):
        assert str(shape) in line
    assert plan_for((16, 16), (8, 1), model=KERAS).input_patch == (8, 1)


def test_lost_dim_counts_the_entries_of_a_shape_with_channels_last() -> None:
    model = KERAS | {"model_output_shape": [1, 8, 8, 3], "lost_dim": 0}
    plan = plan_for((16, 16, 16), (5, 8, 8, 1), model=model)
    assert (plan.input_patch, plan.output_patch) == ((5, 8, 8), (1, 8, 8))
    (line,) = problems((16, 16, 16), (5, 8, 8, 1), model=model | {"lost_dim": 3})
    assert_problem(line, "model_config.lost_dim", 3, "0 to 2")


def test_one_input_channel_is_accepted_and_several_are_rejected() -> None:
    assert plan_for((8, 8), (1, 4, 4)).input_patch == (4, 4)
    (line,) = problems((8, 8), (3, 4, 4))
    assert_problem(line, "model_config.model_input_shape", "3 input channels", 1)


@pytest.mark.parametrize(
    ("output", "axis"), [([3, 4], 0), ([4, 5], 1), ([4, 6], 1), ([7, 4, 1], 1)]
)
def test_an_output_patch_must_fit_centered_in_the_input_patch(output: list[int], axis: int) -> None:
    (line,) = problems((8, 8), (4, 4), pad_width=[9, 9], model={"model_output_shape": output})
    size = output[-2:][axis]
    assert_problem(line, "model_config.model_output_shape", f"{size} along axis {axis}", 4)


@pytest.mark.parametrize("margin", [2, 3, 99])
def test_a_margin_must_leave_a_voxel_of_the_output_patch(margin: int) -> None:
    (line,) = problems((8, 8), (4, 4), margin=[0, margin], **CROP)
    assert_problem(line, "margin", f"{margin} along axis 1", 4, "at most 1")
    assert plan_for((8, 8), (4, 4), margin=[0, 1], **CROP).margin == (0, 1)


def test_a_chunk_must_be_at_least_as_large_as_the_output_patch() -> None:
    (line,) = problems((9, 9), (6, 6), chunksize=[5, 6])
    assert_problem(line, "chunksize", "5 along axis 0", "at least 6")
    assert plan_for((9, 9), (6, 6), chunksize=[6, 6]).blocks == (2, 2)


def test_a_chunk_need_not_be_larger_than_the_volume() -> None:
    (line,) = problems((5, 9), (6, 6), chunksize=[4, 6])
    assert_problem(line, "chunksize", "4 along axis 0", "at least 5")
    assert plan_for((5, 9), (6, 6), chunksize=[5, 6]).blocks == (1, 2)


def test_a_chunk_is_compared_with_the_output_patch_without_its_margin() -> None:
    keys: dict[str, Any] = CROP | {"margin": [1]}
    assert plan_for((9,), (6,), chunksize=[4], **keys).blocks == (3,)
    (line,) = problems((9,), (6,), chunksize=[3], **keys)
    assert_problem(line, "chunksize", "3 along axis 0", "at least 4")


def test_storage_chunks_must_divide_the_chunk() -> None:
    (line,) = problems((9, 9), (4, 4), chunksize=[6, 6], storage_chunks=[3, 4])
    assert_problem(line, "storage_chunks", "4 along axis 1", "divisor of 6")


def test_a_single_block_along_an_axis_may_end_inside_a_storage_chunk() -> None:
    assert plan_for((5, 9), (4, 4), chunksize=[6, 6], storage_chunks=[4, 3]).blocks == (1, 2)


@pytest.mark.parametrize(
    ("volume", "stride", "gap"),
    [  # patch 4
        (9, 5, 4),  # 0, then moved to 5
        (20, 6, 4),
        (13, 5, 4),
    ],
)
def test_strides_larger_than_the_patch_are_reported_with_axis_and_uncovered_voxel(
    volume: int, stride: int, gap: int
) -> None:
    (line,) = problems((9, volume), (4, 4), strides=[4, stride], **SLIDING)
    assert_problem(line, "strides", f"{stride} along axis 1", f"voxel {gap}", "at most 4")


def test_large_strides_are_reported_for_every_axis() -> None:
    first, second = problems((20, 20), (4, 4), strides=[5, 6], **SLIDING)
    assert_problem(first, "strides", "5 along axis 0")
    assert_problem(second, "strides", "6 along axis 1")


def test_large_strides_are_accepted_if_they_leave_no_gap() -> None:
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
def test_an_uncovered_border_is_reported_with_the_pad_width_that_covers_it(
    keys: dict[str, Any], voxel: int, cover: int
) -> None:
    # 18 voxels: the output patches end before the volume for every stride above.
    (line,) = problems((18,), (8,), **keys)
    assert_problem(line, "pad_width", f"voxel {voxel}", "axis 0", f"use {cover}")
    assert plan_for((18,), (8,), **keys | {"pad_width": [cover]}).costs.patches > 0


def test_offset_grids_may_cover_voxels_that_the_first_grid_does_not() -> None:
    # Output 4 of 8. Grid 0 covers [2, 18); grid 1 starts at -4 and covers [-2, 18).
    keys: dict[str, Any] = {"model": {"model_output_shape": [4]}}
    assert problems((18,), (8,), **keys)
    assert plan_for((18,), (8,), offsets=[[-4]], **keys).costs.patches > 0


def test_an_uncovered_high_end_is_rejected_if_an_offset_grid_covers_the_low_end() -> None:
    # Output 4 of 8: grid 0 covers [2, 14); grid 1 starts at -3 and covers [-1, 15).
    keys: dict[str, Any] = {"model": {"model_output_shape": [4]}, "offsets": [[-3]]}
    (line,) = problems((16,), (8,), **keys)
    assert_problem(line, "pad_width", "axis 0", "use 2")
    assert plan_for((16,), (8,), pad_width=[2], **keys).costs.patches > 0


def test_the_reported_voxel_is_uncovered_in_every_grid() -> None:
    (line,) = problems((16,), (8,), model={"model_output_shape": [4]}, offsets=[[-3]])
    assert_problem(line, "pad_width", "voxel 15")


@settings(max_examples=200)
@given(cases(max_rank=2), st.data())
def test_errors_about_uncovered_voxels_are_correct_and_their_fix_works(
    case: Case, data: st.DataObject
) -> None:
    pad = [data.draw(st.integers(0, 2)) for _ in case.volume]
    keys = case.keys | {"pad_width": pad}
    tight = Case(case.volume, case.patch, case.output, keys)
    if ref.covered(tight.setup).all():
        assert tight.plan.costs.patches == len(ref.patches(tight.setup))
        return
    lines = problems(case.volume, case.patch, **keys)
    assert all(line.startswith("pad_width: ") for line in lines)
    uncovered = np.argwhere(~ref.covered(tight.setup))
    for line in lines:
        voxel, axis, width = map(int, numbers_in(line))
        assert case.keys.get("offsets") or voxel in uncovered[:, axis]
        pad[axis] = width
    assert Case(case.volume, case.patch, case.output, keys | {"pad_width": pad}).plan.axes


@settings(max_examples=150)
@given(cases(max_rank=1), st.data())
def test_errors_about_large_strides_are_correct_and_their_fix_works(
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
        # Uncovered at the high end only: see the next test.
        return
    (line,) = problems(case.volume, case.patch, **keys)
    assert line.startswith("strides: ")
    _, _, _, voxel, largest = map(int, numbers_in(line))
    assert not covered[voxel]
    assert Case(case.volume, case.patch, case.output, keys | {"strides": [largest]}).plan.axes


def test_a_stride_that_steps_over_the_end_of_the_volume_is_reported() -> None:
    # Patches start at 0 and at 5, the end of the volume: voxel 4 is uncovered for any pad_width.
    (line,) = problems((5,), (4,), strides=[5], edge="pad", **SLIDING)
    assert_problem(line, "strides", "5 along axis 0", "voxel 4")


@pytest.mark.parametrize(
    ("chunk", "storage"),
    [
        (1024, 64),  # at most 64 in 3-D
        (1000, 50),
        (128, 32),  # a quarter
        (96, 24),
        (100, 25),
        (48, 16),  # at least 16 if that divides the chunk
        (8, 8),
        (1, 1),
        (61, 61),  # primes
        (521, 521),
    ],
)
def test_default_storage_chunks_divide_the_chunk_and_are_small(chunk: int, storage: int) -> None:
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
def test_only_weighted_averages_are_stored_with_channels(
    keys: dict[str, Any], dtype: str, shape: tuple[int, ...]
) -> None:
    plan = plan_for((8, 9), (4, 4), **keys)
    assert (plan.output_dtype, plan.output_shape) == (np.dtype(dtype), shape)
    assert plan.stored_channels == (shape[0] if len(shape) == 3 else 1)
    box = Box((2, 3), (4, 9))
    channels = Box.of_shape(shape[: len(shape) - 2])
    assert plan.output_box(box) == Box(channels.start + box.start, channels.stop + box.stop)


@pytest.mark.parametrize("combine", ["weighted_avg", "soft", "hard"])
@pytest.mark.parametrize("output", [None, [4, 4], [1, 4, 4]])
def test_softmax_of_one_channel_is_refused(output: list[int] | None, combine: str) -> None:
    keys = {"model": {"model_output_shape": output}} if output else {}
    (line,) = problems((8, 8), (4, 4), activation="softmax", combine=combine, **keys)
    assert_problem(line, "activation", "softmax", "sigmoid", "[CHANNELS, 4, 4]")


def test_softmax_of_several_channels_and_sigmoid_of_one_are_accepted() -> None:
    several = {"model_output_shape": [2, 4, 4]}
    assert plan_for((8, 8), (4, 4), activation="softmax", model=several).channels == 2
    assert plan_for((8, 8), (4, 4), activation="sigmoid").channels == 1


@pytest.mark.parametrize(
    ("volume", "hint"),
    [((3, 64, 64), "axes: cyx"), ((4, 20, 64, 64), "axes: czyx"), ((9, 64, 64), "set axes")],
)
def test_a_key_with_too_few_entries_has_a_hint_about_the_axes(
    volume: tuple[int, ...], hint: str
) -> None:
    (line,) = problems(volume, (4,) * len(volume), strides=[4, 4], **SLIDING)
    assert_problem(line, "strides", 2, len(volume))
    assert hint in line
    (line,) = problems(volume, (4,) * len(volume), strides=[4] * 5, **SLIDING)
    assert "axes" not in line
