"""Masks and empty patches: the output equals that of the reference, for any cut and any worker."""

import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from chunkq_producer.produce import produce_job
from chunkq_worker.inline import Contributions
from chunkq_worker.predictor import Predictor
from chunkq_worker.run_task import run_task

from chunkq.create import check_job, create_job
from chunkq.enqueue import enqueue
from chunkq.errors import ChunkqError, ErrorCode, PredictionWarning
from chunkq.finalize import finalize_job
from chunkq.job.job_handle import JobHandle
from chunkq.job.job_reading import load_job
from chunkq.job.tasks import chunk_name
from chunkq.queue.contract.executor import Attempt
from chunkq.queue.registry import open_executor
from tests import reference as ref
from tests.harness.networks import toy_model
from tests.harness.volumes import read_output, write_zarr
from tests.harness.workspace import output_files, run_inline, run_tasks

SHAPE = (37, 23, 30)
PATCH = (8, 8, 8)
CHUNKSIZES = {1: (40, 24, 32), 8: (24, 16, 16), 60: (8, 8, 8)}
"""Chunk size by number of blocks."""
SCALE = 100.0
SLIDING: dict[str, Any] = {
    "inference_type": "sliding_window",
    "strides": [5, 4, 6],
    "pad_width": [4, 4, 4],
    "pad_mode": "reflect",
    "weight_function": ["weight_gaussian"],
}
SLIDING_SETUP = ref.sliding_window(SHAPE, PATCH, (5, 4, 6), pad_width=(4, 4, 4), pad_mode="reflect")
GRIDS: dict[str, Any] = {
    "inference_type": "patch",
    "offsets": [[-4, -4, -4], [3, 0, -2]],
    "pad_mode": "symmetric",
    "weight_function": ["weight_linear"],
}
GRIDS_SETUP = ref.patch(SHAPE, PATCH, offsets=((-4, -4, -4), (3, 0, -2)), pad_mode="symmetric")
CROPPED: dict[str, Any] = {
    "inference_type": "crop_margin",
    "margin": [1, 2, 1],
    "pad_mode": "edge",
    "weight_function": ["weight_uniform"],
}
CROPPED_SETUP = ref.crop_margin(SHAPE, PATCH, (1, 2, 1), pad_mode="edge")
NOISE = (
    (slice(3, 14), slice(2, 13), slice(4, 12)),
    (slice(25, 36), slice(12, 20), slice(18, 29)),
)


def sparse_volume() -> npt.NDArray[np.uint8]:
    """Return a volume of zeros with two boxes of noise."""
    rng, volume = np.random.default_rng(5), np.zeros(SHAPE, np.uint8)
    for box in NOISE:
        volume[box] = rng.integers(13, 100, volume[box].shape, np.uint8)
    return volume


def coarse_mask() -> npt.NDArray[np.uint8]:
    """Return a mask with one voxel per 4 of the volume; it ends before the volume does."""
    mask = np.zeros((9, 6, 7), np.uint8)
    mask[1:4, 1:5, 1:4], mask[6:9, 3:6, 3:7] = 3, 2
    mask[4, 2, 2] = 1
    return mask


