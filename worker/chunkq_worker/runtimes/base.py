"""Interface of the model runtimes: one loaded network on one device."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import Array
from chunkq.casts import REAL
from chunkq.errors import ModelError
from chunkq.install_hint import install_command
from chunkq.job.model_config import SLEAP, ModelConfig
from chunkq.plan.outputs import HeadName
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.steps import Steps
from chunkq_worker.value_watch import ValueWatch

if TYPE_CHECKING:
    from chunkq_worker.runtimes.staging import Accelerator


class BatchFeed:
    """Buffers for batches in host memory, and their transfer to the device.

    This class serves runtimes that read host memory: it has one buffer and copies nothing.
    """

    double_buffered: bool = False
    """Whether a batch can be written and sent while the previous one is computed."""

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self._array = np.zeros(shape, dtype)

    def buffer(self) -> npt.NDArray[Any]:
        """Return the array for the next batch, with the shape and dtype of the feed.

        Its previous contents are no longer needed.
        """
        return self._array

    def send(self, batch: npt.NDArray[Any]) -> Any:
        """Start the transfer of a batch and return the argument for `Runtime.__call__`.

        The batch is the first items of the array from `buffer`, or any other array.
        """
        return batch


class Runtime(ABC):
    """One loaded network on one device. Used by one thread at a time.

    Arrays are NumPy arrays or torch tensors; `chunkq.blend.combine` accepts both. With an
    `accelerator`, results are torch tensors in its memory, and batches can be if
    `reads_device_memory`.
    """

    device: str
    accelerator: Accelerator | None = None
    """The memory and streams of the device; None if results are in host memory."""
    reads_device_memory: bool = True
    """Whether batches can be in the memory of the `accelerator`."""
    output_dtypes: tuple[str, ...] = ("float32",)
    """Names of the dtypes of what the last call returned, as the network or a step returned it."""
    unused_heads: tuple[HeadName, ...] = ()
    """Heads that the network returned in the last call and that no output of the job names."""
    any_batch: bool = False
    """Whether smaller batches cost less, because the network is not compiled for one batch size."""
    _watch: ValueWatch | None = None
    draws_from_known_states: bool = False
    """Whether random numbers come from the states of `random_state.random_states`."""
    is_repeatable: bool = False
    """Whether a batch that has not changed these states gives the same outputs again."""

    @abstractmethod
    def __call__(self, batch: Any) -> tuple[Array, ...]:
        """Run the protected steps and the network on a batch (N, C, *P) or (N, *P), any dtype.

        Return one array for each of the heads in the `ItemShapes` of this runtime, in their order.
        `batch` is an array in host memory, the return value of this runtime's `BatchFeed.send`, or
        a tensor in the memory of the `accelerator`. It is cast to the model's dtype on the device.
        Networks and steps may modify it in place. A network with channels last gets and returns
        them there; the steps see channels first. The arrays are float32 or float64 of any shape,
        with an `accelerator` of any float dtype. They may share memory with the batch. Raise
        ModelError with `head_missing` if the network does not return one of the heads.
        """

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
        """Return zeros in host memory, in the kind of array that the runtime returns."""

    @abstractmethod
    def to_device(self, array: npt.NDArray[Any]) -> Array:
        """Return a host array on the device, without a copy if the device is the host."""

    def feed(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> BatchFeed:
        """Return a feed for batches of at most this shape. Its buffers start as zeros."""
        return BatchFeed(shape, dtype)

    @abstractmethod
    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether an error of `__call__` means that the batch did not fit in memory."""

    def device_bytes(self) -> int | None:
        """Return the peak memory allocated on the device in bytes, None if it is the host."""
        return None

    def tile_norms(self) -> tuple[str, ...]:
        """Return the names of layers that normalize with statistics of the current patch.

        With such layers every output voxel depends on the whole patch.
        """
        return ()

    def notes(self) -> Sequence[str]:
        """Return what the user should know about how the files of the network were read."""
        return ()

    def created_values(self) -> Sequence[tuple[str, Any]]:
        """Return values that the network's code has set and no file contains, with their names.

        See `created_values.check_created_values`. It is called after the first batch if the network
        is built with it.
        """
        return ()

    def recreated_values(self) -> Sequence[tuple[str, Any]]:
        """Create the network again; return the same values of the second one."""
        return ()

    def refresh(self) -> None:  # noqa: B027 - only a copy of the caller's object has something to do
        """Use the present weights of a network that the caller has passed as an object."""

    @contextmanager
    def watched_by(self, watch: ValueWatch) -> Iterator[None]:
        """Report each batch that the network receives to `watch` inside a `with` block."""
        self._watch = watch
        try:
            yield
        finally:
            self._watch = None

    @abstractmethod
    def close(self) -> None:
        """Release the network and its memory on the device."""


