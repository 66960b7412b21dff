"""Pyramids: each level equals that of the whole array, for any workers, kills and resumption."""

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from chunkq_worker.run_task import run_task

import chunkq
from chunkq.create import check_job, create_job
from chunkq.errors import ErrorCode, QueueError
from chunkq.finalize import finalize_job
from chunkq.geometry.levels import level_factors
from chunkq.job.job_reading import load_job
from chunkq.queue.contract.executor import Attempt
from chunkq.stages.registry import stage_of
from tests.harness.networks import toy_model
from tests.harness.small_job import small_workspace
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace, run_inline, run_tasks
from tests.integration.test_outputs import scaled_workspace
from tests.reference import reduce_cells

Voxels = npt.NDArray[Any]
AUTO = {"levels": "auto"}
SHORT_LEASE = {"CHUNKQ_WORKER_SETTINGS": '{"lease": 1, "same_signal": 0}'}
"""Seconds. The default is too long for a test."""
LABELS: dict[str, Any] = {"combine": "soft", "pyramid": AUTO}
AVERAGES: dict[str, Any] = {"combine": "weighted_avg", "pyramid": AUTO}


def datasets(image: zarr.Group) -> list[dict[str, Any]]:
    attributes = dict(image.attrs)
    found: list[dict[str, Any]] = attributes.get("ome", attributes)["multiscales"][0]["datasets"]
    return found


def levels(path: Path) -> list[Voxels]:
    """Return the arrays of all levels of a sealed image, which are the only ones there."""
    image = zarr.open_group(path, mode="r")
    paths = [dataset["path"] for dataset in datasets(image)]
    assert paths == [str(n) for n in range(len(paths))] == sorted(image.array_keys())
    return [np.asarray(image[name]) for name in paths]


def assert_pyramid(
    stored: list[Voxels],
    method: Any,
    count: int | None = None,
    sizes: tuple[float, ...] = (1, 1),
    chunk: tuple[int, ...] = (4, 4),
) -> None:
    """Assert that the levels are those of the reference, computed from level 0."""
    rank, expected = len(sizes), stored[0]
    for level in stored[1:]:
        factors = level_factors(expected.shape[-rank:], sizes)
        sizes = tuple(s * f for s, f in zip(sizes, factors, strict=True))
        expected = reduce_cells(expected, factors, method)
        assert level.dtype == expected.dtype
        np.testing.assert_array_equal(level, expected)
    fits = [all(n <= c for n, c in zip(a.shape[-rank:], chunk, strict=True)) for a in stored]
    assert len(stored) == count if count else fits == [False] * (len(stored) - 1) + [True]


def run(workspace: Workspace, name: str = "job.json") -> None:
    """Run a job in this process: first its chunks, then its blocks and levels."""
    run_inline(workspace.folder / name)


@pytest.mark.parametrize(
    ("changes", "method", "count"),
    [
        (LABELS, "mode", None),
        (AVERAGES, "mean", None),
        ({**AVERAGES, "output_dtype": "float16"}, "mean", None),
        ({**LABELS, "pyramid": {"levels": 2, "method": "nearest"}}, "nearest", 2),
        ({**AVERAGES, "pyramid": {"levels": 6}, "zarr_format": 2}, "mean", 6),
        ({**AVERAGES, "roi": [[4, None], [8, 21]]}, "mean", None),
        ({**LABELS, "roi": [[3, 30], [2, 21]]}, "mode", None),
    ],
)
def test_levels_equal_those_of_the_whole_array(
    tmp_path: Path, changes: dict[str, Any], method: str, count: int | None
) -> None:
    workspace = small_workspace(tmp_path, **changes)
    run(workspace)
    assert_pyramid(levels(workspace.output), method, count)
    # Level 0 is that of a job without a pyramid.
    alone = workspace.write_job("alone.json", pyramid=None, output="alone.zarr")
    run_inline(alone)
    expected = np.asarray(zarr.open_group(tmp_path / "alone.zarr", mode="r")["0"])
    np.testing.assert_array_equal(levels(workspace.output)[0], expected)


