"""Python API: `Predictor` returns the bytes that a job stores; commands are functions."""

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from chunkq_worker import inference_engine
from chunkq_worker import inputs as input_volumes
from chunkq_worker.model_defaults import job_for_model

import chunkq
from chunkq.blend.combine import to_labels
from chunkq.blend.streaming import OutputStream, regions
from chunkq.blend.sums import Contribution, OwnBlock
from chunkq.errors import (
    ChunkqError,
    ErrorCode,
    IncompleteError,
    JobError,
    MissingJobError,
    ModelError,
    PredictionError,
    StoreError,
)
from chunkq.job.job_file import Job
from chunkq.job.job_handle import open_job
from chunkq.plan.chunk import Chunk
from tests import reference as ref
from tests.harness.documents import code_block
from tests.harness.files import everything_below, files_below
from tests.harness.networks import toy_model
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace, output_files, run_inline
from tests.integration.test_inputs import CASES, job_of

README = "README.md"
SHAPE = (17, 14, 19)
CHUNKS = 8
"""Chunks of 8³ voxels that own patches, of 18 blocks."""
SLIDING = {
    "inference_type": "sliding_window",
    "strides": [3, 4, 3],
    "weight_function": ["weight_gaussian"],
    "chunksize": [8, 8, 8],
    "storage_chunks": [4, 4, 4],
    "threads": 1,
}


POISONED = {"poison": 200.0}
FLAT = {"class_name": "Flat", "model_output_shape": [6, 6, 6]}
"""Keys of a network whose output has no channel axis."""
FLAT_CLASS = """

class Flat(Toy):
    def forward(self, batch):
        return super().forward(batch)[:, 0]
"""


