"""What every runtime offers: a loaded network on one device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.combine import Array
from chunkq.errors import ModelError
from chunkq.job import ModelConfig
from chunkq_worker.steps import Steps

Fetched = Callable[[], list[npt.NDArray[Any]]]
"""Waits for results that are on their way to the host, and returns them. Any thread may call it."""


class BatchFeed:
    """Where batches are written, and from where they set out for the device.

    This one is for runtimes that read the host's memory: one array, sent as it is.
    """

    ahead: bool = False
    """Whether one batch may be written and sent while the one before it is computed."""

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self._array = np.zeros(shape, dtype)

    def buffer(self) -> npt.NDArray[Any]:
        """Return the array to write the next batch into, of the feed's shape and dtype.

        What it held before was sent and computed, or is not wanted any more.
        """
        return self._array

    def send(self, batch: npt.NDArray[Any]) -> Any:
        """Return what a runtime takes for the batch: the first items of `blank`, or another."""
        return batch


class Runtime(ABC):
    """One network, loaded and ready, on one device. Used by one thread at a time.

    Arrays it gives and takes besides batches are NumPy arrays or torch tensors and stay on its
    device; `chunkq.combine` works on either.
    """

    device: str
    any_batch: bool = False
    """Whether fewer items than in the first batch cost less: nothing is prepared for one size."""

    @abstractmethod
    def __call__(self, batch: Any) -> Array:
        """Run the network, between its protected steps, on (N, *model_input_shape) of any dtype.

        The batch is an array on the host, or what this runtime's feed sent. It is cast to the
        model's dtype on the device, and may be changed: networks and steps may work in place.
        Returns whatever shape comes out, float32 or better; it may lie in the batch's memory.
        """

    @abstractmethod
    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Return float32 zeros on the device."""

    @abstractmethod
    def to_device(self, array: npt.NDArray[Any]) -> Array:
        """Return a host array on the device; shared, not copied, where that is the host."""

    def feed(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> BatchFeed:
        """Return where to write batches of at most this shape, all zeros at first."""
        return BatchFeed(shape, dtype)

    def fetch(self, arrays: Sequence[Array]) -> Fetched | None:
        """Start results on their way to the host; None where nothing is gained by that."""
        return None

    @abstractmethod
    def is_out_of_memory(self, error: BaseException) -> bool:
        """Tell whether an error of `__call__` means that the batch did not fit."""

    def device_bytes(self) -> int | None:
        """Return the most memory so far allocated on a device of its own; None on the host."""
        return None

    def tile_norms(self) -> tuple[str, ...]:
        """Return the names of layers that normalise by statistics of the tile itself.

        With them a voxel's result depends on all of the patch, wherever it lies.
        """
        return ()

    @abstractmethod
    def close(self) -> None:
        """Let go of the device's memory."""


RUNTIMES: MappingProxyType[str, str] = MappingProxyType(
    {
        "torch": "chunkq_worker.runtimes.torch:load",
        "tensorflow": "chunkq_worker.runtimes.tensorflow:load",
        "onnx": "chunkq_worker.runtimes.onnx:load",
        "numpy": "chunkq_worker.runtimes.numpy:load",
    }
)
"""Name -> loader, `(ModelConfig, Steps, threads or None) -> Runtime`."""
Loader = Callable[[ModelConfig, Steps, int | None], Runtime]


def load_runtime(model: ModelConfig, steps: Steps, threads: int | None) -> Runtime:
    """Load a network; raises ModelError in one line, also where the extra is not installed."""
    module, _, name = RUNTIMES[model.runtime].partition(":")
    try:
        loader: Loader = getattr(import_module(module), name)
    except ImportError as error:
        # What runtime numpy needs is no extra.
        package = "chunkq" if model.runtime == "numpy" else f"chunkq[{model.runtime}]"
        raise ModelError(
            f"model_config.runtime: {model.runtime} is not installed here ({error}); "
            f"pip install '{package}'"
        ) from None
    return loader(model, steps, threads)


def not_one_array(outputs: Any, kind: str) -> ModelError:
    """Return the error for a network that returned something else than one tensor or array."""
    names = f" of {', '.join(sorted(map(str, outputs)))}" if isinstance(outputs, dict) else ""
    return ModelError(
        f"the network returned {type(outputs).__name__}{names}, not one {kind}; wrap it so that "
        "it returns the prediction alone"
    )
