"""The TensorFlow runtime: Keras models and SavedModels."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq.blend.combine import Array
from chunkq.errors import ModelError
from chunkq.job.model_config import ModelConfig
from chunkq.system import buffers
from chunkq_worker.runtimes.axis_moves import Axes, Move, format_axes
from chunkq_worker.runtimes.base import Runtime, not_real
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.network_layout import NetworkLayout
from chunkq_worker.runtimes.returned_values import HeadReader
from chunkq_worker.runtimes.tensorflow_files import LOADERS, Network
from chunkq_worker.runtimes.tensorflow_import import tf, without_log_output
from chunkq_worker.runtimes.tensorflow_objects import object_network
from chunkq_worker.runtimes.tensorflow_reading import shape_problem
from chunkq_worker.steps import Steps

OUT_OF_MEMORY = ("oom when allocating", "failed to allocate memory", "out of memory")
"""Parts of a ResourceExhaustedError for memory; TensorFlow raises it for other resources too."""
FAILED_COPY = "Dst tensor is not initialized"
"""TensorFlow's message if a batch does not fit in the memory of the GPU."""
log = logging.getLogger("chunkq.worker")


class TensorFlowRuntime(Runtime):
    """Runs a network as a graph that is traced for one batch shape at a time.

    The graph moves the channels to where the network has them, and those of its output to the
    front. The protected steps run outside the graph and get eager tensors. Results are NumPy arrays
    that share memory with the tensors. On a GPU, results are torch tensors that share memory if
    torch with CUDA is installed; otherwise they are copied to the host.
    """

    reads_device_memory = False

    def __init__(
        self, model: ModelConfig, steps: Steps, shapes: ItemShapes, network: Any = None
    ) -> None:
        """Load the network on the current device, or use the caller's object `network`."""
        self._object = network
        self.device, self._steps, self._model, self._shapes = model.device, steps, model, shapes
        self._network: Network | None = None
        self._reader = HeadReader(
            shapes.names,
            _is_tensor,
            "tensor",
            has_step=steps.postprocessing_protected is not None,
        )
        self._load_network()
        self._moves: dict[Axes, Move] = {}
        self._dtype = tf.dtypes.as_dtype(model.dtype)
        self._tf_device = "/GPU:0" if model.device == "cuda" else "/CPU:0"
        self._allows_tf32 = model.allows_tf32
        self._torch = _torch_with_cuda() if model.device == "cuda" else None
        self._traced: tuple[Any, Any] = (None, None)
        if self._torch is not None:
            from chunkq_worker.runtimes.staging import Cuda

            self.accelerator = Cuda()

    def _load_network(self) -> None:
        if self._object is None:
            self._network = LOADERS[self._model.type](self._model)
        else:
            self._network = object_network(self._object, self._model)
        spec = self._network.input_spec
        axes = None if spec is None or spec[0] is None else tuple(spec[0][1:])
        self._layout = NetworkLayout(self._shapes, axes, self._steps)

    def prepare(self, batch: npt.NDArray[Any]) -> None:
        """Build the network with a batch and load its weights, if it declares its input shape."""
        with tf.device(self._tf_device):
            inputs = self._cast(batch)
            with self._one_line_errors(inputs):
                moves = self._layout.input_moves(tuple(inputs.shape[1:]))
                if len(moves) == 1:
                    self._open_network().prepare(moves[0].apply(inputs, tf.transpose))

    @override
    def __call__(self, batch: npt.NDArray[Any]) -> tuple[Array, ...]:
        if self._torch is not None:
            # torch may still read the last result, whose memory TensorFlow can reuse.
            self._torch.cuda.current_stream().synchronize()
        with tf.device(self._tf_device), _tf32(allowed=self._allows_tf32):
            inputs = self._cast(batch)
            if self._steps.preprocessing_protected is not None:
                inputs = tf.convert_to_tensor(self._steps.preprocessing_protected(inputs))
            if self._watch is not None:
                self._watch.receive(inputs.numpy())
            outputs = self._forward(inputs)
            if self._steps.postprocessing_protected is not None:
                returned = self._reader.from_step(self._steps.postprocessing_protected(outputs))
                outputs = [tf.convert_to_tensor(output) for output in returned]
            self.unused_heads = self._reader.unused
            self.output_dtypes = tuple(output.dtype.name for output in outputs)
            floats = [_as_float(output) for output in outputs]
        return self._as_arrays(floats)

    def _cast(self, batch: npt.NDArray[Any]) -> Any:
        return tf.cast(tf.convert_to_tensor(batch), self._dtype)

    def _forward(self, inputs: Any) -> Any:
        key = _key(inputs)
        if self._traced[0] != key:
            self._traced = (None, None)  # release the graph of the last batch shape first
            with self._one_line_errors(inputs):
                move = self._move_for(inputs)
                if self._traced[0] != key:
                    self._trace(inputs, move)
        return self._traced[1](inputs)

    def _move_for(self, inputs: Any) -> Move:
        """Return how the axes of a batch change before the network; try what it does not declare.

        An attempt in another order builds a network of a class wrongly, so it is loaded again.
        """

        def reset() -> None:
            self._traced = (None, None)
            self._load_network()

        item: Axes = tuple(inputs.shape[1:])
        if item not in self._moves:
            self._moves[item] = self._layout.choose(
                self._layout.input_moves(item),
                lambda move: self._trace(inputs, move),
                is_final=self.is_out_of_memory,
                reset=reset,
            )
        return self._moves[item]

    def _trace(self, inputs: Any, move: Move) -> Sequence[Axes]:
        """Build the network, load its weights and trace its graph for this batch shape.

        Return the shape of an item of each head, or of each array that a step gets. Unknown lengths
        are None.
        """
        network, layout, item = self._open_network(), self._layout, tuple(inputs.shape[1:])
        has_step = self._steps.postprocessing_protected is not None
        network.prepare(move.apply(inputs, tf.transpose))
        outputs: list[Axes] = []

        def moved(tensor: Any, number: int = 0) -> Any:
            if not _is_tensor(tensor) or tensor.shape.rank is None:
                outputs.append(())
                return tensor
            outputs.append(tuple(tensor.shape[1:]))
            move_back = layout.output_move(item, move, outputs[-1], number)
            return move_back.apply(tensor, tf.transpose)

        def forward(batch: Any) -> Any:
            outputs.clear()
            returned = self._reader.from_network(network(move.apply(batch, tf.transpose)))
            if has_step:
                return tf.nest.map_structure(moved, returned)
            return tuple(moved(tensor, number) for number, tensor in enumerate(returned))

        spec = tf.TensorSpec(inputs.shape, inputs.dtype)
        # Keras, too, runs networks without autograph.
        graph = tf.function(forward, autograph=False).get_concrete_function(spec)
        self._traced = (_key(inputs), graph)
        return outputs

    def _open_network(self) -> Network:
        if self._network is None:
            raise ModelError("the network is closed")
        return self._network

    @contextmanager
    def _one_line_errors(self, inputs: Any) -> Iterator[None]:
        """Convert errors of a network that cannot process a batch to ModelError."""
        try:
            yield
        except ModelError:
            raise
        except Exception as error:
            if self.is_out_of_memory(error):
                raise
            hint = self._shape_hint(inputs.shape[0])
            written = list(self._shapes.written)
            raise ModelError(shape_problem(error, inputs.shape, written) + hint) from error

    def _shape_hint(self, batch_size: int) -> str:
        """Return the end of a message: the shape that the network declares, and advice."""
        spec = self._open_network().input_spec
        if spec is None or spec[0] is None:
            return ""
        hint = f"; the network declares an input of {format_axes(tuple(spec[0]))}"
        shape = self._layout.shape_to_set()
        if spec[0][0] not in (None, batch_size):
            return f"{hint}; set max_batch_size: {spec[0][0]}"
        is_set = shape in (None, list(self._shapes.written))
        return hint if is_set else f"{hint}; set model_input_shape: {shape}"

    def _as_arrays(self, outputs: Sequence[Any]) -> tuple[Array, ...]:
        if self._torch is not None:
            tf.test.experimental.sync_devices()  # torch uses other streams
            shared = map(tf.experimental.dlpack.to_dlpack, outputs)
            # The last operation may have run on the host.
            return tuple(self._torch.from_dlpack(tensor).to("cuda") for tensor in shared)
        arrays = [np.asarray(output) for output in outputs]
        # Arrays that share memory with TensorFlow are read-only, but a step can modify its input.
        return tuple(arrays if self._steps.postprocessing is None else [a.copy() for a in arrays])

    @override
    def zeros(self, shape: tuple[int, ...]) -> Array:
        return buffers.zeros(shape, np.float32)

    @override
    def to_device(self, array: npt.NDArray[Any]) -> Array:
        if self._torch is not None:
            return self._torch.as_tensor(array, device="cuda")
        return array

    @override
    def is_out_of_memory(self, error: BaseException) -> bool:
        if isinstance(error, tf.errors.ResourceExhaustedError):
            return any(text in str(error).lower() for text in OUT_OF_MEMORY)
        if isinstance(error, tf.errors.InternalError):
            return FAILED_COPY in str(error)
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
    def created_values(self) -> Sequence[tuple[str, Any]]:
        return () if self._network is None else self._network.created_values()

    @override
    def recreated_values(self) -> Sequence[tuple[str, Any]]:
        with tf.device(self._tf_device):
            return () if self._network is None else self._network.recreated_values()

    @override
    def close(self) -> None:
        """Release the network. TensorFlow keeps the memory for the next one."""
        self._network, self._object, self._traced = None, None, (None, None)
        gc.collect()  # graphs and models form reference cycles


