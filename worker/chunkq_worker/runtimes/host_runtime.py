"""Networks that take and return NumPy arrays in the host's memory."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq import buffers
from chunkq.combine import Array
from chunkq.errors import ModelError
from chunkq.job import ModelConfig
from chunkq_worker.runtimes.base import Runtime
from chunkq_worker.steps import Steps

NUMBERS = "biuf"
"""Kinds of dtypes that a prediction may have: bool, integers and floats."""


class HostRuntime(Runtime):
    """A network whose batches and results, and those of the protected steps, are NumPy arrays.

    A derived class implements `_run`.
    """

    def __init__(self, model: ModelConfig, steps: Steps) -> None:
        self.device, self._steps = model.device, steps
        self._dtype = np.dtype(model.dtype)

    @override
    def __call__(self, batch: npt.NDArray[Any]) -> Array:
        inputs = self._cast(batch)
        if self._steps.preprocessing_protected is not None:
            inputs = self._steps.preprocessing_protected(inputs)
        outputs = self._run(inputs)
        if self._steps.postprocessing_protected is not None:
            outputs = self._steps.postprocessing_protected(outputs)
        return self._as_float(outputs)

    def _cast(self, batch: npt.NDArray[Any]) -> Array:
        """Return a batch in the job's dtype, for the protected steps and the network."""
        # Steps may work in place.
        convert = np.asarray if self._steps.preprocessing_protected is None else np.array
        # Values outside the dtype's range raise no warning, as with torch.
        with np.errstate(over="ignore", invalid="ignore"):
            return convert(batch, self._dtype, order="C")

    @abstractmethod
    def _run(self, inputs: Array) -> Array:
        """Return the network's output for a batch in the dtype that the protected step returned.

        Raises ModelError if the network does not take such a batch or does not return one array.
        """

    def _as_float(self, outputs: Array) -> Array:
        """Return outputs as float32 or float64; raises ModelError for other than real numbers."""
        outputs = np.asarray(outputs)
        if outputs.dtype.kind not in NUMBERS:
            steps = self._steps.postprocessing_protected
            raise ModelError(
                f"the network{'' if steps is None else ' with its protected steps'} returned "
                f"dtype {outputs.dtype}, expected real numbers; return float32"
            )
        wide = outputs.dtype.kind == "f" and outputs.dtype.itemsize >= 8
        return outputs.astype(np.float64 if wide else np.float32, copy=False)

    @override
    def zeros(self, shape: tuple[int, ...]) -> Array:
        return buffers.zeros(shape, np.float32)

    @override
    def to_device(self, array: npt.NDArray[Any]) -> Array:
        return array

    @override
    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)