def keys(folder: Path, toy: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Return a job without input and output whose blocks have bands.

    `toy` has arguments of the network. `changes` replace keys, or remove them if None; `model`
    is merged into `model_config`.
    """
    toy_keys = toy_model(folder, **({"patch": (6, 6, 6), "scale": 100.0} | (toy or {})))
    model = toy_keys | changes.pop("model", {})
    network = folder / "network.py"
    network.write_text(network.read_text() + FLAT_CLASS)
    values = SLIDING | {"model_config": model} | changes
    return {key: value for key, value in values.items() if value is not None}


# Results


@dataclass(frozen=True)
class Case:
    """A job that must produce the same bytes with and without files."""

    keys: dict[str, Any] = field(default_factory=dict)
    toy: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = SHAPE
    dtype: str = "uint8"


CROP = {"inference_type": "crop_margin", "margin": [1, 1, 1], "strides": None}
OFFSET_GRIDS = {"inference_type": "patch", "strides": None, "offsets": [[3, -2, 4]], "edge": "pad"}
JOB_CASES = {
    "averages in bands": Case(),
    "soft labels": Case({"combine": "soft"}),
    "hard votes": Case({"combine": "hard", "weight_function": ["weight_hann"]}),
    "one channel": Case({"combine": "soft"}, {"channels": 1}),
    "one vote": Case({"combine": "hard"}, {"channels": 1}),
    "float16": Case({"output_dtype": "float16", "activation": "sigmoid"}),
    "no channel axis": Case({"model": FLAT}, {"channels": 1}),
    "reflected": Case({"pad_width": [5, 9, 22], "pad_mode": "reflect"}),
    "smaller output": Case({"strides": [2, 2, 2], "pad_width": [1, 1, 1]}, {"output": (4, 4, 4)}),
    "cropped": Case(CROP | {"combine": "hard"}),
    "offset grids": Case(OFFSET_GRIDS | {"pad_mode": "edge", "combine": "soft"}),
    "one block": Case({"chunksize": None, "storage_chunks": None}),
    "a line": Case({"strides": [4], "chunksize": [8], "storage_chunks": [2]}, shape=(61,)),
    "big-endian": Case(dtype=">u2"),
    "floats": Case({"combine": "soft"}, dtype="float64"),
}


@pytest.mark.filterwarnings("ignore:.*0.5; if the values are logits")
@pytest.mark.parametrize("name", JOB_CASES)
def test_predicting_an_array_returns_the_bytes_that_the_job_stores(
    name: str, tmp_path: Path
) -> None:
    case = JOB_CASES[name]
    values = keys(tmp_path, {"patch": (6,) * len(case.shape)} | case.toy, **case.keys)
    volume = random_volume(case.shape, case.dtype)
    assert_same_as_job(tmp_path, values, [volume])


@pytest.mark.parametrize("name", CASES)
def test_slices_and_several_inputs_return_the_bytes_that_the_job_stores(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    volumes = [random_volume((11, 13, 17), "int16") * (n + 1) for n in range(case.inputs)]
    values = job_of(case, tmp_path, volumes) | {"threads": 1}
    assert_same_as_job(tmp_path, values, volumes)


def assert_same_as_job(
    folder: Path, values: dict[str, Any], volumes: list[npt.NDArray[Any]]
) -> None:
    """Compare all methods of a predictor with the output of produce, work and finalize."""
    paths = [str(write_zarr(folder / f"input{n}.zarr", v)) for n, v in enumerate(volumes)]
    output = str(folder / "job.zarr")
    job, report = run_inline(values | {"input": paths, "output": output})
    stored = read_output(output)
    argument: Any = volumes if len(volumes) > 1 else volumes[0]
    config = {k: v for k, v in values.items() if k not in ("input", "output")}
    with chunkq.Predictor.from_config(config) as predictor:
        prediction = predictor.predict(argument)
        plan = predictor.plan(volumes[0].shape, [v.dtype for v in volumes])
        regions_and_values = list(predictor.predict_streaming(argument))
        store_report = predictor.predict_to_store(argument, folder / "stored.zarr")
    assert plan.costs == job.costs
    assert (plan.output_shape, plan.output_dtype) == (stored.shape, stored.dtype)

    is_averaged = job.items[0].plan.output.is_average
    result = prediction.probabilities if is_averaged else prediction.labels
    assert result is not None
    assert result.dtype == stored.dtype
    assert result.tobytes() == stored.tobytes()
    assert prediction.labels.shape == volumes[0].shape
    if is_averaged:
        assert result.shape == (job.items[0].plan.channels, *volumes[0].shape)
        np.testing.assert_array_equal(
            prediction.labels, to_labels(result, "uint8"), "labels of the average"
        )
    else:
        assert prediction.probabilities is None
    inputs = prediction.input if isinstance(prediction.input, tuple) else (prediction.input,)
    for array, volume in zip(inputs, volumes, strict=True):
        assert np.shares_memory(array, volume)
        np.testing.assert_array_equal(array, volume)

    assembled, counts = np.zeros_like(stored), np.zeros(stored.shape, np.uint8)
    for region, part in regions_and_values:
        assert part.dtype == stored.dtype
        assembled[region] = part
        counts[region] += 1
    assert (counts == 1).all()
    assert assembled.tobytes() == stored.tobytes()

    assert files_below(folder / "stored.zarr" / "0") == files_below(folder / "job.zarr" / "0")
    for key in ("chunks", "patches", "finalized_blocks", "bytes", "missing"):
        assert store_report[key] == report[key], key


def test_the_prediction_equals_the_reference_implementation(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    network = ref.predictor("box_blur", 3, (6, 6, 6))
    expected = ref.reference(
        ref.sliding_window(SHAPE, (6, 6, 6), (3, 4, 3)),
        volume,
        lambda batch, start: network(batch / 100.0, start),
        "weighted_avg",
        "weight_gaussian",
    )
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        prediction = predictor.predict(volume)
    np.testing.assert_allclose(prediction.probabilities, expected.average, rtol=0, atol=1e-5)
    is_clear = expected.margin_of_decision > 1e-5
    np.testing.assert_array_equal(prediction.labels[is_clear], expected.labels[is_clear])


def test_labels_of_one_channel_are_1_from_a_probability_of_one_half(tmp_path: Path) -> None:
    values = keys(tmp_path, {"channels": 1, "scale": 60.0}, model=FLAT)
    with chunkq.Predictor.from_config(values) as predictor:
        prediction = predictor.predict(random_volume(SHAPE))
    assert prediction.probabilities is not None
    assert prediction.probabilities.shape == (1, *SHAPE)
    np.testing.assert_array_equal(prediction.labels, prediction.probabilities[0] >= 0.5)
    assert 0 < prediction.labels.mean() < 1


# Streaming


def test_regions_are_yielded_block_by_block_in_c_order(tmp_path: Path) -> None:
    with chunkq.Predictor.from_config(keys(tmp_path, combine="soft")) as predictor:
        plan = predictor.plan(SHAPE, "uint8")
        steps: list[tuple[int, int]] = []
        stream = predictor.predict_streaming(
            random_volume(SHAPE), progress=lambda done, total: steps.append((done, total))
        )
        regions_in_order = [region for region, _ in stream]
    blocks = [tuple(s.start // 8 for s in region) for region in regions_in_order]
    assert blocks == sorted(blocks)
    assert set(blocks) == set(plan.indices())
    assert steps == [(done, plan.costs.chunks) for done in range(plan.costs.chunks + 1)]
    # The first region of a block has no overlap with later blocks and ends where the block ends.
    first = regions_in_order[blocks.index((1, 1, 1))]
    assert [s.stop for s in first] == [16, 14, 16]


class TrackedArray(np.ndarray[Any, np.dtype[Any]]):
    """An array that supports weak references, to detect when it is freed."""


@pytest.mark.parametrize("views", [False, True], ids=["own arrays", "views of the chunk's sums"])
def test_streaming_keeps_the_pieces_of_at_most_one_slice_of_blocks(
    views: bool, tmp_path: Path
) -> None:
    """The memory is bounded for pieces with own arrays and for pieces that are views."""
    plan = chunkq.Predictor.from_config(keys(tmp_path)).plan((64, 16, 16), "uint8")
    alive: weakref.WeakValueDictionary[int, TrackedArray] = weakref.WeakValueDictionary()

    def tracked(shape: tuple[int, ...]) -> TrackedArray:
        array = TrackedArray(shape, np.float32)
        array[...] = 0
        alive[id(array)] = array
        return array

    def sums(*shape: int) -> npt.NDArray[np.float32]:
        return np.zeros((plan.channels, *shape), np.float32)

    def contribution(index: tuple[int, ...]) -> tuple[Chunk, tuple[Contribution]]:
        chunk, pieces = plan.chunk(index), []
        base = tracked((plan.channels * chunk.region.size,)) if views else None
        for piece in plan.outgoing_pieces(chunk):
            shape = (plan.channels, *piece.box.shape)
            part = tracked(shape) if base is None else base[: prod(shape)].reshape(shape)
            pieces.append((piece, part))
        band = tuple(sums(*box.shape) for box in chunk.band_boxes)
        own_block = OwnBlock(band, tuple(sums(*box.shape) for box in chunk.rest_boxes))
        return chunk, (Contribution(sums(*chunk.core.shape), own_block, tuple(pieces)),)

    peak = 0
    for _ in regions([OutputStream(plan)], map(contribution, plan.indices())):
        peak = max(peak, sum(array.nbytes for array in alive.values()))
    slices = plan.blocks[0]
    assert slices == 8
    pieces = [
        piece for index in plan.indices() for piece in plan.outgoing_pieces(plan.chunk(index))
    ]
    all_pieces = sum(4 * plan.channels * piece.box.size for piece in pieces)
    one_chunk = 4 * plan.channels * max(plan.chunk(i).region.size for i in plan.indices())
    assert 0 < peak <= (2 * one_chunk if views else 2 * all_pieces / (slices - 1))


class RecordingVolume:
    """A volume that records the number of voxels of each read."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._values, self.shape, self.dtype = values, values.shape, values.dtype
        self.reads: list[int] = []

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        part = self._values[key]
        self.reads.append(part.size)
        return part


def test_a_sliceable_volume_is_read_chunk_by_chunk(tmp_path: Path) -> None:
    volume = random_volume((40, 16, 16))
    recording = RecordingVolume(volume)
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        stream = predictor.predict_streaming(recording)
        assert recording.reads == []
        next(stream)
        assert len(recording.reads) <= 2
        stream.close()
        prediction = predictor.predict(volume)
        parts = list(predictor.predict_streaming(recording))
    assert max(recording.reads) < volume.size / 4
    assert prediction.probabilities is not None
    for region, values in parts:
        np.testing.assert_array_equal(prediction.probabilities[region], values)


def test_streaming_raises_errors_before_the_first_region_is_requested(tmp_path: Path) -> None:
    predictor = chunkq.Predictor.from_config(keys(tmp_path))
    with pytest.raises(JobError, match=r"(?m)^strides: .*\b3 entries\b.*\b2\b"):
        predictor.predict_streaming(np.zeros((8, 8), np.uint8))


# Volumes


def test_tensors_zarr_arrays_and_paths_are_accepted_as_volumes(tmp_path: Path) -> None:
    volume = random_volume(SHAPE, "int16")
    np.save(tmp_path / "in.npy", volume)
    path = write_zarr(tmp_path / "in.zarr", volume, (8, 8, 8))
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        expected = predictor.predict(volume).probabilities
        assert expected is not None
        for argument in (
            torch.from_numpy(volume),
            zarr.open_array(path, mode="r"),
            path,
            str(tmp_path / "in.npy"),
            np.asfortranarray(volume),
            [volume],
        ):
            prediction = predictor.predict(argument)
            assert isinstance(prediction.probabilities, np.ndarray), type(argument)
            assert prediction.probabilities.tobytes() == expected.tobytes(), type(argument)
            np.testing.assert_array_equal(prediction.input, volume)


INVALID_VOLUMES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "an empty list": (lambda: [], ["volume"]),
    "a number": (lambda: 5, ["0 spatial axes", "1 to 4"]),
    "strings": (lambda: np.full(SHAPE, "x"), ["<U1"]),
    "no voxel": (lambda: np.zeros((0, 8, 8)), ["[0, 8, 8]"]),
    "uint64": (lambda: np.zeros(SHAPE, np.uint64), ["uint64"]),
    "complex64": (lambda: np.zeros(SHAPE, np.complex64), ["complex64"]),
    "several volumes": (
        lambda: [np.zeros(SHAPE), np.zeros(SHAPE)],
        ["model_config.join_dim"],
    ),
    "different shapes": (
        lambda: [np.zeros(SHAPE), np.zeros((5, 5, 5))],
        ["array 1", "[5, 5, 5]", "[17, 14, 19]"],
    ),
    "a missing path": (lambda: "gone.zarr", ["gone.zarr"]),
}


