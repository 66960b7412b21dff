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
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.returned_values import HeadReader
from chunkq_worker.steps import Steps


class HostRuntime(Runtime):
    """A network with batches and results in host memory. The protected steps get NumPy arrays.

    Subclasses implement `_run`.
    """

    def __init__(self, model: ModelConfig, steps: Steps, shapes: ItemShapes) -> None:
        self.device, self._steps = model.device, steps
        self._dtype = np.dtype(model.dtype)
        self._reader = HeadReader(
            shapes.names,
            self._is_array,
            "array",
            has_step=steps.postprocessing_protected is not None,
        )

    @override
    def __call__(self, batch: Array) -> tuple[Array, ...]:
        inputs = self._cast(batch)
        if self._steps.preprocessing_protected is not None:
            inputs = self._steps.preprocessing_protected(inputs)
        if self._watch is not None:
            self._watch.receive(inputs)
        outputs = self._run(inputs)
        if self._steps.postprocessing_protected is not None:
            outputs = self._reader.from_step(self._steps.postprocessing_protected(outputs))
        self.unused_heads = self._reader.unused
        floats = [self._as_float(output) for output in outputs]
        self.output_dtypes = tuple(dtype for _, dtype in floats)
        return tuple(array for array, _ in floats)

    def _cast(self, batch: Array) -> Array:
        """Return a batch in the job's dtype, copied if a protected step gets it."""
        # Steps may modify the array in place.
        convert = np.asarray if self._steps.preprocessing_protected is None else np.array
        # As in torch, values outside the range of the dtype raise no warning.
        with np.errstate(over="ignore", invalid="ignore"):
            return convert(batch, self._dtype, order="C")

    @abstractmethod
    def _run(self, inputs: Array) -> Any:
        """Run the network on a batch in the dtype that the protected step returned.

        Return `HeadReader.from_network`. Raise ModelError if the network cannot process the batch.
        """

    def _is_array(self, value: Any) -> bool:
        return isinstance(value, np.ndarray)

    def _as_float(self, outputs: Array) -> tuple[Array, str]:
        """Return an array as float32 or float64, and the name of its dtype.

        Raise ModelError unless it has real numbers.
        """
        outputs = np.asarray(outputs)
        steps = self._steps.postprocessing_protected
        source = f"the network{'' if steps is None else ' with its protected steps'}"
        return real_numbers(outputs, source), outputs.dtype.name

    @override
    def zeros(self, shape: tuple[int, ...]) -> Array:
        return buffers.zeros(shape, np.float32)

    @override
    def to_device(self, array: npt.NDArray[Any]) -> Array:
        return array

    @override
    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)
