"""Compare chunks, pieces and finalizing, in memory, with the reference on the whole volume."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkq.blend import sums as blend
from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.sums import OwnBlock, finalize_sums
from chunkq.blend.weights import ArrayWeights
from chunkq.geometry.box import Box
from tests import reference as ref
from tests.harness.memory_run import Array, ToDevice, in_numpy, in_torch, infer, run
from tests.strategies import (
    BUILT_INS,
    PAD_MODES,
    Case,
    JobPlan,
    cases,
    plan_for,
    user_weights,
    without_margin,
)


def assert_as_reference(
    plan: JobPlan, out: Array, expected: ref.Reference, tolerance: float = 1e-5
) -> None:
    if plan.job.combine == "weighted_avg":
        scale = max(1.0, float(np.abs(expected.average).max()))
        assert np.abs(out.reshape(expected.average.shape) - expected.average).max() < (
            tolerance * scale
        )
    else:
        is_clear = expected.margin_of_decision > tolerance
        assert np.array_equal(out[is_clear], expected.labels[is_clear])


def check_case(
    case: Case, name: str, weight: str, seed: int, to_device: ToDevice = in_numpy
) -> None:
    """Assert that a job with the toy network `name` gives the output of the reference."""
    plan = case.plan if weight == "user" else with_weights(case, weight).plan
    volume = np.random.default_rng(seed).integers(0, 6, case.volume).astype(np.uint8)
    predict = ref.predictor(name, case.channels, case.output)
    expected = ref.reference(
        case.setup,
        volume,
        predict,
        case.keys["combine"],
        user_weights if weight == "user" else weight,
        activation=case.keys["activation"],
    )
    weights = ArrayWeights(without_margin(user_weights(case.output), plan.margin))
    out = run(plan, volume, predict, weights if weight == "user" else None, to_device)
    assert_as_reference(plan, out, expected)


def with_weights(case: Case, weight: str) -> Case:
    keys = case.keys | {"weight_function": [weight]}
    return Case(case.volume, case.patch, case.output, keys)


NETWORKS = st.sampled_from(sorted(ref.NETWORKS))
SEEDS = st.integers(0, 99)


@settings(max_examples=300)
@given(cases(), NETWORKS, st.sampled_from((*BUILT_INS, "user")), SEEDS)
def test_any_job_equals_the_reference_in_numpy(
    case: Case, network: str, weight: str, seed: int
) -> None:
    check_case(case, network, weight, seed)


@settings(max_examples=60)
@given(cases(max_rank=3), NETWORKS, st.sampled_from(BUILT_INS), SEEDS)
def test_any_job_equals_the_reference_in_torch(
    case: Case, network: str, weight: str, seed: int
) -> None:
    check_case(case, network, weight, seed, in_torch)


@pytest.mark.parametrize("weight", [*BUILT_INS, "user"])
@pytest.mark.parametrize("combine", ["weighted_avg", "soft", "hard"])
@pytest.mark.parametrize("chunk", [(8, 8), (9, 16), (16, 11), (40, 40)])
def test_every_weight_and_combine_equals_the_reference_for_several_chunk_sizes(
    weight: str, combine: str, chunk: tuple[int, int]
) -> None:
    model = {"model_input_shape": [10, 8], "model_output_shape": [3, 8, 8]}
    keys = {
        "inference_type": "sliding_window",
        "strides": [3, 5],
        "pad_width": [1, 0],
        "pad_mode": "reflect",
        "chunksize": list(chunk),
        "storage_chunks": [1, 1],
        "combine": combine,
        "activation": "softmax",
        "model": model,
    }
    check_case(Case((23, 31), (10, 8), (8, 8), keys), "position_dependent", weight, 1)


def constant(value: float, shape: tuple[int, ...]) -> ref.Predict:
    return lambda _x, _start: np.full((1, *shape), value)


def by_start(values: dict[int, float], length: int) -> ref.Predict:
    """Return a 1-D network whose prediction for a patch is the value of its start."""
    return lambda _x, start: np.full((1, length), values[start[0]])


def sliding(
    volume: tuple[int, ...], patch: tuple[int, ...], strides: list[int], **more: Any
) -> JobPlan:
    return plan_for(volume, patch, inference_type="sliding_window", strides=strides, **more)


# Known failures of other tools.


@pytest.mark.parametrize("weight", BUILT_INS)
def test_sums_of_large_predictions_do_not_overflow_with_a_float16_output(weight: str) -> None:
    # Eight patches cover a voxel: their sum exceeds 65504, their average does not.
    plan = sliding((20,), (8,), [1], output_dtype="float16", weight_function=[weight])
    out = run(plan, np.zeros(20, np.uint8), constant(60000.0, (8,)))
    assert (out == np.float16(60000)).all()


def test_predictions_near_the_largest_float32_stay_finite() -> None:
    plan = sliding((20,), (8,), [1], chunksize=[8], weight_function=["weight_gaussian"])
    out = run(plan, np.zeros(20, np.uint8), constant(3e38, (8,)))
    assert out == pytest.approx(np.full(20, 3e38), rel=1e-6)


@pytest.mark.parametrize("weight", BUILT_INS)
@pytest.mark.parametrize(("size", "stride"), [(16, 16), (24, 8), (27, 8)])
def test_normalization_is_exact_in_the_corners(weight: str, size: int, stride: int) -> None:
    # The corner of the gaussian is exp(-21) = 8e-10: an epsilon of 1e-8 would leave 7 %.
    plan = sliding((size,) * 3, (16,) * 3, [stride] * 3, weight_function=[weight])
    out = run(plan, np.zeros((size,) * 3, np.uint8), constant(1.0, (16,) * 3))
    assert np.abs(out - 1).max() < 1e-6


def test_the_bump_weights_are_a_product_of_their_profiles_also_in_the_corners() -> None:
    # The 3-D product is about exp(-54) in the corners; a lower limit would make it constant there.
    plan = sliding((48, 36, 36), (36, 36, 36), [12, 36, 36], weight_function=["weight_bump"])
    setup = ref.sliding_window((48, 36, 36), (36, 36, 36), (12, 36, 36))

    def predict(_x: ref.F64, start: ref.Shape) -> ref.F64:
        return np.full((1, 36, 36, 36), float(start[0]))

    volume = np.zeros((48, 36, 36), np.uint8)
    out = run(plan, volume, predict)
    expected = ref.reference(setup, volume, predict, weight="weight_bump")
    assert_as_reference(plan, out, expected)
    center_line = out[:, 18, 18]
    assert np.abs(out - center_line[:, np.newaxis, np.newaxis]).max() < 1e-4


@pytest.mark.parametrize("to_device", [in_numpy, in_torch])
@pytest.mark.parametrize("chunk", [300, 420, 599])
def test_more_than_255_votes_are_counted(to_device: ToDevice, chunk: int) -> None:
    # 300 patches cover voxel 299. 256 of them vote for class 0, which is 0 in eight bits.
    plan = sliding(
        (599,),
        (300,),
        [1],
        combine="hard",
        chunksize=[chunk],
        model={"model_output_shape": [2, 300]},
    )

    def predict(_x: ref.F64, start: ref.Shape) -> ref.F64:
        first = start[0] < 256
        return np.repeat([[float(first)], [float(not first)]], 300, axis=1)

    out = run(plan, np.zeros(599, np.uint8), predict, to_device=to_device)
    # Patches v - 299 to v cover voxel v; the votes are tied at v = 511 only, which is not compared.
    assert out[299] == 0
    assert np.array_equal(out[:511], np.zeros(511))
    assert np.array_equal(out[512:], np.ones(87))


def test_labels_above_255_are_stored() -> None:
    plan = plan_for((4,), (2,), combine="soft", model={"model_output_shape": [300, 2]})

    def predict(_x: ref.F64, start: ref.Shape) -> ref.F64:
        return np.repeat((np.arange(300) == (299 if start[0] else 256))[:, np.newaxis], 2, axis=1)

    out = run(plan, np.zeros(4, np.uint8), predict)
    assert (out.tolist(), out.dtype) == ([256, 256, 299, 299], np.dtype(np.uint16))


@pytest.mark.parametrize("weight", BUILT_INS)
@pytest.mark.parametrize("length", [9, 20])
def test_border_voxels_keep_their_value_under_small_weights(weight: str, length: int) -> None:
    # A single patch covers the first and the last voxel, with its smallest weight.
    plan = sliding((length,), (9,), [4], weight_function=[weight])
    volume = np.arange(length, dtype=np.uint8) + 1
    out = run(plan, volume, lambda x, _start: x[np.newaxis])
    assert out == pytest.approx(volume, rel=1e-6)
    assert (out[0], out[-1]) == (1.0, float(length))


@pytest.mark.parametrize("chunk", [4, 5, 8, 11])
@pytest.mark.parametrize(
    ("weight", "shares"),
    [
        ("weight_uniform", [1 / 2, 1 / 2]),
        # Voxel 7 is index 3 of the patch at 4 and index 1 of the patch at 6: weights 1 and 2.
        ("weight_linear", [2 / 3, 1 / 3]),
    ],
)
def test_a_shifted_last_patch_is_weighted_at_its_shifted_position(
    weight: str, shares: list[float], chunk: int
) -> None:
    # Starts 0, 4, and 6 = 10 - 4 instead of 8. Two patches cover voxels 6 and 7, at their
    # indices 2, 3 and 0, 1.
    plan = sliding((10,), (4,), [4], weight_function=[weight], chunksize=[chunk])
    out = run(plan, np.zeros(10, np.uint8), by_start({0: 0.0, 4: 0.0, 6: 1.0}, 4))
    assert out == pytest.approx([0] * 6 + [1 - shares[0], 1 - shares[1], 1, 1], abs=1e-6)


@pytest.mark.parametrize("mode", PAD_MODES)
@pytest.mark.parametrize("edge", ["pad", "shift"])
@pytest.mark.parametrize(
    ("volume", "patch", "strides", "pad"),
    [
        ((3,), (4,), (2,), (9,)),
        ((1,), (4,), (3,), (7,)),
        ((2, 5), (4, 3), (3, 2), (7, 1)),
        ((4, 1, 2), (3, 3, 3), (2, 1, 3), (0, 8, 5)),
    ],
)
def test_pads_wider_than_the_axis_equal_the_reference(
    volume: ref.Shape,
    patch: ref.Shape,
    strides: ref.Shape,
    pad: ref.Shape,
    mode: Literal["constant", "reflect", "symmetric", "edge"],
    edge: Literal["pad", "shift"],
) -> None:
    voxels = np.random.default_rng(3).integers(1, 6, volume).astype(np.uint8)
    options: dict[str, Any] = {"pad_mode": mode, "pad_value": 2, "edge": edge}
    plan = sliding(
        volume,
        patch,
        list(strides),
        pad_width=list(pad),
        weight_function=["weight_linear"],
        **options,
    )
    predict = ref.predictor("box_blur", 1, patch)
    setup = ref.sliding_window(volume, patch, strides, pad_width=pad, **options)
    expected = ref.reference(setup, voxels, predict, weight="weight_linear")
    assert_as_reference(plan, run(plan, voxels, predict), expected)


@pytest.mark.parametrize("weight", ["weight_linear", "weight_gaussian", "user"])
def test_a_margin_crops_the_weights_of_the_output_patch(weight: str) -> None:
    # Cropped patches overlap only where the last one is moved back.
    keys = {
        "inference_type": "crop_margin",
        "margin": [2, 1],
        "edge": "shift",
        "chunksize": [5, 6],
        "storage_chunks": [5, 2],
        "model": {"model_input_shape": [9, 6], "model_output_shape": [9, 6]},
        "combine": "weighted_avg",
        "activation": "none",
    }
    check_case(Case((17, 14), (9, 6), (9, 6), keys), "position_dependent", weight, 2)


# Values computed by hand, and special cases.


@pytest.mark.parametrize("chunk", [2, 3, 4, 6])
def test_a_grid_with_a_negative_offset_gives_values_computed_by_hand(chunk: int) -> None:
    # Patches of 2: grid 0 at 0, 2, 4; grid 1 at -1, 1, 3, 5. Each voxel is the mean of two.
    plan = plan_for((6,), (2,), offsets=[[-1]], chunksize=[chunk])
    values = {0: 0.0, 2: 2.0, 4: 4.0, -1: 10.0, 1: 20.0, 3: 30.0, 5: 40.0}
    out = run(plan, np.zeros(6, np.uint8), by_start(values, 2))
    assert out == pytest.approx([5, 10, 11, 16, 17, 22], rel=1e-6)


@pytest.mark.parametrize("chunk", [2, 3, 6])
def test_an_offset_grid_covers_borders_that_the_first_grid_does_not_cover(chunk: int) -> None:
    # Output 2 of 4: grid 0 covers voxels 1 to 4; grid 1 starts at -1, 1, 3 and covers 0 to 5.
    plan = plan_for(
        (6,), (4,), offsets=[[-1]], chunksize=[chunk], model={"model_output_shape": [2]}
    )
    values = {0: 0.0, 2: 2.0, -1: 10.0, 1: 20.0, 3: 30.0}
    out = run(plan, np.zeros(6, np.uint8), by_start(values, 2))
    assert out == pytest.approx([10, 5, 10, 11, 16, 30], rel=1e-6)


def test_a_block_without_patches_is_finalized_from_pieces_of_its_neighbors() -> None:
    plan = sliding((9,), (4,), [4], chunksize=[8], storage_chunks=[1])
    assert not plan.chunk((1,)).is_active
    out = run(plan, np.zeros(9, np.uint8), by_start({0: 1.0, 4: 2.0, 5: 4.0}, 4))
    assert out == pytest.approx([1, 1, 1, 1, 2, 3, 3, 3, 4], rel=1e-6)


@pytest.mark.parametrize("combine", ["soft", "hard"])
def test_a_tie_gives_the_lowest_class_also_between_blocks(combine: str) -> None:
    plan = sliding(
        (12,), (6,), [3], combine=combine, chunksize=[6], model={"model_output_shape": [3, 6]}
    )

    def tied(_x: ref.F64, _start: ref.Shape) -> ref.F64:
        return np.repeat([[-1.0], [0.7], [0.7]], 6, axis=1)

    assert run(plan, np.zeros(12, np.uint8), tied).tolist() == [1] * 12


@pytest.mark.parametrize("combine", ["soft", "hard"])
def test_a_single_channel_is_foreground_from_exactly_one_half(combine: str) -> None:
    # Blocks [0, 4) and [4, 6); both patches cover voxels 2 and 3.
    plan = sliding((6,), (4,), [2], combine=combine, chunksize=[4])
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    out = run(plan, np.zeros(6, np.uint8), by_start({0: 0.5, 2: below}, 4))
    assert out[[0, 1, 4, 5]].tolist() == [1, 1, 0, 0]
    if combine == "hard":
        # One of two votes is a half.
        assert out[[2, 3]].tolist() == [1, 1]


def test_finalizing_again_gives_the_same_bytes_in_any_order_of_pieces() -> None:
    plan = sliding((12, 12), (6, 6), [2, 3], chunksize=[6, 6], storage_chunks=[3, 2])
    volume = np.random.default_rng(0).integers(0, 6, (12, 12)).astype(np.uint8)
    predict = ref.predictor("position_dependent", 1, (6, 6))
    cache = PatchWeights(plan, plan.blend_weights(), in_numpy)
    results = {i: infer(plan, i, cache, volume, predict, in_numpy) for i in plan.indices()}
    chunk, own_block = plan.chunk((1, 1)), results[1, 1].own_block
    incoming = [
        (piece, sums)
        for result in results.values()
        for piece, sums in result.pieces
        if piece.target == (1, 1)
    ]
    assert len(incoming) == 3
    outputs = [
        [(box, values.tobytes()) for box, values in finalize_sums(plan, chunk, own_block, pieces)]
        for pieces in (dict(incoming), dict(reversed(incoming)), dict(incoming))
    ]
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("combine", ["weighted_avg", "soft"])
def test_the_size_of_slabs_does_not_change_the_bytes_of_a_block(
    monkeypatch: pytest.MonkeyPatch, combine: str
) -> None:
    plan = sliding(
        (12, 12),
        (6, 6),
        [2, 3],
        combine=combine,
        chunksize=[6, 6],
        storage_chunks=[3, 2],
        model={"model_output_shape": [3, 6, 6]},
    )
    chunk, rng = plan.chunk((1, 1)), np.random.default_rng(0)

    def sums(box: Box) -> npt.NDArray[np.float32]:
        # Random magnitudes: another order of additions would change the bytes.
        values = rng.normal(size=(3, *box.shape)) * 10.0 ** rng.integers(-6, 6, (3, *box.shape))
        return values.astype(np.float32)

    own_block = OwnBlock(
        tuple(map(sums, chunk.band_boxes)),
        tuple(
            np.full((*((3,) if plan.channel_axis else ()), *box.shape), 1, plan.output_dtype)
            for box in chunk.rest_boxes
        ),
    )
    pieces = {piece: sums(piece.box) for piece in plan.incoming_pieces(chunk)}
    blocks = []
    for slab_bytes in (1 << 20, 3 * 4 * 7, 1):
        monkeypatch.setattr(blend, "SLAB_BYTES", slab_bytes)
        boxes = finalize_sums(plan, chunk, own_block, pieces)
        blocks.append([(box, values.tobytes()) for box, values in boxes])
    assert blocks[0] == blocks[1] == blocks[2]


def test_the_own_sums_of_a_block_are_added_first_then_the_pieces_in_their_order() -> None:
    plan = sliding((12, 12), (6, 6), [2, 3], chunksize=[6, 6], storage_chunks=[3, 2])
    chunk = plan.chunk((1, 1))
    incoming = plan.incoming_pieces(chunk)
    assert len(incoming) == 3
    # In float32, 1 is lost beside 1e8 unless the large terms have cancelled before.
    terms = np.array([1, 1e8, -1e8, 1], np.float32)
    expected = np.float32(0)
    for term in terms:
        expected += term
    assert expected == 1
    band = [np.full((1, *box.shape), terms[0]) for box in chunk.band_boxes]
    rest = [np.zeros(box.shape, np.float32) for box in chunk.rest_boxes]
    pieces = {
        piece: np.full((1, *piece.box.shape), term)
        for piece, term in zip(incoming, terms[1:], strict=True)
    }
    corner = Box(chunk.block.start, chunk.interior.start)
    values = {
        voxel: value
        for box, block in finalize_sums(plan, chunk, OwnBlock(tuple(band), tuple(rest)), pieces)
        for voxel, value in zip(np.ndindex(box.shape), block.ravel(), strict=True)
        if box.start == corner.start
    }
    assert values[(0, 0)] == expected


def test_a_block_without_own_sums_adds_those_of_its_neighbors() -> None:
    plan = sliding((12,), (6,), [3], chunksize=[6], storage_chunks=[3])
    chunk = plan.chunk((1,))
    pieces = {p: np.full((1, *p.box.shape), -0.0, "<f4") for p in plan.incoming_pieces(chunk)}
    [(box, values)] = finalize_sums(plan, chunk, None, pieces)
    assert (box, values.tobytes()) == (chunk.touched_boxes[0], bytes(4 * box.size))


def test_a_contribution_has_the_documented_shapes_and_dtypes() -> None:
    plan = sliding(
        (14, 14),
        (6, 6),
        [4, 4],
        combine="soft",
        chunksize=[8, 8],
        storage_chunks=[4, 4],
        model={"model_output_shape": [3, 6, 6]},
    )
    volume = np.zeros((14, 14), np.uint8)
    cache = PatchWeights(plan, plan.blend_weights(), in_numpy)
    for index in plan.indices():
        chunk = plan.chunk(index)
        predict = ref.predictor("pointwise", 3, (6, 6))
        result = infer(plan, index, cache, volume, predict, in_numpy)
        assert (result.core.shape, result.core.dtype) == (chunk.core.shape, np.dtype(np.uint8))
        assert [p for p, _ in result.pieces] == plan.outgoing_pieces(chunk)
        for piece, sums in result.pieces:
            assert (sums.shape, sums.dtype) == ((3, *piece.box.shape), np.dtype(np.float32))
        if index == (0, 0):
            assert result.own_block is None
            continue
        assert result.own_block is not None
        assert [a.shape for a in result.own_block.band] == [(3, *b.shape) for b in chunk.band_boxes]
        assert [a.shape for a in result.own_block.rest] == [b.shape for b in chunk.rest_boxes]
        assert {a.dtype for a in result.own_block.rest} <= {np.dtype(np.uint8)}
