"""Compare the naive reference with values computed by hand from docs/design.md."""

import math
from typing import Any

import numpy as np
import pytest

from tests import reference as ref


def constant(by_start: dict[int, list[float]], q: int) -> ref.Predict:
    """Return a 1-D network whose channels are constant over a patch and depend on its start."""
    return lambda _x, start: np.repeat(np.array([by_start[start[0]]]).T, q, axis=1)


def fixed(weights: list[float]) -> ref.WeightFunction:
    """Return a 1-D weight function that ignores the shape."""
    return lambda _shape: np.array(weights)


@pytest.mark.parametrize(
    ("numbers", "pad", "shift"),
    [  # volume, patch, stride, pad_width, offset
        ((10, 4, 3, 0, 0), [0, 3, 6], [0, 3, 6]),  # 6+4 = 10 reaches 10 exactly
        ((10, 4, 4, 0, 0), [0, 4, 8], [0, 4, 6]),  # 8+4 = 12 > 10; moved to 10-4
        ((10, 4, 4, 2, 0), [-2, 2, 6, 10], [-2, 2, 6, 8]),  # 6+4 < 12 <= 10+4; 12-4
        ((10, 4, 4, 0, 2), [2, 6], [2, 6]),
        ((10, 4, 4, 0, -1), [-1, 3, 7], [-1, 3, 6]),  # 3+4 < 10 <= 7+4
        ((10, 4, 4, 2, -3), [-5, -1, 3, 7, 11], [-5, -1, 3, 7, 8]),  # 7+4 < 12 <= 11+4
        ((3, 8, 8, 0, 0), [0], [0]),  # shorter than the patch: the only patch is never moved
        ((3, 8, 2, 2, 0), [-2], [-2]),  # -2+8 = 6 >= 5
        ((3, 4, 4, 2, 0), [-2, 2], [-2, 1]),  # -2+4 < 5 <= 2+4; 5-4
        ((10, 4, 4, 0, 20), [20], [20]),
        ((9, 2, 4, 0, 0), [0, 4, 8], [0, 4, 7]),  # stride larger than patch: 4+2 < 9 <= 8+2
    ],
)
def test_the_last_start_is_the_first_whose_patch_reaches_the_padded_end(
    numbers: tuple[int, int, int, int, int], pad: list[int], shift: list[int]
) -> None:
    assert ref.axis_starts(*numbers, "pad") == pad
    assert ref.axis_starts(*numbers, "shift") == shift


def test_inference_types_set_stride_edge_and_pad_width_as_documented() -> None:
    a = ref.patch((20, 20), (8, 6), (4, 6), offsets=[(-1, 2)])
    assert (a.stride, a.edge, a.pad_width, a.offsets) == ((4, 6), "pad", (0, 0), ((-1, 2),))
    b = ref.sliding_window((20,), (8,), (3,))
    assert (b.output_patch, b.stride, b.edge, b.pad_width) == ((8,), (3,), "shift", (0,))
    c = ref.crop_margin((20,), (8,), (1,), (6,))  # 6-2 = 4; 1+(8-6)/2 = 2
    assert (c.stride, c.edge, c.pad_width) == ((4,), "pad", (2,))
    assert ref.crop_margin((20,), (8,), (1,), pad_width=(5,), edge="shift").pad_width == (5,)


def test_patches_are_centered_and_cropped() -> None:
    # starts -1, 1, 3 (3+4 = 7 = 6+1), outputs one later and two wide
    boxes = [((0,), (2,)), ((2,), (4,)), ((4,), (6,))]
    setup = ref.patch((6,), (4,), (2,), pad_width=(1,))
    assert ref.patches(setup) == [(0, (s,), box) for s, box in zip((-1, 1, 3), boxes, strict=True)]
    # 7 voxels, margin 1: stride 2, pad 1, so -1, 1, 3, 5 (3+4 < 8 <= 5+4)
    kept = [(start, box) for _, start, box in ref.patches(ref.crop_margin((7,), (4,), (1,)))]
    assert kept == [((s,), ((s + 1,), (s + 3,))) for s in (-1, 1, 3, 5)]


