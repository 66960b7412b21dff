"""Casts to the dtype of a network are exact, rounded, checked by range or refused; none wraps."""

from itertools import product
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch

from chunkq.casts import Cast, cast_kind, misfit, proposed_dtype
from chunkq.job.fields import Dtype

TARGETS = (*get_args(Dtype), "bool", "uint8", "uint16", "uint32", "uint64")
UNSIGNED, SIGNED = ("uint8", "uint16", "uint32", "uint64"), ("int8", "int16", "int32", "int64")
FLOATS = ("float16", "float32", "float64")
SOURCES = ("bool", *UNSIGNED, *SIGNED, *FLOATS, "longdouble", "complex64", "complex128", "str")

E, R, C, X = Cast.EXACT, Cast.ROUNDED, Cast.CHECKED, Cast.REFUSED
TABLE = {
    #             f16 bf16 f32 f64 i8 i16 i32 i64
    "bool":       (E, E,   E,  E,  E, E,  E,  E),
    "uint8":      (E, E,   E,  E,  C, E,  E,  E),
    "uint16":     (C, C,   E,  E,  C, C,  E,  E),
    "uint32":     (C, C,   R,  E,  C, C,  C,  E),
    "uint64":     (C, C,   R,  R,  C, C,  C,  C),
    "int8":       (E, E,   E,  E,  E, E,  E,  E),
    "int16":      (C, C,   E,  E,  C, E,  E,  E),
    "int32":      (C, C,   R,  E,  C, C,  E,  E),
    "int64":      (C, C,   R,  R,  C, C,  C,  E),
    "float16":    (E, R,   E,  E,  C, C,  C,  C),
    "float32":    (C, C,   E,  E,  C, C,  C,  C),
    "float64":    (C, C,   C,  E,  C, C,  C,  C),
    "complex64":  (X, X,   X,  X,  X, X,  X,  X),
    "complex128": (X, X,   X,  X,  X, X,  X,  X),
}  # fmt: skip
"""Input dtype -> what the cast to each dtype of a job does."""


@pytest.mark.parametrize("source", TABLE)
def test_every_pair_of_dtypes_has_one_rule(source: str) -> None:
    assert tuple(cast_kind(source, target) for target in get_args(Dtype)) == TABLE[source]


def borders(source: str) -> npt.NDArray[Any]:
    """Return the values of a dtype at which casts begin to wrap, overflow or round."""
    dtype = np.dtype(source)
    if dtype.kind == "b":
        return np.array([False, True])
    powers = [2.0**n for n in (0, 1, 7, 8, 11, 15, 16, 24, 31, 32, 53, 63, 64, 100, 127, 500)]
    values = [s * (p + d) for p in powers for d in (-1.0, 0.0, 1.0) for s in (-1.0, 1.0)]
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        fitting = {int(v) for v in values if info.min <= v <= info.max}
        return np.array(sorted(fitting | {int(info.min), int(info.max)}), dtype)
    largest = float(np.finfo(dtype).max) if dtype.itemsize <= 8 else 1e300
    fractions = [0.25, -0.5, 65504.0, 65520.0, 3.5e38, largest, -largest]
    return np.array([v for v in values + fractions if abs(v) <= largest], dtype)


def cast(value: npt.NDArray[Any], target: str) -> float:
    """Return one value after the cast, as a Python number."""
    if target == "bfloat16":
        wide = value.astype(np.float64 if value.dtype.kind == "f" else np.int64)
        return float(torch.from_numpy(wide).to(torch.bfloat16).double())
    with np.errstate(all="ignore"):
        result: float = value.astype(target)[0].item()
        return result


PRECISION = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


@pytest.mark.parametrize(("source", "target"), list(product(SOURCES[:-3], TARGETS)))
def test_a_value_that_fits_is_cast_without_wrapping_or_overflow(source: str, target: str) -> None:
    for value in borders(source):
        one = np.array([value])
        if misfit(one, target) is not None or (source, target) == ("uint64", "bfloat16"):
            continue
        result, exact = cast(one, target), float(value)
        assert np.isfinite(result), value
        if target not in PRECISION:
            assert result == value.item(), value
            continue
        rounding = PRECISION[target]
        if one.dtype.kind in "iu" and target in ("float16", "bfloat16"):
            rounding = 0.0
        assert abs(result - exact) <= abs(exact) * rounding + 2.0**-24, value


@pytest.mark.parametrize(("source", "target"), list(product(SOURCES[:-3], TARGETS)))
def test_only_a_value_that_the_cast_changes_is_refused(source: str, target: str) -> None:
    for value in borders(source):
        one = np.array([value])
        if misfit(one, target) is None:
            continue
        result = cast(one, target)
        is_rounded_integer = one.dtype.kind in "iu" and abs(int(value)) > 256
        assert result != float(value) or is_rounded_integer or abs(value) > 2.0**53, value


@pytest.mark.parametrize(
    ("values", "target", "problem"),
    [
        (np.array([1, 199], np.uint8), "int8", "values 1 to 199"),
        (np.array([-1, 5], np.int16), "uint8", "values -1 to 5"),
        (np.array([2**63 - 1]), "int32", "values 9.22337e+18 to 9.22337e+18"),
        (np.array([0.25, 1.0], np.float32), "int32", "fractions such as 0.25"),
        (np.array([1.0, np.nan], np.float32), "int32", "NaN or infinity"),
        (np.array([1.0, np.inf], np.float32), "int64", "NaN or infinity"),
        (np.array([1.0, 1e39]), "float32", "values 1 to 1e+39"),
        (np.array([np.nan, 1e39]), "float32", "values 1e+39 to 1e+39"),
        (np.array([0, 65520], np.uint16), "float16", "values 0 to 65520"),
        (np.array([1.0 + 1j]), "float32", "complex128 values"),
        (np.array(["1"]), "float32", "<U1 values"),
    ],
)
def test_what_does_not_fit_is_named(values: Any, target: str, problem: str) -> None:
    assert misfit(values, target) == problem


@pytest.mark.parametrize(
    ("values", "target"),
    [
        (np.array([np.nan, np.inf, -np.inf, 1.0]), "float32"),
        (np.array([np.nan, np.inf], np.float32), "float16"),
        (np.array([-128.0, 127.0], np.float32), "int8"),
        (np.array([], np.int64), "int8"),
        (np.array([2**53], np.int64), "float32"),
        (np.array([-2048, 2048], np.int32), "float16"),
        (np.array([0, 1], np.uint64), "bool"),
    ],
)
def test_values_within_the_range_fit(values: npt.NDArray[Any], target: str) -> None:
    assert misfit(values, target) is None


@pytest.mark.parametrize(
    ("values", "target", "dtype"),
    [
        (np.array([0, 300], np.uint16), "int8", "int16"),
        (np.array([0, 128], np.uint8), "int8", "int16"),
        (np.array([2**40]), "int32", "int64"),
        (np.array([2**64 - 1], np.uint64), "int64", "float32"),
        (np.array([0.5]), "int64", "float32"),
        (np.array([1e39]), "float32", "float64"),
        (np.array([0, 3000], np.uint16), "float16", "float32"),
    ],
)
def test_the_proposed_dtype_is_the_narrowest_that_fits(
    values: npt.NDArray[Any], target: str, dtype: str
) -> None:
    assert misfit(values, target) is not None
    assert proposed_dtype(values, target) == dtype
    assert misfit(values, dtype) is None
