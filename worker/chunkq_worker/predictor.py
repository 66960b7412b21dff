"""Run a network on volumes from Python, without a job file, a job folder or a queue."""

from __future__ import annotations

import operator
import os
import uuid
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.prediction import Prediction, Unread
from chunkq.blend.streaming import OutputStream, regions
from chunkq.blend.sums import Contribution
from chunkq.create import CheckedJob, check_job, create_job
from chunkq.errors import ArgumentError, ChunkqError, JobError, ModelError
from chunkq.finalize import finalize_job
from chunkq.geometry.axes import color_letters, plain_axes
from chunkq.job.events import Sink, StageProgress
from chunkq.job.image_job import IMAGE
from chunkq.job.items import Image, images_of
from chunkq.job.job_file import Job
from chunkq.job.job_parsing import parse_job
from chunkq.job.job_reading import job_values, load_job
from chunkq.job.known_empty import MISSING
from chunkq.job.mask_source import nothing_inside
from chunkq.job.output_name import check_new_output
from chunkq.job.output_shapes import unknown_heads, with_output_shapes
from chunkq.job.record import JobRecord
from chunkq.job.resolve import resolve
from chunkq.paths import absolute, without_secret
from chunkq.plan.chunk import Chunk, Index
from chunkq.plan.item_tasks import ItemTasks
from chunkq.plan.plan import Plan
from chunkq.plan.volume import Volume
from chunkq.queue.registry import queue_url
from chunkq.stages.completion import chunks_of
from chunkq.storage.formats.base import ArrayInfo
from chunkq.storage.images import ImageSource, source_of
from chunkq.storage.remedies import PYTHON
from chunkq.storage.selection import Picks, Selection
from chunkq.summaries import html_table, lengths, one_line
from chunkq.timing.report import Report
from chunkq_worker.device import get_device
from chunkq_worker.imported_classes import class_name
from chunkq_worker.inference_engine import ENGINES_CACHED, InferenceEngine
from chunkq_worker.inline import PROGRESS_STAGE, compute_inline, pipelined, result_of
from chunkq_worker.inputs import (
    Input,
    OpenedInput,
    array_names,
    open_inputs,
    stored_sources,
)
from chunkq_worker.mask_input import open_mask
from chunkq_worker.model_defaults import half_strides, job_for_model, job_for_object, model_keys
from chunkq_worker.network_objects import FILE_KEYS, NetworkObject, network_object, stand_in
from chunkq_worker.output_arrays import OutputArrays
from chunkq_worker.output_shapes import Shapes, find_output_shapes
from chunkq_worker.prediction_request import OpenItem, PredictionRequest
from chunkq_worker.progress import Progress, check_progress, progress_of
from chunkq_worker.steps import Step, Steps
from chunkq_worker.user_errors import UserErrors
from chunkq_worker.user_warnings import UserWarnings
from chunkq_worker.value_watch import ChunkWatch

if TYPE_CHECKING:
    from chunkq_worker.images.outputs import Outputs
    from chunkq_worker.images.predictor import ImagePredictor

Regions = Generator[Any, None, None]
"""Yields regions of the output as slices, with their final values: (region, values). With the key
`outputs` it yields (name, region, values)."""
NumberedRegions = Generator[tuple[int, tuple[slice, ...], npt.NDArray[Any]], None, None]
"""Yields regions of outputs: the number of the output, the region, its values."""
PLACEHOLDER = "memory"
"""Value of `input` and `output` in a predictor's job."""
IN_FLIGHT = 2
"""Chunks in memory: one is read, or used by the caller, while the other is computed."""


def _nothing() -> None:
    """Return the result of a chunk in which no patch runs."""


