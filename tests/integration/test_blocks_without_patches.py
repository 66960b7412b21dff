"""Blocks whose chunk owns no patch are no tasks; they are completed from their neighbors."""

import json
from pathlib import Path

import numpy as np
import pytest
from chunkq_worker.run_task import run_task

from chunkq.errors import ErrorCode, QueueError
from chunkq.queue.contract.executor import Attempt
from tests import reference as ref
from tests.harness.small_job import SHAPE, small_workspace
from tests.harness.volumes import random_volume, read_output
from tests.harness.workspace import Workspace

ACTIVE = {(0, 0), (0, 1), (1, 0), (1, 1)}
WITHOUT_PATCHES = {(2, 0), (2, 1)}
"""Along the first axis the last patch starts at voxel 24, in the second block of 15 voxels."""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return small_workspace(tmp_path, chunksize=[15, 12], storage_chunks=[5, 4])


def test_the_plan_counts_chunks_and_blocks(workspace: Workspace) -> None:
    plan = json.loads(workspace.call("plan", "job.json", "--json").ok().out)
    assert (plan["chunks"], plan["blocks"], plan["blocks_to_finalize"]) == (4, [3, 2], 5)
    text = workspace.call("plan", "job.json").ok().out
    assert "4 of 15×12; 6 blocks (3×2), 2 without patches" in text
    assert "overlaps of 5 of 6 blocks" in text


def test_only_chunks_that_own_patches_are_queued_counted_and_cancelled(
    workspace: Workspace,
) -> None:
    out = workspace.call("produce", "job.json").ok().out
    assert out.startswith("4 chunks, 0 done, 4 newly queued")
    assert workspace.counts().queued == 4
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert (status["chunks"], status["patches"], status["patches_done"]) == (4, 7 * 5, 0)
    assert workspace.call("cancel", "out.zarr").ok().out.startswith("4 ")
    resumed = workspace.call("produce", "job.json", "--resume").ok().out
    assert resumed.startswith("4 chunks, 0 done, 4 newly queued")


def test_status_report_and_missing_chunks_are_right_at_each_stage(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline(only={(0, 0), (0, 1)}.__contains__)
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    # Blocks of 15 voxels own 4 and 3 patches along the first axis, of 5 along the second.
    assert (status["done"], status["patches_done"], status["patches"]) == (2, 20, 35)
    answer = workspace.call("finalize", "out.zarr", "--json")
    answer.refused(3, ErrorCode.JOB_INCOMPLETE, "2 chunks")
    assert json.loads(answer.out)["missing"] == ["1.0", "1.1"]
    report = json.loads(workspace.call("report", "out.zarr", "--json").ok().out)
    assert (report["chunks"], report["planned_chunks"], report["patches"]) == (2, 4, 20)
    assert report["missing"] == ["1.0", "1.1"]
    assert report["voxels"] == round(SHAPE[0] * SHAPE[1] * 20 / 35)

    resumed = workspace.call("produce", "job.json", "--resume").ok().out
    assert resumed.startswith("4 chunks, 2 done, 0 newly queued")
    workspace.compute_inline()
    assert "4/4 chunks done" in workspace.call("status", "out.zarr").ok().out
    workspace.call("finalize", "out.zarr").ok()
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert (status["done"], status["chunks"], status["patches_done"]) == (4, 4, 35)
    assert (status["blocks_finalized"], status["blocks_to_finalize"]) == (5, 5)
    assert (status["sealed"], status["lost_from_queue"]) == (True, False)
    report = workspace.report()
    assert (report["chunks"], report["finalized_blocks"], report["missing"]) == (4, 5, [])
    assert report["voxels"] == SHAPE[0] * SHAPE[1]
    assert report["stragglers"]["count"] == 0


def test_workers_complete_blocks_without_patches_and_the_output_equals_the_reference(
    workspace: Workspace,
) -> None:
    workspace.call("produce", "job.json").ok()
    assert workspace.work("-w", "1").code == 0
    assert {tuple(c.chunk) for c in workspace.commits()} == ACTIVE
    assert {tuple(c.chunk) for c in workspace.commits("finalize")} > WITHOUT_PATCHES
    workspace.call("finalize", "out.zarr").ok()
    network = ref.predictor("box_blur", 3, (8, 8))
    expected = ref.reference(
        ref.sliding_window(SHAPE, (8, 8), (4, 4)),
        random_volume(SHAPE),
        lambda patch, start: network(patch / 100.0, start),
        "weighted_avg",
        "weight_gaussian",
    )
    values = read_output(str(workspace.output))
    np.testing.assert_allclose(values, expected.average, rtol=0, atol=1e-5)


def test_an_output_finalized_without_a_contributor_leaves_the_block_empty(
    workspace: Workspace,
) -> None:
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline(only=lambda index: index != (1, 1))
    workspace.call("finalize", "out.zarr", "--allow-missing").ok()
    blocks = {tuple(c.chunk) for c in workspace.commits("finalize")}
    assert blocks == {(0, 1), (1, 0), (2, 0)}
    assert workspace.report()["missing"] == ["1.1"]


@pytest.mark.parametrize("chunk", [(2, 0), (0, 7)])
def test_a_task_of_a_chunk_without_patches_is_refused(
    workspace: Workspace, chunk: tuple[int, ...]
) -> None:
    workspace.call("produce", "job.json").ok()
    with pytest.raises(QueueError) as raised:
        run_task(workspace.item.task("infer", chunk), Attempt(1, "worker"))
    assert raised.value.code == ErrorCode.TASK_INVALID
    assert workspace.commits() == []