def fine(mask: npt.NDArray[Any], scale: int, above: float = 0) -> npt.NDArray[np.bool_]:
    """Return whether each voxel of the volume is inside a mask of another resolution."""
    inside = np.zeros(SHAPE, np.bool_)
    for voxel in np.ndindex(SHAPE):
        cell = tuple(i // scale for i in voxel)
        if all(c < n for c, n in zip(cell, mask.shape, strict=True)):
            inside[voxel] = mask[cell] > above
    return inside


def equal(value: float) -> Callable[..., bool]:
    return lambda voxels, _: bool((voxels == value).all())


def below(value: float) -> Callable[..., bool]:
    return lambda voxels, _: bool((voxels < value).all())


def job_values(folder: Path, name: str, **keys: Any) -> dict[str, Any]:
    return {
        "input": str(folder / "in.zarr"),
        "output": str(folder / f"{name}.zarr"),
        "storage_chunks": [8, 8, 8],
        "threads": 1,
        "model_config": toy_model(folder, PATCH, scale=SCALE) | {"max_batch_size": 8},
        **keys,
    }


def run(values: dict[str, Any]) -> tuple[JobHandle, dict[str, Any], npt.NDArray[Any]]:
    """Run a job in this process; return it, its report and its output."""
    job, report = run_inline(values)
    return job, report, read_output(job.folder.output)


def reference(
    keys: dict[str, Any], setup: ref.Setup, volume: npt.NDArray[Any], skip: ref.Skip
) -> ref.Reference:
    network = ref.predictor("box_blur", 3, PATCH)
    return ref.reference(
        setup,
        volume,
        lambda patch, start: network(patch / SCALE, start),
        keys.get("combine", "weighted_avg"),
        keys["weight_function"][0],
        activation=keys.get("activation", "none"),
        skip=skip,
        channels=3,
    )


MASK = {"path": "mask.zarr", "scale": [4, 4, 4]}
CASES: dict[str, tuple[dict[str, Any], ref.Setup, ref.Skip]] = {
    "empty, average": (
        SLIDING | {"skip_empty": 0},
        SLIDING_SETUP,
        ref.Skip(None, equal(0)),
    ),
    "below, average with another fill value": (
        SLIDING | {"skip_empty": {"below": 12}, "fill_value": -3.5},
        SLIDING_SETUP,
        ref.Skip(None, below(12), -3.5),
    ),
    "empty, soft": (
        SLIDING | {"skip_empty": 0, "combine": "soft", "activation": "softmax", "fill_value": 1},
        SLIDING_SETUP,
        ref.Skip(None, equal(0), 1),
    ),
    "empty, hard": (
        SLIDING | {"skip_empty": 0, "combine": "hard", "fill_value": 2},
        SLIDING_SETUP,
        ref.Skip(None, equal(0), 2),
    ),
    "empty, cropped margins": (
        CROPPED | {"skip_empty": 0, "fill_value": 4},
        CROPPED_SETUP,
        ref.Skip(None, equal(0), 4),
    ),
    "empty, std of shares": (
        SLIDING | {"skip_empty": 0, "combine": "std", "activation": "softmax", "fill_value": 2},
        SLIDING_SETUP,
        ref.Skip(None, equal(0), 2),
    ),
    "mask and empty, std, three grids": (
        GRIDS | {"mask": MASK, "skip_empty": {"below": 12}, "fill_value": 1.5, "combine": "std"},
        GRIDS_SETUP,
        ref.Skip(fine(coarse_mask(), 4), below(12), 1.5),
    ),
    "empty, entropy": (
        SLIDING | {"skip_empty": 0, "combine": "entropy", "activation": "softmax"},
        SLIDING_SETUP,
        ref.Skip(None, equal(0), 0),
    ),
    "mask, average": (
        SLIDING | {"mask": MASK, "fill_value": 7},
        SLIDING_SETUP,
        ref.Skip(fine(coarse_mask(), 4), None, 7),
    ),
    "mask above 1, soft": (
        SLIDING | {"mask": MASK | {"above": 1}, "combine": "soft", "fill_value": 2},
        SLIDING_SETUP,
        ref.Skip(fine(coarse_mask(), 4, 1), None, 2),
    ),
    "mask and empty, three grids": (
        GRIDS | {"mask": MASK, "skip_empty": {"below": 12}, "fill_value": 1, "combine": "soft"},
        GRIDS_SETUP,
        ref.Skip(fine(coarse_mask(), 4), below(12), 1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_any_cut_skips_the_same_patches_and_equals_the_reference(tmp_path: Path, case: str) -> None:
    keys, setup, skip = CASES[case]
    volume = sparse_volume()
    write_zarr(tmp_path / "in.zarr", volume, (16, 16, 16))
    write_zarr(tmp_path / "mask.zarr", coarse_mask(), (4, 4, 4))
    if "mask" in keys:
        keys = keys | {"mask": {**keys["mask"], "path": str(tmp_path / "mask.zarr")}}
    expected = reference(keys, setup, volume, skip)
    patches_run = sum(not (m or e) for m, e in ref.skipped(setup, volume, skip))
    assert 0 < patches_run < len(ref.patches(setup)) / 2
    for count, chunksize in CHUNKSIZES.items():
        values = job_values(tmp_path, f"out{count}", chunksize=list(chunksize), **keys)
        job, report, output = run(values)
        assert report["patches"] == patches_run, count
        assert report["patches"] + report["skipped_patches"] == job.costs.patches
        if keys.get("combine") in (None, "std", "entropy"):
            stored, power, tolerance = expected.values.reshape(output.shape), 1, 1e-5
            if keys.get("combine") == "std":  # the variance is judged
                power, tolerance = 2, 1e-6 * max(1, np.abs(expected.average).max()) ** 2
            assert np.abs(output**power - stored**power).max() <= tolerance, count
            continue
        is_clear = expected.margin_of_decision > 1e-5
        assert is_clear.mean() > 0.98
        assert len(np.unique(expected.labels)) > 1
        np.testing.assert_array_equal(
            output[is_clear], expected.labels[is_clear], err_msg=str(count)
        )


def test_nan_equals_nan_and_all_channels_count(tmp_path: Path) -> None:
    volume = np.full((2, 8, 24), np.nan, np.float32)
    volume[1, :, 8:12] = 1
    write_zarr(tmp_path / "in.zarr", volume, (2, 8, 8))
    source = tmp_path / "net.py"
    source.write_text("import numpy as np\ndef net(x):\n    return np.nan_to_num(x).sum(1) + 1\n")
    values = {
        "input": {"path": str(tmp_path / "in.zarr"), "axes": "cyx"},
        "output": str(tmp_path / "out.zarr"),
        "skip_empty": float("nan"),
        "fill_value": -1,
        "model_config": {
            "runtime": "numpy",
            "type": "class",
            "class_file": str(source),
            "class_name": "net",
            "model_input_shape": [2, 8, 8],
            "model_output_shape": [8, 8],
        },
    }
    _, report, output = run(values)
    assert (report["patches"], report["skipped_patches"]) == (1, 2)
    assert output[0].tolist() == [-1.0] * 8 + [2.0] * 4 + [1.0] * 4 + [-1.0] * 8


def test_empty_chunks_leave_no_pieces_and_no_voxels(tmp_path: Path) -> None:
    write_zarr(tmp_path / "in.zarr", sparse_volume(), (16, 16, 16))
    values = job_values(
        tmp_path, "out", chunksize=[8, 8, 8], skip_empty=0, combine="soft", **SLIDING
    )
    job = create_job(check_job(load_job(values)))
    run_tasks(job)
    ledger = job.items[0].ledger
    commits = {commit.chunk: commit for commit in ledger.read_commits("infer")}
    empty = {chunk for chunk, commit in commits.items() if commit.empty}
    assert 0 < len(empty) < len(commits)
    for chunk in empty:
        assert not ledger.objects.exists(f"pieces/0/{chunk_name(chunk)}/own")
        assert (commits[chunk].patches, commits[chunk].checksums) == (0, {})
    finalize_job(job, worker="inline")
    stored = [path for path in (tmp_path / "out.zarr/0/c").rglob("*") if path.is_file()]
    assert len(stored) < np.prod([-(-n // 8) for n in SHAPE]) / 2


def test_a_lost_piece_of_a_chunk_that_is_not_empty_is_not_taken_for_empty(tmp_path: Path) -> None:
    write_zarr(tmp_path / "in.zarr", sparse_volume(), (16, 16, 16))
    values = job_values(tmp_path, "out", chunksize=[8, 8, 8], skip_empty=0, **SLIDING)
    job = create_job(check_job(load_job(values)))
    run_tasks(job)
    ledger = job.items[0].ledger
    commits = list(ledger.read_commits("infer"))
    chunk = next(commit.chunk for commit in commits if "own" in commit.checksums)
    ledger.objects.delete(f"pieces/0/{chunk_name(chunk)}/own")
    with pytest.raises(ChunkqError) as error:
        finalize_job(job, worker="inline")
    assert error.value.code is ErrorCode.RESULTS_LOST
    run_tasks(job)
    finalize_job(job, worker="inline")


def test_chunks_outside_the_mask_are_no_tasks(tmp_path: Path) -> None:
    write_zarr(tmp_path / "in.zarr", sparse_volume(), (16, 16, 16))
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:3, 1:3, 1:3] = 1
    write_zarr(tmp_path / "mask.zarr", mask, (16, 16, 16))
    values = job_values(
        tmp_path,
        "out",
        chunksize=[8, 8, 8],
        mask=str(tmp_path / "mask.zarr"),
        fill_value=9,
        **SLIDING,
    )
    checked = check_job(load_job(values))
    assert checked.costs.chunks == 1
    job, report, output = run(values)
    inside = mask > 0
    assert (output[:, ~inside] == 9).all()
    assert (output[:, inside] != 9).any()
    assert (report["chunks"], report["planned_chunks"]) == (1, 1)
    assert report["patches"] == checked.costs.patches
    assert job.costs == checked.costs


def test_a_volume_outside_the_mask_is_complete_at_once(tmp_path: Path) -> None:
    write_zarr(tmp_path / "in.zarr", sparse_volume(), (16, 16, 16))
    write_zarr(tmp_path / "mask.zarr", np.ones(SHAPE, np.uint8), (16, 16, 16))
    mask = {"path": str(tmp_path / "mask.zarr"), "above": 5}
    job, report, output = run(job_values(tmp_path, "out", mask=mask, fill_value=2, **SLIDING))
    assert (job.costs.chunks, job.costs.patches, report["patches"]) == (0, 0, 0)
    assert (output == 2).all()


def test_missing_storage_chunks_are_skipped_as_the_reference_says(tmp_path: Path) -> None:
    store = zarr.create_array(
        tmp_path / "in.zarr", shape=SHAPE, chunks=(10, 10, 10), dtype="uint8", fill_value=0
    )
    volume, exists = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.bool_)
    for corner in ((0, 0, 0), (20, 10, 20)):
        box = tuple(slice(c, min(c + 10, n)) for c, n in zip(corner, SHAPE, strict=True))
        volume[box] = np.random.default_rng(1).integers(1, 99, volume[box].shape, np.uint8)
        store[box], exists[box] = volume[box], True
    skip = ref.Skip(None, lambda _, read: not exists[read].any(), 1)
    expected = reference(SLIDING, SLIDING_SETUP, volume, skip)
    patches = sum(not e for _, e in ref.skipped(SLIDING_SETUP, volume, skip))
    for count, chunksize in CHUNKSIZES.items():
        values = job_values(
            tmp_path,
            f"out{count}",
            chunksize=list(chunksize),
            skip_empty="missing",
            fill_value=1,
            **SLIDING,
        )
        job, report, output = run(values)
        assert report["patches"] == report["planned_patches"] == patches
        np.testing.assert_allclose(output, expected.average, rtol=0, atol=1e-5)
    assert job.costs.chunks < job.items[0].plan.costs.chunks


def test_the_bytes_do_not_depend_on_the_order_of_chunks_and_blocks(tmp_path: Path) -> None:
    write_zarr(tmp_path / "in.zarr", sparse_volume(), (16, 16, 16))
    np.save(tmp_path / "mask.npy", fine(coarse_mask(), 4))
    keys = SLIDING | {
        "chunksize": [8, 8, 8],
        "mask": str(tmp_path / "mask.npy"),
        "skip_empty": {"below": 12},
        "fill_value": -2,
    }
    job, _, output = run(job_values(tmp_path, "first", **keys))
    other = create_job(check_job(load_job(job_values(tmp_path, "second", **keys))))
    blocks = Contributions()
    for chunk in reversed(list(other.items[0].tasks.chunks())):
        result = run_task(other.items[0].task("infer", chunk), Attempt(1, "w"))
        for task in blocks.record(result.contributions):
            run_task(task, Attempt(1, "w"))
    finalize_job(other, worker="w")
    stored = [output_files(tmp_path / f"{name}.zarr") for name in ("first", "second")]
    arrays = [{k: v for k, v in files.items() if k.startswith("0/")} for files in stored]
    assert arrays[0] == arrays[1]
    predictor = Predictor.from_config(
        {k: v for k, v in job.record.job.as_dict().items() if k not in ("input", "output", "mask")}
    )
    with predictor:
        prediction = predictor.predict(sparse_volume(), mask=fine(coarse_mask(), 4))
    np.testing.assert_array_equal(prediction.probabilities, output)


def test_the_share_of_empty_chunks_follows_a_weight_function_of_the_user(tmp_path: Path) -> None:
    write_zarr(tmp_path / "in.zarr", sparse_volume(), (16, 16, 16))
    weights = tmp_path / "weights.py"
    weights.write_text(
        "import numpy as np\ndef weigh(shape):\n    return 1.0 + np.indices(shape).sum(0)\n"
    )
    keys = SLIDING | {"weight_function": [str(weights), "weigh"], "skip_empty": 0, "fill_value": 5}
    volume, skip = sparse_volume(), ref.Skip(None, equal(0), 5)
    network = ref.predictor("box_blur", 3, PATCH)
    expected = ref.reference(
        SLIDING_SETUP,
        volume,
        lambda patch, start: network(patch / SCALE, start),
        "weighted_avg",
        lambda shape: 1.0 + np.indices(shape).sum(0),
        skip=skip,
        channels=3,
    )
    values = job_values(tmp_path, "out", chunksize=[8, 8, 8], **keys)
    job = create_job(check_job(load_job(values)))
    run_tasks(job)
    text = weights.read_text()
    weights.write_text(text.replace("1.0", "2.0"))
    with pytest.raises(ChunkqError) as error:
        finalize_job(job, worker="inline")
    assert str(error.value).startswith("weight_function: ")
    weights.write_text(text)
    finalize_job(job, worker="inline")
    np.testing.assert_allclose(
        read_output(str(tmp_path / "out.zarr")), expected.average, rtol=0, atol=1e-5
    )


def test_what_is_known_of_empty_chunks_is_found_once(tmp_path: Path) -> None:
    store = zarr.create_array(
        tmp_path / "in.zarr", shape=SHAPE, chunks=(8, 8, 8), dtype="uint8", fill_value=0
    )
    store[:8, :8, :8] = 7
    values = job_values(tmp_path, "out", chunksize=[8, 8, 8], skip_empty="missing", **SLIDING)
    job = create_job(check_job(load_job(values)))
    tasks = list(job.items[0].tasks.chunks())
    store[24:32, 8:16, 8:16] = 9
    assert create_job(check_job(load_job(values))) is job
    run_tasks(job)
    again = JobHandle(job.folder, job.record)
    assert list(again.items[0].tasks.chunks()) == tasks
    assert finalize_job(again, worker="inline")["chunks"] == len(tasks)
    path = Path(job.ledger.path) / "skipped" / "0.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ChunkqError) as error:
        _ = JobHandle(job.folder, job.record).items[0].tasks
    assert error.value.code is ErrorCode.JOB_RECORD_DAMAGED


def test_each_time_point_has_its_own_mask_and_voxel_sizes_align_it(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(1, 99, (3, 8, 12, 16), np.uint8)
    mask = np.zeros((3, 4, 6, 8), np.uint8)
    mask[0, 0, 0, 0] = mask[2, 1:3, 2:4, 3:6] = 1
    for name, array, scale in (("in", volume, 1.0), ("mask", mask, 2.0)):
        group = zarr.create_group(tmp_path / f"{name}.zarr")
        group.create_array("0", data=array, chunks=(1, 4, 4, 4))
        half = (scale - 1) / 2
        transforms = [
            {"type": "scale", "scale": [1.0, *[4 * scale] * 3]},
            {"type": "translation", "translation": [0.0, *[40 + 4 * half] * 3]},
        ]
        axes = [
            {"name": axis, "type": "time" if axis == "t" else "space", "unit": unit}
            for axis, unit in zip("tzyx", ("second", *["nanometer"] * 3), strict=True)
        ]
        datasets = [{"path": "0", "coordinateTransformations": transforms}]
        group.attrs["ome"] = {
            "version": "0.5",
            "multiscales": [{"axes": axes, "datasets": datasets}],
        }
    values = job_values(
        tmp_path, "out", inference_type="patch", mask=str(tmp_path / "mask.zarr"), fill_value=-1
    )
    values["storage_chunks"] = [4, 4, 4]
    values["input"] = {"path": str(tmp_path / "in.zarr"), "time": [2, 0]}
    values["model_config"] = toy_model(tmp_path, (4, 4, 4), scale=SCALE)
    _, _, output = run(values)
    inside = np.stack([np.kron(mask[time], np.ones((2, 2, 2))) > 0 for time in (2, 0)])
    assert output.shape == (2, 3, 8, 12, 16)
    assert ((output != -1).all(axis=1) == inside).all()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ({"path": "mask.npy"}, "does not divide"),
        ({"path": "mask.npy", "scale": [4, 4]}, "mask.scale"),
        ({"path": "flat.npy"}, "spatial axes"),
        ({"path": "missing.npy"}, "mask: "),
        ({"path": "many.npy", "axes": "czyx"}, "channels"),
        ({"path": "times.npy", "axes": "tzyx"}, "time points"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(
    tmp_path: Path, mask: dict[str, Any], words: str
) -> None:
    write_zarr(tmp_path / "in.zarr", sparse_volume(), (16, 16, 16))
    np.save(tmp_path / "mask.npy", coarse_mask())
    np.save(tmp_path / "flat.npy", coarse_mask()[0])
    np.save(tmp_path / "many.npy", np.ones((2, *SHAPE), np.uint8))
    np.save(tmp_path / "times.npy", np.ones((2, *SHAPE), np.uint8))
    mask = mask | {"path": str(tmp_path / mask["path"])}
    with pytest.raises(ChunkqError) as error:
        check_job(load_job(job_values(tmp_path, "out", mask=mask, **SLIDING)))
    assert str(error.value).startswith("mask")
    assert words in str(error.value)


def test_a_sparse_volume_costs_what_is_real(tmp_path: Path) -> None:
    store = zarr.create_array(
        tmp_path / "in.zarr", shape=(400, 400, 400), chunks=(8, 8, 8), dtype="uint8"
    )
    for corner in ((0, 0, 0), (160, 240, 80), (392, 392, 392)):
        store[tuple(slice(c, c + 8) for c in corner)] = 5
    values = job_values(
        tmp_path, "out", chunksize=[8, 8, 8], skip_empty="missing", inference_type="patch"
    )
    job = create_job(check_job(load_job(values)))
    assert job.items[0].plan.costs.chunks == 125_000
    with closing(open_executor("inprocess://sparse")) as queue:
        result = enqueue(job, queue)
        assert (result.chunks, result.queued, queue.counts(job.id).queued) == (3, 3, 3)
    run_tasks(job)
    assert finalize_job(job, worker="inline")["chunks"] == 3
    assert (Path(job.ledger.path) / "skipped" / "0.bin").stat().st_size < 2 * 125_000 / 8 + 1000
    stored = [path for path in (tmp_path / "out.zarr/0/c").rglob("*") if path.is_file()]
    assert len(stored) == 3 * 3  # of three channels


@pytest.mark.parametrize(
    ("roi", "tolerance"), [([[16, 36], [8, None], None], 0), ([[13, 36], [5, 20], [-27, 29]], 1e-5)]
)
def test_a_region_has_the_values_of_the_whole_output(
    tmp_path: Path, roi: list[Any], tolerance: float
) -> None:
    write_zarr(tmp_path / "in.zarr", sparse_volume(), (16, 16, 16))
    np.save(tmp_path / "mask.npy", coarse_mask())
    keys = SLIDING | {
        "chunksize": [8, 8, 8],
        "mask": {"path": str(tmp_path / "mask.npy"), "scale": [4, 4, 4]},
        "skip_empty": 0,
        "fill_value": -2,
    }
    _, report, whole = run(job_values(tmp_path, "whole", **keys))
    job, part, output = run(job_values(tmp_path, "part", roi=roi, **keys))
    crop = whole[(slice(None), *(slice(*(bounds or (None,))) for bounds in roi))]
    np.testing.assert_allclose(output, crop, rtol=0, atol=tolerance)
    assert 0 < part["patches"] < report["patches"]
    assert part["patches"] + part["skipped_patches"] == job.costs.patches


def test_missing_is_refused_for_a_format_that_cannot_tell(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", sparse_volume())
    values = job_values(tmp_path, "out", skip_empty="missing", **SLIDING)
    values["input"] = str(tmp_path / "in.npy")
    with pytest.raises(ChunkqError) as error:
        create_job(check_job(load_job(values)))
    assert error.value.code is ErrorCode.STORE_UNSUPPORTED
    assert not (tmp_path / "out.zarr.chunkq").exists()


@pytest.mark.parametrize(
    ("mask", "roi", "warns"),
    [
        ({}, None, False),
        ({"scale": [4, 4, 4]}, None, False),
        ({"scale": [2, 4, 4]}, None, True),
        ({"scale": [8, 4, 4]}, None, True),
        ({"scale": [2, 4, 4]}, [[0, 18], None, None], False),
    ],
)
def test_a_mask_that_covers_another_part_is_a_warning(
    tmp_path: Path, mask: dict[str, Any], roi: Any, *, warns: bool
) -> None:
    volume = sparse_volume()[:36, :20, :28]
    write_zarr(tmp_path / "in.zarr", volume, (16, 16, 16))
    np.save(tmp_path / "mask.npy", np.ones((9, 5, 7), np.uint8))
    keys = {"mask": {"path": str(tmp_path / "mask.npy")} | mask} | ({"roi": roi} if roi else {})
    job = load_job(job_values(tmp_path, "out", **keys, **SLIDING))
    assert [line.startswith("mask: ") for line in check_job(job).warnings] == [True] * warns
    keys.pop("roi", None)
    if roi is None:
        predictor = Predictor.from_config(job_values(tmp_path, "out", **keys, **SLIDING))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PredictionWarning)
            predictor.predict(volume)
        assert len(caught) == warns


def test_a_mask_without_a_position_over_an_image_with_one_is_a_warning(tmp_path: Path) -> None:
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    place: list[dict[str, Any]] = [
        {"type": "scale", "scale": [2.0, 0.5, 0.5]},
        {"type": "translation", "translation": [0.0, 10.0, 0.0]},
    ]
    crop = [place[0], {"type": "translation", "translation": [0.0, 12.0, 0.0]}]
    layouts = {"in": place, "mask": place[:1], "same": place, "crop": crop}
    for name, transformations in layouts.items():
        group = zarr.open_group(tmp_path / f"{name}.zarr", mode="w", zarr_format=2)
        group.create_array("0", data=np.ones((8, 8, 8), np.uint8))
        datasets = [{"path": "0", "coordinateTransformations": transformations}]
        group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    count = {}
    for name in ("mask", "same", "crop"):
        values = job_values(tmp_path, "out", mask=str(tmp_path / f"{name}.zarr"), **SLIDING)
        count[name] = len(check_job(load_job(values)).warnings)
    assert count == {"mask": 1, "same": 0, "crop": 0}


def test_a_mask_with_nothing_inside_is_a_warning(tmp_path: Path) -> None:
    write_zarr(tmp_path / "in.zarr", sparse_volume(), (16, 16, 16))
    write_zarr(tmp_path / "mask.zarr", np.ones(SHAPE, np.uint8), (16, 16, 16))
    for above, expected in ((0, 0), (5, 1)):
        mask = {"path": str(tmp_path / "mask.zarr"), "above": above}
        values = job_values(tmp_path, f"out{above}", mask=mask, **SLIDING)
        messages: list[Any] = []
        checked = check_job(load_job(values))
        assert len(checked.all_warnings) == expected
        with closing(open_executor("inprocess://nothing")) as executor:
            produce_job(checked, executor, emit=messages.append)
        assert sum("warning: mask: " in getattr(m, "line", "") for m in messages) == expected
        predictor = Predictor.from_config(values)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PredictionWarning)
            predictor.predict(sparse_volume())
            predictor.predict_to_store(sparse_volume(), tmp_path / f"p{above}.zarr")
        assert len(caught) == expected