@pytest.mark.parametrize("name", INVALID_VOLUMES)
def test_an_invalid_volume_is_an_error_of_one_line(name: str, tmp_path: Path) -> None:
    create_volume, fragments = INVALID_VOLUMES[name]
    predictor = chunkq.Predictor.from_config(keys(tmp_path))
    for method in (
        predictor.predict,
        predictor.predict_streaming,
        lambda volume: predictor.predict_to_store(volume, tmp_path / "out.zarr"),
    ):
        with pytest.raises((JobError, StoreError), match=r"^input: ") as caught:
            method(create_volume())
        message = str(caught.value)
        assert "\n" not in message
        assert [part for part in fragments if part not in message] == [], message
    assert not (tmp_path / "out.zarr").exists()


# Network


@contextlib.contextmanager
def counting_loads() -> Iterator[mock.Mock]:
    """Yield a mock that counts how often a network is loaded."""
    with mock.patch.object(
        inference_engine, "load_runtime", wraps=inference_engine.load_runtime
    ) as load_runtime:
        yield load_runtime


def test_the_network_is_loaded_once_for_volumes_of_any_shape_and_dtype(tmp_path: Path) -> None:
    values = keys(tmp_path)
    volumes = [
        random_volume((n, 9, 8), t) for n, t in [(9, "u1"), (12, "f4"), (8, "i2"), (9, "u1")]
    ]
    with counting_loads() as load_runtime, chunkq.Predictor.from_config(values) as predictor:
        results = [predictor.predict(volume).probabilities for volume in volumes]
        predictor.predict_to_store(volumes[1], tmp_path / "one.zarr")
        assert load_runtime.call_count == 1
    for number, volume in enumerate(volumes):
        with chunkq.Predictor.from_config(values) as other:
            np.testing.assert_array_equal(other.predict(volume).probabilities, results[number])
    np.testing.assert_array_equal(read_output(tmp_path / "one.zarr"), results[1])