def write_image(path: Path, shape: tuple[int, ...], axes: list[dict[str, str]]) -> None:
    """Write an OME-Zarr image whose voxels are 40 × 8 × 8 nm, in different units."""
    group = zarr.create_group(path)
    write_zarr(path / "0", random_volume(shape), (1,) * (len(shape) - 3) + (4, 8, 8))
    scale = [1.0] * (len(shape) - 3) + [0.04, 8.0, 8.0]
    transformation = {"type": "scale", "scale": scale}
    dataset = {"path": "0", "coordinateTransformations": [transformation]}
    image = {"axes": axes, "datasets": [dataset]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}


SPACE = [
    {"name": "z", "type": "space", "unit": "micrometer"},
    {"name": "y", "type": "space", "unit": "nanometer"},
    {"name": "x", "type": "space", "unit": "nanometer"},
]


def test_axes_with_large_voxels_are_halved_later_and_time_and_channels_never(
    tmp_path: Path,
) -> None:
    (tmp_path / "net").mkdir()
    write_image(tmp_path / "image.zarr", (2, 7, 33, 20), [{"name": "t", "type": "time"}, *SPACE])
    workspace = small_workspace(
        tmp_path,
        input="image.zarr",
        strides=[3, 4, 4],
        chunksize=[4, 12, 12],
        storage_chunks=[2, 4, 4],
        pyramid={"levels": 5},
        model_config=toy_model(tmp_path / "net", (4, 8, 8), scale=100.0),
    )
    run(workspace)
    stored = levels(workspace.output)
    assert_pyramid(stored, "mean", 5, (40, 8, 8), (2, 4, 4))
    shapes = [array.shape for array in stored]
    assert shapes[0] == (2, 3, 7, 33, 20)
    assert shapes[1:4] == [(2, 3, 7, 17, 10), (2, 3, 7, 9, 5), (2, 3, 4, 5, 3)]
    image = zarr.open_group(workspace.output, mode="r")
    transformations = [d["coordinateTransformations"] for d in datasets(image)]
    assert [t[0]["scale"][2:] for t in transformations[:4]] == [
        pytest.approx(sizes)
        for sizes in ([0.04, 8, 8], [0.04, 16, 16], [0.04, 32, 32], [0.08, 64, 64])
    ]
    # The first voxel of level 3 is made of 2 × 8 × 8 voxels; it lies in their middle.
    assert transformations[3][1]["translation"][2:] == pytest.approx([0.02, 28, 28])
    assert image[str(3)].chunks == (1, 1, 2, 4, 3)


def test_each_image_of_a_job_has_its_own_levels(tmp_path: Path) -> None:
    for name, shape in {"left": (30, 22), "small": (12, 12)}.items():
        write_zarr(tmp_path / f"{name}.zarr", random_volume(shape), (8, 8))
    workspace = small_workspace(tmp_path, input=["left.zarr", "small.zarr"], **LABELS)
    run(workspace)
    for name, count in {"left": 4, "small": 3}.items():
        stored = levels(workspace.output / name)
        assert len(stored) == count
        assert_pyramid(stored, "mode")


def test_each_output_of_a_job_has_levels_by_its_own_method(tmp_path: Path) -> None:
    outputs = {"tissue": {"combine": "soft"}, "mean": {}, "one": {"channels": 1}}
    workspace = small_workspace(tmp_path, outputs=outputs, pyramid=AUTO)
    run(workspace)
    for name, method in {"tissue": "mode", "mean": "mean", "one": "mean"}.items():
        assert_pyramid(levels(workspace.output / name), method)
    assert {chunk[0] for chunk in workspace.ledger.committed("downsample")} == {0, 1, 2}


