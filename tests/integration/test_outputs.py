"""Jobs with several named outputs: those of separate jobs, from one pass of the network."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from chunkq_worker.predictor import Predictor
from chunkq_worker.run_task import run_task

import chunkq
from chunkq.create import check_job, create_job
from chunkq.errors import IncompleteError, JobError
from chunkq.finalize import finalize_job
from chunkq.job.job_reading import load_job
from chunkq.queue.contract.executor import Attempt
from tests.harness.files import files_below
from tests.harness.small_job import SHAPE, small_workspace
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace, run_tasks

Array = npt.NDArray[Any]
NETWORK = '''
import numpy as np


def several(batch):
    """Return scores of three classes, a distance and labels of four classes."""
    x = batch.astype(np.float32) / 100
    ramp = np.linspace(0, 1, x.shape[-1], dtype=np.float32)
    scores = [np.sin(7 * x + n) * (1 + ramp) for n in range(3)]
    labels = np.floor(x * 3.999).astype(np.float32)
    return np.stack([*scores, 50 * x * ramp, labels], axis=1)


def tissue(batch):
    return several(batch)[:, 0:3]


def vote(batch):
    return several(batch)[:, [2, 0, 1]]


def distance(batch):
    return several(batch)[:, 3]


def scores(batch):
    return several(batch)[:, 0:3]


def doubt(batch):
    """Return a contiguous array, because sums over a view can differ in the last bit."""
    return np.ascontiguousarray(scores(batch))


entropy, near = doubt, distance


def parts(batch):
    return several(batch)[:, 4:5]
'''
OUTPUTS: dict[str, dict[str, Any]] = {
    "tissue": {"channels": "0:3", "activation": "softmax", "combine": "soft"},
    "vote": {"channels": [2, 0, 1], "combine": "hard", "fill_value": 2},
    "distance": {"channels": 3, "output_dtype": "float16", "fill_value": -1},
    "scores": {"channels": "0:3", "storage_chunks": [6, 4]},
    "parts": {"channels": [4], "classes": ["air", "skin", "bone", "rest"], "combine": "soft"},
    "doubt": {"channels": "0:3", "activation": "softmax", "combine": "std"},
    "near": {"channels": 3, "output_dtype": "uint8", "range": [-1, 20], "fill_value": 2},
    "entropy": {"channels": "0:3", "activation": "softmax", "combine": "entropy"},
}
CHANNELS = {
    "tissue": [3],
    "vote": [3],
    "distance": [],
    "scores": [3],
    "parts": [1],
    "doubt": [3],
    "near": [],
    "entropy": [3],
}
"""Leading axes of what a network returns for one output alone."""
PATCH = [8, 8]


def model(folder: Path, function: str, channels: list[int]) -> dict[str, Any]:
    (folder / "several.py").write_text(NETWORK)
    return {
        "runtime": "numpy",
        "type": "class",
        "class_file": str(folder / "several.py"),
        "class_name": function,
        "model_input_shape": PATCH,
        "model_output_shape": [*channels, *PATCH],
        "max_batch_size": 4,
    }


def workspace_of(folder: Path, **changes: Any) -> Workspace:
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {"outputs": OUTPUTS, "model_config": model(folder, "several", [5])}
    return small_workspace(folder, **(values | changes))


def alone(folder: Path, name: str, **changes: Any) -> Workspace:
    """Return a workspace with a job for one of the outputs, whose network returns that alone."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = {key: value for key, value in OUTPUTS[name].items() if key != "channels"}
    network = model(folder, name, CHANNELS[name])
    return small_workspace(folder, **(changes | keys | {"model_config": network}))


def arrays_of(output: Path) -> dict[str, dict[str, bytes]]:
    """Return the files of the sealed array of each output."""
    return {name: files_below(output / name / "0") for name in OUTPUTS}


