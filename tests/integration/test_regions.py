"""Jobs, predictors and plans of a region, compared with the output of the whole volume."""

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
from chunkq.errors import JobError
from chunkq.geometry.box import Box
from chunkq.job.job_reading import load_job
from chunkq.queue.contract.executor import Attempt
from tests.harness.small_job import SHAPE, small_workspace
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace, run_inline

ALIGNED, OTHER = [[8, 27], [12, None]], [[9, 27], [-9, None]]
"""Regions of the small job, whose storage chunks are 4 × 4. Both contain no whole chunk 0.0."""
PATCH = (8, 8)


def keys_of(workspace: Workspace, **changes: Any) -> dict[str, Any]:
    values = {"input": str(workspace.folder / "in.zarr"), "output": str(workspace.output)}
    return workspace.values | values | changes


def crop(values: npt.NDArray[Any], roi: list[Any]) -> npt.NDArray[Any]:
    return values[(..., *(slice(*(bounds or (None,))) for bounds in roi))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> npt.NDArray[Any]:
    """The output of the small job without a region."""
    workspace = small_workspace(tmp_path_factory.mktemp("whole"))
    return read_output(run_inline(keys_of(workspace))[0].folder.output)


@pytest.mark.parametrize(("roi", "tolerance"), [(ALIGNED, 0), (OTHER, 1e-5)])
def test_a_job_moves_the_bytes_that_its_plan_counts(
    tmp_path: Path, whole: npt.NDArray[Any], roi: Any, tolerance: float
) -> None:
    job, report = run_inline(keys_of(small_workspace(tmp_path), roi=roi))
    values, expected = read_output(job.folder.output), crop(whole, roi)
    assert values.shape == expected.shape
    assert np.abs(values - expected).max() <= tolerance
    assert report["missing"] == []
    moved, planned = report["bytes"], report["planned_bytes"]
    assert {key: moved[key] - planned[key] for key in ("input", "output")} == {
        "input": 0,
        "output": 0,
    }
    [item] = job.items
    active = list(map(item.plan.chunk, item.plan.active_indices()))
    pieces = sum(len(item.plan.outgoing_pieces(c)) + c.has_band for c in active)
    # Each piece has a line of JSON and a checksum.
    assert 0 < moved["pieces_written"] - planned["pieces_written"] < 250 * pieces
    assert moved["pieces_read"] == moved["pieces_written"]
    assert report["patches"] == report["planned_patches"] == job.costs.patches
    assert report["chunks"] == job.costs.chunks
    assert report["voxels"] == np.prod(values.shape[1:])


def test_a_run_with_two_worker_processes_has_the_same_bytes(
    tmp_path: Path, whole: npt.NDArray[Any]
) -> None:
    workspace = small_workspace(tmp_path, roi=ALIGNED, zarr_format=2)
    report = chunkq.run(workspace.job_file, queue=workspace.queue_url, gpus="none", workers=2)
    assert report["missing"] == []
    assert read_output(workspace.output).tobytes() == crop(whole, ALIGNED).tobytes()
    assert not list(workspace.job_folder.glob("*/pieces/*/*/*"))


def test_an_interrupted_job_shows_its_patches_and_is_continued(
    tmp_path: Path, whole: npt.NDArray[Any]
) -> None:
    workspace = small_workspace(tmp_path, roi=ALIGNED)
    values = keys_of(workspace)
    job = create_job(check_job(load_job(values)))
    [item] = job.items
    first, *_ = item.plan.active_indices()
    run_task(item.task("infer", first), Attempt(1, "first"))
    status = json.loads(workspace.call("status", workspace.output, "--json").out)
    assert (status["chunks"], status["done"]) == (item.plan.costs.chunks, 1)
    assert status["patches"] == item.plan.costs.patches
    assert status["patches_done"] == item.plan.chunk(first).patches
    run_inline(values)
    assert read_output(workspace.output).tobytes() == crop(whole, ALIGNED).tobytes()


def test_a_job_with_another_region_is_another_job(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path)
    create_job(check_job(load_job(keys_of(workspace, roi=ALIGNED))))
    with pytest.raises(JobError) as error:
        create_job(check_job(load_job(keys_of(workspace, roi=OTHER))))
    assert "different: roi" in error.value.problems[0]


def test_bounds_are_kept_in_the_job_record(tmp_path: Path) -> None:
    roi = [None, [-9, None]]
    job = create_job(check_job(load_job(keys_of(small_workspace(tmp_path), roi=roi))))
    assert json.loads((tmp_path / "out.zarr.chunkq/job.json").read_text())["job"]["roi"] == roi
    assert job.items[0].plan.region == Box((0, 13), SHAPE)


def test_the_region_must_lie_in_every_volume(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path)
    write_zarr(tmp_path / "short.zarr", random_volume((20, 22)), (8, 8))
    inputs = [str(tmp_path / name) for name in ("in.zarr", "short.zarr")]
    with pytest.raises(JobError) as error:
        check_job(load_job(keys_of(workspace, input=inputs, roi=ALIGNED)))
    [line] = error.value.problems
    assert line.startswith("roi.0: [8, 27] ")
    assert "short.zarr" in line
    job, _ = run_inline(keys_of(workspace, input=inputs, roi=[[-8, None], None]))
    regions = [item.plan.region for item in job.items]
    assert regions == [Box((24, 0), (32, 22)), Box((12, 0), (20, 22))]
    for name, region in zip(("in", "short"), regions, strict=True):
        array = zarr.open_array(workspace.output / name / "0", mode="r")
        assert array.shape == (3, *region.shape)


def write_level(path: Path, values: npt.NDArray[Any], names: str) -> None:
    """Write an OME-Zarr image with one level `low`, whose voxel n along z is at 100 + 2n."""
    numbers = {"z": (2.0, 100.0), "x": (0.5, -1.0)}
    pairs = [numbers.get(name, (1.0, 0.0)) for name in names]
    transforms = [
        {"type": "scale", "scale": [scale for scale, _ in pairs]},
        {"type": "translation", "translation": [translation for _, translation in pairs]},
    ]
    kinds = {"t": "time", "c": "channel"}
    image = {
        "axes": [{"name": n, "type": kinds.get(n, "space")} for n in names],
        "datasets": [{"path": "low", "coordinateTransformations": transforms}],
    }
    group = zarr.create_group(path, attributes={"ome": {"version": "0.5", "multiscales": [image]}})
    group.create_array("low", data=values, chunks=(8,) * values.ndim)


def test_time_points_channels_and_order_have_the_region_at_its_position(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 99, (2, 3, 20, 24)).astype(np.uint8)  # t, c, z, x
    write_level(tmp_path / "image.zarr", values, "tczx")
    (tmp_path / "net.py").write_text("def net(batch):\n    return batch.sum(1) / 7\n")
    keys = {
        "input": {"path": str(tmp_path / "image.zarr"), "order": "xz"},
        "inference_type": "sliding_window",
        "strides": [3, 5],
        "chunksize": [12, 12],
        "storage_chunks": [4, 4],
        "model_config": {
            "runtime": "numpy",
            "type": "class",
            "class_file": str(tmp_path / "net.py"),
            "class_name": "net",
            "model_input_shape": [3, 6, 6],
            "model_output_shape": [6, 6],
            "max_batch_size": 4,
        },
    }
    roi = [[4, 17], [-8, None]]  # along x, z
    for name, region in (("whole", {}), ("part", {"roi": roi})):
        run_inline(keys | {"output": str(tmp_path / name)} | region)
    full, part = (read_output(tmp_path / name) for name in ("whole", "part"))
    assert part.shape == (2, 13, 8)
    assert part.tobytes() == crop(full, roi).tobytes()
    ome: Any = zarr.open_group(tmp_path / "part", mode="r").attrs["ome"]
    [image] = ome["multiscales"]
    assert [axis["name"] for axis in image["axes"]] == ["t", "x", "z"]
    scale, translation = image["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == [1.0, 0.5, 2.0]
    assert translation["translation"] == [0.0, -1.0 + 4 * 0.5, 100.0 + 12 * 2.0]


def test_inputs_that_the_network_sees_together_have_one_region(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_zarr(tmp_path / f"{name}.zarr", random_volume((30, 26)), (8, 8))
    (tmp_path / "net.py").write_text("def net(batch):\n    return batch[:, 0] - batch[:, 1] / 3\n")
    keys = {
        "input": [str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr")],
        "inference_type": "crop_margin",
        "margin": [1, 1],
        "chunksize": [12, 12],
        "storage_chunks": [4, 4],
        "model_config": {
            "runtime": "numpy",
            "type": "class",
            "class_file": str(tmp_path / "net.py"),
            "class_name": "net",
            "model_input_shape": [1, 6, 6],
            "model_output_shape": [6, 6],
            "join_dim": 1,
        },
    }
    roi = [[8, 9], None]
    for name, region in (("whole", {}), ("part", {"roi": roi})):
        run_inline(keys | {"output": str(tmp_path / name)} | region)
    full, part = (read_output(tmp_path / name) for name in ("whole", "part"))
    assert part.tobytes() == crop(full, roi).tobytes()


class Network:
    """Counts the patches that it gets; the result depends on the other patches of a batch."""

    def __init__(self) -> None:
        self.patches = 0

    def __call__(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self.patches += len(batch)
        return np.asarray(batch + 1e-3 * batch.mean(), np.float32)


def predictor(network: Network, **keys: Any) -> Predictor:
    return Predictor.from_model(
        network,
        model_input_shape=PATCH,
        strides=[4, 4],
        chunksize=[16, 16],
        storage_chunks=[4, 4],
        stochastic=True,  # no batch is repeated to compare results
        **keys,
    )


def test_a_predictor_runs_the_batches_of_its_region() -> None:
    volume, network = random_volume((40, 32), "float32"), Network()
    with predictor(network) as everything:
        full = everything.predict(volume)
    whole_patches, network.patches = network.patches, 0
    roi = [[8, 20], [-20, None]]
    with predictor(network, roi=roi) as part_only:
        plan = part_only.plan(volume.shape)
        part = part_only.predict(volume)
        computed = network.patches
        stream = dict(enumerate(part_only.predict_streaming(volume)))
    assert plan.output_shape == part.probabilities.shape[1:] == (12, 20)
    assert computed == plan.costs.patches < whole_patches
    assert part.probabilities.tobytes() == crop(full.probabilities, roi).tobytes()
    np.testing.assert_array_equal(part.labels, crop(full.labels, roi))
    np.testing.assert_array_equal(part.input, crop(volume, roi))
    together = np.full(plan.output_shape, np.nan)
    for region, values in stream.values():
        assert np.isnan(together[region]).all()
        together[region] = values
    np.testing.assert_array_equal(together, part.probabilities[0])


def test_a_prediction_of_a_region_has_the_coordinates_of_its_voxels(tmp_path: Path) -> None:
    nibabel, xarray = pytest.importorskip("nibabel"), pytest.importorskip("xarray")
    values, roi = random_volume((16, 16), "float32"), [[8, 14], [4, None]]
    array = xarray.DataArray(
        values, dims=("y", "x"), coords={"y": np.arange(16) * 0.5, "x": np.arange(16) + 100.0}
    )
    affine = np.array([[2.0, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]])
    with predictor(Network(), roi=roi) as part_only:
        result = part_only.predict(array).to_xarray()
        part_only.predict_to_store(array, tmp_path / "out.zarr")
    assert result.coords["y"].values.tolist() == [4.0, 4.5, 5.0, 5.5, 6.0, 6.5]
    assert result.coords["x"].values.tolist() == [*range(104, 116)]
    ome: Any = zarr.open_group(tmp_path / "out.zarr", mode="r").attrs["ome"]
    transforms = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert transforms[1]["translation"] == [4.0, 104.0]
    cube = Predictor.from_model(Network(), model_input_shape=(8, 8, 8), roi=[[4, 12], None, [1, 9]])
    with cube:
        image = cube.predict(nibabel.Nifti1Image(random_volume((12, 12, 12), "float32"), affine))
    np.testing.assert_array_equal(image.affine[:, 3], [10 + 4 * 2, 20, 30 + 1 * 4, 1])
    assert image.to_nibabel().shape == (8, 12, 8)


def test_plan_says_whether_the_bytes_are_those_of_the_whole_output(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path)
    for roi, same, start in ((ALIGNED, True, [8, 12]), (OTHER, False, [8, 12])):
        path = workspace.write_job(roi=roi)
        plan = json.loads(workspace.call("plan", path, "--json").ok().out)
        assert (plan["region"]["same_bytes"], plan["region"]["aligned_start"]) == (same, start)
        text = workspace.call("plan", path).ok().out
        assert ("1e-5" in text) is not same
        assert ("[8, 12]" in text) is not same
    plan = json.loads(workspace.call("plan", workspace.write_job(roi=None), "--json").ok().out)
    assert plan["region"] is None


@pytest.mark.parametrize("roi", [ALIGNED, None])
def test_plan_draws_a_picture(tmp_path: Path, roi: Any) -> None:
    workspace = small_workspace(tmp_path)
    path = workspace.write_job(roi=roi)
    workspace.call("plan", path, "--plot", "plan.png").ok()
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    workspace.call("plan", path, "--plot", "plan.xyz").refused(2, "--plot: ", "plan.xyz")
    workspace.call("plan", path, "--plot", "none/plan.png").refused(2, "--plot: ", "none/plan.png")
