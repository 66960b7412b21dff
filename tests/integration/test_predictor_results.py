"""`Predictor` returns the bytes that a job stores, whole or region by region."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr

import chunkq
from chunkq.blend.combine import to_labels
from chunkq.blend.streaming import OutputStream, regions
from chunkq.blend.sums import Contribution, OwnBlock
from chunkq.errors import JobError, StoreError
from chunkq.plan.chunk import Chunk
from tests import reference as ref
from tests.harness.files import files_below
from tests.harness.predictor_job import FLAT, SHAPE, keys
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import run_inline
from tests.integration.test_inputs import CASES, job_of


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
