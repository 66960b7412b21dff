"""A job with two more stages of another package: the sum of each block, then one total."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from chunkq_worker.run_task import check_gate, run_task

import chunkq
from chunkq.enqueue import enqueue
from chunkq.errors import ErrorCode, IncompleteError, JobError
from chunkq.job.task_records import Commit
from chunkq.job.tasks import Task, chunk_name
from chunkq.queue.contract.executor import Attempt, GateState, TaskCounts
from chunkq.stages import registry
from tests.harness.servers.redis import RedisServer
from tests.harness.small_job import CHUNKS, small_workspace
from tests.harness.sum_stages import stored
from tests.harness.workspace import Workspace

OUTSIDE = str(Path(__file__).parent.parent / "outside_stages")
"""A folder with the metadata of a package that adds the stages."""
PYTHONPATH = os.pathsep.join(
    [OUTSIDE, str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
)


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the package in this process."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(OUTSIDE)
        registry._by_kind.cache_clear()
        kinds = [stage.kind for stage in registry.stages()]
        assert kinds == ["ingest", "infer", "finalize", "downsample", "sum", "total", "export"]
        yield
    registry._by_kind.cache_clear()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return small_workspace(tmp_path)


def assert_total(workspace: Workspace) -> None:
    """Assert that the total was computed from all sums."""
    array = np.asarray(zarr.open_array(workspace.output / "0", mode="r"))
    expected = float(array.astype(np.float64).sum())
    assert stored(workspace.item, "total", (0,)) == pytest.approx(expected, rel=1e-12)
    assert set(workspace.ledger.committed("sum")) == CHUNKS
    assert set(workspace.ledger.committed("total")) == {(0,)}


def test_in_one_process_the_total_is_computed_after_all_sums(workspace: Workspace) -> None:
    assert chunkq.run(workspace.job_file, queue="inprocess://")["missing"] == []
    assert_total(workspace)


def test_a_resumed_job_in_one_process_completes_the_sums_before_the_total(
    workspace: Workspace,
) -> None:
    workspace.produce()
    workspace.compute_inline()
    assert workspace.ledger.committed("sum") == {}
    assert chunkq.run(workspace.job_file, queue="inprocess://")["missing"] == []
    assert_total(workspace)


@pytest.mark.parametrize("server", ["sqlite", "redis"])
def test_worker_processes_compute_the_total_after_all_sums(
    workspace: Workspace, server: str, request: pytest.FixtureRequest
) -> None:
    if server == "redis":
        redis: RedisServer = request.getfixturevalue("redis")
        workspace = Workspace(workspace.folder, workspace.values, url=redis.url)
    workspace.run("run", "job.json", "--gpus", "none", "-w", "2", PYTHONPATH=PYTHONPATH).ok()
    assert_total(workspace)


def test_the_total_waits_behind_a_gate_while_a_sum_is_missing(workspace: Workspace) -> None:
    workspace.produce()
    job = workspace.job
    with workspace.queue() as queue:
        assert queue.counts(job.id) == TaskCounts(queued=len(CHUNKS), waiting=1)
    assert check_gate(job.id, "total", worker="w") is GateState.BLOCKED
    workspace.compute_inline()
    # No queue has counted the contributions: the blocks and their sums are left to the gate.
    assert workspace.ledger.committed("sum") == {}


def test_sums_of_a_killed_worker_are_computed_when_the_gate_is_checked(
    workspace: Workspace,
) -> None:
    workspace.produce()
    workspace.compute_inline()
    for index in workspace.item.plan.to_finalize():
        run_task(workspace.item.task("finalize", index), Attempt(1, "w"))
    assert workspace.ledger.committed("sum") == {}
    assert check_gate(workspace.job.id, "total", worker="w") is GateState.OPEN
    assert set(workspace.ledger.committed("sum")) == CHUNKS


def test_a_block_whose_pieces_are_damaged_has_no_sum_until_it_is_complete(
    workspace: Workspace,
) -> None:
    workspace.produce()
    workspace.compute_inline()
    workspace.ledger.commit(Commit("total", 0, (0,), 1, "w", 0.0, 0.0))
    block = next(iter(workspace.item.plan.to_finalize()))
    min((workspace.pieces_folder() / chunk_name(block)).iterdir()).write_bytes(b"damaged")
    with pytest.raises(IncompleteError) as raised:
        chunkq.finalize(workspace.output)
    assert raised.value.code is ErrorCode.RESULTS_LOST
    assert set(workspace.ledger.committed("sum")) == CHUNKS - {block}


def test_a_job_without_its_total_is_incomplete_and_names_the_task(workspace: Workspace) -> None:
    workspace.produce()
    workspace.compute_inline()
    with pytest.raises(IncompleteError) as raised:
        chunkq.finalize(workspace.output)
    assert raised.value.missing == ("0",)


def test_a_complete_job_is_queued_without_a_gate(workspace: Workspace) -> None:
    chunkq.run(workspace.job_file, queue="inprocess://")
    workspace.ledger.delete_commits("total", [(0,)])
    with workspace.queue() as queue:
        assert enqueue(workspace.job, queue).queued == 1
        assert queue.counts(workspace.job.id) == TaskCounts(queued=1)


def test_a_task_of_an_unknown_stage_is_an_error(workspace: Workspace) -> None:
    workspace.produce()
    with pytest.raises(JobError) as raised:
        run_task(Task("stats", *workspace.job.id, 0, (0,)), Attempt(1, "w"))
    assert raised.value.code is ErrorCode.TASK_INVALID