def run_all(workspace: Workspace, name: str = "job.json", **options: Any) -> dict[str, Any]:
    """Run a job in this process; return its report."""
    job = create_job(check_job(load_job(workspace.folder / name)), **options)
    run_tasks(job)
    return finalize_job(job, worker="test")


def empty_corner(folder: Path) -> None:
    """Replace the input by one with a region of zeros, which is larger than some chunks."""
    volume = random_volume(SHAPE) + 1
    volume[:25, :19] = 0
    write_zarr(folder / "in.zarr", volume, (8, 8), overwrite=True)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zarr v2": {"zarr_format": 2},
    "aligned region": {"roi": [[12, 27], [12, None]]},
    "other region": {"roi": [[9, 27], [-9, None]]},
    "mask": {"mask": "mask.zarr"},
    "empty": {"skip_empty": 0},
    "one batch at a time": {"strides": [8, 8]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_of_one_job_have_the_bytes_of_separate_jobs(tmp_path: Path, variant: str) -> None:
    changes = VARIANTS[variant]
    together = workspace_of(tmp_path / "together", **changes)
    workspaces = {name: alone(tmp_path / name, name, **changes) for name in OUTPUTS}
    for workspace in (together, *workspaces.values()):
        empty_corner(workspace.folder)
        if "mask" in changes:
            mask = np.zeros(SHAPE, np.uint8)
            mask[3:9, 5:20] = 1
            write_zarr(workspace.folder / "mask.zarr", mask, (8, 8))
    report = run_all(together)
    assert report["missing"] == []
    assert report["patches"] == report["planned_patches"] - report["skipped_patches"]
    for name, workspace in workspaces.items():
        one = run_all(workspace)
        assert one["patches"] == report["patches"]
        expected = files_below(workspace.output / "0")
        assert files_below(together.output / name / "0") == expected, name
        assert len(expected) > 1
    assert not list(together.job_folder.glob("*/pieces/*/*/*"))


def test_the_network_runs_once_per_patch(tmp_path: Path) -> None:
    workspace_of(tmp_path)
    code = NETWORK.replace(
        "    x = batch",
        "    with open(__file__ + '.calls', 'ab') as f: f.write(b'x')\n    x = batch",
    )
    (tmp_path / "several.py").write_text(code)
    keys = json.loads((tmp_path / "job.json").read_text())
    keys["model_config"]["stochastic"] = True  # no batch is repeated to compare it
    (tmp_path / "job.json").write_text(json.dumps(keys))
    job = create_job(check_job(load_job(tmp_path / "job.json")))
    run_tasks(job)
    batches = sum(-(-job.items[0].plan.chunk(i).patches // 4) for i in job.items[0].tasks.chunks())
    assert len((tmp_path / "several.py.calls").read_bytes()) == batches


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    workspace = workspace_of(tmp_path_factory.mktemp("one"))
    run_all(workspace)
    return arrays_of(workspace.output)


def test_three_worker_processes_write_the_same_bytes(
    tmp_path: Path, one_worker: dict[str, dict[str, bytes]]
) -> None:
    workspace = workspace_of(tmp_path)
    report = chunkq.run(workspace.job_file, queue=workspace.queue_url, gpus="none", workers=3)
    assert report["missing"] == []
    assert arrays_of(workspace.output) == one_worker


def test_an_interrupted_job_continues_and_computes_no_chunk_twice(
    tmp_path: Path, one_worker: dict[str, dict[str, bytes]]
) -> None:
    workspace = workspace_of(tmp_path)
    job = create_job(check_job(load_job(workspace.job_file)))
    [item] = job.items
    first, *rest = list(item.tasks.chunks())
    run_task(item.task("infer", first), Attempt(1, "test"))
    with pytest.raises(IncompleteError):
        finalize_job(job, worker="test")
    done = workspace.done()
    for index in rest:
        run_task(item.task("infer", index), Attempt(1, "test"))
    report = finalize_job(job, worker="test")
    assert report["chunks"] == len(rest) + 1
    assert done.items() <= workspace.done().items()
    assert arrays_of(workspace.output) == one_worker


def test_a_lost_piece_is_computed_again(
    tmp_path: Path, one_worker: dict[str, dict[str, bytes]]
) -> None:
    workspace = workspace_of(tmp_path)
    job = create_job(check_job(load_job(workspace.job_file)))
    [item] = job.items
    for index in item.tasks.chunks():
        run_task(item.task("infer", index), Attempt(1, "test"))
    piece = workspace.pieces()[0]
    content = bytearray(piece.read_bytes())
    content[-9] ^= 1
    piece.write_bytes(content)
    report = chunkq.run(workspace.job_file, queue="inprocess://")
    assert report["missing"] == []
    assert arrays_of(workspace.output) == one_worker


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_the_output_is_a_group_with_a_valid_image_per_name(
    tmp_path: Path, zarr_format: int
) -> None:
    workspace = workspace_of(tmp_path, zarr_format=zarr_format)
    run_all(workspace)
    group = zarr.open_group(workspace.output, mode="r")
    attributes = dict(group.attrs) if zarr_format == 2 else dict(group.attrs)["ome"]
    assert attributes["bioformats2raw.layout"] == 3
    series = dict(group["OME"].attrs)
    assert (series if zarr_format == 2 else series["ome"])["series"] == sorted(OUTPUTS)
    version = "v04" if zarr_format == 2 else "v05"
    models = importlib.import_module(f"ome_zarr_models.{version}.bioformats2raw")
    images = importlib.import_module(f"ome_zarr_models.{version}.image")
    models.BioFormats2RawAttrs.model_validate(attributes)
    for name in OUTPUTS:
        image = zarr.open_group(workspace.output / name, mode="r")
        attributes = dict(image.attrs) if zarr_format == 2 else dict(image.attrs)["ome"]
        images.ImageAttrs.model_validate(attributes)
        assert image["0"].shape[-2:] == SHAPE
        assert image.attrs["chunkq"]["state"] == "complete"
    names = dict(zarr.open_group(workspace.output / "parts", mode="r").attrs)
    labels = (names if zarr_format == 2 else names["ome"])["image-label"]
    assert [one["class"] for one in labels["properties"]] == OUTPUTS["parts"]["classes"]
    assert group["distance/0"].fill_value == -1
    assert group["vote/0"].fill_value == 2


def test_one_named_output_is_an_image_in_a_group(tmp_path: Path) -> None:
    workspace = workspace_of(tmp_path, outputs={"tissue": OUTPUTS["tissue"]})
    run_all(workspace)
    assert sorted(zarr.open_group(workspace.output, mode="r").group_keys()) == ["OME", "tissue"]


def test_several_images_have_a_group_of_outputs_each(tmp_path: Path) -> None:
    for name, shape in {"left": (20, 22), "right": (12, 12)}.items():
        write_zarr(tmp_path / f"{name}.zarr", random_volume(shape), (8, 8))
    workspace = workspace_of(tmp_path, input=["left.zarr", "right.zarr"])
    run_all(workspace)
    group = zarr.open_group(workspace.output, mode="r")
    for name, shape in {"left": (20, 22), "right": (12, 12)}.items():
        single = workspace_of(tmp_path / name)
        write_zarr(single.folder / "in.zarr", random_volume(shape), (8, 8), overwrite=True)
        run_all(single)
        for output in OUTPUTS:
            together = np.asarray(group[f"{name}/{output}/0"])
            separate = zarr.open_array(single.output / output / "0", mode="r")
            np.testing.assert_array_equal(together, np.asarray(separate))
    series = dict(group["OME"].attrs)["ome"]["series"]
    assert series == [
        f"{name}/{output}" for name in ("left", "right") for output in sorted(OUTPUTS)
    ]
    assert workspace.call("status", str(workspace.output), "--json").code == 0


def test_an_output_replaces_one_of_another_layout_and_is_sealed_again(tmp_path: Path) -> None:
    workspace = workspace_of(tmp_path)
    run_all(workspace)
    workspace.write_job("plain.json", outputs=None)
    run_all(workspace, "plain.json", overwrite=True)
    assert sorted(p.name for p in workspace.output.iterdir()) == ["0", "zarr.json"]
    run_all(workspace, overwrite=True)
    names = sorted(p.name for p in workspace.output.iterdir())
    assert names == sorted([*OUTPUTS, "OME", "zarr.json"])
    before = arrays_of(workspace.output)
    run_all(workspace)  # sealed: no task remains
    assert arrays_of(workspace.output) == before


def test_the_plan_counts_the_bytes_of_each_output_that_the_job_moves(tmp_path: Path) -> None:
    workspace = workspace_of(tmp_path)
    values = json.loads(workspace.call("plan", workspace.job_file, "--json").out)
    report = run_all(workspace)
    stored = {one["name"]: one["bytes"] for one in values["outputs"]}
    group = zarr.open_group(workspace.output, mode="r")
    assert stored == {name: group[f"{name}/0"].nbytes for name in OUTPUTS}
    assert values["output_bytes"] == sum(stored.values()) == report["bytes"]["output"]
    pieces = report["bytes"]["pieces_written"] - values["piece_bytes"]
    assert 0 < pieces < 700 * len(report["bytes"]) * values["chunks"]


def test_a_predictor_returns_the_outputs_by_name(
    tmp_path: Path, one_worker: dict[str, dict[str, bytes]]
) -> None:
    workspace = workspace_of(tmp_path)
    run_all(workspace)
    volume = np.asarray(zarr.open_array(tmp_path / "in.zarr", mode="r"))
    with Predictor.from_config(workspace.job_file) as predictor:
        predictions = predictor.predict(volume)
        streamed: dict[str, Array] = {
            name: np.zeros_like(np.asarray(zarr.open_array(workspace.output / name / "0")))
            for name in OUTPUTS
        }
        for name, region, values in predictor.predict_streaming(volume):
            streamed[name][region] = values
    assert list(predictions) == sorted(OUTPUTS)
    for name, prediction in predictions.items():
        stored = np.asarray(zarr.open_array(workspace.output / name / "0", mode="r"))
        np.testing.assert_array_equal(streamed[name], stored)
        arrays = (prediction.probabilities, prediction.values, prediction.labels)
        values = next(array for array in arrays if array is not None)
        np.testing.assert_array_equal(values.reshape(stored.shape), stored)
        assert (prediction.range is not None) == (name == "near")
        assert (prediction.labels is None) == (name in ("doubt", "entropy"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a name that OME reserves": ({"outputs": {"labels": {}}}, "outputs"),
    "a name with a slash": ({"outputs": {"a/b": {}}}, "outputs"),
    "no output": ({"outputs": {}}, "outputs"),
    "a channel that does not exist": ({"outputs": {"a": {"channels": [7]}}}, "outputs.a.channels"),
    "a range that does not exist": ({"outputs": {"a": {"channels": "3:9"}}}, "outputs.a.channels"),
    "combine beside outputs": ({"combine": "soft"}, "combine"),
    "classes beside outputs": ({"classes": 5}, "classes"),
    "an unknown key": ({"outputs": {"a": {"chanels": 1}}}, "outputs.a.chanels"),
    "a dtype of labels": (
        {"outputs": {"a": {"combine": "soft", "output_dtype": "float16"}}},
        "outputs.a.output_dtype",
    ),
    "another number of classes": (
        {"outputs": {"a": {"channels": "0:3", "classes": 4}}},
        "outputs.a.classes",
    ),
    "a fill value that is no class": (
        {"outputs": {"a": {"channels": "0:3", "combine": "soft", "fill_value": 3}}},
        "outputs.a.fill_value",
    ),
    "softmax of one channel": (
        {"outputs": {"a": {"channels": 1, "activation": "softmax"}}},
        "outputs.a.activation",
    ),
    "storage chunks that do not divide": (
        {"outputs": {"a": {"storage_chunks": [5, 4]}}},
        "outputs.a.storage_chunks",
    ),
    "storage chunks of another rank": (
        {"outputs": {"a": {"storage_chunks": [4]}}},
        "outputs.a.storage_chunks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_impossible_output_is_one_line_that_names_its_key(tmp_path: Path, case: str) -> None:
    changes, key = REFUSED[case]
    workspace = workspace_of(tmp_path, **changes)
    with pytest.raises(JobError) as error:
        check_job(load_job(workspace.job_file))
    [line] = error.value.problems
    assert line.startswith(f"{key}: ")


SCALED = '''
import numpy as np


def values(batch):
    return batch.astype(np.float32) / 100 * np.linspace(1, 2, batch.shape[-1], dtype=np.float32)


def pyramid(batch):
    """Return two channels at a quarter of the voxels, 8 × 8 for 16 × 16."""
    x = values(batch)
    coarse = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    return np.stack([coarse, 1 - coarse], axis=1)


def centered(batch):
    """Return the 8 × 8 voxels in the middle of 16 × 16."""
    return np.stack([values(batch)[:, 4:12, 4:12]] * 2, axis=1)
'''


def scaled_workspace(folder: Path, function: str, outputs: Any, **changes: Any) -> Workspace:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scaled.py").write_text(SCALED)
    network = {
        "runtime": "numpy",
        "type": "class",
        "class_file": str(folder / "scaled.py"),
        "class_name": function,
        "model_input_shape": [16, 16],
        "model_output_shape": [2, 8, 8],
        "max_batch_size": 4,
    }
    values: dict[str, Any] = {
        "outputs": outputs,
        "model_config": network,
        "strides": [4, 6],
        "chunksize": [16, 16],
        "storage_chunks": None,
        "pad_width": [4, 4],
        "pad_mode": "reflect",
    }
    return small_workspace(folder, **(values | changes))


COARSE: dict[str, Any] = {
    "coarse": {"channels": 0, "scale": [2, 2], "storage_chunks": [4, 2]},
    "doubt": {"channels": "0:2", "combine": "soft", "scale": [2, 2], "storage_chunks": [8, 8]},
}


def write_with_axes(path: Path, shape: tuple[int, int]) -> None:
    """Write an OME-Zarr image with voxels of 0.5 × 2 µm that begins at 10 and 20 µm."""
    volume = random_volume(shape)
    group = zarr.open_group(path, mode="w")
    group.create_array("0", data=volume, chunks=(8, 8))
    transforms = [
        {"type": "scale", "scale": [0.5, 2.0]},
        {"type": "translation", "translation": [10.0, 20.0]},
    ]
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    datasets = [{"path": "0", "coordinateTransformations": transforms}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}


@pytest.mark.parametrize("roi", [None, [[16, None], [16, 21]], [[6, 29], [2, None]]])
def test_a_coarser_output_has_the_shape_and_the_place_of_its_voxels(
    tmp_path: Path, roi: Any
) -> None:
    shape = (33, 22)
    workspace = scaled_workspace(tmp_path, "pyramid", COARSE, input="image.zarr", roi=roi)
    write_with_axes(tmp_path / "image.zarr", shape)
    report = run_all(workspace)
    assert report["missing"] == []
    group = zarr.open_group(workspace.output, mode="r")
    bounds = [b or [0, None] for b in roi or [None, None]]
    start = [b[0] for b in bounds]
    stop = [n if b[1] is None else b[1] for b, n in zip(bounds, shape, strict=True)]
    expected = [-(-(high - low) // 2) for low, high in zip(start, stop, strict=True)]
    assert group["coarse/0"].shape == tuple(expected)
    ome = dict(zarr.open_group(workspace.output / "coarse", mode="r").attrs)["ome"]
    transforms = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert transforms[0]["scale"] == [1.0, 4.0]
    # The first voxel of the output covers the first two of the region along each axis.
    first = [10 + 0.5 * (start[0] + 0.5), 20 + 2 * (start[1] + 0.5)]
    assert transforms[1]["translation"] == first
    assert report["bytes"]["output"] == report["planned_bytes"]["output"]


def test_a_region_of_a_coarser_output_has_the_bytes_of_the_whole_one(tmp_path: Path) -> None:
    whole = scaled_workspace(tmp_path / "whole", "pyramid", COARSE)
    part = scaled_workspace(tmp_path / "part", "pyramid", COARSE, roi=[[16, None], [16, 21]])
    run_all(whole)
    run_all(part)
    for name in COARSE:
        one, other = (
            np.asarray(zarr.open_array(w.output / name / "0", mode="r")) for w in (whole, part)
        )
        assert one[8:, 8:11].tobytes() == other.tobytes()


def test_a_mask_speaks_of_the_voxels_of_a_coarser_output(tmp_path: Path) -> None:
    whole = scaled_workspace(tmp_path / "whole", "pyramid", COARSE)
    run_all(whole)
    masked = scaled_workspace(tmp_path / "masked", "pyramid", COARSE, mask="mask.zarr")
    mask = np.zeros(SHAPE, np.uint8)
    mask[3:9, 5:20] = 1
    write_zarr(masked.folder / "mask.zarr", mask, (8, 8))
    report = run_all(masked)
    assert report["patches"] < report["planned_patches"] or report["patches"] > 0
    inside = mask[1::2, 1::2] > 0  # voxel i of the output has its center at voxel 2 i + 1
    for name in COARSE:
        one, other = (
            np.asarray(zarr.open_array(w.output / name / "0", mode="r")) for w in (whole, masked)
        )
        np.testing.assert_array_equal(other[inside], one[inside])
        assert (other[~inside] == 0).all()


def test_outputs_of_different_widths_of_one_pass_have_the_bytes_of_separate_jobs(
    tmp_path: Path,
) -> None:
    outputs = {
        "narrow": {"channels": 0, "storage_chunks": [4, 4]},
        "wide": {"channels": 1, "scale": [2, 2], "storage_chunks": [4, 4]},
    }
    keys: dict[str, Any] = {"strides": [4, 4], "edge": "pad"}
    together = scaled_workspace(tmp_path / "both", "centered", outputs, **keys)
    report = run_all(together)
    assert report["missing"] == []
    three = scaled_workspace(tmp_path / "three", "centered", outputs, **keys)
    chunkq.run(three.job_file, queue=three.queue_url, gpus="none", workers=2)
    for name, output in outputs.items():
        expected = files_below(together.output / name / "0")
        assert files_below(three.output / name / "0") == expected
        single = scaled_workspace(tmp_path / name, "centered", {name: output}, **keys)
        run_all(single)
        one, other = (
            np.asarray(zarr.open_array(w.output / name / "0", mode="r")) for w in (together, single)
        )
        # Ownership follows the widest output, so sums of a narrower one can associate differently.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_a_predictor_gives_a_coarser_output_its_voxel_size(tmp_path: Path) -> None:
    workspace = scaled_workspace(tmp_path, "pyramid", COARSE)
    run_all(workspace)
    volume = np.asarray(zarr.open_array(tmp_path / "in.zarr", mode="r"))
    with Predictor.from_config(workspace.job_file) as predictor:
        predictions = predictor.predict(volume)
    for name in COARSE:
        stored = np.asarray(zarr.open_array(workspace.output / name / "0", mode="r"))
        prediction = predictions[name]
        values = prediction.labels if prediction.probabilities is None else prediction.probabilities
        np.testing.assert_array_equal(values.reshape(stored.shape), stored)
        assert prediction.voxel_size == (2.0, 2.0)