@pytest.mark.parametrize("roi", [None, [[16, None], [2, 21]]])
def test_outputs_of_another_resolution_have_levels_and_shards_of_their_own(
    tmp_path: Path, roi: Any
) -> None:
    outputs = {
        "coarse": {"channels": 0, "scale": [2, 2], "storage_chunks": [2, 2]},
        "shards": {"channels": 1, "scale": [2, 2], "storage_chunks": [2, 2]},
        "tissue": {"combine": "soft", "scale": [2, 2], "storage_chunks": [8, 8]},
    }
    outputs["shards"]["storage_shards"] = [4, 8]
    workspace = scaled_workspace(tmp_path, "pyramid", outputs, pyramid={"levels": 3}, roi=roi)
    run(workspace)
    for name, method in {"coarse": "mean", "shards": "mean", "tissue": "mode"}.items():
        stored = levels(workspace.output / name)
        assert_pyramid(stored, method, 3)
        image = zarr.open_group(workspace.output / name, mode="r")
        scales = [d["coordinateTransformations"][0]["scale"] for d in datasets(image)]
        assert scales == [[2.0, 2.0], [4.0, 4.0], [8.0, 8.0]]
        assert image["0"].shards == ((4, 8) if name == "shards" else None)


def voxels(workspace: Workspace) -> dict[str, bytes]:
    """Return the files of all levels; the group's metadata contain the digest of the job."""
    return {name: content for name, content in workspace.stored().items() if name != "zarr.json"}


def test_workers_write_the_levels_before_the_job_is_finalized(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path / "two", **AVERAGES)
    workspace.produce()
    assert workspace.work("-w", "2").code == 0
    item = workspace.item
    stage = stage_of("downsample")
    assert set(workspace.ledger.committed("downsample")) == set(stage.chunks(item))
    written = workspace.done("downsample")
    status = workspace.status()
    assert status["level_parts_done"] == status["level_parts"] == len(written)
    text = f"{len(written)}/{len(written)} parts of pyramids"
    assert text in workspace.call("status", workspace.output).ok().out
    workspace.finalize().ok()
    report = workspace.report()
    assert report["levels"]["tasks"] == report["levels"]["planned"] == len(written)
    for kind in ("levels", "level_below"):
        assert report["bytes"][kind] == report["planned_bytes"][kind] > 0
    assert workspace.done("downsample") == written
    one = small_workspace(tmp_path / "one", **AVERAGES)
    run(one)
    assert voxels(workspace) == voxels(one)


def test_blocks_and_levels_are_tasks_of_their_own_when_finalizing_is_distributed(
    tmp_path: Path,
) -> None:
    workspace = small_workspace(tmp_path, **AVERAGES)
    workspace.produce()
    run_tasks(workspace.job)
    assert workspace.ledger.committed("downsample") == {}
    with workspace.start("work", "--gpus", "none", "-w", "1"):
        workspace.call("finalize", workspace.output, "--distribute").ok()
    assert {commit.worker.rpartition(":")[0] for commit in workspace.commits("downsample")} == {
        commit.worker.rpartition(":")[0] for commit in workspace.commits("finalize")
    }
    assert_pyramid(levels(workspace.output), "mean")


def test_a_killed_worker_leaves_levels_that_another_completes(tmp_path: Path) -> None:
    undisturbed = small_workspace(tmp_path / "undisturbed", **AVERAGES)
    run(undisturbed)
    workspace = small_workspace(tmp_path / "killed", **AVERAGES)
    workspace.produce()
    with workspace.start("work", "--gpus", "none", "-w", "1", TOY_DELAY="0.05", **SHORT_LEASE):
        wait_until(lambda: len(workspace.done("downsample")) > 0, "a level is written")
    before = workspace.done("downsample")
    workspace.call("produce", "--resume", workspace.job_file).ok()
    assert workspace.work(**SHORT_LEASE).code == 0
    workspace.finalize().ok()
    after = workspace.done("downsample")
    assert {name: after[name] for name in before} == before
    assert voxels(workspace) == voxels(undisturbed)


