"""`chunkq work --allow` as a process, and jobs on the queue with forged paths."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chunkq.errors import ErrorCode
from chunkq.job.tasks import Task
from chunkq.queue.contract.executor import TaskCounts
from chunkq.queue.registry import open_executor
from tests.harness.networks import toy_model
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace

EPOCH = "0a1b2c3d"
"""Epoch of tasks with a forged path."""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Create the folders `allowed`, with a job of two chunks, and `other`.

    The code in each folder writes a marker file when it runs.
    """
    models = {}
    for name in ("allowed", "other"):
        folder = tmp_path / name
        folder.mkdir()
        models[name] = toy_model(folder, (4,), channels=1)
        with (folder / "network.py").open("a") as file:
            file.write(f"\nopen({str(tmp_path / f'ran-{name}')!r}, 'w').close()\n")
    write_zarr(tmp_path / "other" / "in.zarr", random_volume((8,)))
    values: dict[str, Any] = {"input": "../other/in.zarr", "output": "out.zarr", "chunksize": [4]}
    values |= {"model_config": models["allowed"]}
    return Workspace(tmp_path / "allowed", values, url=f"sqlite://{tmp_path}/queue.db")


def test_a_worker_with_allow_computes_only_allowed_jobs_and_runs_no_other_code(
    workspace: Workspace,
) -> None:
    root, allowed = workspace.folder.parent, workspace.folder
    other = root / "other"
    workspace.produce()
    code = {"class_file": str(other / "network.py")}
    for name, output in (("far", other / "far.zarr"), ("code", "code.zarr")):
        job = workspace.write_job(f"{name}.json", output=str(output), model=code)
        workspace.call("produce", job).ok()
    forged = f"file://{allowed}/../other/far.zarr.chunkq"
    with workspace.queue() as queue:
        queue.submit(
            [Task("infer", forged, EPOCH, 0, (0,)), Task("finalize", forged, EPOCH, 0, (1,))]
        )
    for marker in root.glob("ran-*"):
        marker.unlink()
    result = workspace.work("--allow", ".")
    assert [path.name for path in root.glob("ran-*")] == ["ran-allowed"]
    assert len(workspace.done()) == 2
    with workspace.queue() as queue:
        counts = {job.path: counts for job, counts in queue.jobs().items()}
    rejected = {
        str(other / "far.zarr.chunkq"): TaskCounts(queued=2),
        str(allowed / "code.zarr.chunkq"): TaskCounts(queued=2),
        forged: TaskCounts(queued=2),
    }
    assert counts == rejected
    assert result.code == 1
    assert "Traceback" not in result.err
    for path in (f"job folder {other}/far", f"model_config.class_file {other}/network", forged):
        assert any(path in line for line in result.err.splitlines()), result.err


@pytest.mark.parametrize("prefix", ["", "s3://", "s3://bucket/../other", "dir::file:///x"])
def test_work_rejects_an_invalid_path_to_allow(workspace: Workspace, prefix: str) -> None:
    workspace.call("work", "--burst", "--gpus", "none", "--allow", prefix).refused(
        2, ErrorCode.PATH_INVALID, "--allow: "
    )


def test_every_spelling_of_an_output_names_the_same_job(workspace: Workspace) -> None:
    workspace.produce()
    for spelling in (
        "out.zarr/",
        "../allowed/./out.zarr",
        f"FILE://{workspace.output}",
        f"/{workspace.output}",
        f"local://{workspace.folder}/x/../out.zarr",
    ):
        assert '"queued": 2' in workspace.call("status", spelling, "--json").ok().out
    workspace.call("produce", workspace.job_file, "-o", f"file://{workspace.output}/").ok()
    with workspace.queue() as queue:
        assert queue.jobs() == {workspace.job.id: TaskCounts(queued=2)}
    workspace.call("cancel", f"FILE:///{workspace.output}").ok()
    assert workspace.counts() == TaskCounts()


def test_jobs_with_forged_paths_are_listed_in_one_line_each_and_can_be_cancelled(
    workspace: Workspace,
) -> None:
    forged = [
        "/x/\x1b[2J\nall good",
        "nosuch://x",
        "s3://bucket/../x",
        f"file://{workspace.output}",
    ]
    with closing(open_executor(workspace.queue_url)) as queue:
        queue.submit([Task("infer", f"{path}.chunkq", EPOCH, 0, (0,)) for path in forged])
    lines = workspace.call("jobs").ok().out.splitlines()
    assert len(lines) == len(forged)
    assert all(
        line.isprintable() and line.endswith("1 queued, 0 running, 0 failed") for line in lines
    )
    for output in forged:
        workspace.call("cancel", output).ok()
    with workspace.queue() as queue:
        assert queue.jobs() == {}
