"""Restrict a worker process to one deep-learning framework.

PyTorch and TensorFlow in the same process need the memory of both, and can crash each other (see
`runtimes/triton_import.py`).
"""

from __future__ import annotations

from types import MappingProxyType

from chunkq.errors import FrameworkConflictError
from chunkq.job.model_config import ModelConfig

BY_RUNTIME = MappingProxyType({"torch": "torch", "tensorflow": "tensorflow", "sleap": "torch"})
"""Runtime -> framework; the other runtimes need no framework."""


def framework_of(model: ModelConfig) -> str | None:
    """Return the framework that a network needs: `torch`, `tensorflow` or None."""
    if model.runtime == "onnx" and model.device == "cuda":
        return "torch"  # for the batches and results in device memory
    return BY_RUNTIME.get(model.runtime)


class FrameworkRule:
    """Record the first framework that computed in a process, and raise for any other.

    With `enforced` False nothing is raised, for processes that no supervisor restarts.
    """

    def __init__(self, *, enforced: bool = False) -> None:
        self.enforced = enforced
        self._used: str | None = None

    def check(self, model: ModelConfig) -> None:
        """Raise FrameworkConflictError if the network needs another framework."""
        needed = framework_of(model)
        if self.enforced and None not in (needed, self._used) and needed != self._used:
            raise FrameworkConflictError(
                f"model_config.runtime: {model.runtime} needs a new worker process; this one "
                f"uses {self._used}"
            )

    def record(self, model: ModelConfig) -> None:
        """Set the framework of this process, unless it is set already.

        Call this after the network has computed, not after loading it: a job whose network always
        fails must not restart one process after another.
        """
        self._used = self._used or framework_of(model)


framework_rule = FrameworkRule()
"""The rule of this process."""