@pytest.mark.parametrize("stop_after", range(1, 4))
def test_a_sealing_that_was_cut_off_is_completed(
    tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = small_workspace(tmp_path, **LABELS)
    workspace.produce()
    run_tasks(workspace.job)
    rename, renamed = os.rename, 0

    def interrupted(source: str, target: str) -> None:
        nonlocal renamed
        if os.path.basename(target).isdigit():
            if renamed == stop_after:
                raise KeyboardInterrupt
            renamed += 1
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finalize_job(workspace.job, worker="cut off")
    # The smallest level is renamed first, level 0 last.
    assert not (workspace.output / "0").exists()
    assert (workspace.output / "3").exists()
    assert not workspace.status()["sealed"]
    workspace.produce()
    assert workspace.status()["sealed"]
    assert_pyramid(levels(workspace.output), "mode")


def test_a_job_that_was_unsealed_writes_its_levels_again_under_their_epoch(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path, **LABELS)
    run(workspace)
    stored = workspace.stored()
    # A late process of the same job has written under an old name.
    epoch = workspace.job.record.epoch
    for level in (0, 2):
        (workspace.output / f"{level}.{epoch}" / "c").mkdir(parents=True)
    for kind in ("infer", "finalize"):
        workspace.ledger.delete_commits(kind, list(workspace.ledger.committed(kind)))
    workspace.produce()
    assert sorted(path.name for path in workspace.output.iterdir() if path.is_dir()) == [
        f"{level}.{epoch}" for level in range(4)
    ]
    run(workspace)
    assert workspace.stored() == stored


def test_overwriting_a_job_leaves_no_level_of_the_old_one(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path, **LABELS)
    run(workspace)
    less = workspace.write_job("less.json", pyramid={"levels": 2})
    chunkq.run(less, queue="inprocess://", overwrite=True)
    assert_pyramid(levels(workspace.output), "mode", 2)


def test_levels_of_what_is_known_to_be_empty_are_not_written(tmp_path: Path) -> None:
    inside = np.zeros((32, 22), np.uint8)
    inside[:5, :5] = 1
    write_zarr(tmp_path / "mask.zarr", inside)
    workspace = small_workspace(
        tmp_path, **AVERAGES, mask="mask.zarr", fill_value=-1, roi=[[0, 30], [0, 21]]
    )
    run(workspace)
    assert_pyramid(levels(workspace.output), "mean")
    item = workspace.item
    tasks = set(stage_of("downsample").chunks(item))
    assert set(workspace.ledger.committed("downsample")) == tasks
    assert stage_of("downsample").count(item) == len(tasks)
    (pyramid,) = item.pyramids
    assert len([t for t in tasks if t[1] == 1]) < np.prod(pyramid.levels[0].units)
    # Each task has a block, or a unit below, that is written; the others have none.
    for number, level in enumerate(pyramid.levels, start=1):
        for unit in np.ndindex(*level.units):
            waits = stage_of("downsample").waits_for(item, (0, number, *unit))
            assert bool(waits) == ((0, number, *unit) in tasks)


def test_chunks_that_turn_out_empty_leave_levels_of_the_fill_value(tmp_path: Path) -> None:
    volume = random_volume((32, 22))
    volume[12:] = 0
    workspace = small_workspace(tmp_path, **AVERAGES, skip_empty=0)
    write_zarr(tmp_path / "other.zarr", volume, (8, 8))
    job = workspace.write_job(input="other.zarr")
    run_inline(job)
    stored = levels(workspace.output)
    assert_pyramid(stored, "mean")
    assert (stored[1][:, -4:] == 0).all()
    assert not [path for path in (workspace.output / "1/c/0/3").rglob("*") if path.is_file()]


def test_a_damaged_level_is_found_and_costs_its_own_task(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path, **LABELS)
    run(workspace)
    stored, computed = workspace.stored(), workspace.done("infer")
    (workspace.output / "2/c/0/1").write_bytes(b"damaged")
    report = workspace.call("verify", workspace.output, "--json")
    assert report.code == 1
    assert [entry["object"] for entry in json.loads(report.out)["damaged"]] == ["2/c/0/1"]
    repaired = json.loads(workspace.call("verify", workspace.output, "--json", "--repair").ok().out)
    assert repaired["chunks"] == []
    assert len(repaired["others"]) == 1
    workspace.finalize().ok()
    assert workspace.stored() == stored
    assert workspace.done("infer") == computed


def test_in_a_bucket_levels_keep_their_names_and_those_of_earlier_jobs_are_deleted(
    tmp_path: Path,
) -> None:
    filesystem = fsspec.filesystem("memory")
    root = f"memory://{tmp_path.name}"
    workspace = small_workspace(tmp_path, output=f"{root}/out.zarr", **LABELS)
    job, _ = run_inline(workspace.folder / "job.json")

    def arrays() -> list[str]:
        paths = filesystem.ls(f"/{tmp_path.name}/out.zarr", detail=False)
        return sorted(path.rpartition("/")[2] for path in paths)

    assert arrays() == ["0", "1", "2", "3", "zarr.json"]
    less = workspace.write_job("less.json", pyramid={"levels": 2}, output=f"{root}/out.zarr")
    job = create_job(check_job(load_job(less)), overwrite=True)
    # A late process of the first job writes under the old names.
    filesystem.pipe(f"/{tmp_path.name}/out.zarr/3/c/0/0", b"late")
    run_tasks(job)
    finalize_job(job, worker="inline")
    epoch = job.record.epoch
    assert arrays() == [f"0.{epoch}", f"1.{epoch}", "zarr.json"]
    image = zarr.open_group(f"{root}/out.zarr", mode="r")
    stored = [np.asarray(image[dataset["path"]]) for dataset in datasets(image)]
    assert_pyramid(stored, "mode", 2)
    filesystem.rm(f"/{tmp_path.name}", recursive=True)


def test_a_damaged_commit_record_of_a_level_is_replaced(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path, **LABELS)
    workspace.produce()
    run_tasks(workspace.job)
    job = workspace.job
    stage, item = stage_of("downsample"), workspace.item
    for stages in ("finalize", "downsample"):
        for chunk in list(stage_of(stages).chunks(item)):
            run_task(item.task(stages, chunk), Attempt(1, "test"))
    [*_, chunk] = stage.chunks(item)
    record = workspace.done_folder("downsample") / ".".join(map(str, chunk))
    record.write_bytes(b"{}")
    assert finalize_job(job, worker="test")["missing"] == []
    assert chunk in {commit.chunk for commit in workspace.commits("downsample")}
    assert_pyramid(levels(workspace.output), "mode")


def test_a_task_of_no_unit_is_refused(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path, **LABELS)
    workspace.produce()
    for chunk in [(1, 1, 0, 0), (0, 0, 0, 0), (0, 9, 0, 0), (0, 1, 50, 0), (0, 1, 0), (0,)]:
        with pytest.raises(QueueError) as caught:
            stage_of("downsample").run(workspace.item, chunk, Attempt(1, "test"))
        assert caught.value.code is ErrorCode.TASK_INVALID


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pyramid": {"levels": 7}}, "pyramid.levels: 7, but level 5 has one voxel; use at most 6"),
        ({"pyramid": {"levels": 0}}, "pyramid.levels"),
        ({"pyramid": {"method": "median"}}, "pyramid.method"),
    ],
)
def test_a_pyramid_that_is_impossible_is_refused_before_work_starts(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    workspace = small_workspace(tmp_path)
    result = workspace.call("plan", workspace.write_job(**changes))
    assert result.code == 2
    assert text in result.err
    assert not workspace.output.exists()


def test_a_pyramid_of_one_axis_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    write_zarr(tmp_path / "line.zarr", random_volume((40,)))
    workspace = small_workspace(
        tmp_path,
        input="line.zarr",
        strides=[4],
        chunksize=None,
        storage_chunks=None,
        pyramid=AUTO,
        model_config=toy_model(tmp_path / "net", (8,), scale=100.0),
    )
    result = workspace.call("plan", workspace.job_file)
    assert result.code == 2
    assert "pyramid: " in result.err
