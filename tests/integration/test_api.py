"""From Python: the same bytes as a job's, without files, and the commands as functions."""

import ast
import contextlib
import os
import re
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
from chunkq_worker import inputs as given_volumes
from chunkq_worker.model_defaults import job_for_model

import chunkq
from chunkq.blend import Contribution, OwnBlock
from chunkq.combine import reduce_and_cast
from chunkq.errors import (
    ChunkqError,
    IncompleteError,
    JobError,
    MissingJobError,
    ModelError,
    PredictionError,
    StoreError,
)
from chunkq.job import Job
from chunkq.job_handle import open_job
from chunkq.plan import Chunk
from chunkq.streaming import regions
from tests import reference as ref
from tests.harness.files import everything_below, files_below
from tests.harness.networks import toy_model
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace, output_files, run_inline
from tests.integration.test_inputs import CASES, job_of

README = Path(__file__).parents[2] / "README.md"
SHAPE = (17, 14, 19)
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
"""Of a network without a channel axis in what it gives."""
FLAT_CLASS = """

class Flat(Toy):
    def forward(self, batch):
        return super().forward(batch)[:, 0]
"""


def keys(folder: Path, toy: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A job without input or output whose blocks have bands; None takes a key out.

    `toy` goes to the network, `model` among the changes is merged into `model_config`.
    """
    made = toy_model(folder, **({"patch": (6, 6, 6), "scale": 100.0} | (toy or {})))
    model = made | changes.pop("model", {})
    network = folder / "network.py"
    network.write_text(network.read_text() + FLAT_CLASS)
    values = SLIDING | {"model_config": model} | changes
    return {key: value for key, value in values.items() if value is not None}


# What comes out


@dataclass(frozen=True)
class Same:
    """Keys of a job that must give the same bytes with and without files."""

    keys: dict[str, Any] = field(default_factory=dict)
    toy: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = SHAPE
    dtype: str = "uint8"


CUT = {"inference_type": "crop_margin", "margin": [1, 1, 1], "strides": None}
GRIDS = {"inference_type": "patch", "strides": None, "offsets": [[3, -2, 4]], "edge": "pad"}
SAME = {
    "averages in bands": Same(),
    "soft labels": Same({"combine": "soft"}),
    "hard votes": Same({"combine": "hard", "weight_function": ["weight_hann"]}),
    "one channel": Same({"combine": "soft"}, {"channels": 1}),
    "one vote": Same({"combine": "hard"}, {"channels": 1}),
    "float16": Same({"output_dtype": "float16", "activation": "sigmoid"}),
    "no channel axis": Same({"model": FLAT}, {"channels": 1}),
    "reflected": Same({"pad_width": [5, 9, 22], "pad_mode": "reflect"}),
    "smaller output": Same({"strides": [2, 2, 2], "pad_width": [1, 1, 1]}, {"output": (4, 4, 4)}),
    "cropped": Same(CUT | {"combine": "hard"}),
    "offset grids": Same(GRIDS | {"pad_mode": "edge", "combine": "soft"}),
    "one block": Same({"chunksize": None, "storage_chunks": None}),
    "a line": Same({"strides": [4], "chunksize": [8], "storage_chunks": [2]}, shape=(61,)),
    "big-endian": Same(dtype=">u2"),
    "floats": Same({"combine": "soft"}, dtype="float64"),
}


@pytest.mark.parametrize("name", SAME)
def test_an_array_gives_the_bytes_that_the_job_stores(name: str, tmp_path: Path) -> None:
    case = SAME[name]
    values = keys(tmp_path, {"patch": (6,) * len(case.shape)} | case.toy, **case.keys)
    volume = random_volume(case.shape, case.dtype)
    same_as_stored(tmp_path, values, [volume])


@pytest.mark.parametrize("name", CASES)
def test_slices_and_several_inputs_give_the_bytes_that_the_job_stores(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    volumes = [random_volume((11, 13, 17), "int16") * (n + 1) for n in range(case.inputs)]
    values = job_of(case, tmp_path, volumes) | {"threads": 1}
    same_as_stored(tmp_path, values, volumes)


def same_as_stored(folder: Path, values: dict[str, Any], volumes: list[npt.NDArray[Any]]) -> None:
    """Compare every way out of a predictor with what produce, work and finalize store."""
    paths = [str(write_zarr(folder / f"input{n}.zarr", v)) for n, v in enumerate(volumes)]
    output = str(folder / "job.zarr")
    job, report = run_inline(values | {"input": paths, "output": output})
    stored = read_output(output)
    given: Any = volumes if len(volumes) > 1 else volumes[0]
    bare = {k: v for k, v in values.items() if k not in ("input", "output")}
    with chunkq.Predictor.from_config(bare) as predictor:
        found = predictor.predict(given)
        plan = predictor.plan(volumes[0].shape, [v.dtype for v in volumes])
        streamed = list(predictor.predict_streaming(given))
        copied = predictor.predict_to_store(given, folder / "copied.zarr")
    assert plan.costs == job.plan.costs
    assert (plan.output_shape, plan.output_dtype) == (stored.shape, stored.dtype)

    averaged = job.plan.job.combine == "weighted_avg"
    result = found.probabilities if averaged else found.labels
    assert result is not None
    assert result.dtype == stored.dtype
    assert result.tobytes() == stored.tobytes()
    assert found.labels.shape == volumes[0].shape
    if averaged:
        assert result.shape == (job.plan.channels, *volumes[0].shape)
        np.testing.assert_array_equal(
            found.labels, reduce_and_cast(result, "soft", "uint8"), "labels of the average"
        )
    else:
        assert found.probabilities is None
    inputs = found.input if isinstance(found.input, tuple) else (found.input,)
    for one, other in zip(inputs, volumes, strict=True):
        assert np.shares_memory(one, other)
        np.testing.assert_array_equal(one, other)

    assembled, seen = np.zeros_like(stored), np.zeros(stored.shape, np.uint8)
    for where, part in streamed:
        assert part.dtype == stored.dtype
        assembled[where] = part
        seen[where] += 1
    assert (seen == 1).all()
    assert assembled.tobytes() == stored.tobytes()

    assert files_below(folder / "copied.zarr" / "0") == files_below(folder / "job.zarr" / "0")
    for key in ("chunks", "patches", "finalized_blocks", "bytes", "missing"):
        assert copied[key] == report[key], key


def test_the_result_is_the_reference_s(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    network = ref.predictor("box_blur", 3, (6, 6, 6))
    wanted = ref.reference(
        ref.sliding_window(SHAPE, (6, 6, 6), (3, 4, 3)),
        volume,
        lambda given, start: network(given / 100.0, start),
        "weighted_avg",
        "weight_gaussian",
    )
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        found = predictor.predict(volume)
    np.testing.assert_allclose(found.probabilities, wanted.average, rtol=0, atol=1e-5)
    clear = wanted.margin_of_decision > 1e-5
    np.testing.assert_array_equal(found.labels[clear], wanted.labels[clear])


def test_labels_of_one_channel_without_axis_are_whether_it_reaches_a_half(tmp_path: Path) -> None:
    values = keys(tmp_path, {"channels": 1, "scale": 60.0}, model=FLAT)
    with chunkq.Predictor.from_config(values) as predictor:
        found = predictor.predict(random_volume(SHAPE))
    assert found.probabilities is not None
    assert found.probabilities.shape == (1, *SHAPE)
    np.testing.assert_array_equal(found.labels, found.probabilities[0] >= 0.5)
    assert 0 < found.labels.mean() < 1


# Streaming


def test_regions_come_block_by_block_the_last_axis_fastest(tmp_path: Path) -> None:
    with chunkq.Predictor.from_config(keys(tmp_path, combine="soft")) as predictor:
        plan = predictor.plan(SHAPE, "uint8")
        steps: list[tuple[int, int]] = []
        streamed = predictor.predict_streaming(
            random_volume(SHAPE), progress=lambda done, total: steps.append((done, total))
        )
        places = [where for where, _ in streamed]
    blocks = [tuple(s.start // 8 for s in where) for where in places]
    assert blocks == sorted(blocks)
    assert set(blocks) == set(plan.indices())
    assert steps == [(done, plan.costs.chunks) for done in range(plan.costs.chunks + 1)]
    # What no neighbour reaches is final first: it ends where the block ends.
    first = places[blocks.index((1, 1, 1))]
    assert [s.stop for s in first] == [16, 14, 16]


class Watched(np.ndarray[Any, np.dtype[Any]]):
    """An array that can be seen to be let go."""


@pytest.mark.parametrize("views", [False, True], ids=["of their own", "views of the chunk's sums"])
def test_streaming_holds_no_more_than_one_slice_of_bands(views: bool, tmp_path: Path) -> None:
    """Whatever arrays the pieces of a chunk come in, those alive at once are few."""
    plan = chunkq.Predictor.from_config(keys(tmp_path)).plan((64, 16, 16), "uint8")
    alive: weakref.WeakValueDictionary[int, Watched] = weakref.WeakValueDictionary()

    def watched(shape: tuple[int, ...]) -> Watched:
        array = Watched(shape, np.float32)
        array[...] = 0
        alive[id(array)] = array
        return array

    def sums(*shape: int) -> npt.NDArray[np.float32]:
        return np.zeros((plan.channels, *shape), np.float32)

    def contribution(index: tuple[int, ...]) -> tuple[Chunk, Contribution]:
        chunk, pieces = plan.chunk(index), []
        whole = watched((plan.channels * chunk.region.size,)) if views else None
        for piece in plan.outgoing_pieces(chunk):
            shape = (plan.channels, *piece.box.shape)
            part = watched(shape) if whole is None else whole[: prod(shape)].reshape(shape)
            pieces.append((piece, part))
        band = tuple(sums(*box.shape) for box in chunk.band_boxes)
        own = OwnBlock(band, tuple(sums(*box.shape) for box in chunk.rest_boxes))
        return chunk, Contribution(sums(*chunk.core.shape), own, tuple(pieces))

    most = 0
    for _ in regions(plan, map(contribution, plan.indices())):
        most = max(most, sum(array.nbytes for array in alive.values()))
    slices = plan.blocks[0]
    assert slices == 8
    pieces = [
        piece for index in plan.indices() for piece in plan.outgoing_pieces(plan.chunk(index))
    ]
    every_piece = sum(4 * plan.channels * piece.box.size for piece in pieces)
    one_chunk = 4 * plan.channels * max(plan.chunk(i).region.size for i in plan.indices())
    assert 0 < most <= (2 * one_chunk if views else 2 * every_piece / (slices - 1))


class Seen:
    """A volume that gives what it is asked for and notes how much that was."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._values, self.shape, self.dtype = values, values.shape, values.dtype
        self.asked: list[int] = []

    def __getitem__(self, where: Any) -> npt.NDArray[Any]:
        part = self._values[where]
        self.asked.append(part.size)
        return part


def test_what_is_sliced_into_arrays_is_read_a_chunk_at_a_time(tmp_path: Path) -> None:
    volume = random_volume((40, 16, 16))
    seen = Seen(volume)
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        streamed = predictor.predict_streaming(seen)
        assert seen.asked == []
        next(streamed)
        assert len(seen.asked) <= 2
        streamed.close()
        whole = predictor.predict(volume)
        parts = list(predictor.predict_streaming(seen))
    assert max(seen.asked) < volume.size / 4
    assert whole.probabilities is not None
    for where, values in parts:
        np.testing.assert_array_equal(whole.probabilities[where], values)


def test_streaming_refuses_before_the_first_region_is_asked_for(tmp_path: Path) -> None:
    predictor = chunkq.Predictor.from_config(keys(tmp_path))
    with pytest.raises(JobError, match="strides: has 3 entries, the input has 2 axes"):
        predictor.predict_streaming(np.zeros((8, 8), np.uint8))


# Volumes


def test_tensors_zarr_arrays_and_paths_are_the_volumes_they_hold(tmp_path: Path) -> None:
    volume = random_volume(SHAPE, "int16")
    np.save(tmp_path / "in.npy", volume)
    path = write_zarr(tmp_path / "in.zarr", volume, (8, 8, 8))
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        wanted = predictor.predict(volume).probabilities
        assert wanted is not None
        for given in (
            torch.from_numpy(volume),
            zarr.open_array(path, mode="r"),
            path,
            str(tmp_path / "in.npy"),
            np.asfortranarray(volume),
            [volume],
        ):
            found = predictor.predict(given)
            assert isinstance(found.probabilities, np.ndarray), type(given)
            assert found.probabilities.tobytes() == wanted.tobytes(), type(given)
            np.testing.assert_array_equal(found.input, volume)


NOT_A_VOLUME: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: [], "input: no volume was given"),
    "a number": (lambda: 5, "input: the array has 0 axes; 1 to 4 spatial axes"),
    "words": (lambda: np.full(SHAPE, "x"), "input: the array holds <U1; real numbers are needed"),
    "no voxel": (lambda: np.zeros((0, 8, 8)), "so no voxel"),
    "too wide": (lambda: np.zeros(SHAPE, np.uint64), "input: the array holds uint64"),
    "complex": (lambda: np.zeros(SHAPE, np.complex64), "holds complex64; real numbers"),
    "bfloat16": (lambda: torch.zeros(SHAPE, dtype=torch.bfloat16), "Tensor) is no array"),
    "several": (
        lambda: [np.zeros(SHAPE), np.zeros(SHAPE)],
        "input: several volumes need model_config.join_dim",
    ),
    "of two shapes": (
        lambda: [np.zeros(SHAPE), np.zeros((5, 5, 5))],
        "input: array 1 has shape [5, 5, 5], the first input [17, 14, 19]",
    ),
    "an old path": (lambda: "gone.zarr", "gone.zarr is not there"),
}


