"""Profiles of the built-in blend weights along one axis, as logarithms."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


def _uniform(n: int) -> Float64:
    return np.zeros(n)


def _gaussian(n: int) -> Float64:
    sigma = n / 8
    distance = np.arange(n, dtype=np.float64) - (n - 1) / 2
    return -np.square(distance) / (2 * sigma**2)


def _linear(n: int) -> Float64:
    i = np.arange(n)
    return np.log(np.minimum(i + 1, n - i))


def _hann(n: int) -> Float64:
    return 2 * np.log(np.sin(np.pi * (np.arange(n) + 1) / (n + 1)))


def _bump(n: int) -> Float64:
    t = (2 * np.arange(n) + 1) / n - 1
    return -1 / (1 - t**2)


LOG_PROFILES: MappingProxyType[str, Callable[[int], Float64]] = MappingProxyType(
    {
        "weight_uniform": _uniform,
        "weight_gaussian": _gaussian,
        "weight_linear": _linear,
        "weight_hann": _hann,
        "weight_bump": _bump,
    }
)
