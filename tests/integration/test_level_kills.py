"""A process that is ended at any step of a level of a pyramid is continued with the same bytes."""

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chunkq.finalize import finalize_job
from chunkq.job.tasks import chunk_name
from chunkq.plan.chunk import Index
from chunkq.stages.registry import stage_of
from tests.harness.level_kills import KIND, STEPS, end_at
from tests.harness.small_job import small_volume, small_workspace
from tests.harness.workspace import Workspace, run_tasks

ROOT = Path(__file__).parents[2]
JOBS: dict[str, dict[str, Any]] = {
    "chunks": {"chunksize": [8, 8], "storage_chunks": [4, 4]},
    "shards": {"chunksize": [8, 8], "storage_chunks": [2, 2], "storage_shards": [4, 4]},
    "precomputed": {"chunksize": [8, 8], "storage_chunks": [4, 4]},
}
JOBS = {name: keys | {"pyramid": {"levels": "auto"}} for name, keys in JOBS.items()}


class KilledError(BaseException):
    """A process is killed: nothing after it runs."""


def workspace_of(folder: Path, name: str) -> Workspace:
    return (small_volume if name == "precomputed" else small_workspace)(folder, **JOBS[name])


def voxels(workspace: Workspace) -> dict[str, bytes]:
    """Return the files of all levels; the metadata of the image contain the digest of the job."""
    files = workspace.stored()
    return {name: files[name] for name in files if name not in ("zarr.json", "info")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of each job's output without a kill."""
    outputs = {}
    for name in JOBS:
        workspace = workspace_of(tmp_path_factory.mktemp(name), name)
        finalize_job(computed(workspace).job, worker="undisturbed")
        outputs[name] = voxels(workspace)
    return outputs


def computed(workspace: Workspace) -> Workspace:
    """Run the chunks of a job, and neither its blocks nor its levels."""
    workspace.produce()
    run_tasks(workspace.job)
    return workspace


def all_units(workspace: Workspace) -> set[str]:
    return {chunk_name(chunk) for chunk in stage_of(KIND).chunks(workspace.item)}


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("step", STEPS)
def test_a_finalizer_that_is_ended_at_a_step_of_a_level_is_continued(
    tmp_path: Path,
    step: str,
    name: str,
    undisturbed: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workspace = computed(workspace_of(tmp_path, name))
    chunks, units = workspace.done("infer"), all_units(workspace)
    committed: dict[str, tuple[bytes, int]] = {}
    for rest in (len(units) - 3, 2):  # a task of level 1, and one of the last levels
        number, started = len(units) - len(committed) - rest, list[str]()
        with monkeypatch.context() as patch:
            end_at(step, number, ended, adding(started), patch.setattr)
            with pytest.raises(KilledError):
                finalize_job(workspace.job, worker="killed", threads=1)
        after = workspace.done(KIND)
        assert {unit: after[unit] for unit in committed} == committed
        done = started if step == "after the commit" else started[:-1]
        assert after.keys() == {*committed, *done}
        assert len(started) == number
        committed = after
    started = []
    with monkeypatch.context() as patch:
        end_at(step, 0, ended, adding(started), patch.setattr)
        finalize_job(workspace.job, worker="next", threads=1)
    assert sorted(started) == sorted(units - committed.keys())
    assert workspace.done("infer") == chunks
    assert voxels(workspace) == undisturbed[name]


def ended() -> None:
    raise KilledError


def adding(names: list[str]) -> Callable[[Index], None]:
    return lambda chunk: names.append(chunk_name(chunk))


def test_killed_processes_of_a_finalizer_are_continued(
    tmp_path: Path, undisturbed: dict[str, dict[str, bytes]]
) -> None:
    workspace, steps = (
        computed(workspace_of(tmp_path, "shards")),
        ("in the write", "before the commit", "after the commit"),
    )
    chunks, trace = workspace.done("infer"), tmp_path / "trace"
    committed: dict[str, tuple[bytes, int]] = {}
    for step in steps:
        assert finalizer(workspace, step, 2) == -signal.SIGKILL
        after = workspace.done(KIND)
        assert {unit: after[unit] for unit in committed} == committed
        assert len(after) == len(committed) + (2 if step == "after the commit" else 1)
        committed = after
    assert finalizer(workspace, "after the commit", 0) == 0
    runs = Counter(trace.read_text().split())
    assert runs.keys() == all_units(workspace)
    assert sum(runs.values()) == len(runs) + len(steps) - 1
    assert workspace.done("infer") == chunks
    assert voxels(workspace) == undisturbed["shards"]


def finalizer(workspace: Workspace, step: str, number: int) -> int:
    """Run a process that is killed at a step of the task with a number; return its exit code."""
    module = ("-m", "tests.harness.level_kills", step, str(number), str(workspace.folder / "trace"))
    command = [sys.executable, *module, "finalize", str(workspace.output), "--threads", "1"]
    return subprocess.run(command, cwd=ROOT, env=workspace.process_env, check=False).returncode