def test_patches_are_ordered_by_grid_then_lexicographically() -> None:
    setup = ref.patch((4, 3), (2, 2), offsets=[(-1, 0)])
    # grid 0: rows 0, 2, columns 0, 2; grid 1: rows -1, 1, 3 (1+2 < 4 <= 3+2), columns 0, 2
    expected = [(0, (r, c)) for r in (0, 2) for c in (0, 2)]
    expected += [(1, (r, c)) for r in (-1, 1, 3) for c in (0, 2)]
    assert [(g, s) for g, s, _ in ref.patches(setup)] == expected


def test_patches_outside_the_volume_are_omitted() -> None:
    # starts -4, 0, 4 (4+4 = 4+4): the outputs [-4, 0) and [4, 8) are outside [0, 4)
    assert [s for _, s, _ in ref.patches(ref.patch((4,), (4,), pad_width=(4,)))] == [(0,)]
    far = ref.patch((4,), (4,), offsets=[(20,), (-7,)])  # the last grid: -7, -3, 1; -7+4 < 0
    assert [(g, s[0]) for g, s, _ in ref.patches(far)] == [(0, 0), (2, -3), (2, 1)]


def test_uncovered_voxels_are_an_error() -> None:
    setup = ref.patch((6,), (4,), (2,))  # starts 0, 2: outputs [1, 3), [3, 5)
    assert ref.covered(setup).tolist() == [False, True, True, True, True, False]
    with pytest.raises(ValueError, match=r"voxel \[0\]"):
        ref.reference(setup, np.zeros(6), ref.predictor("pointwise", 1, (2,)))
    assert ref.covered(ref.patch((6, 7), (4, 4), (2, 4), pad_width=(1, 0))).all()


def test_padding_wider_than_the_axis_equals_np_pad() -> None:
    v = np.array([1, 2, 3])
    # period 4 (1 2 3 2); -5 is 3 mod 4
    reflected = ref.pad_read(v, (-5,), (13,), "reflect")
    assert reflected.tolist() == [2, 1, 2, 3, 2, 1, 2, 3, 2, 1, 2, 3, 2]
    # period 6 (1 2 3 3 2 1); -4 is 2 mod 6
    mirrored = ref.pad_read(v, (-4,), (12,), "symmetric")
    assert mirrored.tolist() == [3, 3, 2, 1, 1, 2, 3, 3, 2, 1, 1, 2]
    assert ref.pad_read(v, (-2,), (7,), "edge").tolist() == [1, 1, 1, 2, 3, 3, 3]
    assert ref.pad_read(v, (1,), (4,), "constant", 9).tolist() == [2, 3, 9, 9]
    assert ref.pad_read(v, (5,), (3,), "reflect").tolist() == [2, 3, 2]  # 5, 6, 7 are 1, 2, 3 mod 4
    assert ref.pad_read(v, (-9,), (2,), "constant").tolist() == [0, 0]
    assert ref.pad_read(np.array([4]), (-2,), (5,), "reflect").tolist() == [4] * 5
    grid = np.array([[1, 2], [3, 4]])  # rows 1 0 1, columns 1 0 1
    assert ref.pad_read(grid, (-1, -1), (3, 3), "reflect").tolist() == [
        [4, 3, 4],
        [2, 1, 2],
        [4, 3, 4],
    ]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_window_does_not_depend_on_how_far_the_volume_is_padded(n: int) -> None:
    v = np.arange(n)
    for mode in ("reflect", "symmetric"):
        far = ref.pad_read(v, (-30,), (60,), mode)
        for start in range(-30, 25):
            assert ref.pad_read(v, (start,), (5,), mode).tolist() == far[start + 30 :][:5].tolist()


