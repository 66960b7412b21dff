from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkq.geometry.box import Box

Voxels = set[tuple[int, ...]]


def voxels(box: Box) -> Voxels:
    return set(product(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True))))


@st.composite
def boxes(draw: st.DrawFn, rank: int | None = None) -> Box:
    rank = rank or draw(st.integers(1, 4))
    start = [draw(st.integers(-3, 3)) for _ in range(rank)]
    return Box(tuple(start), tuple(a + draw(st.integers(0, 4)) for a in start))


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[Box, Box]:
    """Two boxes of the same rank; the second usually intersects or touches the first."""
    rank = draw(st.integers(1, 3))
    a = draw(boxes(rank))
    pairs = [
        sorted(draw(st.lists(st.integers(low - 1, high + 1), min_size=2, max_size=2)))
        for low, high in zip(a.start, a.stop, strict=True)
    ]
    return a, Box(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))


def assert_partition(parts: list[Box], expected: Voxels) -> None:
    """Assert that non-empty, disjoint boxes cover exactly the expected voxels."""
    assert all(part.size for part in parts)
    assert sum(part.size for part in parts) == len(expected)
    assert set().union(*map(voxels, parts)) == expected


@given(boxes(), st.integers(1, 30))
def test_slabs_cover_a_box_once_in_c_order_and_are_no_larger_than_asked(
    box: Box, max_size: int
) -> None:
    slabs = list(box.slabs(max_size))
    assert_partition(slabs, voxels(box))
    assert all(slab.size <= max_size for slab in slabs)
    assert [slab.start for slab in slabs] == sorted(slab.start for slab in slabs)


@given(boxes())
def test_size_is_the_number_of_voxels_and_shape_the_lengths(box: Box) -> None:
    assert box.size == len(voxels(box))
    assert box.shape == tuple(b - a for a, b in zip(box.start, box.stop, strict=True))


def test_a_box_of_a_shape_starts_at_the_origin() -> None:
    assert Box.of_shape([2, 0, 3]) == Box((0, 0, 0), (2, 0, 3))


def test_corners_of_different_rank_are_refused() -> None:
    with pytest.raises(ValueError, match=r"start \(0, 0\) .*stop \(1,\) .*rank"):
        Box((0, 0), (1,))


def test_an_inverted_box_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stop \(3, 1\).* start \(0, 2\)"):
        Box((0, 2), (3, 1))


@given(two_boxes())
def test_the_intersection_has_exactly_the_voxels_in_both(pair: tuple[Box, Box]) -> None:
    a, b = pair
    assert voxels(a & b) == voxels(a) & voxels(b)
    assert voxels(b & a) == voxels(a & b)


@given(two_boxes())
def test_an_intersection_is_inside_the_left_operand_even_when_empty(pair: tuple[Box, Box]) -> None:
    a, b = pair
    assert a & b in a


@given(two_boxes())
def test_a_box_contains_another_if_it_has_all_its_voxels(pair: tuple[Box, Box]) -> None:
    a, b = pair
    if b.size:
        assert (b in a) == (voxels(b) <= voxels(a))


def test_a_frame_around_a_hole_is_cut_into_two_boxes_per_axis() -> None:
    parts = list(Box((0, 0), (9, 9)).minus(Box((3, 3), (6, 6))))
    assert len(parts) == 4
    assert_partition(parts, voxels(Box((0, 0), (9, 9))) - voxels(Box((3, 3), (6, 6))))


def test_a_box_contains_boxes_only() -> None:
    assert 3 not in Box((0,), (9,))
    assert (3,) not in Box((0,), (9,))


@given(two_boxes())
def test_slices_select_the_box_in_an_array_with_an_origin(
    pair: tuple[Box, Box],
) -> None:
    outer, box = pair
    box = box & outer
    selected = np.argwhere(_mask(outer, box)) + outer.start
    assert {tuple(int(i) for i in position) for position in selected} == voxels(box)


@given(two_boxes(), st.lists(st.integers(0, 3), max_size=2))
def test_an_index_selects_the_box_in_every_leading_entry(
    pair: tuple[Box, Box], leading: list[int]
) -> None:
    outer, box = pair
    box = box & outer
    positions = np.indices(outer.shape).transpose(*range(1, len(outer.shape) + 1), 0)
    array = np.broadcast_to(positions, (*leading, *positions.shape))
    for axis in range(len(outer.shape)):
        selected = array[..., axis][box.index(outer.start)]
        assert selected.shape == (*leading, *box.shape)
        assert (selected == positions[..., axis][box.slices(outer.start)]).all()


def test_indexing_with_a_box_returns_a_view() -> None:
    array = np.zeros((2, 3, 4))
    array[Box((1,), (3,)).index((0,))] = 1
    assert array.sum() == 2 * 3 * 2


def _mask(outer: Box, box: Box) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    array = np.zeros(outer.shape, dtype=np.bool_)
    array[box.slices(outer.start)] = True
    return array


@given(st.data())
def test_a_box_without_its_upper_corner_is_cut_into_at_most_one_box_per_axis(
    data: st.DataObject,
) -> None:
    box = data.draw(boxes())
    corner = tuple(data.draw(st.integers(a, b)) for a, b in zip(box.start, box.stop, strict=True))
    parts = list(box.without_corner(corner))
    assert_partition(parts, voxels(box) - voxels(Box(corner, box.stop)))
    assert len(parts) <= len(corner)


@settings(max_examples=300)
@given(two_boxes())
def test_a_difference_is_cut_into_disjoint_boxes(pair: tuple[Box, Box]) -> None:
    a, b = pair
    assert_partition(list(a.minus(b)), voxels(a) - voxels(b))
