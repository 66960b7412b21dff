"""Which deep-learning framework this process computes with; a worker process keeps to one.

PyTorch and TensorFlow in one process take the memory of both, and can crash each other (see
`runtimes/triton_import.py`).
"""

from __future__ import annotations

from types import MappingProxyType

from chunkq.errors import FrameworkConflictError
from chunkq.job import ModelConfig

BY_RUNTIME = MappingProxyType({"torch": "torch", "tensorflow": "tensorflow"})
"""Runtime -> framework; runtimes that are not listed need none."""


def framework_of(model: ModelConfig) -> str | None:
    """Return the framework that a network runs on: `torch`, `tensorflow` or None."""
    if model.runtime == "onnx" and model.device == "cuda":
        return "torch"  # holds the batches and the results
    return BY_RUNTIME.get(model.runtime)


class FrameworkRule:
    """Remember the first framework that computed in a process, and refuse the other.

    With `enforced` False nothing is refused: nobody replaces that process.
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
        """Keep to a network's framework from now on.

        To be called once the network has computed, not when it is loaded: a job whose network
        always fails must not have one process after another replaced.
        """
        self._used = self._used or framework_of(model)


this_process = FrameworkRule()