def test_built_in_weights_follow_their_formulas() -> None:
    assert ref.weight_uniform((2, 1)).tolist() == [[1], [1]]
    # n = 4: σ = 1/2, so exp(-2 d²) at d = 3/2 and 1/2
    gauss = [math.exp(-4.5), math.exp(-0.5), math.exp(-0.5), math.exp(-4.5)]
    np.testing.assert_allclose(ref.weight_gaussian((4,)), gauss, rtol=1e-14)
    np.testing.assert_allclose(ref.weight_linear((5,)), [1, 2, 3, 2, 1], rtol=1e-14)
    np.testing.assert_allclose(ref.weight_linear((3, 2)), [[1, 1], [2, 2], [1, 1]], rtol=1e-14)
    # n = 5: sin² of 30, 60, 90, 120, 150 degrees
    np.testing.assert_allclose(ref.weight_hann((5,)), [0.25, 0.75, 1, 0.75, 0.25], rtol=1e-14)
    # n = 4: t = ∓3/4, ∓1/4, so 1-t² = 7/16, 15/16
    bump = [math.exp(-16 / 7), math.exp(-16 / 15), math.exp(-16 / 15), math.exp(-16 / 7)]
    np.testing.assert_allclose(ref.weight_bump((4,)), bump, rtol=1e-14)
    np.testing.assert_allclose(ref.weight_bump((1, 1)), [[math.exp(-2)]], rtol=1e-14)  # t = 0 twice


def test_log_weights_are_finite_where_the_product_underflows() -> None:
    # n = 128: 1-t² = (128²-127²)/128² = 255/16384 at the rim
    corner = ref.log_weights("weight_bump", (128, 128, 128))[0, 0, 0]
    assert corner == pytest.approx(-3 * 16384 / 255, rel=1e-12)
    # n = 1500: -1500²/2999 = -750 at the rim, and exp(-745.2) is already 0
    assert ref.weight_bump((1500,))[0] == 0
    volume = np.linspace(0, 1, 1501)
    setup = ref.sliding_window((1501,), (1500,), (1,))
    got = ref.reference(setup, volume, lambda x, _: x[None], weight="weight_bump").average
    np.testing.assert_allclose(got[0], volume, rtol=1e-12)


def test_weights_of_a_regular_lattice_sum_to_a_constant_inside() -> None:
    # linear, n = 4, stride 2: 1+2 everywhere; hann, n = 3, stride 2: 1/2+1/2 or 1
    for weight, n, expected in ((ref.weight_linear, 4, 3), (ref.weight_hann, 3, 1)):
        total = np.zeros(20)
        for _, (start,), _ in ref.patches(ref.sliding_window((20,), (n,), (2,), edge="pad")):
            total[start : start + n] += weight((n,))[: 20 - start]
        np.testing.assert_allclose(total[2:18], expected, rtol=1e-14)


def test_the_average_is_weighted() -> None:
    # patches at 0 (prediction 0) and 1 (prediction 1), weights 1 2 1: voxel 1 has (2·0+1·1)/3
    setup = ref.sliding_window((4,), (3,), (1,))
    got = ref.reference(setup, np.zeros(4), constant({0: [0], 1: [1]}, 3), "soft", "weight_linear")
    np.testing.assert_allclose(got.average, [[0, 1 / 3, 2 / 3, 1]], rtol=1e-14)
    assert got.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(got.margin_of_decision, [1 / 2, 1 / 6, 1 / 6, 1 / 2], rtol=1e-14)


def test_a_single_channel_is_foreground_from_exactly_one_half() -> None:
    setup = ref.sliding_window((4,), (3,), (1,))
    network = constant({0: [0], 1: [1]}, 3)  # averages and vote shares 0, 1/2, 1/2, 1
    assert ref.reference(setup, np.zeros(4), network, "soft").labels.tolist() == [0, 1, 1, 1]
    assert ref.reference(setup, np.zeros(4), network, "hard").labels.tolist() == [0, 1, 1, 1]
    votes = ref.reference(setup, np.zeros(4), constant({0: [0.5], 1: [0.49]}, 3), "hard")
    assert votes.average.tolist() == [[1, 0.5, 0.5, 0]]
    assert votes.margin_of_decision.tolist() == [0, 0, 0, pytest.approx(0.01)]