def test_threads_and_predictors_can_share_a_device(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = chunkq.Predictor.from_config(keys(tmp_path))
    second = chunkq.Predictor.from_config(
        keys(tmp_path / "other", combine="soft", model={"max_batch_size": 3})
    )
    volumes = [random_volume((8 + n, 9, 10)) for n in range(4)]
    tasks = [(predictor, volume) for volume in volumes for predictor in (first, second)]
    with first, second:
        expected = [predictor.predict(volume).labels for predictor, volume in tasks]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda task: task[0].predict(task[1]).labels, tasks))
    for labels, expected_labels in zip(results, expected, strict=True):
        np.testing.assert_array_equal(labels, expected_labels)


def test_a_closed_predictor_raises_an_error_and_can_be_closed_again(tmp_path: Path) -> None:
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        stream = predictor.predict_streaming(random_volume((30, 9, 9)))
        next(stream)
    predictor.close()
    with pytest.raises(ChunkqError, match="predictor is closed"):
        list(stream)
    with pytest.raises(ChunkqError, match="predictor is closed"):
        predictor.predict(random_volume(SHAPE))
    unused = chunkq.Predictor.from_config(keys(tmp_path))
    unused.close()


def test_invalid_output_of_the_network_raises_the_same_errors_as_in_a_job(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    volume[16, 13, 18] = 255
    with chunkq.Predictor.from_config(keys(tmp_path, POISONED)) as predictor:
        with pytest.raises(PredictionError, match=r"NaN .* voxels \[11, 8, 13\] to \[17, 14, 19\]"):
            predictor.predict(volume)
        # The predictor is still usable.
        assert predictor.predict(volume[:16]).labels.shape == (16, 14, 19)
    wrong_shape = {"model_output_shape": [4, 6, 6, 6]}
    predictor = chunkq.Predictor.from_config(keys(tmp_path, model=wrong_shape))
    with pytest.raises(ModelError, match=r"\[4, 3, 6, 6, 6\]") as error:
        predictor.predict(volume)
    assert error.value.code is ErrorCode.MODEL_UNUSABLE


# Jobs and model files


def test_a_job_file_configures_a_predictor_and_paths_are_relative_to_it(tmp_path: Path) -> None:
    model = keys(tmp_path)["model_config"]
    for key in ("class_file", "kwargs_file"):
        model[key] = Path(model[key]).name
    job = Workspace(tmp_path, {**SLIDING, "input": 5, "model_config": model}).write_job()
    with chunkq.Predictor.from_config(job) as predictor:
        assert predictor.predict(random_volume(SHAPE)).probabilities is not None
        assert predictor.job.combine == "weighted_avg"
        assert predictor.plan((100, 100, 100)).costs.patches == 33 * 25 * 33


def test_all_mistakes_in_a_config_are_reported_together(tmp_path: Path) -> None:
    values = keys(tmp_path, stride=[3], combine="sotf", model={"ts_fil": "x"})
    with pytest.raises(JobError) as caught:
        chunkq.Predictor.from_config(values)
    problems = problems_by_key(caught.value)
    assert problems.keys() == {"stride", "combine", "model_config.ts_fil"}
    assert "did you mean 'strides'?" in problems["stride"]
    assert "'sotf'" in problems["combine"]
    assert "did you mean 'soft'?" in problems["combine"]
    assert "did you mean 'ts_file'?" in problems["model_config.ts_fil"]
    with pytest.raises(JobError, match=r"^model_config\.class_file: .*gone\.py"):
        chunkq.Predictor.from_config(keys(tmp_path, model={"class_file": "gone.py"}))


def problems_by_key(error: JobError) -> dict[str, str]:
    """Return key path -> message. Each key may have one problem only."""
    problems = dict(problem.split(": ", 1) for problem in error.problems)
    assert len(problems) == len(error.problems), error.problems
    return problems


class Conv(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 3, 3, padding=1)
        with torch.no_grad():
            for number, values in enumerate(self.conv.parameters()):
                steps = torch.arange(values.numel(), dtype=torch.float32)
                values.copy_(torch.sin(steps + number).reshape(values.shape) / 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return y


def save_script(path: Path) -> Path:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Conv()).save(path)
    return path


def test_a_predictor_needs_only_a_model_file_and_its_shapes(tmp_path: Path) -> None:
    script = save_script(tmp_path / "model.pt")
    shapes: dict[str, Any] = {
        "model_input_shape": (1, 6, 1, 7),
        "model_output_shape": (3, 6, 1, 7),
    }
    volume = random_volume((13, 5, 16))
    with chunkq.Predictor.from_model(script, **shapes, threads=1) as predictor:
        prediction = predictor.predict(volume)
        assert predictor.plan(volume.shape).grid.strides == (3, 1, 3)
    assert (predictor.job.model.runtime, predictor.job.model.type) == ("torch", "torchscript")
    explicit = {
        "inference_type": "sliding_window",
        "strides": [3, 1, 3],
        "weight_function": ["weight_gaussian"],
        "combine": "weighted_avg",
        "threads": 1,
        "model_config": {"runtime": "torch", "type": "torchscript", "ts_file": str(script)}
        | {key: list(shape) for key, shape in shapes.items()}
        | {"max_batch_size": 4},
    }
    with chunkq.Predictor.from_config(explicit) as predictor:
        expected = predictor.predict(volume)
    np.testing.assert_array_equal(prediction.probabilities, expected.probabilities)


def test_keywords_are_job_keys_and_override_defaults(tmp_path: Path) -> None:
    script = save_script(tmp_path / "model.pt")

    def job(**keywords: Any) -> Job:
        return chunkq.Predictor.from_model(script, model_input_shape=[1, 8, 8], **keywords).job

    sliding = job(strides=(2, 5), weight_function="weight_hann", combine="soft", max_batch_size=9)
    assert sliding.strides == (2, 5)
    assert sliding.weight_function == ("weight_hann",)
    assert (sliding.combine, sliding.model.max_batch_size) == ("soft", 9)
    cropped = job(inference_type="crop_margin", margin=[1, 1], device="cuda", dtype="float16")
    assert (cropped.strides, cropped.weight_function) == (None, ("weight_uniform",))
    assert (cropped.model.device, cropped.model.dtype) == ("cuda", "float16")
    with pytest.raises(JobError) as caught:
        job(stride=[2], max_batchsize=3, xyz=1)
    problems = problems_by_key(caught.value)
    assert problems.keys() == {"stride", "model_config.max_batchsize", "xyz"}
    assert "did you mean 'strides'?" in problems["stride"]
    assert "did you mean 'max_batch_size'?" in problems["model_config.max_batchsize"]
    assert "`chunkq explain`" in problems["xyz"]
    with pytest.raises(JobError, match=r"^model_config: "):
        job(model_config={"device": "cuda"})


def test_default_strides_are_half_the_patch_along_the_axes_of_the_volume(tmp_path: Path) -> None:
    script = save_script(tmp_path / "model.pt")

    def strides(shape: tuple[int, ...], **more: Any) -> tuple[int, ...]:
        predictor = chunkq.Predictor.from_model(script, **more)
        return predictor.plan(shape).grid.strides

    # [1, 8, 8] is a slice of a volume or an image with a channel axis, depending on the volume.
    assert strides((9, 20, 20), model_input_shape=[1, 8, 8]) == (1, 4, 4)
    assert strides((20, 20), model_input_shape=[1, 8, 8]) == (4, 4)
    smaller = {"model_output_shape": [2, 6, 4], "pad_width": [1, 2]}
    assert strides((20, 20), model_input_shape=[8, 8], **smaller) == (3, 2)
    assert strides((20, 9, 9), model_input_shape=[5, 8, 8], lost_dim=0) == (1, 4, 4)
    with pytest.raises(JobError) as caught:
        strides((20, 20, 20), model_input_shape=[8, 8])
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith("model_config.model_input_shape: ")


def zipped(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "")

    return write


def saved_model(path: Path) -> None:
    path.mkdir()
    (path / "saved_model.pb").touch()


def with_content(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def save_exported(path: Path) -> None:
    torch.export.save(torch.export.export(Conv(), (torch.zeros(1, 1, 4, 4, 4),)), path)


MODEL_FILES: dict[str, tuple[str, Callable[[Path], Any], tuple[str, str, str]]] = {
    "scripted": ("m.pt", save_script, ("torch", "torchscript", "ts_file")),
    "scripted, .pth": ("m.pth", save_script, ("torch", "torchscript", "ts_file")),
    "scripted, no suffix": ("m", save_script, ("torch", "torchscript", "ts_file")),
    "exported": ("m.pt2", save_exported, ("torch", "exported", "model_file")),
    "exported, named .pt": ("m.pt", save_exported, ("torch", "exported", "model_file")),
    "exported by an old torch": (
        "m.pt2",
        zipped("version", "serialized_exported_program.json"),
        ("torch", "exported", "model_file"),
    ),
    "onnx": ("m.onnx", with_content(b"\x08\x08"), ("onnx", "file", "model_file")),
    "keras": (
        "m.keras",
        zipped("metadata.json", "config.json", "model.weights.h5"),
        ("tensorflow", "file", "model_file"),
    ),
    "hdf5": ("m.h5", with_content(b"\x89HDF\r\n\x1a\n..."), ("tensorflow", "file", "model_file")),
    "saved model": ("m", saved_model, ("tensorflow", "file", "model_file")),
    "json": (
        "m",
        with_content(b'{"class_name": 1, "config": 2}'),
        ("tensorflow", "json", "json_file"),
    ),
    "a class": ("m.py", with_content(b""), ("torch", "class", "class_file")),
}


@pytest.mark.parametrize("name", MODEL_FILES)
def test_the_type_of_a_model_file_is_detected_from_its_content(name: str, tmp_path: Path) -> None:
    file, write, expected = MODEL_FILES[name]
    runtime, model_type, key = expected
    write(tmp_path / file)
    model = job_for_model(str(tmp_path / file), {})["model_config"]
    assert (model["runtime"], model["type"]) == (runtime, model_type)
    assert model[key] == str(tmp_path / file)


def save_state_dict(path: Path) -> None:
    torch.save(Conv().state_dict(), path)


INVALID_MODEL_FILES: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "missing": ("gone.pt", lambda path: None, ["gone.pt"]),
    "a state dict": ("m.pt", save_state_dict, ["m.pt", "class_name=", "checkpoint="]),
    "a text": ("m.pt", with_content(b"hello"), ["m.pt", "runtime=", "type="]),
    "another zip": ("m.pt", zipped("a.txt"), ["m.pt", "runtime=", "type="]),
    "a folder": ("m", Path.mkdir, ["saved_model.pb"]),
    "another suffix": ("m.bin", with_content(b"hello"), ["m.bin", "runtime=", "type="]),
}


@pytest.mark.parametrize("name", INVALID_MODEL_FILES)
def test_an_invalid_model_file_is_an_error_of_one_line(name: str, tmp_path: Path) -> None:
    file, write, fragments = INVALID_MODEL_FILES[name]
    write(tmp_path / file)
    with pytest.raises((JobError, ModelError), match=r"^model: ") as caught:
        chunkq.Predictor.from_model(tmp_path / file, model_input_shape=[8, 8])
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in fragments if part not in message] == [], message


