"""A network over volumes in memory: the worker's machinery without files or queue."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

import chunkq
from chunkq.blend import Contribution
from chunkq.combine import label_dtype, reduce_and_cast
from chunkq.errors import ChunkqError, ModelError
from chunkq.executors import queue_url
from chunkq.finalize import finalize_job
from chunkq.job import Job, load_job, parse_job
from chunkq.job_handle import open_job
from chunkq.paths import absolute
from chunkq.plan import Chunk, Index, Plan, Volume
from chunkq.prediction import Prediction
from chunkq.record import JobRecord
from chunkq.resolve import resolve
from chunkq.stores import Array, read_padded
from chunkq.streaming import output_slices, regions
from chunkq_worker.inference_engine import ENGINES_CACHED, InferenceEngine, get_device
from chunkq_worker.inline import NoQueue, compute_inline, pipelined
from chunkq_worker.inputs import Input, as_paths, open_inputs, read_all, volume_of
from chunkq_worker.model_defaults import half_strides, job_for_model

Progress = Callable[[int, int], None]
Regions = Generator[tuple[tuple[slice, ...], npt.NDArray[Any]], None, None]
"""Where, and the final values there."""
NOWHERE = "memory"
"""Stands for the input and output of a job that has none."""
IN_FLIGHT = 2
"""Chunks in memory: one is read, or taken by the caller, while the other is computed."""


def _quiet(done: int, total: int) -> None:
    pass


class Predictor:
    """A network ready to run over volumes of any shape, the way a job file says.

    A volume is an array (*S) of 1 to 4 spatial axes: NumPy, torch, or anything that
    `np.asarray` takes or that gives NumPy arrays when sliced (zarr, h5py, dask); or the path of
    what a job can read. Where `model_config.join_dim` is set it is a list of volumes of one
    shape. The network is loaded with the first volume, onto `model_config.device`, and kept
    until `close`; use it as a context manager.

    The same voxels come out, to the last byte, as from a job with the same keys and threads.

    Thread-safe: calls from several threads, and of several predictors, take turns chunk by chunk
    on the process's one device thread. Close it when none is under way.
    """

    def __init__(self, job: Job, *, half_strides: bool = False) -> None:
        """Use `from_config` or `from_model`."""
        self._job, self._half_strides = job, half_strides
        self._hashes = JobRecord.create(job, ()).file_hashes
        self._engines: OrderedDict[Volume, InferenceEngine] = OrderedDict()
        self._closed = False

    @classmethod
    def from_config(cls, config: str | Path | Mapping[str, Any]) -> Predictor:
        """Make one from a job: a job file's path, or a mapping with the same keys.

        `input` and `output` may be missing, and are not used: volumes come with each call.
        Relative paths are relative to the file, or for a mapping to the working directory.
        Raises JobError with one line for each mistake, as the commands do.
        """
        return cls(load_job(config, input=NOWHERE, output=NOWHERE))

    @classmethod
    def from_model(
        cls, path: str | Path, *, model_input_shape: Sequence[int], **keys: Any
    ) -> Predictor:
        """Make one from a model file: TorchScript, torch.export (.pt2), ONNX, Keras, SavedModel.

        `model_input_shape` is one item of a batch: the patch, with a leading 1 where the network
        wants a channel axis. `model_output_shape`, channels first, is needed where the network
        gives something else. Every other keyword is a key of the job file or of its
        `model_config`. Left out, patches overlap by half (`sliding_window`, `weight_gaussian`),
        are averaged (`combine: weighted_avg`) and run in batches of four on the CPU.

        Raises JobError or ModelError with one line for each mistake, among them a file whose
        kind is not to be told: then `runtime` and `type` name it.
        """
        keys["model_input_shape"] = list(model_input_shape)
        values = job_for_model(absolute(str(path), Path.cwd()), keys)
        half = values["inference_type"] == "sliding_window" and "strides" not in values
        if half:  # until a volume says how many axes there are
            values["strides"] = [1]
        return cls(load_job(values, input=NOWHERE, output=NOWHERE), half_strides=half)

    @property
    def job(self) -> Job:
        """The job's keys; of `input` and `output` stand-ins."""
        return self._job

    def plan(
        self,
        shape: Sequence[int],
        dtype: npt.DTypeLike | Sequence[npt.DTypeLike] = "float32",
    ) -> Plan:
        """Return the plan for a volume of this shape: chunks, patches, `output_shape`, `costs`.

        `dtype` is the volume's, or a list with one for each of several inputs. The network is
        not needed. Raises JobError with one line for each thing that does not fit.
        """
        several = isinstance(dtype, (list, tuple))
        dtypes: Any = dtype if several else [dtype]
        length = tuple(int(n) for n in shape)
        volume = Volume.joined([Volume(length, str(np.dtype(name))) for name in dtypes])
        names = [f"array {n}" for n in range(len(dtypes))] if several else ["the array"]
        return resolve(self._job_for(names, len(length)), volume)

    def predict(
        self, volume: Input | Sequence[Input], *, progress: Progress = _quiet
    ) -> Prediction:
        """Run the network over a whole volume and return all of the result, in memory.

        `progress` is called with (chunks done, chunks in all). Raises JobError where volume and
        job do not fit, ModelError where the network cannot be loaded or breaks its declaration,
        PredictionError where it returns what is not finite.
        """
        arrays = open_inputs(volume)
        plan = self._plan(arrays)
        averaged = plan.job.combine == "weighted_avg"
        dtype = label_dtype(max(2, plan.channels))
        stored = np.zeros(plan.output_shape, plan.output_dtype)
        labels = np.zeros(plan.volume.shape, dtype) if averaged else stored
        for where, values in self._stream(plan, arrays, progress):
            stored[where] = values
            if averaged:
                average = values if plan.channel_axis else values[np.newaxis]
                labels[where[-plan.rank :]] = reduce_and_cast(average, "soft", dtype)
        given = tuple(read_all(array) for array in arrays)
        probabilities = stored.reshape(plan.channels, *plan.volume.shape) if averaged else None
        return Prediction(labels, given if len(given) > 1 else given[0], probabilities)

    def predict_streaming(
        self, volume: Input | Sequence[Input], *, progress: Progress = _quiet
    ) -> Regions:
        """Return a generator of the result's regions, each as soon as it is final.

        Each item is `(where, values)`: slices into an array of shape `plan(...).output_shape`
        ((*S), or (C, *S) for averages of a network with channels) and the values there, in
        `plan(...).output_dtype`. Every voxel comes exactly once: block by block, the last axis
        fastest, within a block first what no other block's patches reach, then the rest.

        Held in memory are two chunks, and the unfinished bands along one slice of blocks across
        the first axis; a volume given by path or as a zarr array is read chunk by chunk. Checks
        are made at once and raise as `predict` does; the network runs as items are asked for.
        """
        arrays = open_inputs(volume)
        return self._stream(self._plan(arrays), arrays, progress)

    def predict_to_store(
        self,
        volume: Input | Sequence[Input],
        output: str | Path,
        *,
        overwrite: bool = False,
        progress: Progress = _quiet,
    ) -> dict[str, Any]:
        """Write the result as an OME-Zarr image, sealed, with its job folder; returns the report.

        The same as a job with this input, computed in this process, past the queue. Cut off, the
        same call continues where it was if the volume is given by path. An array is first written
        to a temporary `.npy` beside the output; an output that exists is then only replaced with
        `overwrite`, which deletes it first. Raises as `predict` does, StoreError where a path
        cannot be read or written.
        """
        arrays = open_inputs(volume)
        self._plan(arrays)  # refuses what cannot be done before anything is copied
        output = str(output)
        with as_paths(volume, arrays, output) as paths:
            values = self._job_for(paths, len(arrays[0].shape)).as_dict()
            queue = NoQueue(queue_url(None, self._job.queue))
            made = chunkq.produce(values, output=output, queue=queue, overwrite=overwrite)
            job = open_job(made.folder.path)
            if job.record.file_hashes != self._hashes:
                raise ModelError(
                    "the model's files have changed since the predictor was made; make another"
                )
            device = get_device()
            engine = device.run(lambda: self._engine(job.plan)).result()
            with device.compute_with(job, engine):
                worker = compute_inline(job, progress)
            return finalize_job(job, worker=worker)

    def close(self) -> None:
        """Let go of the network and the device's memory; nothing happens the second time."""
        self._closed = True
        get_device().run(self._let_go).result()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _job_for(self, names: Sequence[str], rank: int) -> Job:
        values = self._job.as_dict() | {"input": list(names)}
        if self._half_strides:
            values["strides"] = half_strides(self._job.model, rank)
        return parse_job(values)

    def _plan(self, arrays: Sequence[Array]) -> Plan:
        names = [array.path for array in arrays]
        return resolve(self._job_for(names, len(arrays[0].shape)), volume_of(arrays))

    def _stream(self, plan: Plan, arrays: Sequence[Array], progress: Progress) -> Regions:
        self._check_open()
        for box, values in regions(plan, self._computed(plan, arrays, progress)):
            yield output_slices(plan, box), values

    def _computed(
        self, plan: Plan, arrays: Sequence[Array], progress: Progress
    ) -> Iterator[tuple[Chunk, Contribution | None]]:
        """Yield every chunk with what it came to; the next one is computed meanwhile."""
        job, device, total = plan.job, get_device(), plan.costs.chunks

        def start(index: Index) -> Future[tuple[Chunk, Contribution | None]]:
            chunk = plan.chunk(index)
            if not chunk.is_active:
                return device.run(lambda: (chunk, None))
            halos = [
                read_padded(array, chunk.halo, job.pad_mode, job.pad_value) for array in arrays
            ]
            return device.run(lambda: (chunk, self._engine(plan).compute(chunk, halos)))

        progress(0, total)
        for done, result in enumerate(pipelined(start, plan.indices(), IN_FLIGHT), start=1):
            yield result
            progress(done, total)

    def _engine(self, plan: Plan) -> InferenceEngine:
        """Return the network over a plan's volume; only the device thread calls it."""
        self._check_open()
        engine = self._engines.get(plan.volume)
        if engine is None:
            if self._engines:
                engine = next(iter(self._engines.values())).for_plan(plan)
            else:
                engine = InferenceEngine(JobRecord(plan.job, (), self._hashes), plan)
            self._engines[plan.volume] = engine
        self._engines.move_to_end(plan.volume)
        while len(self._engines) > ENGINES_CACHED:
            self._engines.popitem(last=False)
        return engine

    def _let_go(self) -> None:
        engines = list(self._engines.values())
        self._engines.clear()
        if engines:
            engines[0].close()

    def _check_open(self) -> None:
        if self._closed:
            raise ChunkqError("the predictor is closed; make another")
