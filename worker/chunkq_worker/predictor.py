"""Run a network on volumes from Python, without a job file, a job folder or a queue."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import reduce_and_cast
from chunkq.blend.prediction import Prediction
from chunkq.blend.streaming import regions
from chunkq.blend.sums import Contribution
from chunkq.create import check_job, create_job
from chunkq.errors import ChunkqError, JobError, ModelError
from chunkq.finalize import finalize_job
from chunkq.job.events import progress_sink
from chunkq.job.job_file import Job, load_job, parse_job
from chunkq.job.record import JobRecord
from chunkq.job.resolve import resolve
from chunkq.paths import absolute
from chunkq.plan.plan import Chunk, Index, Plan, Volume
from chunkq.queue.registry import queue_url
from chunkq.storage.array import Array
from chunkq.storage.padded_reading import read_padded
from chunkq_worker.device import get_device
from chunkq_worker.inference_engine import ENGINES_CACHED, InferenceEngine
from chunkq_worker.inline import compute_inline, pipelined
from chunkq_worker.inputs import Input, as_paths, open_inputs, read_all, volume_of
from chunkq_worker.model_defaults import half_strides, job_for_model

Progress = Callable[[int, int], None]
Regions = Generator[tuple[tuple[slice, ...], npt.NDArray[Any]], None, None]
"""Yields regions of the output as slices, with their final values."""
PLACEHOLDER = "memory"
"""Value of `input` and `output` in a predictor's job."""
IN_FLIGHT = 2
"""Chunks in memory: one is read, or used by the caller, while the other is computed."""


def _quiet(done: int, total: int) -> None:
    pass


def _nothing() -> None:
    """Return the result of a chunk without patches."""