@pytest.mark.parametrize("name", NOT_A_VOLUME)
def test_what_is_no_volume_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, words = NOT_A_VOLUME[name]
    predictor = chunkq.Predictor.from_config(keys(tmp_path))
    for ask in (
        predictor.predict,
        predictor.predict_streaming,
        lambda given: predictor.predict_to_store(given, tmp_path / "out.zarr"),
    ):
        with pytest.raises((JobError, StoreError), match=re.escape(words)) as caught:
            ask(make())
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.zarr").exists()


# One network


@contextlib.contextmanager
def loads() -> Iterator[mock.Mock]:
    with mock.patch.object(
        inference_engine, "load_runtime", wraps=inference_engine.load_runtime
    ) as loaded:
        yield loaded


def test_one_network_serves_volumes_of_every_shape_and_dtype(tmp_path: Path) -> None:
    values = keys(tmp_path)
    volumes = [
        random_volume((n, 9, 8), t) for n, t in [(9, "u1"), (12, "f4"), (8, "i2"), (9, "u1")]
    ]
    with loads() as loaded, chunkq.Predictor.from_config(values) as predictor:
        together = [predictor.predict(volume).probabilities for volume in volumes]
        predictor.predict_to_store(volumes[1], tmp_path / "one.zarr")
        assert loaded.call_count == 1
    for number, volume in enumerate(volumes):
        with chunkq.Predictor.from_config(values) as alone:
            np.testing.assert_array_equal(alone.predict(volume).probabilities, together[number])
    np.testing.assert_array_equal(read_output(tmp_path / "one.zarr"), together[1])


