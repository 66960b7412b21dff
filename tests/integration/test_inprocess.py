"""Tests of the queue `inprocess://` through the Python API and the commands."""

import threading
from pathlib import Path

import numpy as np
import pytest
from chunkq_worker.worker_main import serve

import chunkq
from chunkq.errors import ErrorCode
from chunkq.job.tasks import JobId, Task
from chunkq.queue.contract.executor import EXIT_TASK_TIMEOUT, TaskCounts, WorkerOptions
from chunkq.queue.contract.settings import WorkerSettings
from chunkq.queue.registry import open_executor
from tests.harness.networks import toy_model
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace

JOB = JobId("/data/out.zarr.chunkq", "0a1b2c3d")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    volume = write_zarr(tmp_path / "in.zarr", random_volume((16, 12)))
    values = {
        "input": str(volume),
        "output": str(tmp_path / "out.zarr"),
        "inference_type": "sliding_window",
        "strides": [2, 2],
        "chunksize": [8, 6],
        "combine": "weighted_avg",
        "threads": 1,
        "model_config": toy_model(tmp_path, (4, 4)),
    }
    return Workspace(tmp_path, values)


def test_a_job_in_this_process_has_the_same_output_as_in_worker_processes(
    workspace: Workspace, tmp_path: Path
) -> None:
    other = workspace.write_job("other.json", output=str(tmp_path / "other.zarr"))
    assert workspace.run("run", other).code == 0
    report = chunkq.run(workspace.write_job(), queue="inprocess://")
    assert report["chunks"] == 4
    assert np.array_equal(read_output(tmp_path / "out.zarr"), read_output(tmp_path / "other.zarr"))


def test_the_run_command_runs_tasks_in_its_own_process(workspace: Workspace) -> None:
    answer = workspace.call("run", workspace.write_job(), "--queue", "inprocess://").ok()
    assert "Traceback" not in answer.err
    assert workspace.job.ledger.read_report() is not None
    record = workspace.job.record
    assert record.job.queue is None  # the queue ended with the command


def test_an_inprocess_run_with_failed_chunks_exits_with_code_3(workspace: Workspace) -> None:
    workspace.write_job(model=toy_model(workspace.folder, (4, 4), poison=0.0))
    answer = workspace.call("run", workspace.folder / "job.json", "--queue", "inprocess://")
    assert answer.code == 3
    assert "Traceback" not in answer.err
    assert open_executor("inprocess://").counts(workspace.job.id) == TaskCounts(failed=4)


def test_several_workers_in_one_process_are_rejected_before_anything_is_written(
    workspace: Workspace,
) -> None:
    answer = workspace.call("run", workspace.write_job(), "--queue", "inprocess://", "-w", "2")
    answer.refused(2, ErrorCode.JOB_INVALID, "workers", "inprocess://")
    assert not workspace.job_folder.exists()


@pytest.mark.parametrize("command", [["produce", "job.json"], ["work", "--burst"], ["jobs"]])
def test_a_command_that_shares_its_queue_rejects_an_inprocess_queue(
    workspace: Workspace, command: list[str]
) -> None:
    workspace.write_job()
    workspace.call(*command, "--queue", "inprocess://").refused(
        2, ErrorCode.QUEUE_ADDRESS_INVALID, "inprocess://", "sqlite://"
    )


def test_tasks_produced_in_a_process_are_run_by_its_threads(workspace: Workspace) -> None:
    url = f"inprocess://{workspace.folder}"
    chunkq.produce(workspace.write_job(), queue=url)
    worker_options = [WorkerOptions(f"worker-{n}", burst=True) for n in range(2)]
    threads = [
        threading.Thread(target=open_executor(url).run_worker, args=(serve, options))
        for options in worker_options
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert open_executor(url).counts(workspace.job.id) == TaskCounts()
    assert len(workspace.commits()) == 4
    assert chunkq.finalize(workspace.output)["chunks"] == 4


def test_queues_with_different_names_are_separate(tmp_path: Path) -> None:
    one, other = (open_executor(f"inprocess://{tmp_path}/{name}") for name in "ab")
    one.submit([Task("infer", *JOB, 0, (0,))])
    assert other.jobs() == {}
    assert list(open_executor(one.url).jobs()) == [JOB]


def test_a_chunk_that_hangs_ends_the_worker_but_not_the_process(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr("chunkq_worker.run_task.run_task", lambda task, attempt: go.wait())
    queue = open_executor(f"inprocess://{workspace.folder}")
    queue.submit([Task("infer", *JOB, 0, (0, 0))])
    settings = WorkerSettings(lease=0.3)
    slow = WorkerOptions("slow", burst=True, time_limit=0.1, settings=settings)
    status = queue.run_worker(serve, slow)
    go.set()
    assert status.code == EXIT_TASK_TIMEOUT
    assert len(status.lines) == 1
    assert queue.counts(JOB) == TaskCounts(queued=1)