class Predictor:
    """A network that predicts volumes of any shape, with the keys of a job file.

    A volume is an array (*S) with 1 to 4 spatial axes, and with channels if `axes` names them:
    NumPy, torch, an argument of `np.asarray`, or an array-like that returns NumPy arrays when
    sliced (zarr, h5py, dask). It can also be the path of an array that a job can read. If
    `model_config.join_dim` is set, pass a list of volumes of the same shape. The network is loaded
    onto `model_config.device` for the first volume and kept until `close`; the predictor is a
    context manager.

    The output is byte-identical to that of a job with the same keys and number of threads.

    Thread-safe: calls from several threads, and of several predictors, alternate chunk by chunk
    on the single device thread of the process. Do not call `close` during other calls.
    """

    def __init__(self, job: Job, *, half_strides: bool = False) -> None:
        """Use `from_config` or `from_model`."""
        self._job, self._half_strides = job, half_strides
        self._hashes = JobRecord.create(job, ()).file_hashes
        self._engines: OrderedDict[Volume, InferenceEngine] = OrderedDict()
        self._closed = False

    @classmethod
    def from_config(cls, config: str | Path | Mapping[str, Any]) -> Predictor:
        """Create a predictor from a job: the path of a job file, or a mapping with its keys.

        `input` and `output` are not used and may be missing. Relative paths are relative to the
        job file, or for a mapping to the working directory. Raise JobError with one line per
        mistake.
        """
        return cls(load_job(config, input=PLACEHOLDER, output=PLACEHOLDER))

    @classmethod
    def from_model(
        cls, path: str | Path, *, model_input_shape: Sequence[int], **keys: Any
    ) -> Predictor:
        """Create a predictor from a model file.

        Supported are TorchScript, torch.export (.pt2), ONNX, Keras and SavedModel.
        `model_input_shape` is the shape of one item of a batch: the patch, with a leading 1 if the
        network has a channel axis. Set `model_output_shape`, channels first, if the output has
        another shape. Every other keyword is a key of the job file or of its `model_config`. By
        default, patches overlap by half (`sliding_window`, `weight_gaussian`), overlaps are
        averaged (`combine: weighted_avg`), and batches of four patches run on the CPU.

        Raise JobError or ModelError with one line per mistake. If the format of the file cannot be
        detected, set `runtime` and `type`.
        """
        keys["model_input_shape"] = list(model_input_shape)
        values = job_for_model(absolute(str(path), Path.cwd()), keys)
        uses_half_strides = values["inference_type"] == "sliding_window" and "strides" not in values
        if uses_half_strides:  # replaced once a volume's number of axes is known
            values["strides"] = [1]
        return cls(
            load_job(values, input=PLACEHOLDER, output=PLACEHOLDER), half_strides=uses_half_strides
        )

    @property
    def job(self) -> Job:
        """Return the job; its `input` and `output` are placeholders."""
        return self._job

    def plan(
        self,
        shape: Sequence[int],
        dtype: npt.DTypeLike | Sequence[npt.DTypeLike] = "float32",
    ) -> Plan:
        """Return the plan for a volume of this shape: chunks, patches, `output_shape`, `costs`.

        `dtype` is the dtype of the volume, or a list with one dtype per input. The network is not
        loaded. Raise JobError with one line per mismatch between the job and the volume.
        """
        has_several = isinstance(dtype, (list, tuple))
        dtypes: Any = dtype if has_several else [dtype]
        length = tuple(int(n) for n in shape)
        volume = Volume.joined([Volume(length, str(np.dtype(name))) for name in dtypes])
        names = [f"array {n}" for n in range(len(dtypes))] if has_several else ["the array"]
        return resolve(self._job_for(names, volume), volume)

    def predict(
        self,
        volume: Input | Sequence[Input],
        *,
        axes: str | None = None,
        progress: Progress = _quiet,
    ) -> Prediction:
        """Run the network on an entire volume and return the result in memory.

        `axes` has one letter of c, z, y, x per axis of the volume, such as "yxc" for colour.
        `progress` is called with (chunks done, all chunks). Raise JobError if the volume does not
        match the job, ModelError if the network cannot be loaded or does not match its
        declaration, and PredictionError if it returns NaN or infinity.
        """
        arrays = open_inputs(volume, axes, allow_empty=self._job.allow_empty)
        plan = self._plan(arrays)
        is_averaged = plan.output.is_average
        dtype = plan.output.label_dtype
        stored = np.zeros(plan.output_shape, plan.output_dtype)
        labels = np.zeros(plan.volume.shape, dtype) if is_averaged else stored
        for region, values in self._stream(plan, arrays, progress):
            stored[region] = values
            if is_averaged:
                averages = values.reshape(plan.channels, *values.shape[-plan.rank :])
                labels[region[-plan.rank :]] = reduce_and_cast(averages, "soft", dtype)
        inputs = tuple(read_all(array) for array in arrays)
        probabilities = stored.reshape(plan.channels, *plan.volume.shape) if is_averaged else None
        return Prediction(labels, inputs if len(inputs) > 1 else inputs[0], probabilities)

    def predict_streaming(
        self,
        volume: Input | Sequence[Input],
        *,
        axes: str | None = None,
        progress: Progress = _quiet,
    ) -> Regions:
        """Return a generator that yields each region of the result as soon as it is final.

        Each item is `(region, values)`: slices of an array of shape `plan(...).output_shape`
        ((*S), or (C, *S) for averages of a network with channels) and the values in that region,
        in `plan(...).output_dtype`. Every voxel is yielded exactly once, block by block, the last
        axis fastest. Within a block, the voxels that only its own patches cover come first.

        Two chunks are in memory, and the unfinished bands along one slice of blocks across the
        first axis. A path or a zarr array is read chunk by chunk. The arguments are checked in
        this call, which raises like `predict`; the network runs while the generator is consumed.
        """
        arrays = open_inputs(volume, axes, allow_empty=self._job.allow_empty)
        return self._stream(self._plan(arrays), arrays, progress)

    def predict_to_store(
        self,
        volume: Input | Sequence[Input],
        output: str | Path,
        *,
        axes: str | None = None,
        overwrite: bool = False,
        progress: Progress = _quiet,
    ) -> dict[str, Any]:
        """Write the result as a sealed OME-Zarr image with its job folder; return the report.

        Run the job with this input in this process, without a queue. If the volume is a path, an
        interrupted call continues when it is repeated. An array is first written to a temporary
        `.npy` file beside the output; then an existing output is replaced only with `overwrite`,
        which deletes it first. Raise like `predict`, and StoreError if a path cannot be read or
        written.
        """
        arrays = open_inputs(volume, axes, allow_empty=self._job.allow_empty)
        plan = self._plan(arrays)  # raises before an array is copied
        output = str(output)
        with as_paths(volume, arrays, output) as paths:
            values = self._job_for(paths, plan.volume).as_dict()
            if axes is not None:
                values["input"] = [{"path": path, "axes": axes} for path in paths]
            checked = check_job(load_job(values, output=output))
            # The queue for the chunks that remain if this call is interrupted.
            queue = queue_url(None, self._job.queue)
            job = create_job(checked, queue=queue, overwrite=overwrite)
            if job.record.file_hashes != self._hashes:
                raise ModelError(
                    "the model's files have changed since the predictor was created; create a new "
                    "predictor"
                )
            device = get_device()
            engine = device.run(lambda: self._engine(job.items[0].plan)).result()
            with device.compute_with(job, engine):
                worker = compute_inline(job, progress_sink(progress))
            return finalize_job(job, worker=worker)

    def close(self) -> None:
        """Release the network and the device's memory; do nothing if that is done already."""
        self._closed = True
        get_device().run(self._release).result()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _job_for(self, names: Sequence[str], volume: Volume) -> Job:
        values = self._job.as_dict() | {"input": list(names)}
        if self._half_strides:
            values["strides"] = half_strides(self._job.model, volume)
        return parse_job(values)

    def _plan(self, arrays: Sequence[Array]) -> Plan:
        names = [array.path for array in arrays]
        if len(names) > 1 and self._job.model.join_dim is None:
            raise JobError(
                f"input: found {len(names)} volumes without model_config.join_dim; set it to the "
                "axis along which to stack them, or predict the volumes one by one"
            )
        volume = volume_of(arrays)
        return resolve(self._job_for(names, volume), volume)

    def _stream(self, plan: Plan, arrays: Sequence[Array], progress: Progress) -> Regions:
        self._check_open()
        for box, values in regions(plan, self._computed(plan, arrays, progress)):
            region = plan.output_box(box)
            yield region.slices((0,) * len(region.shape)), values

    def _computed(
        self, plan: Plan, arrays: Sequence[Array], progress: Progress
    ) -> Iterator[tuple[Chunk, Contribution | None]]:
        """Yield every chunk with its contribution, while the next chunk is computed.

        The contribution is None for a chunk without patches.
        """
        job, device, total, done = self._job, get_device(), plan.costs.chunks, 0

        def start(index: Index) -> Future[Any]:
            chunk = plan.chunk(index)
            if not chunk.is_active:
                return device.run(lambda: _nothing)
            halos = [
                read_padded(array, chunk.halo, job.pad_mode, job.pad_value) for array in arrays
            ]
            return device.start(lambda: self._engine(plan), chunk, halos)

        progress(0, total)
        started = pipelined(start, plan.indices(), IN_FLIGHT)
        for index, finish in zip(plan.indices(), started, strict=True):
            yield plan.chunk(index), finish()
            if plan.is_active(index):
                done += 1
                progress(done, total)

    def _engine(self, plan: Plan) -> InferenceEngine:
        """Return the engine for a plan's volume. Call it on the device thread only."""
        self._check_open()
        engine = self._engines.get(plan.volume)
        if engine is None:
            if self._engines:
                engine = next(iter(self._engines.values())).for_plan(plan)
            else:
                engine = InferenceEngine(JobRecord(self._job, (), self._hashes), plan)
            self._engines[plan.volume] = engine
        self._engines.move_to_end(plan.volume)
        while len(self._engines) > ENGINES_CACHED:
            self._engines.popitem(last=False)
        return engine

    def _release(self) -> None:
        engines = list(self._engines.values())
        self._engines.clear()
        if engines:
            engines[0].close()

    def _check_open(self) -> None:
        if self._closed:
            raise ChunkqError("the predictor is closed; create a new one")