RUNTIMES: MappingProxyType[str, str] = MappingProxyType(
    {
        "torch": "chunkq_worker.runtimes.torch:load",
        "tensorflow": "chunkq_worker.runtimes.tensorflow:load",
        "onnx": "chunkq_worker.runtimes.onnx:load",
        "numpy": "chunkq_worker.runtimes.numpy:load",
        "sleap": "chunkq_worker.runtimes.sleap:load",
    }
)
"""Name -> loader, `(ModelConfig, Steps, threads or None, ItemShapes[, network=]) -> Runtime`.

That of `sleap` takes `(ModelConfig, PeaksConfig, threads or None)`.
"""
Loader = Callable[..., Runtime]
SLEAP_PYTHON = (3, 14)
"""The first version of Python that sleap-nn does not support."""


def load_runtime(
    model: ModelConfig,
    steps: Steps,
    threads: int | None,
    shapes: ItemShapes | None = None,
    *,
    network: Any = None,
) -> Runtime:
    """Load a network: that of the job, or the object `network`.

    Batches and results have channels first, as in `shapes`. By default, all entries of
    `model_input_shape` are axes of the volume. Raise ModelError if the network is unusable or its
    framework is not installed. ONNX networks are files.
    """
    loader, shapes = import_runtime(model.runtime), shapes or ItemShapes.of(model)
    if network is None:
        return loader(model, steps, threads, shapes)
    return loader(model, steps, threads, shapes, network=network)


def import_runtime(runtime: str) -> Loader:
    """Import a runtime with its framework. Raise ModelError if that is not installed."""
    module, _, name = RUNTIMES[runtime].partition(":")
    try:
        loader: Loader = getattr(import_module(module), name)
    except ImportError as error:
        # Runtime numpy has no extra: its packages are dependencies of chunkq.
        command = install_command("" if runtime == "numpy" else runtime)
        if runtime == SLEAP and sys.version_info >= SLEAP_PYTHON:
            command += "` with Python below 3.14, and start the worker with it: `chunkq work"
        raise ModelError(
            f"model_config.runtime: {runtime} is not installed ({error}); run `{command}`"
        ) from None
    return loader


def real_numbers(values: Any, source: str) -> npt.NDArray[Any]:
    """Return an array of real numbers as float32 or float64; `source` is what returned it.

    Wider floats are float64, limited to its range. Raise ModelError for other values.
    """
    array = np.asarray(values)
    if array.dtype.kind not in REAL:
        raise not_real(source, array.dtype)
    is_wide = array.dtype.kind == "f" and array.dtype.itemsize >= 8
    if is_wide and array.dtype.itemsize > 8:
        limit = np.finfo(np.float64).max
        array = np.where(np.isfinite(array), array.clip(-limit, limit), array)
    return array.astype(np.float64 if is_wide else np.float32, copy=False)


def not_real(source: str, dtype: Any) -> ModelError:
    """Return the error for outputs that are no real numbers; `source` is what returned them."""
    return ModelError(f"{source} returned dtype {dtype}, expected real numbers; return float32")