def test_threads_and_predictors_share_the_device_and_disturb_nobody(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = chunkq.Predictor.from_config(keys(tmp_path))
    second = chunkq.Predictor.from_config(
        keys(tmp_path / "other", combine="soft", model={"max_batch_size": 3})
    )
    volumes = [random_volume((8 + n, 9, 10)) for n in range(4)]
    tasks = [(predictor, volume) for volume in volumes for predictor in (first, second)]
    with first, second:
        alone = [predictor.predict(volume).labels for predictor, volume in tasks]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda task: task[0].predict(task[1]).labels, tasks))
    for one, other in zip(alone, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_closed_predictor_says_so_and_may_be_closed_again(tmp_path: Path) -> None:
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        streamed = predictor.predict_streaming(random_volume((30, 9, 9)))
        next(streamed)
    predictor.close()
    with pytest.raises(ChunkqError, match="the predictor is closed"):
        list(streamed)
    with pytest.raises(ChunkqError, match="the predictor is closed"):
        predictor.predict(random_volume(SHAPE))
    never_used = chunkq.Predictor.from_config(keys(tmp_path))
    never_used.close()


def test_what_the_network_does_wrong_is_raised_as_in_a_job(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    volume[16, 13, 18] = 255
    with chunkq.Predictor.from_config(keys(tmp_path, POISONED)) as predictor:
        with pytest.raises(PredictionError, match=r"NaN .* voxels \[11, 8, 13\] to \[17, 14, 19\]"):
            predictor.predict(volume)
        # The network is none the worse for it.
        assert predictor.predict(volume[:16]).labels.shape == (16, 14, 19)
    wrong = {"model_output_shape": [4, 6, 6, 6]}
    predictor = chunkq.Predictor.from_config(keys(tmp_path, model=wrong))
    with pytest.raises(ModelError, match=r"returned shape \[4, 3, 6, 6, 6\]"):
        predictor.predict(volume)


# Jobs and model files


def test_a_job_file_serves_as_it_is_and_paths_are_relative_to_it(tmp_path: Path) -> None:
    model = keys(tmp_path)["model_config"]
    for key in ("class_file", "kwargs_file"):
        model[key] = Path(model[key]).name
    job = Workspace(tmp_path, {**SLIDING, "input": 5, "model_config": model}).write_job()
    with chunkq.Predictor.from_config(job) as predictor:
        assert predictor.predict(random_volume(SHAPE)).probabilities is not None
        assert predictor.job.combine == "weighted_avg"
        assert predictor.plan((100, 100, 100)).costs.patches == 33 * 25 * 33


def test_every_mistake_in_a_config_is_told_at_once(tmp_path: Path) -> None:
    values = keys(tmp_path, stride=[3], combine="sotf", model={"ts_fil": "x"})
    with pytest.raises(JobError) as caught:
        chunkq.Predictor.from_config(values)
    assert set(caught.value.problems) == {
        "stride: unknown key; did you mean 'strides'?",
        "combine: 'sotf' is none of 'weighted_avg', 'soft' or 'hard'; did you mean 'soft'?",
        "model_config.ts_fil: unknown key; did you mean 'ts_file'?",
    }
    with pytest.raises(JobError, match=r"model_config\.class_file: no file .*gone\.py"):
        chunkq.Predictor.from_config(keys(tmp_path, model={"class_file": "gone.py"}))


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


def test_a_model_file_and_its_shapes_are_enough(tmp_path: Path) -> None:
    script = save_script(tmp_path / "model.pt")
    shapes: dict[str, Any] = {
        "model_input_shape": (1, 6, 1, 7),
        "model_output_shape": (3, 6, 1, 7),
    }
    volume = random_volume((13, 5, 16))
    with chunkq.Predictor.from_model(script, **shapes, threads=1) as predictor:
        found = predictor.predict(volume)
        job = predictor.plan(volume.shape).job
    assert job.strides == (3, 1, 3)
    assert (job.model.runtime, job.model.type) == ("torch", "torchscript")
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
        wanted = predictor.predict(volume)
    np.testing.assert_array_equal(found.probabilities, wanted.probabilities)


def test_keywords_are_the_job_file_s_keys_and_go_before_what_is_usual(tmp_path: Path) -> None:
    script = save_script(tmp_path / "model.pt")

    def job(**given: Any) -> Job:
        return chunkq.Predictor.from_model(script, model_input_shape=[1, 8, 8], **given).job

    given = job(strides=(2, 5), weight_function="weight_hann", combine="soft", max_batch_size=9)
    assert given.strides == (2, 5)
    assert given.weight_function == ("weight_hann",)
    assert (given.combine, given.model.max_batch_size) == ("soft", 9)
    cropped = job(inference_type="crop_margin", margin=[1, 1], device="cuda", dtype="float16")
    assert (cropped.strides, cropped.weight_function) == (None, ("weight_uniform",))
    assert (cropped.model.device, cropped.model.dtype) == ("cuda", "float16")
    with pytest.raises(JobError) as caught:
        job(stride=[2], max_batchsize=3, xyz=1)
    assert set(caught.value.problems) == {
        "stride: unknown key; did you mean 'strides'?",
        "model_config.max_batchsize: unknown key; did you mean 'max_batch_size'?",
        "xyz: unknown key; `chunkq schema` lists the legal ones",
    }
    with pytest.raises(JobError, match="model_config: give each of its keys as a keyword"):
        job(model_config={"device": "cuda"})


def test_half_a_patch_follows_the_volume_s_axes_and_the_lost_one(tmp_path: Path) -> None:
    script = save_script(tmp_path / "model.pt")

    def strides(shape: tuple[int, ...], **more: Any) -> tuple[int, ...] | None:
        predictor = chunkq.Predictor.from_model(script, **more)
        return predictor.plan(shape).job.strides

    # [1, 8, 8] is a slice of a volume, or an image with a channel axis: the volume tells.
    assert strides((9, 20, 20), model_input_shape=[1, 8, 8]) == (1, 4, 4)
    assert strides((20, 20), model_input_shape=[1, 8, 8]) == (4, 4)
    smaller = {"model_output_shape": [2, 6, 4], "pad_width": [1, 2]}
    assert strides((20, 20), model_input_shape=[8, 8], **smaller) == (3, 2)
    assert strides((20, 9, 9), model_input_shape=[5, 8, 8], lost_dim=0) == (1, 4, 4)
    with pytest.raises(JobError) as caught:
        strides((20, 20, 20), model_input_shape=[8, 8])
    assert len(caught.value.problems) == 1
    assert "model_config.model_input_shape: has 2 entries" in str(caught.value)


def zipped(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "")

    return write


def saved_model(path: Path) -> None:
    path.mkdir()
    (path / "saved_model.pb").touch()


def of_bytes(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(Conv(), (torch.zeros(1, 1, 4, 4, 4),)), path)


KINDS: dict[str, tuple[str, Callable[[Path], Any], tuple[str, str, str]]] = {
    "scripted": ("m.pt", save_script, ("torch", "torchscript", "ts_file")),
    "scripted, .pth": ("m.pth", save_script, ("torch", "torchscript", "ts_file")),
    "scripted, no suffix": ("m", save_script, ("torch", "torchscript", "ts_file")),
    "exported": ("m.pt2", exported, ("torch", "exported", "model_file")),
    "exported, named .pt": ("m.pt", exported, ("torch", "exported", "model_file")),
    "exported by an old torch": (
        "m.pt2",
        zipped("version", "serialized_exported_program.json"),
        ("torch", "exported", "model_file"),
    ),
    "onnx": ("m.onnx", of_bytes(b"\x08\x08"), ("onnx", "file", "model_file")),
    "keras": (
        "m.keras",
        zipped("metadata.json", "config.json", "model.weights.h5"),
        ("tensorflow", "file", "model_file"),
    ),
    "hdf5": ("m.h5", of_bytes(b"\x89HDF\r\n\x1a\n..."), ("tensorflow", "file", "model_file")),
    "saved model": ("m", saved_model, ("tensorflow", "file", "model_file")),
    "json": ("m", of_bytes(b'{"class_name": 1, "config": 2}'), ("tensorflow", "json", "json_file")),
    "a class": ("m.py", of_bytes(b""), ("torch", "class", "class_file")),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_file_s_kind_is_told_by_what_it_is(name: str, tmp_path: Path) -> None:
    file, write, wanted = KINDS[name]
    write(tmp_path / file)
    model = job_for_model(str(tmp_path / file), {})["model_config"]
    assert (model["runtime"], model["type"]) == wanted[:2]
    assert model[wanted[2]] == str(tmp_path / file)


def state_dict(path: Path) -> None:
    torch.save(Conv().state_dict(), path)


NO_KIND: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "absent": ("gone.pt", lambda path: None, "model: no file"),
    "weights": ("m.pt", state_dict, "class_name= and this as checkpoint="),
    "a text": ("m.pt", of_bytes(b"hello"), "m.pt is not to be told; pass runtime= and"),
    "another zip": ("m.pt", zipped("a.txt"), "m.pt is not to be told; pass runtime= and"),
    "a folder": ("m", Path.mkdir, "a folder without saved_model.pb"),
    "unknown": ("m.bin", of_bytes(b"hello"), "pass runtime= and type="),
}


@pytest.mark.parametrize("name", NO_KIND)
def test_a_file_that_is_no_model_is_told_with_what_to_pass(name: str, tmp_path: Path) -> None:
    file, write, words = NO_KIND[name]
    write(tmp_path / file)
    with pytest.raises((JobError, ModelError), match=re.escape(words)) as caught:
        chunkq.Predictor.from_model(tmp_path / file, model_input_shape=[8, 8])
    assert "\n" not in str(caught.value)


def test_what_is_said_of_a_model_file_goes_before_what_it_looks_like(tmp_path: Path) -> None:
    state_dict(tmp_path / "m.pt")
    path = str(tmp_path / "m.pt")
    for given, wanted in [
        ({"type": "file", "trusted": True}, ("torch", "file")),
        ({"type": "torchscript"}, ("torch", "torchscript")),
        ({"runtime": "tensorflow", "type": "class"}, ("tensorflow", "class")),
        ({"runtime": "onnx", "type": "file"}, ("onnx", "file")),
    ]:
        model = job_for_model(path, given)["model_config"]
        assert (model["runtime"], model["type"]) == wanted
    with pytest.raises(JobError, match="tensorflow has no torchscript; its types are"):
        chunkq.Predictor.from_model(
            save_script(tmp_path / "s.pt"), model_input_shape=[8], runtime="tensorflow"
        )
    with fsspec.open("memory://models/m", "wb") as file:
        file.write((tmp_path / "s.pt").read_bytes())
    assert job_for_model("memory://models/m", {})["model_config"]["ts_file"] == "memory://models/m"


# To a store


def test_a_store_written_from_python_is_the_job_s(tmp_path: Path) -> None:
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
    ours = open_job(f"{tmp_path}/out.zarr.chunkq")
    assert ours.record.digest == job.record.digest
    assert zarr.open_group(tmp_path / "out.zarr", mode="r").attrs["chunkq"]["state"] == "complete"
    assert report["missing"] == []
    assert steps == [(n, report["chunks"]) for n in range(report["chunks"] + 1)]
    assert chunkq.status(tmp_path / "out.zarr").sealed


def test_cut_off_the_same_call_continues_where_it_was(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "in.zarr", random_volume(SHAPE), (8, 8, 8))

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    output = tmp_path / "out.zarr"
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        with pytest.raises(KeyboardInterrupt):
            predictor.predict_to_store(path, output, progress=stop)
        before = chunkq.status(output).done
        assert 5 <= before < 18
        steps: list[int] = []
        report = predictor.predict_to_store(
            path, output, progress=lambda done, total: steps.append(done)
        )
        assert steps == list(range(before, 19))
        assert report["patches"] == report["planned_patches"]
        wanted = predictor.predict(path)
    np.testing.assert_array_equal(read_output(output), wanted.probabilities)
    other = keys(tmp_path, combine="soft")
    with (
        chunkq.Predictor.from_config(other) as predictor,
        pytest.raises(JobError, match=r"belongs to a different job \(different: combine\)"),
    ):
        predictor.predict_to_store(path, output)


def test_an_array_leaves_no_file_but_the_result_and_replaces_only_on_demand(
    tmp_path: Path,
) -> None:
    volume = random_volume(SHAPE)
    before = {*everything_below(tmp_path), "network.py", "kwargs.py"}
    output = tmp_path / "out.zarr"
    with (
        chunkq.Predictor.from_config(keys(tmp_path)) as predictor,
        mock.patch.object(given_volumes, "COPY_BYTES", 1000),  # three rows at a time
    ):
        predictor.predict_to_store(volume, output)
        with pytest.raises(JobError, match="belongs to a different job"):
            predictor.predict_to_store(volume, output)
        predictor.predict_to_store(np.asfortranarray(volume[::-1]), output, overwrite=True)
        wanted = predictor.predict(np.ascontiguousarray(volume[::-1]))
    np.testing.assert_array_equal(read_output(output), wanted.probabilities)
    left = {name for name in everything_below(tmp_path) if not name.startswith("out.zarr")}
    assert left - before <= {"__pycache__"}


def test_a_chunk_that_fails_raises_its_cause_and_the_ledger_keeps_it(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    volume[16, 13, 18] = 255
    path = write_zarr(tmp_path / "in.zarr", volume)
    values = keys(tmp_path, POISONED)
    with (
        chunkq.Predictor.from_config(values) as predictor,
        pytest.raises(PredictionError, match="the network gave NaN"),
    ):
        predictor.predict_to_store(path, tmp_path / "out.zarr")
    status = chunkq.status(tmp_path / "out.zarr")
    assert [group.error for group in status.failures] == ["PredictionError"]
    assert not status.sealed


def test_a_model_file_that_changed_meanwhile_is_not_vouched_for(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "in.zarr", random_volume(SHAPE))
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        predictor.predict(path)
        (tmp_path / "network.py").write_text((tmp_path / "network.py").read_text() + "\n")
        with pytest.raises(ModelError, match="have changed since the predictor was made"):
            predictor.predict_to_store(path, tmp_path / "out.zarr")


# The commands as functions


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    write_zarr(tmp_path / "in.zarr", random_volume(SHAPE), (8, 8, 8))
    values = keys(tmp_path) | {"input": str(tmp_path / "in.zarr")}
    made = Workspace(tmp_path, values | {"output": str(tmp_path / "out.zarr")})
    for name in [name for name in os.environ if name.startswith("CHUNKQ")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CHUNKQ_QUEUE", f"sqlite://{made.queue_file}")
    return made


def test_produce_status_and_finalize_are_functions_that_print_nothing(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    steps: list[tuple[int, int]] = []
    made = chunkq.produce(workspace.values, progress=lambda *step: steps.append(step))
    assert (made.chunks, made.done, made.queued) == (18, 0, 18)
    assert steps == [(0, 18), (18, 18)]
    status = chunkq.status(str(workspace.output))
    assert (status.chunks, status.done, status.queued, status.sealed) == (18, 0, 18, False)
    with pytest.raises(IncompleteError, match="18 chunks are not computed yet") as caught:
        chunkq.finalize(workspace.output)
    assert len(caught.value.missing) == 18
    workspace.compute_inline()
    report = chunkq.finalize(workspace.output)
    assert (report["chunks"], report["missing"]) == (18, [])
    status = chunkq.status(workspace.output)
    assert (status.done, status.sealed) == (18, True)
    assert status.blocks_finalized == status.blocks_to_finalize > 0
    assert chunkq.produce(workspace.write_job()).queued == 0
    with chunkq.Predictor.from_config(workspace.values) as predictor:
        np.testing.assert_array_equal(
            predictor.predict(workspace.folder / "in.zarr").probabilities,
            read_output(workspace.output),
        )
    assert capfd.readouterr() == ("", "")


def test_functions_raise_what_commands_say(workspace: Workspace) -> None:
    with pytest.raises(MissingJobError, match="no job was produced here"):
        chunkq.status(workspace.output)
    with pytest.raises(MissingJobError, match="no job was produced here"):
        chunkq.finalize(workspace.output)
    for function in (chunkq.produce, chunkq.run):
        with pytest.raises(StoreError, match=r"gone\.zarr is not there"):
            function(workspace.values, input=workspace.folder / "gone.zarr")
        with pytest.raises(JobError, match="no such job file"):
            function(workspace.folder / "gone.yaml")
    with pytest.raises(JobError, match="--resume goes on and --overwrite starts again"):
        chunkq.produce(workspace.values, resume=True, overwrite=True)
    with pytest.raises(JobError, match="amqp://x"):
        chunkq.produce(workspace.values, queue="amqp://x", output=workspace.folder / "other.zarr")
    chunkq.produce(workspace.values)
    status = chunkq.status(workspace.output, queue=f"sqlite://{workspace.folder}/in.zarr")
    assert (status.queued, status.chunks) == (None, 18)
    assert status.queue_problem is not None


def test_run_is_stopped_by_ctrl_c_and_completed_by_the_same_call_from_any_thread(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupts: list[int] = []

    def interrupt(status: Any) -> None:
        if not interrupts:
            interrupts.append(status.done)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(ChunkqError, match="stopped; the same command continues") as caught:
        chunkq.run(workspace.values, progress=interrupt)
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before

    looks: list[Any] = []
    threads: set[str] = set()

    def look(status: Any) -> None:
        looks.append(status)
        threads.add(threading.current_thread().name)

    # Not the main thread, so that signals cannot be passed on.
    with ThreadPoolExecutor(1, thread_name_prefix="own") as pool:
        report = pool.submit(chunkq.run, workspace.values, workers=2, progress=look).result()
    assert (report["chunks"], report["missing"]) == (18, [])
    assert report["patches"] == report["planned_patches"]
    assert looks[-1].done == 18
    assert threads == {"own_0"}
    with chunkq.Predictor.from_config(workspace.values) as predictor:
        np.testing.assert_array_equal(
            predictor.predict(workspace.folder / "in.zarr").probabilities,
            read_output(workspace.output),
        )
    assert capfd.readouterr() == ("", "")


def test_run_says_why_chunks_failed_in_the_error_s_notes(workspace: Workspace) -> None:
    volume = random_volume(SHAPE)
    volume[16, 13, 18] = 255
    write_zarr(workspace.folder / "marked.zarr", volume, (8, 8, 8))
    model = keys(workspace.folder, POISONED)["model_config"]
    with pytest.raises(IncompleteError, match="chunks are not computed yet") as caught:
        chunkq.run(
            {**workspace.values, "model_config": model}, input=workspace.folder / "marked.zarr"
        )
    assert caught.value.missing
    assert any("the network gave NaN or infinity" in note for note in caught.value.__notes__)


# What `import chunkq` offers


def test_importing_chunkq_imports_nothing_heavy_and_no_side(tmp_path: Path) -> None:
    script = (
        "import sys, chunkq; "
        "print(*sorted({n.partition('.')[0] for n in sys.modules} & {'numpy', 'torch', 'zarr', "
        "'pydantic', 'click', 'rich', 'chunkq_worker', 'chunkq_producer'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == ""


def test_every_name_is_there_and_the_types_say_the_same() -> None:
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


def test_a_module_of_the_same_name_does_not_hide_a_function() -> None:
    script = (
        "import chunkq.finalize; import chunkq; from chunkq.finalize import finalize_job; "
        "assert chunkq.finalize.__module__ == 'chunkq_producer.api', chunkq.finalize"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def code_block(after: str, language: str) -> str:
    """The first block of code in a language after a heading of the README."""
    text = README.read_text().partition(f"## {after}\n")[2]
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_readme_s_example_runs_as_it_stands(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workspace.folder / "readme"
    folder.mkdir()
    volume = random_volume((70, 64, 64))
    write_zarr(folder / "volume.zarr", volume, (32, 32, 32))
    save_script(folder / "model.ts")
    (folder / "job.yaml").write_text(code_block("Your own job in ten lines", "yaml"))
    names: dict[str, Any] = {}
    monkeypatch.chdir(folder)
    exec(compile(code_block("From Python", "python"), str(README), "exec"), names)
    assert names["prediction"].labels.shape == volume.shape
    assert (folder / "segmented.png").read_bytes().startswith(b"\x89PNG")
    probabilities = read_output(folder / "probabilities.zarr")
    np.testing.assert_array_equal(probabilities, names["prediction"].probabilities)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)
    assert names["report"]["missing"] == []
    assert read_output(folder / "labels.zarr").shape == volume.shape
    assert len(capsys.readouterr().out.splitlines()) > 1
    shutil.rmtree(folder)
