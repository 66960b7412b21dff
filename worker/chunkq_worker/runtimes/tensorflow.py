"""The runtime of TensorFlow and Keras."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq import buffers
from chunkq.combine import Array
from chunkq.errors import ModelError
from chunkq.job import ModelConfig
from chunkq_worker.runtimes.base import Runtime, not_one_array
from chunkq_worker.runtimes.tensorflow_files import LOADERS, Network
from chunkq_worker.runtimes.tensorflow_import import tf, without_log_output
from chunkq_worker.runtimes.tensorflow_reading import shape_problem
from chunkq_worker.steps import KEY, Steps

OUT_OF_MEMORY = ("oom when allocating", "failed to allocate memory", "out of memory")
"""What errors of a lack of memory say; TensorFlow has the same type for other resources."""
NOT_COPIED = "Dst tensor is not initialized"
"""What TensorFlow says where there was no memory on a GPU to copy a batch to."""
log = logging.getLogger("chunkq.worker")


class TensorFlowRuntime(Runtime):
    """A network as a graph, traced for one shape of batch at a time.

    The layout is the network's own: it is given (N, *model_input_shape) as it is, and must give
    (N, *model_output_shape), or `postprocessing_protected` makes that of it. Protected steps run
    outside the graph and are given tf.Tensors with values. Results are NumPy arrays that share
    the tensors' memory; from a GPU they are torch tensors, which share it too, if torch is there
    with CUDA, and else are copied to the host.
    """

    def __init__(self, network: Network, model: ModelConfig, steps: Steps) -> None:
        self.device, self._steps = model.device, steps
        self._network: Network | None = network
        self._dtype = tf.dtypes.as_dtype(model.dtype)
        self._place = "/GPU:0" if model.device == "cuda" else "/CPU:0"
        self._torch = _torch_with_cuda() if model.device == "cuda" else None
        self._traced: tuple[Any, Any] = (None, None)

    def prepare(self, batch: npt.NDArray[Any]) -> None:
        """Build the network on a batch (N, *model_input_shape) and load its weights."""
        with tf.device(self._place):
            given = self._cast(batch)
            with self._explained(given):
                self._loaded().prepare(given)

    @override
    def __call__(self, batch: npt.NDArray[Any]) -> Array:
        if self._torch is not None:
            # What torch still does with the last result must not meet TensorFlow's next one.
            self._torch.cuda.current_stream().synchronize()
        with tf.device(self._place):
            given = self._cast(batch)
            if self._steps.preprocessing_protected is not None:
                given = tf.convert_to_tensor(self._steps.preprocessing_protected(given))
            outputs = _alone(self._forward(given))
            if self._steps.postprocessing_protected is not None:
                outputs = tf.convert_to_tensor(self._steps.postprocessing_protected(outputs))
            if outputs.dtype != tf.float64:
                outputs = tf.cast(outputs, tf.float32)
        return self._as_array(outputs)

    def _cast(self, batch: npt.NDArray[Any]) -> Any:
        return tf.cast(tf.convert_to_tensor(batch), self._dtype)

    def _forward(self, given: Any) -> Any:
        shape = (tuple(given.shape), given.dtype)
        if self._traced[0] != shape:
            self._traced = (None, None)  # the graph of another batch size need not stay
            self._traced = (shape, self._trace(given))
        return self._traced[1](given)

    def _trace(self, given: Any) -> Any:
        """Return the network as a graph for this shape, built and with its weights."""
        network = self._loaded()
        with self._explained(given):
            network.prepare(given)
            spec = tf.TensorSpec(given.shape, given.dtype)
            # Keras itself runs networks without autograph.
            return tf.function(network, autograph=False).get_concrete_function(spec)

    def _loaded(self) -> Network:
        if self._network is None:
            raise ModelError("the network was closed already")
        return self._network

    @contextmanager
    def _explained(self, given: Any) -> Iterator[None]:
        """Turn what a network raises that cannot take such a batch into one line."""
        try:
            yield
        except ModelError:
            raise
        except Exception as error:
            if self.is_out_of_memory(error):
                raise
            hint = _hint(self._loaded().takes, given.shape)
            raise ModelError(shape_problem(error, given.shape) + hint) from error

    def _as_array(self, outputs: Any) -> Array:
        if self._torch is not None:
            tf.test.experimental.sync_devices()  # torch has streams of its own
            taken = self._torch.from_dlpack(tf.experimental.dlpack.to_dlpack(outputs))
            return taken.to("cuda")  # a last operation may have run on the host
        array = np.asarray(outputs)
        # What TensorFlow shares cannot be written to, and a step may want to.
        return array if self._steps.postprocessing is None else array.copy()

    @override
    def zeros(self, shape: tuple[int, ...]) -> Array:
        if self._torch is not None:
            return self._torch.zeros(shape, dtype=self._torch.float32, device="cuda")
        return buffers.zeros(shape, np.float32)

    @override
    def to_device(self, array: npt.NDArray[Any]) -> Array:
        if self._torch is not None:
            return self._torch.as_tensor(array, device="cuda")
        return array

    @override
    def is_out_of_memory(self, error: BaseException) -> bool:
        if isinstance(error, tf.errors.ResourceExhaustedError):
            return any(words in str(error).lower() for words in OUT_OF_MEMORY)
        if isinstance(error, tf.errors.InternalError):
            return NOT_COPIED in str(error)
        if self._torch is not None and isinstance(error, self._torch.cuda.OutOfMemoryError):
            return True
        return isinstance(error, MemoryError)

    @override
    def device_bytes(self) -> int | None:
        if self.device != "cuda":
            return None
        return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])

    @override
    def tile_norms(self) -> tuple[str, ...]:
        return self._network.tile_norms() if self._network is not None else ()

    @override
    def close(self) -> None:
        """Let go of the network; TensorFlow keeps the memory for the next one."""
        self._network, self._traced = None, (None, None)
        gc.collect()  # graphs and models refer to each other


def load(model: ModelConfig, steps: Steps, threads: int | None) -> Runtime:
    """Load the network a job names; raises ModelError in one line.

    TensorFlow takes the number of threads and whether to see GPUs once per process, when it is
    first used. A later job of the process that wants other threads is computed with those of the
    first, and a warning; one on `cpu` is kept on the CPU; one on `cuda` after one on `cpu` is
    refused.
    """
    with without_log_output():
        _start(model.device, threads)
    with tf.device("/GPU:0" if model.device == "cuda" else "/CPU:0"):
        runtime = TensorFlowRuntime(LOADERS[model.type](model), model, steps)
    inside = (steps.preprocessing, steps.preprocessing_protected, model.join_dim)
    if inside == (None, None, None):  # else only the first batch shows what the network is given
        runtime.prepare(np.zeros((1, *model.model_input_shape), model.dtype))
    return runtime


def _start(device: str, threads: int | None) -> None:
    gpus, visible = tf.config.list_physical_devices("GPU"), tf.config.get_visible_devices("GPU")
    if device == "cuda":
        if not gpus:
            built = "" if tf.test.is_built_with_cuda() else ", being built without CUDA"
            raise ModelError(
                f"model_config.device: cuda, but TensorFlow sees no GPU here{built}; start the "
                "worker on a GPU node with a TensorFlow for GPUs, or set device: cpu"
            )
        if not visible and not _before_start(tf.config.set_visible_devices, gpus, "GPU"):
            raise ModelError(
                "model_config.device: cuda, but this process began with a network on device: cpu, "
                "which hid the GPUs from TensorFlow; work on this job alone, with --job"
            )
        for gpu in visible or gpus:
            _before_start(tf.config.experimental.set_memory_growth, gpu, True)
    elif visible:
        _before_start(tf.config.set_visible_devices, [], "GPU")
    if threads is None or tf.config.threading.get_intra_op_parallelism_threads() == threads:
        return
    if _before_start(tf.config.threading.set_intra_op_parallelism_threads, threads):
        _before_start(tf.config.threading.set_inter_op_parallelism_threads, 1)
    else:
        log.warning(
            "threads: TensorFlow keeps the %d threads that this process began with, not %d; the "
            "last bits of results may differ",
            tf.config.threading.get_intra_op_parallelism_threads(),
            threads,
        )


def _before_start(setting: Any, *values: Any) -> bool:
    """Change a setting of TensorFlow; False where it has started already, and keeps it."""
    try:
        setting(*values)
    except RuntimeError:
        return False
    return True


def _alone(outputs: Any) -> Any:
    """Return the one tensor that a network gave; models of one output may give a list of it."""
    given = outputs
    if isinstance(given, dict):
        given = list(given.values())
    if isinstance(given, (list, tuple)) and len(given) == 1:
        given = given[0]
    if not tf.is_tensor(given) or not given.shape.rank:
        raise not_one_array(outputs, "tensor")
    return given


def _hint(takes: Any, given: Any) -> str:
    """Say what to do about a batch that a network of a declared shape does not take."""
    if takes is None:
        return ""
    wanted, shape = list(takes[0]), list(given)
    said = f"; it takes {[n if n else 'any' for n in wanted]}"
    last = [shape[0], *shape[2:], *shape[1:2]]
    if len(wanted) == len(last) and all(w in (None, n) for w, n in zip(wanted, last, strict=True)):
        said += f", channels last: move them there with preprocessing_protected of {KEY}"
        if wanted[-1] == 1:
            said += ", or leave the 1 out of model_input_shape"
    return said


def _torch_with_cuda() -> Any:
    """Return torch where it can take over arrays on the GPU, else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None