def test_runtime_and_type_keywords_override_the_detection(tmp_path: Path) -> None:
    save_state_dict(tmp_path / "m.pt")
    path = str(tmp_path / "m.pt")
    for keywords, expected in [
        ({"type": "file", "trusted": True}, ("torch", "file")),
        ({"type": "torchscript"}, ("torch", "torchscript")),
        ({"runtime": "tensorflow", "type": "class"}, ("tensorflow", "class")),
        ({"runtime": "onnx", "type": "file"}, ("onnx", "file")),
    ]:
        model = job_for_model(path, keywords)["model_config"]
        assert (model["runtime"], model["type"]) == expected
    with pytest.raises(JobError, match=r"^model_config\.type: .*torchscript.*tensorflow"):
        chunkq.Predictor.from_model(
            save_script(tmp_path / "s.pt"), model_input_shape=[8], runtime="tensorflow"
        )
    with fsspec.open("memory://models/m", "wb") as file:
        file.write((tmp_path / "s.pt").read_bytes())
    assert job_for_model("memory://models/m", {})["model_config"]["ts_file"] == "memory://models/m"


# Stores


def test_predict_to_store_refuses_the_name_of_another_format_before_it_copies_an_array(
    tmp_path: Path,
) -> None:
    with chunkq.Predictor.from_model(lambda batch: batch, model_input_shape=[4, 4]) as predictor:
        for name in ("out.tif", "seg.nii.gz"):
            with pytest.raises(JobError, match=r"^output: .*use \w+\.zarr$") as caught:
                predictor.predict_to_store(np.zeros((8, 8), "uint8"), tmp_path / name)
            assert caught.value.code is ErrorCode.STORE_UNSUPPORTED
    assert list(tmp_path.iterdir()) == []


