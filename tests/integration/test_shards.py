"""Outputs with shards: one writing task per shard, readable by other programs, same voxels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import zarr

from chunkq.stages.registry import stages
from tests.harness.files import files_below
from tests.harness.small_job import small_workspace
from tests.harness.waiting import wait_until
from tests.harness.workspace import run_inline

SHARDS: dict[str, Any] = {
    "chunksize": [16, 16],
    "storage_chunks": [4, 4],
    "storage_shards": [8, 8],
}
PYRAMID: dict[str, Any] = {"pyramid": {"levels": "auto"}}


def read_with_tensorstore(path: Path) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return ts.open(spec, read=True).result().read().result()


@pytest.mark.parametrize("combine", ["weighted_avg", "soft"])
def test_an_output_with_shards_has_the_voxels_of_one_without(tmp_path: Path, combine: str) -> None:
    workspace = small_workspace(tmp_path, combine=combine, **SHARDS, **PYRAMID)
    run_inline(workspace.job_file)
    plain = workspace.write_job("plain.json", storage_shards=None, output="plain.zarr")
    run_inline(plain)
    group = zarr.open_group(workspace.output, mode="r")
    expected = zarr.open_group(tmp_path / "plain.zarr", mode="r")
    assert sorted(group.array_keys()) == ["0", "1", "2", "3"]
    for name, array in group.arrays():
        values = np.asarray(array)
        np.testing.assert_array_equal(values, np.asarray(expected[name]))
        np.testing.assert_array_equal(values, read_with_tensorstore(workspace.output / name))
    leading = (1,) * (group["0"].ndim - 2)
    assert group["0"].shards == (*leading, 8, 8)
    assert group["0"].chunks == (*leading, 4, 4)
    # Level 2 has 8 × 6 voxels and level 3 has 4 × 3; a shard is no larger than its level.
    assert group["2"].shards == (*leading, 8, 8)
    assert group["3"].shards == group["3"].chunks == (*leading, 4, 3)


def test_each_shard_is_one_object_that_one_task_writes(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path, combine="soft", **SHARDS, **PYRAMID)
    job, _ = run_inline(workspace.job_file)
    item = job.items[0]
    names = [
        name
        for stage in stages()
        for chunk in stage.chunks(item)
        for name in stage.stored_objects(item, chunk)
    ]
    assert len(names) == len(set(names))
    stored = {name for name in files_below(workspace.output) if not name.endswith("zarr.json")}
    epoch = f".{job.record.epoch}"
    assert {name.replace(epoch, "", 1) for name in names} == stored
    assert len([name for name in stored if name.startswith("0/")]) == 4 * 3


def test_the_band_of_a_block_is_a_whole_number_of_shards(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path, **SHARDS)
    workspace.produce()
    plan = workspace.item.plan
    for index in plan.indices():
        chunk = plan.chunk(index)
        axes = zip(chunk.block.start, chunk.core.start, chunk.block.stop, strict=True)
        assert all((core - start) % 8 == 0 or core == stop for start, core, stop in axes)
    plain = small_workspace(tmp_path / "plain", **SHARDS | {"storage_shards": None})
    plain.produce()
    assert plan.costs.finalized_voxels > plain.item.plan.costs.finalized_voxels


def test_a_killed_worker_leaves_shards_that_another_writes_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    workspace = small_workspace(tmp_path / "killed", **SHARDS, **PYRAMID)
    workspace.produce()
    with workspace.start("work", "--gpus", "none", "-w", "1", TOY_DELAY="0.05"):
        wait_until(lambda: len(workspace.done("infer")) > 1, "chunks are committed")
    before = workspace.done("infer")
    workspace.call("produce", "--resume", workspace.job_file).ok()
    run_inline(workspace.job_file)
    after = workspace.done("infer")
    assert {name: after[name] for name in before} == before
    undisturbed = small_workspace(tmp_path / "undisturbed", **SHARDS, **PYRAMID)
    run_inline(undisturbed.job_file)
    first, second = (files_below(w.output) for w in (workspace, undisturbed))
    assert {n: c for n, c in first.items() if n != "zarr.json"} == {
        n: c for n, c in second.items() if n != "zarr.json"
    }


@pytest.mark.parametrize(("start", "is_aligned"), [([8, 16], True), ([4, 8], False)])
def test_a_region_that_starts_at_shards_has_the_bytes_of_the_whole_output(
    tmp_path: Path, start: list[int], is_aligned: bool
) -> None:
    workspace = small_workspace(tmp_path, **SHARDS)
    run_inline(workspace.job_file)
    roi = [[start[0], None], [start[1], None]]
    part = workspace.write_job("part.json", roi=roi, output="part.zarr")
    job, _ = run_inline(part)
    assert job.items[0].plan.grid.is_aligned == is_aligned
    whole = np.asarray(zarr.open_group(workspace.output, mode="r")["0"])
    values = np.asarray(zarr.open_group(tmp_path / "part.zarr", mode="r")["0"])
    crop = whole[:, start[0] :, start[1] :]
    if is_aligned:
        np.testing.assert_array_equal(values, crop)
    np.testing.assert_allclose(values, crop, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"zarr_format": 2}, "storage_shards: Zarr v2 has no shards"),
        ({"storage_shards": [6, 8]}, "storage_shards: 6 along axis 0"),
        ({"storage_shards": [32, 8]}, "storage_shards: 32 along axis 0 does not divide the chunk"),
        ({"storage_shards": [8]}, "storage_shards: found 1 entries"),
    ],
)
def test_shards_that_do_not_fit_are_refused_before_work_starts(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    workspace = small_workspace(tmp_path, **SHARDS | changes)
    result = workspace.call("plan", workspace.job_file)
    assert result.code == 2
    assert text in result.err


@pytest.mark.parametrize("chunksize", [None, [16, 24]])
def test_chunks_that_are_not_set_are_whole_numbers_of_shards(
    tmp_path: Path, chunksize: Any
) -> None:
    changes = {"chunksize": chunksize, "storage_chunks": None}
    workspace = small_workspace(tmp_path, **SHARDS | changes)
    workspace.produce()
    plan = workspace.item.plan
    for length, shard, chunk in zip(plan.chunksize, (8, 8), plan.storage_chunks, strict=True):
        assert length % shard == shard % chunk == 0
