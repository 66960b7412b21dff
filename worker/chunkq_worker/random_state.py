"""The global random states of the frameworks: replaced for a while, and compared."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

SEED = 20_240_229
"""A seed that training scripts are unlikely to use."""


@contextmanager
def other_random_state() -> Iterator[None]:
    """Seed Python, NumPy and torch with SEED inside a `with` block, then restore their states.

    TensorFlow draws the seeds of its initializers from Python's generator.
    """
    python, legacy = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    state = None if torch is None else torch.random.get_rng_state()
    random.seed(SEED)
    np.random.seed(SEED)
    if torch is not None:
        torch.random.default_generator.manual_seed(SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        if torch is not None:
            torch.random.set_rng_state(state)


def random_states() -> tuple[Any, ...]:
    """Return the states of Python, NumPy and torch, on the CPU.

    They are equal if nothing was drawn, and what was not imported before is not imported since.
    """
    torch = sys.modules.get("torch")
    # NumPy imports its generators when they are first used, which takes 15 ms.
    _, *legacy = np.random.get_state() if "random" in vars(np) else (None,)
    return (
        random.getstate(),
        *(value.tobytes() if isinstance(value, np.ndarray) else value for value in legacy),
        None if torch is None else torch.random.get_rng_state().numpy().tobytes(),
    )