def test_predict_to_store_writes_the_same_store_as_a_job(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    path = write_zarr(tmp_path / "in.zarr", volume, (8, 8, 8))
    values = keys(tmp_path, combine="soft")
    job, _ = run_inline(values | {"input": str(path), "output": str(tmp_path / "job.zarr")})
    steps: list[tuple[int, int]] = []
    with chunkq.Predictor.from_config(values) as predictor:
        report = predictor.predict_to_store(
            path, tmp_path / "out.zarr", progress=lambda done, total: steps.append((done, total))
        )
    assert output_files(tmp_path / "out.zarr") == output_files(tmp_path / "job.zarr")
    stored_job = open_job(f"{tmp_path}/out.zarr.chunkq")
    assert stored_job.record.digest == job.record.digest
    assert zarr.open_group(tmp_path / "out.zarr", mode="r").attrs["chunkq"]["state"] == "complete"
    assert report["missing"] == []
    assert steps == [(n, report["chunks"]) for n in range(report["chunks"] + 1)]
    assert chunkq.status(tmp_path / "out.zarr").sealed


def test_an_interrupted_predict_to_store_continues_with_the_same_call(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "in.zarr", random_volume(SHAPE), (8, 8, 8))

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    output = tmp_path / "out.zarr"
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        with pytest.raises(KeyboardInterrupt):
            predictor.predict_to_store(path, output, progress=interrupt)
        before = chunkq.status(output).done
        assert 3 <= before < CHUNKS
        steps: list[int] = []
        report = predictor.predict_to_store(
            path, output, progress=lambda done, total: steps.append(done)
        )
        assert steps == list(range(before, CHUNKS + 1))
        assert report["patches"] == report["planned_patches"]
        expected = predictor.predict(path)
    np.testing.assert_array_equal(read_output(output), expected.probabilities)
    other = keys(tmp_path, combine="soft")
    with (
        chunkq.Predictor.from_config(other) as predictor,
        pytest.raises(JobError, match="different: combine") as caught,
    ):
        predictor.predict_to_store(path, output)
    assert caught.value.code is ErrorCode.OUTPUT_OF_OTHER_JOB


def test_storing_an_array_leaves_no_other_file_and_replaces_only_with_overwrite(
    tmp_path: Path,
) -> None:
    volume = random_volume(SHAPE)
    before = {*everything_below(tmp_path), "network.py", "kwargs.py"}
    output = tmp_path / "out.zarr"
    with (
        chunkq.Predictor.from_config(keys(tmp_path)) as predictor,
        mock.patch.object(input_volumes, "COPY_BYTES", 1000),  # three rows per write
    ):
        predictor.predict_to_store(volume, output)
        with pytest.raises(JobError) as caught:
            predictor.predict_to_store(volume, output)
        assert caught.value.code is ErrorCode.OUTPUT_OF_OTHER_JOB
        predictor.predict_to_store(np.asfortranarray(volume[::-1]), output, overwrite=True)
        expected = predictor.predict(np.ascontiguousarray(volume[::-1]))
    np.testing.assert_array_equal(read_output(output), expected.probabilities)
    files = {name for name in everything_below(tmp_path) if not name.startswith("out.zarr")}
    assert files - before <= {"__pycache__"}


def test_a_failing_chunk_raises_its_error_and_is_recorded_in_the_ledger(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    volume[16, 13, 18] = 255
    path = write_zarr(tmp_path / "in.zarr", volume)
    values = keys(tmp_path, POISONED)
    with (
        chunkq.Predictor.from_config(values) as predictor,
        pytest.raises(PredictionError, match="NaN"),
    ):
        predictor.predict_to_store(path, tmp_path / "out.zarr")
    status = chunkq.status(tmp_path / "out.zarr")
    assert [group.error for group in status.failures] == ["PredictionError"]
    assert not status.sealed


def test_a_changed_model_file_is_an_error(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "in.zarr", random_volume(SHAPE))
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        predictor.predict(path)
        (tmp_path / "network.py").write_text((tmp_path / "network.py").read_text() + "\n")
        with pytest.raises(ModelError, match="changed"):
            predictor.predict_to_store(path, tmp_path / "out.zarr")


# The commands as functions


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    write_zarr(tmp_path / "in.zarr", random_volume(SHAPE), (8, 8, 8))
    values = keys(tmp_path) | {"input": str(tmp_path / "in.zarr")}
    workspace = Workspace(tmp_path, values | {"output": str(tmp_path / "out.zarr")})
    for name in [name for name in os.environ if name.startswith("CHUNKQ")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CHUNKQ_QUEUE", f"sqlite://{workspace.queue_file}")
    return workspace


def test_produce_status_and_finalize_are_functions_that_print_nothing(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    steps: list[tuple[int, int]] = []
    result = chunkq.produce(workspace.values, progress=lambda *step: steps.append(step))
    assert (result.chunks, result.done, result.queued) == (CHUNKS, 0, CHUNKS)
    assert steps == [(0, CHUNKS), (CHUNKS, CHUNKS)]
    status = chunkq.status(str(workspace.output))
    assert (status.chunks, status.done, status.queued) == (CHUNKS, 0, CHUNKS)
    assert not status.sealed
    with pytest.raises(IncompleteError) as caught:
        chunkq.finalize(workspace.output)
    assert caught.value.code is ErrorCode.JOB_INCOMPLETE
    assert len(caught.value.missing) == CHUNKS
    workspace.compute_inline()
    report = chunkq.finalize(workspace.output)
    assert (report["chunks"], report["missing"]) == (CHUNKS, [])
    status = chunkq.status(workspace.output)
    assert (status.done, status.sealed) == (CHUNKS, True)
    assert status.blocks_finalized == status.blocks_to_finalize > 0
    assert chunkq.produce(workspace.write_job()).queued == 0
    with chunkq.Predictor.from_config(workspace.values) as predictor:
        np.testing.assert_array_equal(
            predictor.predict(workspace.folder / "in.zarr").probabilities,
            read_output(workspace.output),
        )
    assert capfd.readouterr() == ("", "")


def test_plans_and_reports_are_objects_of_one_line(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = chunkq.plan(workspace.values)
    assert not workspace.job_folder.exists()
    assert (plan.chunks, plan.warnings) == (CHUNKS, ())
    printed = json.loads(workspace.call("plan", workspace.write_job(), "--json").ok().out)
    assert plan.as_dict() == printed
    assert all(label in plan._repr_html_() for label, _ in plan.rows())
    chunkq.produce(workspace.values)
    assert not chunkq.report(workspace.output).sealed
    workspace.compute_inline()
    finished = chunkq.finalize(workspace.output)
    report, status = chunkq.report(workspace.output), chunkq.status(workspace.output)
    assert f"{CHUNKS}/{CHUNKS} chunks done" in repr(status)
    assert (report.sealed, report.timing.patches) == (True, plan.patches)
    assert report.as_dict()["conclusion"] == finished["conclusion"]
    for result in (plan, finished, report):
        text = repr(result)
        assert str(plan.patches) in text
        assert len(text) < 400
        assert str(plan.patches) in result._repr_html_()
    assert capfd.readouterr() == ("", "")


def test_functions_raise_the_errors_that_commands_print(workspace: Workspace) -> None:
    for function in (chunkq.status, chunkq.finalize, chunkq.report):
        with pytest.raises(MissingJobError, match=r"out\.zarr") as missing_job:
            function(workspace.output)
        assert missing_job.value.code is ErrorCode.JOB_MISSING
    for function in (chunkq.produce, chunkq.run, chunkq.plan):
        with pytest.raises(StoreError, match=r"^input: .*gone\.zarr"):
            function(workspace.values, input=workspace.folder / "gone.zarr")
        with pytest.raises(JobError, match=r"gone\.yaml: "):
            function(workspace.folder / "gone.yaml")
    with pytest.raises(JobError, match=r"--resume.*--overwrite"):
        chunkq.produce(workspace.values, resume=True, overwrite=True)
    with pytest.raises(JobError, match="amqp://x"):
        chunkq.produce(workspace.values, queue="amqp://x", output=workspace.folder / "other.zarr")
    chunkq.produce(workspace.values)
    status = chunkq.status(workspace.output, queue=f"sqlite://{workspace.folder}/in.zarr")
    assert (status.queued, status.chunks) == (None, CHUNKS)
    assert status.queue_problem is not None


def test_run_stops_on_ctrl_c_and_continues_with_the_same_call_in_another_thread(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupts: list[int] = []

    def interrupt(status: Any) -> None:
        if not interrupts:
            interrupts.append(status.done)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(ChunkqError) as caught:
        chunkq.run(workspace.values, progress=interrupt)
    assert caught.value.code is ErrorCode.INTERRUPTED
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before

    statuses: list[Any] = []
    threads: set[str] = set()

    def record(status: Any) -> None:
        statuses.append(status)
        threads.add(threading.current_thread().name)

    # Signals are forwarded only in the main thread.
    with ThreadPoolExecutor(1, thread_name_prefix="caller") as pool:
        report = pool.submit(chunkq.run, workspace.values, workers=2, progress=record).result()
    assert (report["chunks"], report["missing"]) == (CHUNKS, [])
    assert report["patches"] == report["planned_patches"]
    assert statuses[-1].done == CHUNKS
    assert threads == {"caller_0"}
    with chunkq.Predictor.from_config(workspace.values) as predictor:
        np.testing.assert_array_equal(
            predictor.predict(workspace.folder / "in.zarr").probabilities,
            read_output(workspace.output),
        )
    assert capfd.readouterr() == ("", "")


def test_run_adds_the_causes_of_failed_chunks_as_notes(workspace: Workspace) -> None:
    volume = random_volume(SHAPE)
    volume[16, 13, 18] = 255
    write_zarr(workspace.folder / "marked.zarr", volume, (8, 8, 8))
    model = keys(workspace.folder, POISONED)["model_config"]
    with pytest.raises(IncompleteError) as caught:
        chunkq.run(
            {**workspace.values, "model_config": model}, input=workspace.folder / "marked.zarr"
        )
    assert caught.value.missing
    assert any("NaN" in note for note in caught.value.__notes__)


# Names of the package


def test_importing_chunkq_imports_no_large_package(tmp_path: Path) -> None:
    script = (
        "import sys, chunkq; "
        "print(*sorted({n.partition('.')[0] for n in sys.modules} & {'numpy', 'torch', 'zarr', "
        "'pydantic', 'click', 'rich', 'chunkq_worker', 'chunkq_producer'}))"
    )
    completed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert completed.stdout.strip() == ""


def test_the_names_of_the_package_match_its_type_stub() -> None:
    stub = ast.parse(Path(chunkq.__file__).with_suffix(".pyi").read_text())
    typed = {
        alias.asname
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert typed == set(chunkq.API)
    for name in chunkq.API:
        assert getattr(chunkq, name).__name__ == name
        assert name in dir(chunkq)
        assert getattr(chunkq, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'predict'"):
        chunkq.predict  # type: ignore[attr-defined]  # noqa: B018


def test_a_module_with_the_same_name_does_not_hide_a_function() -> None:
    script = (
        "import chunkq.finalize; import chunkq; from chunkq.finalize import finalize_job; "
        "from chunkq.plan.plan import Plan; assert chunkq.plan.__name__ == 'plan', chunkq.plan; "
        "assert chunkq.finalize.__module__ == 'chunkq_producer.api', chunkq.finalize"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


README_NETWORK = """
import torch


class UNet(torch.nn.Conv3d):
    def __init__(self):
        super().__init__(1, 3, 1)
"""


def test_the_example_in_the_readme_runs_unchanged(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workspace.folder / "readme"
    folder.mkdir()
    volume = random_volume((192, 64, 64))
    write_zarr(folder / "volume.zarr", volume, (32, 32, 32))
    save_script(folder / "model.ts")
    (folder / "net.py").write_text(README_NETWORK)
    torch.save(torch.nn.Conv3d(1, 3, 1).state_dict(), folder / "unet.pt")
    (folder / "job.yaml").write_text(code_block(README, "Your own job", "yaml"))
    names: dict[str, Any] = {}
    monkeypatch.chdir(folder)
    exec(compile(code_block(README, "From Python", "python"), README, "exec"), names)
    assert names["prediction"].labels.shape == volume.shape
    assert (folder / "segmented.png").read_bytes().startswith(b"\x89PNG")
    probabilities = read_output(folder / "probabilities.zarr")
    np.testing.assert_array_equal(probabilities, names["prediction"].probabilities)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)
    assert names["report"]["missing"] == []
    assert read_output(folder / "labels.zarr").shape == volume.shape
    assert len(capsys.readouterr().out.splitlines()) > 1
    shutil.rmtree(folder)
