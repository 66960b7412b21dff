"""Jobs with several items: three volumes of different sizes in one job."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import chunkq
from chunkq.errors import ErrorCode, IncompleteError, JobError
from tests.harness.small_job import small_workspace
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace

SHAPES = {"left": (30, 22), "right": (17, 40), "small": (12, 12)}
CHUNKS = 8


def workspace_with(folder: Path, inputs: Any = None, **changes: Any) -> Workspace:
    """Write the volumes and a job over all of them, or over other inputs."""
    for name, shape in SHAPES.items():
        write_zarr(folder / f"{name}.zarr", random_volume(shape), (8, 8))
    return small_workspace(folder, input=inputs or [f"{name}.zarr" for name in SHAPES], **changes)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return workspace_with(tmp_path)


def images(output: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the sealed array of each image."""
    return {name: np.asarray(zarr.open_array(output / name / "0", mode="r")) for name in SHAPES}


def test_the_image_of_each_volume_equals_that_of_a_job_over_it_alone(
    workspace: Workspace, tmp_path: Path
) -> None:
    report = chunkq.run(workspace.job_file, queue=workspace.queue_url, gpus="none", workers=2)
    assert (report["chunks"], report["planned_chunks"], report["missing"]) == (CHUNKS, CHUNKS, [])
    together = images(workspace.output)
    for name, shape in SHAPES.items():
        alone = workspace.write_job(f"{name}.json", input=f"{name}.zarr", output=f"{name}-out.zarr")
        chunkq.run(alone, queue="inprocess://")
        values = np.asarray(zarr.open_array(tmp_path / f"{name}-out.zarr" / "0", mode="r"))
        assert values.shape == (3, *shape)
        np.testing.assert_array_equal(together[name], values)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_the_output_is_a_group_with_one_image_per_volume(tmp_path: Path, zarr_format: int) -> None:
    workspace = workspace_with(tmp_path, zarr_format=zarr_format)
    chunkq.run(workspace.job_file, queue="inprocess://")
    group = zarr.open_group(workspace.output, mode="r")
    ome = dict(group.attrs) if zarr_format == 2 else dict(group.attrs)["ome"]
    assert ome["bioformats2raw.layout"] == 3
    series = dict(group["OME"].attrs) if zarr_format == 2 else dict(group["OME"].attrs)["ome"]
    assert series["series"] == list(SHAPES)
    assert group.attrs["chunkq"]["state"] == "complete"
    for name in SHAPES:
        image = dict(group[name].attrs)
        [multiscale] = (image if zarr_format == 2 else image["ome"])["multiscales"]
        assert [axis["name"] for axis in multiscale["axes"]] == ["c", "y", "x"]
        assert multiscale["datasets"][0]["path"] == "0"


def test_names_that_repeat_get_a_number(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        write_zarr(folder / "brain.ome.zarr", random_volume((12, 12)), (8, 8))
    write_zarr(tmp_path / "labels.zarr", random_volume((12, 12)), (8, 8))
    inputs = [*(str(folder / "brain.ome.zarr") for folder in folders), "labels.zarr"]
    workspace = workspace_with(tmp_path, inputs)
    workspace.produce()
    assert [item.name for item in workspace.job.record.items] == ["brain", "brain_2", "labels_"]


def test_an_interrupted_job_continues_with_the_remaining_chunks_of_each_volume(
    workspace: Workspace,
) -> None:
    workspace.produce()
    workspace.compute_inline(lambda index: index[0] == 0)  # chunks of the first volume only
    status = chunkq.status(workspace.output, queue=workspace.queue_url)
    assert (status.done, status.chunks, status.sealed) == (2, CHUNKS, False)
    with pytest.raises(IncompleteError) as raised:
        chunkq.finalize(workspace.output)
    assert len(raised.value.missing) == CHUNKS - 2
    assert raised.value.missing[0] == "0/1.0"
    assert raised.value.missing[-1] == "2/0.0"
    chunkq.run(workspace.job_file, queue=workspace.queue_url, gpus="none")
    assert [len(item.ledger.committed("infer")) for item in workspace.job.items] == [4, 3, 1]
    assert chunkq.status(workspace.output, queue=workspace.queue_url).sealed


def test_the_plan_lists_all_volumes_and_its_costs_are_their_sums(workspace: Workspace) -> None:
    plan = json.loads(workspace.call("plan", workspace.job_file, "--json").ok().out)
    assert [(item["name"], tuple(item["volume"])) for item in plan["items"]] == [*SHAPES.items()]
    assert plan["chunks"] == sum(item["chunks"] for item in plan["items"]) == CHUNKS
    assert "3 volumes, the largest 17×40" in workspace.call("plan", workspace.job_file).ok().out


def test_a_volume_that_does_not_fit_the_job_is_refused_by_its_name(tmp_path: Path) -> None:
    write_zarr(tmp_path / "deep.zarr", random_volume((8, 8, 8)), (8, 8, 8))
    workspace = workspace_with(tmp_path, ["left.zarr", "deep.zarr"])
    with pytest.raises(JobError) as raised:
        chunkq.run(workspace.job_file, queue="inprocess://")
    assert raised.value.code is ErrorCode.JOB_INVALID
    assert not workspace.output.exists()


def test_a_job_over_a_volume_that_was_replaced_is_another_job(workspace: Workspace) -> None:
    workspace.produce()
    shutil.rmtree(workspace.folder / "right.zarr")
    write_zarr(workspace.folder / "right.zarr", random_volume((17, 41)), (8, 8))
    result = workspace.call("produce", workspace.job_file)
    assert result.code == 2
    assert ErrorCode.OUTPUT_OF_OTHER_JOB in result.err
