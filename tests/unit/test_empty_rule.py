"""`EmptyRule` says which voxels are empty, exactly as the numbers of their dtype compare."""

import numpy as np
import pytest

from chunkq.plan.empty_rule import EmptyRule, occupied_in

NAN = float("nan")


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "uint32", "float16", "float32", "f8"])
@pytest.mark.parametrize("limit", [-1e9, -1.0, 0.0, 0.1, 1.0, 2.5, 127.0, 1e9])
def test_below_compares_as_real_numbers_do(dtype: str, limit: float) -> None:
    values = np.array([0, 1, 2, 3, 100], dtype)
    expected = [float(value) >= limit for value in values]
    assert EmptyRule(limit, is_limit=True).occupied(values, 1).tolist() == expected


def test_below_a_number_that_float32_rounds_down_includes_the_rounded_number() -> None:
    values = np.array([np.float32(0.3), np.nextafter(np.float32(0.3), np.float32(1))])
    limit = (float(values[0]) + float(values[1])) / 2
    assert np.float32(limit) in values
    assert EmptyRule(limit, is_limit=True).occupied(values, 1).tolist() == [False, True]


def test_a_value_is_compared_in_the_dtype_of_the_voxels() -> None:
    values = np.array([0.1, 0.2], np.float32)
    assert EmptyRule(0.1).occupied(values, 1).tolist() == [False, True]
    assert EmptyRule(1).occupied(np.array([True, False]), 1).tolist() == [False, True]


def test_nan_equals_nan_only_and_is_below_nothing() -> None:
    values = np.array([np.nan, 0, np.inf])
    assert EmptyRule(NAN).occupied(values, 1).tolist() == [False, True, True]
    assert EmptyRule(1.0, is_limit=True).occupied(values, 1).tolist() == [True, False, True]


def test_a_voxel_is_occupied_in_any_channel_of_any_input() -> None:
    one = np.zeros((2, 3), np.uint8)
    one[1, 0] = 5
    other = np.zeros((2, 3), np.float32)
    other[0, 2] = 1
    assert occupied_in(EmptyRule(0), [one, other], 1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("value", "dtype", "fits"),
    [
        (0, "uint8", True),
        (256, "uint8", False),
        (-1, "uint8", False),
        (0.5, "int32", False),
        (NAN, "int32", False),
        (NAN, "float32", True),
        (1e39, "float32", False),
        (2, "bool", False),
    ],
)
def test_a_value_that_no_voxel_can_have_does_not_fit(value: float, dtype: str, fits: bool) -> None:
    assert EmptyRule(value).fits(dtype) is fits
