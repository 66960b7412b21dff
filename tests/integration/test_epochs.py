"""Tasks of jobs that were replaced or deleted stay without effect on the job of their output."""

import json
import shutil
from pathlib import Path

import pytest
from chunkq_worker.run_task import record_failure, run_task

from chunkq.errors import ErrorCode, JobError, MissingJobError, TaskTimeoutError
from chunkq.job.tasks import JobId, Task
from chunkq.queue.contract.executor import Attempt, TaskCounts
from chunkq.stages.completion import failures
from tests.harness.files import everything_below, files_below
from tests.harness.small_job import CHUNKS, small_workspace
from tests.harness.workspace import Workspace

ATTEMPT = Attempt(1, "worker")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = small_workspace(tmp_path)
    workspace.call("produce", "job.json").ok()
    return workspace


def replace_job(workspace: Workspace) -> JobId:
    """Replace the job while its tasks are on the queue; return the replaced job."""
    old = workspace.job.id
    workspace.call(
        "produce", "job.json", "--overwrite", "--queue", "sqlite:///" + other_queue(workspace)
    )
    assert workspace.job.id.epoch != old.epoch
    workspace.call("produce", "job.json").ok()
    return old


def other_queue(workspace: Workspace) -> str:
    return str(workspace.folder / "other.db").lstrip("/")


@pytest.mark.parametrize("kind", ["infer", "finalize"])
def test_a_task_of_a_replaced_job_is_refused_and_changes_nothing(
    workspace: Workspace, kind: str
) -> None:
    task = Task(kind, *replace_job(workspace), 0, (0, 0))
    before = files_below(workspace.folder)
    with pytest.raises(MissingJobError) as error:
        run_task(task, ATTEMPT)
    assert error.value.code is ErrorCode.JOB_REPLACED
    assert str(error.value).startswith(f"{workspace.output}: ")
    assert files_below(workspace.folder) == before


def test_a_task_of_a_deleted_job_is_refused_and_creates_nothing(workspace: Workspace) -> None:
    task = Task("infer", *workspace.job.id, 0, (0, 0))
    shutil.rmtree(workspace.job_folder)
    shutil.rmtree(workspace.output)
    before = everything_below(workspace.folder)
    with pytest.raises(MissingJobError) as error:
        run_task(task, ATTEMPT)
    assert error.value.code is ErrorCode.JOB_MISSING
    record_failure(task, ATTEMPT, TaskTimeoutError("too long", []))
    assert everything_below(workspace.folder) == before


def test_a_task_of_a_replaced_job_that_hangs_is_no_failure_of_the_new_job(
    workspace: Workspace,
) -> None:
    old = replace_job(workspace)
    hung, before = TaskTimeoutError("too long", []), everything_below(workspace.folder)
    record_failure(Task("infer", *old, 0, (0, 0)), ATTEMPT, hung)
    assert failures(workspace.job) == []
    assert everything_below(workspace.folder) == before
    record_failure(Task("infer", *workspace.job.id, 0, (0, 1)), ATTEMPT, hung)
    assert [failure.chunk for failure in failures(workspace.job)] == [(0, 1)]


def test_a_task_of_an_unknown_kind_is_refused_without_a_recorded_failure(
    workspace: Workspace,
) -> None:
    before = files_below(workspace.folder)
    with pytest.raises(JobError) as error:
        run_task(Task("system", *workspace.job.id, 0, (0, 0)), ATTEMPT)
    assert error.value.code is ErrorCode.TASK_INVALID
    assert files_below(workspace.folder) == before


def test_overwrite_clears_the_tasks_of_the_job_that_it_replaces_only(
    workspace: Workspace,
) -> None:
    stranger = JobId(workspace.job.id.path, "ffffffff")
    with workspace.queue() as queue:
        queue.submit([Task("infer", *stranger, 0, (0, 0))])
    result = workspace.call("produce", "job.json", "--overwrite").ok()
    [line] = [line for line in result.err.splitlines() if stranger.epoch in line]
    assert workspace.job.id.epoch not in line
    with workspace.queue() as queue:
        assert queue.jobs() == {
            workspace.job.id: TaskCounts(queued=len(CHUNKS)),
            stranger: TaskCounts(queued=1),
        }


def test_the_jobs_of_one_output_are_listed_and_cancelled_together(workspace: Workspace) -> None:
    assert "epoch" not in workspace.call("jobs").ok().out
    old = replace_job(workspace)
    lines = {}
    for line in workspace.call("jobs").ok().out.splitlines():
        assert line.startswith(f"{workspace.output}: {len(CHUNKS)} queued")
        lines[next(job for job in (old, workspace.job.id) if job.epoch in line)] = line
    assert "current" not in lines[old]
    assert "current" in lines[workspace.job.id]
    rows = json.loads(workspace.call("jobs", "--json").ok().out)
    assert {row["epoch"]: row["is_current"] for row in rows} == {
        old.epoch: False,
        workspace.job.id.epoch: True,
    }
    workspace.call("cancel", workspace.output).ok()
    with workspace.queue() as queue:
        assert queue.jobs() == {}


def test_status_and_retry_use_the_current_job(workspace: Workspace) -> None:
    old = replace_job(workspace)
    with workspace.queue() as queue:
        queue.cancel(workspace.job.id)
    assert workspace.status()["queued"] == 0
    workspace.call("retry", workspace.output).ok()
    with workspace.queue() as queue:
        assert queue.jobs() == {old: TaskCounts(queued=len(CHUNKS))}


def test_a_worker_computes_the_current_job_and_sets_the_replaced_one_aside(
    workspace: Workspace,
) -> None:
    old = replace_job(workspace)
    result = workspace.work()
    assert result.code == 0, result.err
    assert len([line for line in result.err.splitlines() if old.epoch in line]) == 1
    assert set(workspace.item.ledger.committed("infer")) == set(CHUNKS)
    with workspace.queue() as queue:
        assert queue.jobs() == {old: TaskCounts(queued=len(CHUNKS))}
