"""Run a network on volumes from Python, without a job file, a job folder or a queue."""

from __future__ import annotations

import operator
import os
import uuid
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import reduce_and_cast
from chunkq.blend.empty_patches import EmptyChunks
from chunkq.blend.prediction import Prediction, Unread
from chunkq.blend.streaming import regions
from chunkq.blend.sums import Contribution
from chunkq.create import CheckedJob, check_job, create_job
from chunkq.errors import ArgumentError, ChunkqError, JobError, ModelError
from chunkq.finalize import finalize_job
from chunkq.geometry.axes import Axis
from chunkq.job.events import Sink, StageProgress
from chunkq.job.job_file import Job, job_values, load_job, parse_job
from chunkq.job.known_empty import MISSING, mask_counts
from chunkq.job.output_name import check_new_output
from chunkq.job.record import JobRecord
from chunkq.job.resolve import empty_rule, resolve
from chunkq.job.user_code import load_blend_weights
from chunkq.paths import absolute, without_secret
from chunkq.plan.item_tasks import ItemTasks
from chunkq.plan.patch_selection import SkipRules
from chunkq.plan.plan import Chunk, Index, Plan, Volume
from chunkq.queue.registry import queue_url
from chunkq.storage.array import Array
from chunkq.storage.images import ImageSource
from chunkq.storage.mask import Mask
from chunkq.storage.padded_reading import read_padded
from chunkq.storage.selection import Selection
from chunkq.summaries import html_table, lengths, one_line
from chunkq_worker.device import get_device
from chunkq_worker.imported_classes import class_name
from chunkq_worker.inference_engine import ENGINES_CACHED, InferenceEngine
from chunkq_worker.inline import PROGRESS_STAGE, compute_inline, pipelined
from chunkq_worker.input_objects import OpenedInput
from chunkq_worker.inputs import Input, as_paths, open_inputs, read_region, volume_of
from chunkq_worker.mask_input import MaskInput, open_mask
from chunkq_worker.model_defaults import half_strides, job_for_model, job_for_object, model_keys
from chunkq_worker.network_objects import FILE_KEYS, NetworkObject, network_object, stand_in
from chunkq_worker.progress import Progress, check_progress, progress_of
from chunkq_worker.steps import Step, Steps
from chunkq_worker.user_errors import UserErrors

Regions = Generator[tuple[tuple[slice, ...], npt.NDArray[Any]], None, None]
"""Yields regions of the output as slices, with their final values."""
SPATIAL = "zyx"
"""Letters of spatial axes."""
PLACEHOLDER = "memory"
"""Value of `input` and `output` in a predictor's job."""
IN_FLIGHT = 2
"""Chunks in memory: one is read, or used by the caller, while the other is computed."""


def _nothing() -> None:
    """Return the result of a chunk in which no patch runs."""


