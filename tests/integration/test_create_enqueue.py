"""`create_job` creates a job without a queue; `enqueue` queues the chunks that remain."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chunkq.create import CheckedJob, check_job, create_job
from chunkq.enqueue import check_not_running, enqueue
from chunkq.errors import ErrorCode, JobError
from chunkq.job.events import Event, StageProgress
from chunkq.job.job_reading import load_job
from chunkq.queue.contract.executor import Executor, TaskCounts, WorkerOptions
from chunkq.queue.leases.task_loop import LeaseQueue
from chunkq.queue.registry import open_executor
from tests.harness.nifti import AFFINE, write_nifti
from tests.harness.small_job import CHUNKS, SHAPE, small_workspace
from tests.harness.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return small_workspace(tmp_path)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Executor]:
    with closing(open_executor(f"inprocess://{tmp_path}")) as executor:
        yield executor


def checked(workspace: Workspace, **changes: Any) -> CheckedJob:
    return check_job(load_job(workspace.write_job(**changes)))


def test_checking_a_job_writes_nothing(workspace: Workspace) -> None:
    checked(workspace)
    assert not workspace.output.exists()
    assert not workspace.job_folder.exists()


def test_a_position_that_the_output_cannot_hold_is_a_warning(workspace: Workspace) -> None:
    values, flipped = np.zeros((1, *SHAPE), "u1"), AFFINE * [-1, 1, 1, 1]
    write_nifti(workspace.folder / "a.nii", values, affine=flipped)
    write_nifti(workspace.folder / "b.nii", values, affine=flipped)
    patch = {"model_input_shape": [1, 8, 8], "model_output_shape": [1, 8, 8]}
    keys: dict[str, Any] = {"chunksize": None, "storage_chunks": None, "model": patch}
    keys |= {"strides": [1, 4, 4], "input": ["a.nii", "b.nii"]}
    (line,) = checked(workspace, **keys).warnings
    assert all(word in line for word in ("a.nii", "flipped", "1 more"))
    assert checked(workspace, **keys, output="out.nii.gz").warnings == ()
    straight = keys | {"input": {"path": "a.nii", "orientation": "RAS"}}
    assert checked(workspace, **straight).warnings == ()


def test_a_job_is_created_with_its_output_and_without_a_task(workspace: Workspace) -> None:
    job = create_job(checked(workspace))
    assert job.folder.path == str(workspace.job_folder)
    assert workspace.array.is_dir()
    assert not workspace.queue_file.exists()
    assert job.record.job.queue is None


def test_the_queue_for_later_commands_is_stored_and_can_be_changed(workspace: Workspace) -> None:
    first = create_job(checked(workspace), queue="sqlite:///one/queue.db")
    again = create_job(checked(workspace), queue="sqlite:///two/queue.db")
    assert first.record.epoch == again.record.epoch
    stored = workspace.job.folder.require_record()
    assert stored.job.queue == "sqlite:///two/queue.db"


def test_exactly_the_chunks_without_a_commit_record_are_queued(
    workspace: Workspace, queue: Executor
) -> None:
    job = create_job(checked(workspace))
    workspace.compute_inline(lambda index: index[0] == 1)
    events: list[Event] = []
    result = enqueue(job, queue, emit=events.append)
    assert (result.chunks, result.done, result.queued) == (6, 2, 4)
    assert events == [StageProgress("queueing chunks", n, 4) for n in (0, 4)]
    assert reserved(queue) == {index for index in CHUNKS if index[0] != 1}
    assert enqueue(job, queue).queued == 0


def test_a_job_that_replaces_another_has_only_its_own_tasks(
    workspace: Workspace, queue: Executor
) -> None:
    old = create_job(checked(workspace))
    enqueue(old, queue)
    new = create_job(checked(workspace, chunksize=[16, 24]), overwrite=True)
    assert enqueue(new, queue, replaced=old.id).queued == 2
    assert queue.counts(new.id) == TaskCounts(queued=2)
    assert reserved(queue) == {(0, 0), (1, 0)}


def test_a_job_with_a_running_task_is_not_to_be_replaced(
    workspace: Workspace, queue: Executor
) -> None:
    job = create_job(checked(workspace))
    enqueue(job, queue)
    check_not_running(job.folder.path, job.id, queue)
    reserve(queue)
    with pytest.raises(JobError) as raised:
        check_not_running(job.folder.path, job.id, queue)
    assert raised.value.code is ErrorCode.OUTPUT_IN_USE
    assert "worker-1" in str(raised.value)


def reserve(queue: Executor) -> tuple[int, ...] | None:
    """Reserve a task; return its chunk."""
    assert isinstance(queue, LeaseQueue)
    lease = queue.reserve(WorkerOptions("worker-1"))
    return None if lease is None else lease.task.chunk


def reserved(queue: Executor) -> set[tuple[int, ...]]:
    """Reserve all tasks; return their chunks."""
    return {chunk for chunk in iter(lambda: reserve(queue), None) if chunk is not None}
