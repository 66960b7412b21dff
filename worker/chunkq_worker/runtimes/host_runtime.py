"""Base class of the runtimes whose networks take and return NumPy arrays."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq.blend.combine import Array
from chunkq.job.model_config import ModelConfig
from chunkq.system import buffers
from chunkq_worker.runtimes.base import Runtime, real_numbers
from chunkq_worker.steps import Steps


class HostRuntime(Runtime):
    """A network with batches and results in host memory. The protected steps get NumPy arrays.

    Subclasses implement `_run`.
    """

    def __init__(self, model: ModelConfig, steps: Steps) -> None:
        self.device, self._steps = model.device, steps
        self._dtype = np.dtype(model.dtype)

    @override
    def __call__(self, batch: Array) -> Array:
        inputs = self._cast(batch)
        if self._steps.preprocessing_protected is not None:
            inputs = self._steps.preprocessing_protected(inputs)
        if self._watch is not None:
            self._watch.receive(inputs)
        outputs = self._run(inputs)
        if self._steps.postprocessing_protected is not None:
            outputs = self._steps.postprocessing_protected(outputs)
        return self._as_float(outputs)

    def _cast(self, batch: Array) -> Array:
        """Return a batch in the job's dtype, copied if a protected step gets it."""
        # Steps may modify the array in place.
        convert = np.asarray if self._steps.preprocessing_protected is None else np.array
        # As in torch, values outside the range of the dtype raise no warning.
        with np.errstate(over="ignore", invalid="ignore"):
            return convert(batch, self._dtype, order="C")

    @abstractmethod
    def _run(self, inputs: Array) -> Array:
        """Run the network on a batch in the dtype that the protected step returned.

        Raise ModelError if the network cannot process the batch or does not return one array.
        """

    def _as_float(self, outputs: Array) -> Array:
        """Return outputs as float32 or float64. Raise ModelError unless they are real numbers."""
        outputs = np.asarray(outputs)
        self.output_dtype = outputs.dtype.name
        steps = self._steps.postprocessing_protected
        return real_numbers(
            outputs, f"the network{'' if steps is None else ' with its protected steps'}"
        )

    @override
    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
        return buffers.zeros(shape, dtype)

    @override
    def to_device(self, array: npt.NDArray[Any]) -> Array:
        return array

    @override
    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)