class Predictor:
    """A network that predicts volumes of any shape, with the keys of a job file.

    A volume is an array ([C,] *S) with 1 to 4 spatial axes: NumPy, torch, dask, xarray, zarr, h5py,
    tensorstore, an image of nibabel or tifffile, the path of an array that a job can read, or any
    array-like that returns NumPy arrays when sliced. What is not in memory is read chunk by chunk.
    It has channels and time points if the object or `axes` names them. Time points are predicted
    one by one, and so are channels if the network takes one; the result has them as its first axes.
    Pass a list of volumes of the same shape if `model_config.join_dim` is set, or for the channels
    of a network that takes as many as there are volumes. The network is loaded onto
    `model_config.device` for the first volume and kept until `close`; the predictor is a context
    manager.

    The output is byte-identical to that of a job with the same keys and number of threads.

    `progress` of the methods is True for a bar, False for none, None for a bar on a terminal and in
    a notebook, or a function that is called with (chunks done, all chunks).

    What is probably a mistake, such as logits that are compared with 0.5, is a PredictionWarning,
    once for each cause. It is found in the chunk that the check of a job would run, or in another
    one if all patches of that chunk are skipped.

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
        self._engines: OrderedDict[Plan, InferenceEngine] = OrderedDict()
        self._images: ImagePredictor | None = None
        if job.is_image:
            from chunkq_worker.images.predictor import ImagePredictor  # imports an extra

            loaded = None if network is None else network.network
            self._images = ImagePredictor(job, self._hashes, loaded, steps)
        self._warnings = UserWarnings()
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
        says of axes, level, channels, order and orientation applies to every volume. Relative paths
        are relative to the job file, or for a mapping to the working directory. `model` is a
        network as in `from_model` that replaces the one of the job; the job then needs none.
        Functions for the steps replace the key `processing_steps`. Raise JobError with one line per
        mistake, and ArgumentError, which is a TypeError, for an argument of a wrong type.
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
            return cls(_load(values))
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
        return cls(_load(values | {"model_config": section}), network=network, steps=steps)

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
        another shape. With `outputs` it can be a mapping of heads to shapes, or be left out: then
        one batch shows it. Every other keyword is a key of the job file or of its `model_config`.
        By default, patches overlap by half (`sliding_window`, `weight_gaussian`), overlaps are
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
        if (shapes := keys.get("model_output_shape")) is not None:
            keys["model_output_shape"] = (
                {
                    head: _shape(f"model_output_shape.{head}", shape)
                    for head, shape in shapes.items()
                }
                if isinstance(shapes, Mapping)
                else _shape("model_output_shape", shapes)
            )
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
        return cls(_load(values), half_strides=uses_half_strides, network=network, steps=steps)

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
            "combine": ", ".join(one.combine for one in self._job.output_configs().values()),
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
        *,
        axes: str | None = None,
    ) -> Plan:
        """Return the plan for an array of this shape: chunks, patches, `output_shape`, `costs`.

        `dtype` is the dtype of the array, or a list with one dtype per input. `axes` are as in
        `predict`; the plan is that of one time point. The network is not loaded, unless outputs
        have shapes that the job does not declare. Raise JobError with one line per mismatch between
        the job and the array.
        """
        self._check_volumes("plan")
        has_several = isinstance(dtype, (list, tuple))
        dtypes: Any = dtype if has_several else [dtype]
        described = plain_axes(_shape("shape", shape))
        names = array_names(len(dtypes)) if has_several else array_names(1)
        selection = self._selection(axes)
        sources = [
            source_of(
                ArrayInfo(name, described, str(np.dtype(one))), selection, name, remedies=PYTHON
            )
            for name, one in zip(names, dtypes, strict=True)
        ]
        return self._plan(names, sources)[2]

    def predict(
        self,
        volume: Input | Sequence[Input] | Any,
        *,
        axes: str | None = None,
        channels: Picks | None = None,
        time: Picks | None = None,
        mask: Any = None,
        progress: Progress = None,
    ) -> Any:
        """Run the network on an entire volume and return the result in memory: a Prediction.

        If the job has the key `outputs`, the result is a dict with a Prediction for each name.

        With `inference_type: image`, `volume` is an image, a list of images, or an array
        (N, H, W, C), and the result is an `Outputs`. An image is an array (H, W) or (H, W, C) of 1
        to 4 channels, an image of Pillow, or a path. A path that is alone can also be a folder, a
        pattern, or a table with a column `path`. An image that is no list raises its error.
        The other arguments, except for `progress`, are for volumes.

        `axes` has one letter of t, c, z, y, x per axis of the array, such as "yxc" for colour.
        `channels` and `time` select positions along these axes, as in a job file: indices or a
        range such as "0:3". By default, all are read. `mask` is an array, a path or a mapping with
        the keys of `mask` in a job file; by default the mask of the job. Without voxel sizes its
        shape divides that of the volume. With a time axis it has a mask for each time point of the
        array. Voxels outside are `fill_value`, and the network runs only where a patch has a voxel
        inside. Raise ArgumentError if the volume is not an array or a path, JobError if the volume
        or the mask does not match the job, ModelError if the network cannot be loaded or does not
        match its declaration, and PredictionError if it returns NaN or infinity.
        """
        if self._images is not None:
            check_progress(progress)
            self._check_open()
            _check_unused(axes=axes, channels=channels, time=time, mask=mask)
            with progress_of(progress) as emit:
                outputs = self._images.predict(volume, emit)
            self._warn_of_errors(outputs)
            return outputs
        request = self._request_in_memory(volume, self._selection(axes, channels, time), mask)
        arrays = [OutputArrays(view, request.series) for view in request.plan.views]
        check_progress(progress)
        with closing(self._stream(request, progress)) as stream:
            for number, region, values in stream:
                arrays[number].put(region, values)
        is_read = not request.series and all(one.in_memory for one in request.inputs)
        volumes = request.read() if is_read else Unread(request.read)
        results = {
            one.name: Prediction(
                one.labels,
                volumes,
                one.probabilities,
                request.geometry(number),
                one.values,
                one.range,
            )
            for number, one in enumerate(arrays)
        }
        return results if self._job.outputs is not None else results[""]

    def predict_streaming(
        self,
        volume: Input | Sequence[Input],
        *,
        axes: str | None = None,
        channels: Picks | None = None,
        time: Picks | None = None,
        mask: Any = None,
        progress: Progress = None,
    ) -> Regions:
        """Return a generator that yields each region of the result as soon as it is final.

        Each item is `(region, values)`: slices of an array of shape `plan(...).output_shape`
        ((*S), or (C, *S) for averages of a network with channels) and the values in that region,
        in `plan(...).output_dtype`. Time points, and channels that are predicted one by one, are
        axes before those. Every voxel is yielded exactly once, block by block, the last axis
        fastest. Within a block, the voxels that only its own patches cover come first.

        If the job has the key `outputs`, each item is `(name, region, values)`, where shape and
        dtype are those of `plan(...).of_output(n)`, by the number of the output.

        Two chunks are in memory, and the unfinished bands along one slice of blocks across the
        first axis. The arguments are checked in this call, which raises like `predict`; the network
        runs while the generator is consumed.
        """
        check_progress(progress)
        self._check_volumes("predict_streaming")
        request = self._request_in_memory(volume, self._selection(axes, channels, time), mask)
        stream = self._stream(request, progress)
        if self._job.outputs is None:
            return ((region, values) for _, region, values in stream)
        names = [output.name for output in request.plan.outputs]
        return ((names[number], region, values) for number, region, values in stream)

    def predict_to_store(
        self,
        volume: Input | Sequence[Input],
        output: str | Path,
        *,
        axes: str | None = None,
        channels: Picks | None = None,
        time: Picks | None = None,
        mask: Any = None,
        overwrite: bool = False,
        progress: Progress = None,
    ) -> Report:
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
        self._check_volumes("predict_to_store")
        output = os.fspath(output)
        check_new_output(output, Path.cwd(), zarr_only=True)
        selection = self._selection(axes, channels, time)
        request = self._request(volume, selection, mask)  # raises before an array is copied
        inputs, masked = request.inputs, request.mask
        for line in (line for one in inputs for line in one.lost):
            self._warnings.show("positions", f"input: {line}")
        mask_input, mask_keys = (None, {}) if masked is None else masked.stored(inputs[0])
        opened = inputs if mask_input is None else (*inputs, mask_input)
        with stored_sources(opened, output) as (*sources,):
            values, mask_source = request.job.as_dict(), None
            if mask_input is not None:
                mask_source = sources.pop()
                if not mask_input.path:  # its axes are in the order of the volume
                    mask_source = replace(mask_source, named_by="")
                values["mask"] = {"path": mask_input.path or mask_source.path, **mask_keys}
            values["input"] = [
                _input_of(source.path, one, selection)
                for source, one in zip(sources, inputs, strict=True)
            ]
            checked = check_job(load_job(values, output=output), sources, mask_source)
            if checked.record.file_hashes != self._file_hashes:
                raise ModelError(
                    "the model's files have changed since the predictor was created; create a new "
                    "predictor"
                )
            checked = self._with_objects(checked)
            # The queue for the chunks that remain if this call is interrupted.
            queue = queue_url(None, self._job.queue)
            job = create_job(checked, queue=queue, overwrite=overwrite)
            if not chunks_of(job):
                line = nothing_inside(checked.record.job.fill_value, has_mask=masked is not None)
                self._warnings.show("nothing", line)
            device, plan = get_device(), job.items[0].plan
            watch = self._watch(request)
            with UserErrors(), progress_of(progress) as emit:
                engine = device.run(lambda: self._fresh_engine(plan)).result()
                with device.compute_with(job, engine, watch):
                    worker = compute_inline(job, emit)
            report = finalize_job(job, worker=worker)
        self._warnings.show_values(watch.suspicions(is_done=True))
        return report

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

    def _selection(
        self, axes: str | None, channels: Picks | None = None, time: Picks | None = None
    ) -> Selection:
        """Return what is read of each volume: what the job says of its input, with these keys.

        Raise JobError if a key has an invalid value.
        """
        selection = self._job.inputs[0].selection
        keys = {"axes": axes, "channels": _picks(channels), "time": _picks(time)}
        keys = {key: value for key, value in keys.items() if value is not None}
        if not keys:
            return selection
        selected = {key: value for key, value in asdict(selection).items() if value is not None}
        values = self._job.as_dict() | {"input": {"path": PLACEHOLDER, **selected, **keys}}
        return parse_job(values).inputs[0].selection

    def _request_in_memory(
        self, volume: Input | Sequence[Input], selection: Selection, mask: Any
    ) -> PredictionRequest:
        """Return the request for a volume; raise JobError if a prediction needs a stored job."""
        if self._job.skip_empty == MISSING:
            raise JobError(
                "skip_empty: missing is unsupported for predictions in memory; use "
                "predict_to_store, a job, or another skip_empty"
            )
        request = self._request(volume, selection, mask)
        if not request.chunks:
            has_mask = request.mask is not None
            line = nothing_inside(request.job.fill_value, has_mask=has_mask)
            self._warnings.show("nothing", line)
        return request

    def _request(
        self, volume: Input | Sequence[Input], selection: Selection, mask: Any
    ) -> PredictionRequest:
        inputs = open_inputs(volume, selection, allow_empty=self._job.allow_empty)
        sources = [one.source for one in inputs]
        try:
            job, image, plan = self._plan([one.array.path for one in inputs], sources)
        except JobError as error:
            if remedy := _axes_remedy(sources[0], self._job):
                raise JobError([*error.problems, remedy], code=error.code) from None
            raise
        masked = open_mask(mask, self._job.mask, allow_empty=self._job.allow_empty)
        if masked is not None:
            for line in masked.doubts(inputs[0], plan.region):
                self._warnings.show("mask", line)
        for line in (line for source in sources for line in source.doubts(PYTHON)):
            self._warnings.show("axes", line)
        for line in (line for source in sources for line in source.file_doubts()):
            self._warnings.show(line, line)
        return PredictionRequest(inputs, masked, job, image, plan)

    def _watch(self, request: PredictionRequest) -> ChunkWatch:
        batch = self._job.model.max_batch_size
        return ChunkWatch(request.plan, batch, can_skip=request.can_skip)

    def _plan(
        self, names: Sequence[str], sources: Sequence[ImageSource]
    ) -> tuple[Job, Image, Plan]:
        """Return the job for volumes with these names, their image, and the plan of its items."""
        job = parse_job(self._job.as_dict() | {"input": list(names)})
        images = images_of(job, sources)
        if len(images) > 1:
            raise JobError(
                f"input: found {len(names)} volumes without model_config.join_dim; set it to the "
                "axis along which to stack them, or predict the volumes one by one"
            )
        image = images[0]
        if unknown := unknown_heads(job):
            with UserErrors():
                shapes = self._output_shapes(job, image.volume)
            shapes_of_heads = {head: shapes[head] for head in unknown}
            self._job = with_output_shapes(self._job, shapes_of_heads)
            job = with_output_shapes(job, shapes_of_heads)
        if self._half_strides:
            strides = tuple(half_strides(job, image.volume))
            job = job.model_copy(update={"strides": strides})
        by_channel = image.is_channel_series
        plan = resolve(job, image.volume, names, by_channel=by_channel, remedies=PYTHON)
        return job, image, plan

    def _output_shapes(self, job: Job, volume: Volume) -> Shapes:
        """Run one batch to find the shapes that the job does not declare."""
        self._check_open()
        network = None if self._network is None else self._network.network
        return result_of(
            get_device().run(lambda: find_output_shapes(job, volume, network, self._steps))
        )

    def _object_hashes(self, *, with_weights: bool) -> dict[str, str]:
        """Return what identifies the objects of the predictor, by their names in a job record."""
        hashes = {}
        if self._network is not None:
            hashes["network"] = self._network.identity() if with_weights else self._network.token
        if self._steps is not None:
            hashes["steps"] = self._token
        return hashes

    def _with_objects(self, checked: CheckedJob) -> CheckedJob:
        """Return a job with the identity of the predictor's objects."""
        hashes = checked.record.file_hashes | self._object_hashes(with_weights=True)
        return replace(checked, record=replace(checked.record, file_hashes=hashes))

    def _stream(self, request: PredictionRequest, progress: Progress) -> NumberedRegions:
        """Yield the regions of each output of each item, while the next chunk is computed.

        Chunks that nobody waits for any longer are given up.
        """
        self._check_open()
        plan, items, stop = request.plan, request.items, Event()
        watch, empty = self._watch(request), request.empty_chunks()
        chunks = ((item, index) for item in items for index in plan.indices())
        with progress_of(progress) as sink:
            emit = _counted(sink, request.chunks)
            try:
                with UserErrors():
                    result_of(get_device().run(lambda: self._fresh_engine(plan)))

                def start(chunk: tuple[OpenItem, Index]) -> Future[Any]:
                    return self._start(*chunk, stop, watch)

                with closing(pipelined(start, chunks, IN_FLIGHT)) as started:
                    for item in items:
                        point = tuple(slice(n, n + 1) for n in item.item.point)
                        computed = self._computed(item.tasks, started, watch, emit)
                        streams = [
                            OutputStream(view, empty_chunks, item.rules.inside_of(view))
                            for view, empty_chunks in zip(plan.views, empty, strict=True)
                        ]
                        for number, box, values in regions(streams, computed):
                            region = plan.of_output(number).output_box(box)
                            slices = region.slices((0,) * len(region.shape))
                            yield number, (*point, *slices), values[(np.newaxis,) * len(point)]
            finally:
                stop.set()
        self._warnings.show_values(watch.suspicions(is_done=True))

    def _start(self, item: OpenItem, index: Index, stop: Event, watch: ChunkWatch) -> Future[Any]:
        """Read a chunk of an item and start it on the device, unless none of its patches runs."""
        device, plan = get_device(), item.tasks.plan
        if not item.tasks.is_task(index):
            return device.run(lambda: _nothing)
        chunk = plan.chunk(index)
        halos, selection = item.read(chunk, self._job)
        if not selection.run:
            return device.run(lambda: _nothing)
        value_watch = watch.of(item.item.number, chunk)
        return device.start(lambda: self._engine(plan), chunk, halos, selection, stop, value_watch)

    def _computed(
        self, tasks: ItemTasks, started: Iterator[Any], watch: ChunkWatch, emit: Callable[[], None]
    ) -> Iterator[tuple[Chunk, Sequence[Contribution] | None]]:
        """Yield every chunk of an item with its contributions, one per output.

        They are None for a chunk without patches, and for an empty one.
        """
        for index in tasks.plan.indices():
            with UserErrors():
                contributions = next(started)()
            self._warnings.show_values(watch.suspicions(is_done=False))
            yield tasks.plan.chunk(index), contributions
            if tasks.is_task(index):
                emit()

    def _fresh_engine(self, plan: Plan) -> InferenceEngine:
        """Return the engine for a plan's volume, with the present weights of a network object."""
        engine = self._engine(plan)
        engine.runtime.refresh()
        return engine

    def _engine(self, plan: Plan) -> InferenceEngine:
        """Return the engine for a plan's volume. Call it on the device thread only."""
        self._check_open()
        engine = self._engines.get(plan)
        if engine is None:
            if self._engines:
                engine = next(iter(self._engines.values())).for_plan(plan)
            else:
                network = None if self._network is None else self._network.network
                record = JobRecord(self._job, (), self._hashes)
                engine = InferenceEngine(record, plan, network, self._steps)
                engine.checks.report = self._warnings.keep
            self._engines[plan] = engine
        self._engines.move_to_end(plan)
        while len(self._engines) > ENGINES_CACHED:
            self._engines.popitem(last=False)
        return engine

    def _check_volumes(self, method: str) -> None:
        """Raise JobError if the network of this predictor sees images whole."""
        if self._images is not None:
            raise JobError(
                f"{method}: unsupported for inference_type image; use predict, or a job for a table"
            )

    def _warn_of_errors(self, outputs: Outputs) -> None:
        if not outputs.errors:
            return
        number, error = next(iter(outputs.errors.items()))
        self._warnings.show(
            f"errors {number}",
            f"{len(outputs.errors)} of {len(outputs)} images failed, the first one is number "
            f"{number}: {error}; see errors",
        )

    def _release(self) -> None:
        if self._images is not None:
            self._images.release()
        engines = list(self._engines.values())
        self._engines.clear()
        if engines:
            engines[0].close()

    def _check_open(self) -> None:
        if self._closed:
            raise ChunkqError("the predictor is closed; create a new one")


