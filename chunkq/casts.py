"""Casts of values to the dtype of a network: which are exact, and what a dtype cannot hold.

Integers stay exact. Only float32 and float64 may round them, to 24 and 53 significant bits.
Floating-point values may be rounded. No value wraps, overflows or loses its fraction.
"""

from __future__ import annotations

from enum import Enum, auto
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

REAL = "biuf"
"""`dtype.kind` of real numbers: bool, integers and floats."""
_FLOATS: MappingProxyType[str, tuple[float, int]] = MappingProxyType(
    {
        "float16": (65504.0, 11),
        "bfloat16": (float.fromhex("0x1.fep127"), 8),
        "float32": (float.fromhex("0x1.fffffep127"), 24),
        "float64": (float.fromhex("0x1.fffffffffffffp1023"), 53),
    }
)
"""Floating-point dtype -> largest value and significant bits."""
_ROUND_INTEGERS = ("float32", "float64")
"""Dtypes that may round integers."""
_PROPOSED = ("int8", "int16", "int32", "int64", "float32", "float64")
"""Dtypes of networks from the narrowest to the widest, for advice."""


class Cast(Enum):
    """What a cast from one dtype to another does to values."""

    EXACT = auto()
    """Every value is represented."""
    ROUNDED = auto()
    """Every value is represented up to the precision of the floating-point dtype."""
    CHECKED = auto()
    """It depends on the values; `misfit` examines them."""
    REFUSED = auto()
    """The source has no real numbers."""


def cast_kind(source: npt.DTypeLike, target: str) -> Cast:
    """Return what a cast does, judged by the dtypes. `target` is a NumPy name or bfloat16."""
    dtype = np.dtype(source)
    if dtype.kind not in REAL:
        return Cast.REFUSED
    if dtype.kind == "b":
        return Cast.EXACT
    if target not in _FLOATS:
        return Cast.EXACT if _is_within(dtype, target) else Cast.CHECKED
    if dtype.kind == "f":
        return _float_to_float(dtype, target)
    return _integer_to_float(dtype, target)


def _float_to_float(dtype: np.dtype[Any], target: str) -> Cast:
    (largest, bits), info = _FLOATS[target], np.finfo(dtype)
    if float(info.max) > largest:
        return Cast.CHECKED
    return Cast.EXACT if info.nmant < bits else Cast.ROUNDED


def _integer_to_float(dtype: np.dtype[Any], target: str) -> Cast:
    (_, bits), info = _FLOATS[target], np.iinfo(dtype)
    if max(-int(info.min), int(info.max)) <= 1 << bits:
        return Cast.EXACT
    return Cast.ROUNDED if target in _ROUND_INTEGERS else Cast.CHECKED


def misfit(values: npt.NDArray[Any], target: str) -> str | None:
    """Return what of the values a dtype cannot hold, None if it can hold all of them.

    The values are read only if the dtypes do not decide. Infinity and NaN fit floating-point
    dtypes.
    """
    kind = cast_kind(values.dtype, target)
    if kind is Cast.REFUSED:
        return f"{values.dtype} values"
    if kind is not Cast.CHECKED or values.size == 0:
        return None
    to_integer = target not in _FLOATS
    low, high = _extremes(values)
    if not (np.isfinite(low) and np.isfinite(high)):
        if to_integer:
            return "NaN or infinity"
        finite = values[np.isfinite(values)]
        if finite.size == 0:
            return None
        low, high = _extremes(finite)
    if values.dtype.kind == "f" and to_integer and (fraction := _fraction(values)) is not None:
        return f"fractions such as {fraction:.6g}"
    lowest, highest = _bounds(target, is_integer=values.dtype.kind != "f")
    return None if lowest <= low and high <= highest else f"values {low:.6g} to {high:.6g}"


def proposed_dtype(values: npt.NDArray[Any], target: str) -> str:
    """Return the narrowest dtype that holds all values, to set instead of `target`.

    It is a floating-point dtype if `target` is one, and float64 if none holds all values.
    """
    names = [name for name in _PROPOSED if name in _ROUND_INTEGERS or target not in _FLOATS]
    return next((name for name in names if misfit(values, name) is None), "float64")


def _bounds(target: str, *, is_integer: bool) -> tuple[Any, Any]:
    if target in _FLOATS:
        largest, bits = _FLOATS[target]
        return (-(1 << bits), 1 << bits) if is_integer else (-largest, largest)
    if target == "bool":
        return 0, 1
    info = np.iinfo(target)
    return int(info.min), int(info.max)


def _is_within(dtype: np.dtype[Any], target: str) -> bool:
    if dtype.kind == "f":
        return False
    info, (lowest, highest) = np.iinfo(dtype), _bounds(target, is_integer=True)
    return bool(lowest <= int(info.min) and int(info.max) <= highest)


def _extremes(values: npt.NDArray[Any]) -> tuple[Any, Any]:
    """Return the smallest and the largest value as Python numbers, whose comparison is exact."""
    with np.errstate(invalid="ignore"):
        low, high = values.min(), values.max()
    return (int(low), int(high)) if values.dtype.kind in "iu" else (float(low), float(high))


def _fraction(values: npt.NDArray[Any]) -> Any:
    """Return a finite value that is no integer, or None."""
    fractions = values[values != np.rint(values)]
    return fractions[0] if fractions.size else None