def load(
    model: ModelConfig,
    steps: Steps,
    threads: int | None,
    shapes: ItemShapes,
    *,
    network: Any = None,
) -> Runtime:
    """Load the network that the job names, or use the object `network`; or raise ModelError.

    TensorFlow reads the number of threads and the visible GPUs once per process, at first use. A
    later job with another number of threads logs a warning and uses the first number. A later job
    on `cpu` runs on the CPU. Raise ModelError for a job on `cuda` after one on `cpu`.
    """
    with without_log_output():
        _configure(model.device, threads)
    with tf.device("/GPU:0" if model.device == "cuda" else "/CPU:0"):
        runtime = TensorFlowRuntime(model, steps, shapes, network)
    has_step = (steps.preprocessing, steps.preprocessing_protected) != (None, None)
    item = [n for n in shapes.input if n is not None]
    if not has_step and len(item) == len(shapes.input):  # else the first batch decides the shape
        runtime.prepare(np.zeros((1, *item), model.dtype))
    return runtime


def _configure(device: str, threads: int | None) -> None:
    """Set the device and the number of threads of TensorFlow for this process."""
    gpus, visible = tf.config.list_physical_devices("GPU"), tf.config.get_visible_devices("GPU")
    if device == "cuda":
        if not gpus:
            build = "" if tf.test.is_built_with_cuda() else " (it is built without CUDA)"
            raise ModelError(
                f"model_config.device: cuda, but TensorFlow finds no GPU{build}; start the worker "
                "on a GPU node with a TensorFlow for GPUs, or set device: cpu"
            )
        if not visible and not _try_set(tf.config.set_visible_devices, gpus, "GPU"):
            raise ModelError(
                "model_config.device: cuda, but this process already ran a network on device: cpu "
                "with the GPUs disabled; run a worker for this job only, with --job"
            )
        for gpu in visible or gpus:
            _try_set(tf.config.experimental.set_memory_growth, gpu, True)
    elif visible:
        _try_set(tf.config.set_visible_devices, [], "GPU")
    if threads is None or tf.config.threading.get_intra_op_parallelism_threads() == threads:
        return
    if _try_set(tf.config.threading.set_intra_op_parallelism_threads, threads):
        _try_set(tf.config.threading.set_inter_op_parallelism_threads, 1)
    else:
        log.warning(
            "threads: TensorFlow in this process already uses %d threads, expected %d; the last "
            "bits of results can differ",
            tf.config.threading.get_intra_op_parallelism_threads(),
            threads,
        )


def _try_set(setter: Any, *values: Any) -> bool:
    """Change a setting of TensorFlow. Return False if TensorFlow has already started."""
    try:
        setter(*values)
    except RuntimeError:
        return False
    return True


def _as_float(output: Any) -> Any:
    """Return a tensor as float32 or float64. Raise ModelError unless it has real numbers."""
    dtype = output.dtype
    if not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
        raise not_real("the network", dtype.name)
    return output if dtype == tf.float64 else tf.cast(output, tf.float32)


def _is_tensor(value: Any) -> bool:
    return bool(tf.is_tensor(value) and value.shape.rank != 0)


def _key(inputs: Any) -> tuple[Any, ...]:
    """Return what the graph of a batch depends on."""
    return tuple(inputs.shape), inputs.dtype


@contextmanager
def _tf32(*, allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 on a GPU inside a `with` block, then restore the process's setting."""
    settings = tf.config.experimental
    previous = settings.tensor_float_32_execution_enabled()
    settings.enable_tensor_float_32_execution(allowed)
    try:
        yield
    finally:
        settings.enable_tensor_float_32_execution(previous)


def _torch_with_cuda() -> Any:
    """Return torch if it is installed and can use a GPU, else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None