class Predictor:
    """A network that predicts volumes of any shape, with the keys of a job file.

    A volume is an array ([C,] *S) with 1 to 4 spatial axes: NumPy, torch, dask, xarray, zarr, h5py,
    tensorstore, an image of nibabel or tifffile, the path of an array that a job can read or of a
    TIFF file, or any array-like that returns NumPy arrays when sliced. What is not in memory is
    read chunk by chunk. It has channels if the object or `axes` names them. If
    `model_config.join_dim` is set, pass a list of volumes of the same shape. The network is loaded
    onto `model_config.device` for the first volume and kept until `close`; the predictor is a
    context manager.

    The output is byte-identical to that of a job with the same keys and number of threads.

    `progress` of the methods is True for a bar, False for none, None for a bar on a terminal and in
    a notebook, or a function that is called with (chunks done, all chunks).

    An error in the code of a network or a step is a ModelError whose cause is that error. After
    Ctrl-C the predictor can be used again; the current batch is finished in the background.

    Thread-safe: calls from several threads, and of several predictors, alternate chunk by chunk
    on the single device thread of the process. Do not call `close` during other calls.
    """

    def __init__(
        self,
        job: Job,
        *,
        half_strides: bool = False,
        network: NetworkObject | None = None,
        steps: Steps | None = None,
    ) -> None:
        """Use `from_config` or `from_model`."""
        if not isinstance(job, Job):
            raise ArgumentError(
                f"Predictor: found {class_name(job)}; use Predictor.from_model(network, "
                "model_input_shape=...) or Predictor.from_config(job)"
            )
        self._job, self._half_strides = job, half_strides
        self._network, self._steps, self._token = network, steps, uuid.uuid4().hex
        self._file_hashes = JobRecord.create(job, ()).file_hashes
        self._hashes = self._file_hashes | self._object_hashes(with_weights=False)
        self._engines: OrderedDict[Volume, InferenceEngine] = OrderedDict()
        self._closed = False

    @classmethod
    def from_config(
        cls,
        config: str | Path | Mapping[str, Any],
        *,
        model: Any = None,
        preprocessing: Step | None = None,
        preprocessing_protected: Step | None = None,
        postprocessing_protected: Step | None = None,
        postprocessing: Step | None = None,
    ) -> Predictor:
        """Create a predictor from a job: the path of a job file, or a mapping with its keys.

        `output` and the path of `input` are not used and may be missing. What a mapping in `input`
        says of axes, level, channels and order applies to every volume. Relative paths are relative
        to the job file, or for a mapping to the working directory. `model` is a network as in
        `from_model` that replaces the one of the job; the job then needs none. Functions for the
        steps replace the key `processing_steps`. Raise JobError with one line per mistake, and
        ArgumentError, which is a TypeError, for an argument of a wrong type.
        """
        steps = _steps(
            preprocessing=preprocessing,
            preprocessing_protected=preprocessing_protected,
            postprocessing_protected=postprocessing_protected,
            postprocessing=postprocessing,
        )
        values = job_values(config)
        inputs = values.get("input")
        if isinstance(inputs, (list, tuple)) and any(isinstance(one, Mapping) for one in inputs):
            raise JobError(
                "input: a predictor reads all volumes in one way, and cannot use a list of "
                "mappings; use one mapping, which applies to every volume"
            )
        if model is None and steps is None:
            return cls(load_job(values, input=PLACEHOLDER, output=PLACEHOLDER))
        stored = values.get("model_config")
        section = dict(stored) if isinstance(stored, Mapping) else {}
        if steps is not None:
            section["processing_steps"] = stand_in()
        network = None
        if model is not None:
            for key in FILE_KEYS:
                section.pop(key, None)
            runtime = section.pop("runtime", None)
            if isinstance(model, (str, os.PathLike)):
                section |= model_keys(absolute(os.fspath(model), Path.cwd()), section)
            else:
                network = network_object(model, runtime)
                section = network.model_config(section)
        job = load_job(values | {"model_config": section}, input=PLACEHOLDER, output=PLACEHOLDER)
        return cls(job, network=network, steps=steps)

    @classmethod
    def from_model(
        cls,
        model: Any,
        *,
        model_input_shape: Sequence[int],
        preprocessing: Step | None = None,
        preprocessing_protected: Step | None = None,
        postprocessing_protected: Step | None = None,
        postprocessing: Step | None = None,
        **keys: Any,
    ) -> Predictor:
        """Create a predictor from a network: an object, or the path of a model file.

        Objects are a torch.nn.Module, a Keras model, or a function from a batch
        (N, *model_input_shape) to a batch of predictions, both NumPy arrays; with `runtime="torch"`
        or `"tensorflow"` a function of tensors. The object is used with the weights that it has
        when a volume is predicted. It stays on its device and keeps its dtype and its mode: a torch
        module runs in evaluation mode, and is in its own mode again after each batch. `device` and
        `dtype` are by default those of its weights; with others, the predictor works on a copy.

        Files are TorchScript, torch.export (.pt2), ONNX, Keras and SavedModel.

        `preprocessing`, `preprocessing_protected`, `postprocessing_protected` and `postprocessing`
        are functions from a batch to a batch, as in the file `processing_steps` of a job.

        `model_input_shape` is the shape of one item of a batch: the patch, with a leading 1 if the
        network has a channel axis. Set `model_output_shape`, channels first, if the output has
        another shape. Every other keyword is a key of the job file or of its `model_config`. By
        default, patches overlap by half (`sliding_window`, `weight_gaussian`), overlaps are
        averaged (`combine: weighted_avg`), and batches of four patches run on the CPU.

        Raise JobError or ModelError with one line per mistake, and ArgumentError, which is a
        TypeError, for an argument of a wrong type. If the format of a file cannot be detected, set
        `runtime` and `type`.
        """
        steps = _steps(
            preprocessing=preprocessing,
            preprocessing_protected=preprocessing_protected,
            postprocessing_protected=postprocessing_protected,
            postprocessing=postprocessing,
        )
        keys["model_input_shape"] = _shape("model_input_shape", model_input_shape)
        if keys.get("model_output_shape") is not None:
            keys["model_output_shape"] = _shape("model_output_shape", keys["model_output_shape"])
        if callable(keys.get("activation")):
            raise ArgumentError(
                "activation: found a function, expected 'none', 'softmax' or 'sigmoid'; pass the "
                "function as postprocessing_protected"
            )
        if steps is not None:
            if keys.get("processing_steps") is not None:
                raise JobError(
                    "model_config.processing_steps: unsupported beside steps that are functions; "
                    "use one of them"
                )
            keys["processing_steps"] = stand_in()
        network = None
        if isinstance(model, (str, os.PathLike)):
            values = job_for_model(absolute(os.fspath(model), Path.cwd()), keys)
        else:
            network = network_object(model, keys.get("runtime"))
            values = job_for_object(network, keys)
        uses_half_strides = values["inference_type"] == "sliding_window" and "strides" not in values
        if uses_half_strides:  # replaced once a volume's number of axes is known
            values["strides"] = [1]
        job = load_job(values, input=PLACEHOLDER, output=PLACEHOLDER)
        return cls(job, half_strides=uses_half_strides, network=network, steps=steps)

    def __repr__(self) -> str:
        return one_line("Predictor", self._summary())

    def _repr_html_(self) -> str:
        return html_table("Predictor", self._summary())

    def _summary(self) -> dict[str, str]:
        model = self._job.model
        if self._network is not None:
            name = self._network.name
        else:
            path = model.class_file or model.model_file or model.ts_file or model.json_file or ""
            name = without_secret(path).rstrip("/").rpartition("/")[2]
            name = f"{model.class_name} of {name}" if model.class_file else name
        rows = {
            "network": name,
            "runtime": f"{model.runtime} on {model.device}",
            "input shape": lengths(model.model_input_shape),
            "inference_type": self._job.inference_type,
            "combine": self._job.combine,
        }
        return rows | ({"state": "closed"} if self._closed else {})

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
        length = tuple(_shape("shape", shape))
        volume = Volume.joined([Volume(length, str(np.dtype(name))) for name in dtypes])
        names = [f"array {n}" for n in range(len(dtypes))] if has_several else ["the array"]
        return resolve(self._job_for(names, volume), volume)

    def predict(
        self,
        volume: Input | Sequence[Input],
        *,
        axes: str | None = None,
        mask: Any = None,
        progress: Progress = None,
    ) -> Prediction:
        """Run the network on an entire volume and return the result in memory.

        `axes` has one letter of c, z, y, x per axis of the volume, such as "yxc" for colour. `mask`
        is an array, a path or a mapping with the keys of `mask` in a job file; by default the mask
        of the job. Without voxel sizes its shape divides that of the volume. Voxels outside are
        `fill_value`, and the network runs only where a patch has a voxel inside. Raise
        ArgumentError if the volume is not an array or a path, JobError if the volume does not
        match the job, ModelError if the network cannot be loaded or does not match its
        declaration, and PredictionError if it returns NaN or infinity.
        """
        inputs = self._open(volume, axes)
        plan = self._plan(inputs)
        is_averaged = plan.output.is_average
        dtype = plan.output.label_dtype
        stored = np.zeros(plan.output_shape, plan.output_dtype)
        labels = np.zeros(plan.region.shape, dtype) if is_averaged else stored
        check_progress(progress)
        with closing(self._stream(plan, inputs, self._mask(mask, inputs), progress)) as stream:
            for region, values in stream:
                stored[region] = values
                if is_averaged:
                    averages = values.reshape(plan.channels, *values.shape[-plan.rank :])
                    labels[region[-plan.rank :]] = reduce_and_cast(averages, "soft", dtype)
        probabilities = stored.reshape(plan.channels, *plan.region.shape) if is_averaged else None

        def read() -> Any:
            arrays = tuple(read_region(one.array, plan.region) for one in inputs)
            return arrays if len(arrays) > 1 else arrays[0]

        is_read = all(one.in_memory for one in inputs)
        geometry = inputs[0].geometry
        if plan.grid.region is not None:
            geometry = geometry.cropped(plan.region)
        return Prediction(labels, read() if is_read else Unread(read), probabilities, geometry)

    def predict_streaming(
        self,
        volume: Input | Sequence[Input],
        *,
        axes: str | None = None,
        mask: Any = None,
        progress: Progress = None,
    ) -> Regions:
        """Return a generator that yields each region of the result as soon as it is final.

        Each item is `(region, values)`: slices of an array of shape `plan(...).output_shape`
        ((*S), or (C, *S) for averages of a network with channels) and the values in that region,
        in `plan(...).output_dtype`. Every voxel is yielded exactly once, block by block, the last
        axis fastest. Within a block, the voxels that only its own patches cover come first.

        Two chunks are in memory, and the unfinished bands along one slice of blocks across the
        first axis. The arguments are checked in this call, which raises like `predict`; the network
        runs while the generator is consumed.
        """
        check_progress(progress)
        inputs = self._open(volume, axes)
        return self._stream(self._plan(inputs), inputs, self._mask(mask, inputs), progress)

    def predict_to_store(
        self,
        volume: Input | Sequence[Input],
        output: str | Path,
        *,
        axes: str | None = None,
        mask: Any = None,
        overwrite: bool = False,
        progress: Progress = None,
    ) -> dict[str, Any]:
        """Write the result as a sealed OME-Zarr image with its job folder; return the report.

        Run the job with this input in this process, without a queue. If the volume is a path, an
        interrupted call continues when it is repeated. An array is first written to a temporary
        `.npy` file beside the output; then an existing output is replaced only with `overwrite`,
        which deletes it first. Names, voxel sizes and positions of its axes are kept. A job whose
        network or steps are objects can only be continued by this predictor. Raise like `predict`,
        and StoreError if a path cannot be read or written.
        """
        if not isinstance(output, (str, os.PathLike)):
            raise ArgumentError(
                f"output: expected the path of a Zarr image, found {class_name(output)}"
            )
        check_progress(progress)
        output = os.fspath(output)
        check_new_output(output, Path.cwd())
        inputs = self._open(volume, axes)
        plan = self._plan(inputs)  # raises before an array is copied
        selection = self._selection(axes)
        opened = self._open_mask(mask)
        stored = None if opened is None else opened.stored(inputs[0])
        with as_paths([*inputs, *([] if stored is None else [stored[0]])], output) as paths:
            mask_path = paths.pop() if stored is not None else ""
            values = self._job_for(paths, plan.volume).as_dict()
            if stored is not None:
                values["mask"] = {"path": mask_path, **stored[1]}
            values["input"] = [
                _input_of(path, one, selection) for path, one in zip(paths, inputs, strict=True)
            ]
            checked = check_job(load_job(values, output=output))
            if checked.record.file_hashes != self._file_hashes:
                raise ModelError(
                    "the model's files have changed since the predictor was created; create a new "
                    "predictor"
                )
            checked = self._with_objects(checked, inputs)
            # The queue for the chunks that remain if this call is interrupted.
            queue = queue_url(None, self._job.queue)
            job = create_job(checked, queue=queue, overwrite=overwrite)
            device = get_device()
            with UserErrors(), progress_of(progress) as emit:
                engine = device.run(lambda: self._fresh_engine(job.items[0].plan)).result()
                with device.compute_with(job, engine):
                    worker = compute_inline(job, emit)
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

    def _selection(self, axes: str | None) -> Selection:
        """Return what is read of each volume: what the job says of its input, with these axes."""
        selection = self._job.inputs[0].selection
        return selection if axes is None else replace(selection, axes=axes)

    def _open(self, volume: Input | Sequence[Input], axes: str | None) -> tuple[OpenedInput, ...]:
        allow_empty = self._job.allow_empty
        return open_inputs(volume, self._selection(axes), allow_empty=allow_empty)

    def _open_mask(self, mask: Any) -> MaskInput | None:
        return open_mask(mask, self._job.mask, allow_empty=self._job.allow_empty)

    def _mask(self, mask: Any, inputs: Sequence[OpenedInput]) -> Mask | None:
        """Return the mask of the volume, None without one."""
        if self._job.skip_empty == MISSING:
            raise JobError(
                "skip_empty: missing is unsupported for predictions in memory; use "
                "predict_to_store, a job, or another skip_empty"
            )
        opened = self._open_mask(mask)
        return None if opened is None else opened.on(inputs[0])

    def _object_hashes(self, *, with_weights: bool) -> dict[str, str]:
        """Return what identifies the objects of the predictor, by their names in a job record."""
        hashes = {}
        if self._network is not None:
            hashes["network"] = self._network.identity() if with_weights else self._network.token
        if self._steps is not None:
            hashes["steps"] = self._token
        return hashes

    def _with_objects(self, checked: CheckedJob, inputs: Sequence[OpenedInput]) -> CheckedJob:
        """Return a job with the identity of the predictor's objects and the axes of its inputs."""
        record = checked.record
        hashes = record.file_hashes | self._object_hashes(with_weights=True)
        images = []
        for image in record.images:
            pairs = zip(image.sources, inputs, strict=True)
            sources = tuple(
                source if one.path else _with_spatial_axes(source, one.geometry.axes)
                for source, one in pairs
            )
            images.append(replace(image, sources=sources))
        return replace(checked, record=replace(record, file_hashes=hashes, images=tuple(images)))

    def _plan(self, inputs: Sequence[OpenedInput]) -> Plan:
        names = [one.array.path for one in inputs]
        if len(names) > 1 and self._job.model.join_dim is None:
            raise JobError(
                f"input: found {len(names)} volumes without model_config.join_dim; set it to the "
                "axis along which to stack them, or predict the volumes one by one"
            )
        volume = volume_of(inputs)
        return resolve(self._job_for(names, volume), volume)

    def _stream(
        self, plan: Plan, inputs: Sequence[OpenedInput], mask: Mask | None, progress: Progress
    ) -> Regions:
        self._check_open()
        arrays = [one.array for one in inputs]
        rules = SkipRules(None if mask is None else mask.inside, empty_rule(self._job))
        tasks = ItemTasks(plan, None if mask is None else mask_counts(plan, mask))
        empty = None
        if rules.empty is not None and plan.output.nothing.any():
            empty = EmptyChunks(plan, load_blend_weights(self._job.weight_function, plan))
        with (
            progress_of(progress) as emit,
            closing(self._computed(tasks, rules, arrays, emit)) as chunks,
        ):
            for box, values in regions(plan, chunks, empty, rules.inside):
                region = plan.output_box(box)
                yield region.slices((0,) * len(region.shape)), values

    def _computed(
        self, tasks: ItemTasks, rules: SkipRules, arrays: Sequence[Array], emit: Sink
    ) -> Generator[tuple[Chunk, Contribution | None], None, None]:
        """Yield every chunk with its contribution, while the next chunk is computed.

        The contribution is None for a chunk without patches, and for an empty one. Chunks that
        nobody waits for any longer are given up.
        """
        job, device, plan, done = self._job, get_device(), tasks.plan, 0
        total, stop = tasks.costs.chunks, Event()

        def start(index: Index) -> Future[Any]:
            chunk = plan.chunk(index)
            if not tasks.is_task(index):
                return device.run(lambda: _nothing)
            halos = [
                read_padded(array, chunk.halo, job.pad_mode, job.pad_value) for array in arrays
            ]
            selection = rules.select(plan, chunk, halos)
            if not selection.run:
                return device.run(lambda: _nothing)
            return device.start(lambda: self._engine(plan), chunk, halos, selection, stop)

        emit(StageProgress(PROGRESS_STAGE, 0, total))
        try:
            with UserErrors():
                device.run(lambda: self._fresh_engine(plan)).result()
            with closing(pipelined(start, plan.indices(), IN_FLIGHT)) as started:
                for index in plan.indices():
                    with UserErrors():
                        contribution = next(started)()
                    yield plan.chunk(index), contribution
                    if tasks.is_task(index):
                        done += 1
                        emit(StageProgress(PROGRESS_STAGE, done, total))
        finally:
            stop.set()

    def _fresh_engine(self, plan: Plan) -> InferenceEngine:
        """Return the engine for a plan's volume, with the present weights of a network object."""
        engine = self._engine(plan)
        engine.runtime.refresh()
        return engine

    def _engine(self, plan: Plan) -> InferenceEngine:
        """Return the engine for a plan's volume. Call it on the device thread only."""
        self._check_open()
        engine = self._engines.get(plan.volume)
        if engine is None:
            if self._engines:
                engine = next(iter(self._engines.values())).for_plan(plan)
            else:
                network = None if self._network is None else self._network.network
                record = JobRecord(self._job, (), self._hashes)
                engine = InferenceEngine(record, plan, network, self._steps)
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