def test_a_tie_gives_the_lowest_class() -> None:
    setup, zeros = ref.sliding_window((4,), (3,), (1,)), np.zeros(4)
    network = constant({0: [0, 0, 1], 1: [0, 1, 0]}, 3)  # the middle: 0, 1/2, 1/2
    for combine in ("soft", "hard"):
        assert ref.reference(setup, zeros, network, combine).labels.tolist() == [2, 1, 1, 1]
        margin = ref.reference(setup, zeros, network, combine).margin_of_decision
        assert margin.tolist() == [1, 0, 0, 1]
    level = ref.reference(setup, zeros, constant({0: [3, 3], 1: [3, 3]}, 3), "hard")
    assert level.average.tolist() == [[1] * 4, [0] * 4]


def test_votes_are_weighted_by_blend_weights_not_by_predictions() -> None:
    # weights 1 2 1. Voxel 1: class 0 has 2/3 of the votes, but averages (2·0.6+0)/3 = 0.4 < 0.6
    setup, network = ref.sliding_window((4,), (3,), (1,)), constant({0: [0.6, 0.4], 1: [0, 1]}, 3)
    hard = ref.reference(setup, np.zeros(4), network, "hard", "weight_linear")
    np.testing.assert_allclose(hard.average[0], [1, 2 / 3, 1 / 3, 0], atol=1e-14)
    assert hard.labels.tolist() == [0, 0, 1, 1]
    # channels of the first patch differ by 0.6-0.4, of the second by 1; shares by 1, 1/3, 1/3, 1
    np.testing.assert_allclose(hard.margin_of_decision, [0.2, 0.2, 0.2, 1], rtol=1e-12)
    soft = ref.reference(setup, np.zeros(4), network, "soft", "weight_linear")
    assert soft.labels.tolist() == [0, 1, 1, 1]


def test_activation_is_applied_before_averaging() -> None:
    setup, zeros = ref.sliding_window((4,), (3,), (1,)), np.zeros(4)
    network = constant({0: [0, math.log(3)], 1: [0, 0]}, 3)  # softmax (1/4, 3/4) and (1/2, 1/2)
    got = ref.reference(setup, zeros, network, activation="softmax").average
    np.testing.assert_allclose(got[1], [0.75, 0.625, 0.625, 0.5], rtol=1e-14)
    single = constant({0: [-1e4], 1: [1e4]}, 3)
    big = ref.reference(setup, zeros, single, activation="sigmoid").average
    assert big.tolist() == [[0, 0.5, 0.5, 1]]
    far = constant({0: [1e4, 0], 1: [0, 1e4]}, 3)
    assert (
        ref.reference(setup, zeros, far, activation="softmax").average[1].tolist()
        == big[0].tolist()
    )


def test_user_weights_are_computed_for_the_output_patch_then_cropped() -> None:
    # starts -1, 1, 2 (3 moved to 5+1-4); voxel 3: second of the patch at 1, first of that at 2
    def weight(shape: tuple[int, ...]) -> Any:
        assert shape == (4,)
        return np.array([1, 2, 5, 100])

    setup = ref.crop_margin((5,), (4,), (1,), edge="shift")
    network = constant({-1: [0], 1: [0], 2: [1]}, 4)
    got = ref.reference(setup, np.zeros(5), network, weight=weight).average
    np.testing.assert_allclose(got, [[0, 0, 0, 2 / 7, 1]], rtol=1e-14)


@pytest.mark.parametrize("setup", [
    ref.crop_margin((7, 5), (5, 4), (1, 1)),
    ref.patch((7, 5), (5, 4), (3, 2), pad_width=(1, 1), offsets=[(-1, 1)]),
])  # fmt: skip
def test_cropped_patches_equal_the_network_applied_to_the_volume(setup: ref.Setup) -> None:
    volume = np.random.default_rng(0).random((7, 5))
    expected = ref.box_blur(3)(volume, (7, 5))  # zeros outside; the blur extends one voxel
    network = ref.predictor("box_blur", 3, setup.output_patch)
    got = ref.reference(setup, volume, network, weight="weight_hann").average
    np.testing.assert_allclose(got, expected, atol=1e-14)