def _load(values: Mapping[str, Any]) -> Job:
    """Return the job of these values with placeholders as input and output."""
    is_image = values.get("inference_type") == IMAGE
    output = f"{PLACEHOLDER}.parquet" if is_image else PLACEHOLDER
    return load_job(values, input=PLACEHOLDER, output=output)


def _check_unused(**arguments: Any) -> None:
    """Raise JobError for an argument that is for volumes."""
    for name, value in arguments.items():
        if value is not None:
            raise JobError(f"{name}: unsupported for inference_type image; remove it")


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


def _picks(picks: Any) -> Any:
    """Return indices of NumPy as Python integers, which a job has; other values are unchanged."""
    if isinstance(picks, (list, tuple, range, np.ndarray)) and np.ndim(picks) == 1:
        return [_picks(one) for one in picks]
    return int(picks) if isinstance(picks, np.integer) else picks


def _axes_remedy(source: ImageSource, job: Job) -> str:
    """Return what to do if the first axis is channels; empty if it cannot be, or has a name."""
    rank = len(source.axes)
    if source.named_by or rank < 3 or rank != len(job.model.model_input_shape):
        return ""
    return (
        f"input: {source.path} has shape {[axis.size for axis in source.axes]} without names of "
        f"its axes, so all are spatial; if the first one is channels, "
        f"{PYTHON.set_axes(color_letters(rank, first=True))}"
    )


def _input_of(path: str, opened: OpenedInput, selection: Selection) -> dict[str, Any]:
    """Return the input of a job at a path, which is that of the opened input if it has one."""
    keys = asdict(selection).items() if opened.path else ()
    return {"path": opened.path or path} | {k: value for k, value in keys if value is not None}


def _counted(emit: Sink, total: int) -> Callable[[], None]:
    """Report the progress of no chunk; return a function that reports that of one more."""
    done = count(1)
    emit(StageProgress(PROGRESS_STAGE, 0, total))
    return lambda: emit(StageProgress(PROGRESS_STAGE, next(done), total))