def _steps(**functions: Any) -> Steps | None:
    """Return the steps that are passed as functions, None if there are none."""
    steps = Steps.of(functions)
    return None if steps == Steps() else steps


def _shape(key: str, shape: Any) -> list[int]:
    """Return a shape as a list; raise ArgumentError if it is no sequence of integers."""
    try:
        return [operator.index(n) for n in shape]
    except TypeError:
        raise ArgumentError(
            f"{key}: expected a list of integers such as [1, 64, 64, 64], found {shape!r:.100}"
        ) from None


def _input_of(path: str, opened: OpenedInput, selection: Selection) -> dict[str, Any]:
    """Return the input of a job for an opened input, whose view was written if it has no path."""
    if opened.path:
        keys = asdict(selection).items()
        return {"path": path} | {key: value for key, value in keys if value is not None}
    rank = len(opened.geometry.axes)
    if rank > len(SPATIAL):  # such arrays have no letters, and no channels
        return {"path": path}
    return {"path": path, "axes": "c" * opened.array.has_channels + SPATIAL[-rank:]}


def _with_spatial_axes(source: ImageSource, axes: Sequence[Axis]) -> ImageSource:
    """Return a source with other names, units and voxel sizes of its spatial axes."""
    spatial = iter(axes)
    return replace(
        source,
        axes=tuple(next(spatial) if axis.kind == "space" else axis for axis in source.axes),
    )