@pytest.mark.parametrize("weight", ["uniform", "gaussian", "linear", "hann", "bump"])
def test_the_output_of_a_pointwise_network_does_not_depend_on_patches(weight: str) -> None:
    volume = np.random.default_rng(1).integers(0, 2, (4, 5, 6), dtype=np.uint8)
    setup = ref.sliding_window(volume.shape, (3, 4, 3), (2, 1, 2), pad_width=(1, 0, 4))
    got = ref.reference(
        setup, volume, ref.predictor("pointwise", 2, (3, 4, 3)), "soft", f"weight_{weight}"
    )
    # channel t = 1/4: x/2 - 1/16; t = 3/4: 3x/2 - 9/16
    np.testing.assert_allclose(
        got.average, [volume / 2 - 1 / 16, 1.5 * volume - 9 / 16], atol=1e-13
    )
    assert (got.labels == volume).all()


def test_the_output_of_a_position_dependent_network_depends_on_patches() -> None:
    # P = 2: u = 1/4, 3/4, so cos is 0, 0 in channel 0 (t = 1/4) and -sin 1, sin 1 in channel 1
    two = ref.position_dependent(2)(np.ones(2), (2,))
    np.testing.assert_allclose(two[0], [1 / 2 - 1 / 16] * 2, rtol=1e-14)
    low, high = 1.5 * (1 - math.sin(1) / 2) - 9 / 16, 1.5 * (1 + math.sin(1) / 2) - 9 / 16
    np.testing.assert_allclose(two[1], [low, high], rtol=1e-14)
    # P = 1: u = 1/2, the cosine is -1, t = 1/2: x/2 - 1/4
    np.testing.assert_allclose(ref.position_dependent(1)(np.ones((1, 1)), (1, 1)), [[[0.25]]])


def test_patches_at_the_border_read_the_padded_volume() -> None:
    # one channel is x - 1/4; one voxel per patch, the mean over its neighbors in (2) 1 2 3 (2)
    setup = ref.crop_margin((3,), (3,), (1,), pad_mode="reflect")
    got = ref.reference(setup, np.array([1, 2, 3]), ref.predictor("box_blur", 1, (3,))).average
    np.testing.assert_allclose(got, [[5 / 3 - 0.25, 1.75, 7 / 3 - 0.25]], rtol=1e-14)
    blur = ref.box_blur(1)(np.ones((2, 3)), (2, 3))  # 4 or 6 of the 9 voxels are in the patch
    np.testing.assert_allclose(blur[0] + 0.25, [[4 / 9, 6 / 9, 4 / 9]] * 2, rtol=1e-14)


def test_labels_are_uint16_for_more_than_256_classes() -> None:
    for classes, dtype in ((256, np.uint8), (257, np.uint16)):
        network = constant({0: [float(c) for c in range(classes)]}, 2)
        labels = ref.reference(ref.patch((2,), (2,)), np.zeros(2), network, "hard").labels
        assert labels.dtype == dtype
        assert labels.tolist() == [classes - 1] * 2


def test_invalid_setups_weights_and_predictions_are_errors() -> None:
    for p, q, m in ((5, 4, 0), (4, 6, 0), (4, 4, 2)):
        with pytest.raises(ValueError, match="output patch"):
            ref.crop_margin((8,), (p,), (m,), (q,))
    setup, network = ref.patch((4,), (4,)), constant({0: [1]}, 4)
    for invalid in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="finite and positive"):
            ref.reference(setup, np.zeros(4), network, weight=fixed([1, invalid, 1, 1]))
    for invalid in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"patch at \(0,\)"):
            ref.reference(setup, np.zeros(4), constant({0: [invalid]}, 4))
