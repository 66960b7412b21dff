"""Allow or forbid TF32 in torch's float32 operations on a GPU.

torch has one setting per process for convolutions, allowed by default, and one for matrix products.
Since version 2.9 there is also one per kind of operation, which inherits from more general ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch


@contextlib.contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 inside a `with` block, then restore the settings.

    Other jobs of the process, and a program that uses chunkq, can need other settings.
    """
    old, new = _settings(), [one.fp32_precision for one in _operations()]
    _set((allowed, "high" if allowed else "highest"), ["tf32" if allowed else "ieee"] * len(new))
    try:
        yield
    finally:
        _set(old, new)


def _operations() -> tuple[Any, ...]:
    """Return torch's settings per kind of operation; an older version has none."""
    cudnn: Any = torch.backends.cudnn
    return (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul) if hasattr(cudnn, "conv") else ()


def _settings() -> tuple[bool | None, str | None]:
    """Return the settings per process; None where torch raises because operations differ."""
    convolutions, products = None, None
    with contextlib.suppress(RuntimeError):
        convolutions = torch.backends.cudnn.allow_tf32
    with contextlib.suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    return convolutions, products


def _set(settings: tuple[bool | None, str | None], by_operation: Sequence[str]) -> None:
    """Set both kinds of settings: torch reads neither if they contradict each other."""
    convolutions, products = settings
    if convolutions is not None:
        torch.backends.cudnn.allow_tf32 = convolutions
    if products is not None:
        torch.set_float32_matmul_precision(products)
    for operation, precision in zip(_operations(), by_operation, strict=True):
        operation.fp32_precision = precision
