"""Run the same job on every engine: commands, output and `status` must be the same."""

import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until
from tests.integration.test_heads import SEVERAL, run_all, stored_objects, workspace_of

ENGINES = ("sqlite", "rq", "dask", "ray")
SERVERS_ONLY = pytest.mark.parametrize(
    "workspace",
    [
        "sqlite",
        "rq",
        pytest.param("dask", marks=pytest.mark.proof("dask")),
        pytest.param("ray", marks=pytest.mark.proof("ray")),
    ],
    indirect=True,
)
"""On clusters these tests are optional, because the contract tests cover the same rules."""
FIXTURES = {"rq": "redis", "dask": "dask", "ray": "ray"}
CHUNKS = 24
ON_CPU = ("work", "--gpus", "none", "--burst")


def queue_url(request: pytest.FixtureRequest, engine: str) -> str | None:
    """Return the URL of the empty queue of an engine; None for the embedded one."""
    if engine not in FIXTURES:
        return None
    server = request.getfixturevalue(FIXTURES[engine])
    url: str = getattr(server, "url", server)
    return url


@pytest.fixture(params=ENGINES)
def workspace(
    request: pytest.FixtureRequest,
    standard_job: StandardJob,
    tmp_path: Path,
    undisturbed: StandardWorkspace,
) -> StandardWorkspace:
    """Return a workspace with the job and the queue of an engine."""
    return standard_job.workspace(tmp_path, url=queue_url(request, request.param))


def test_the_output_is_byte_identical(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    assert workspace.counts().queued == CHUNKS
    with workspace.start(*ON_CPU, "-w", "2") as cli:
        result = cli.wait()
    assert result.code == 0, result.err
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}
    cli.wait_for_children()


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The arrays of a job with outputs of every kind, run without a queue."""
    workspace = workspace_of(tmp_path_factory.mktemp("arrays"), **SEVERAL)
    run_all(workspace)
    return stored_objects(workspace.output)


@pytest.mark.parametrize("engine", FIXTURES)
def test_outputs_of_every_kind_are_byte_identical(
    request: pytest.FixtureRequest, engine: str, tmp_path: Path, arrays: dict[str, bytes]
) -> None:
    workspace: Any = workspace_of(tmp_path, **SEVERAL)
    workspace = replace(workspace, url=queue_url(request, engine))
    workspace.produce()
    assert workspace.work().code == 0
    workspace.finalize().ok()
    assert stored_objects(workspace.output) == arrays
    levels = workspace.done("downsample")
    assert len(levels) == sum(costs.tasks for p in workspace.item.pyramids for costs in p.costs)


@SERVERS_ONLY
def test_a_killed_worker_process_loses_no_committed_chunks(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    with workspace.start(*ON_CPU, "--depth", "2", NET_HOLD="piece", NET_AFTER="4") as cli:
        pid = workspace.wait_until_stopped()
        workspace.wait_for_chunks_in_flight(2)
        committed = set(workspace.done())
        os.kill(pid, signal.SIGKILL)
        workspace.open_gate()
        result = cli.wait()
    assert result.code == 0, result.err
    # On Ray the killed process is the worker's actor; the worker process ends by itself.
    assert re.search(r"(signal 9|code 1); 2 chunks", result.err)
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    patches = workspace.patches()
    repeated = {patch for patch, times in workspace.computed().items() if times > 1}
    assert not any(repeated & patches[name] for name in committed)
    cli.wait_for_children()


@SERVERS_ONLY
def test_status_reports_failures_and_retries(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    poison = workspace.folder / "poison"
    poison.touch()
    workspace.produce()
    result = workspace.work(NET_POISON=str(poison))
    assert result.code == 3, result.err
    status = workspace.status()
    assert {key: status[key] for key in ("chunks", "done", "running", "queued", "failed")} == {
        "chunks": CHUNKS, "done": CHUNKS - 1, "running": 0, "queued": 0, "failed": 1
    }  # fmt: skip
    [failure] = status["failures"]
    assert (failure["error"], failure["chunks"]) == ("ArithmeticError", ["1.2.2"])
    assert failure["message"] == "ArithmeticError: a poisonous voxel"
    assert failure["traceback"].endswith("ArithmeticError: a poisonous voxel\n")
    [worker] = status["workers"]
    assert (worker["device"], worker["recent_chunks"]) == ("cpu", CHUNKS - 1)
    [recorded] = workspace.failures()
    assert (recorded.chunk, recorded.attempt) == ((1, 2, 2), 3)
    unfinished = workspace.finalize()
    assert unfinished.code == 3
    poison.unlink()
    assert workspace.call("retry", str(workspace.output)).code == 0
    assert workspace.counts().queued == 1
    assert workspace.work().code == 0
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()


@SERVERS_ONLY
def test_ctrl_c_finishes_chunks_in_flight_and_the_same_command_continues(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    with workspace.start(*ON_CPU, NET_HOLD="piece", NET_AFTER="3") as cli:
        workspace.wait_until_stopped()
        cli.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping" in cli.output(), "the worker stops")
        workspace.open_gate()
        result = cli.wait()
    assert result.code == 0, result.err
    done = len(workspace.done())
    assert 3 < done < CHUNKS
    counts = workspace.counts()
    assert (counts.running, counts.failed, counts.queued) == (0, 0, CHUNKS - done)
    assert workspace.work().code == 0
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}
