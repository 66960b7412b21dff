"""A run's own Dask or Ray cluster in an allocation: signals to all processes, and a lost head."""

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import psutil
import pytest

from chunkq.errors import ErrorCode
from tests.harness.documents import code_block
from tests.harness.network_namespace import NetworkNamespace
from tests.harness.processes import RunningCommand
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until

STEP = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURMD_NODENAME": "node",
}
"""What srun sets for the only task of a step."""
SOON = 30.0
"""Time (s) in which a run notices that its cluster has ended; Ray itself takes a minute."""


@pytest.fixture
def allocated(standard_job: StandardJob, tmp_path: Path) -> Iterator[StandardWorkspace]:
    """Yield a workspace in a network namespace, for a job that starts its own cluster."""
    network = NetworkNamespace()
    keys = {"cluster": "slurm", "hardware": "cpu_only", "dask_config": {"threads_per_worker": 2}}
    with network.inside():
        yield standard_job.workspace(tmp_path, keys)
    network.close()


def running(
    workspace: StandardWorkspace, engine: str, **environment: str
) -> AbstractContextManager[RunningCommand]:
    """Run the job with the environment of the step."""
    variables = {"CHUNKQ_QUEUE": f"{engine}://", **STEP, **environment}
    return workspace.start("run", str(workspace.job_file), "-e", engine, **variables)


def signal_step(run: RunningCommand) -> None:
    """Send SIGTERM to all processes of a step, as slurmstepd does."""
    for pid in (run.pid, *run.children()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def assert_rest_is_computed_once(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace, engine: str
) -> None:
    """Run the same command again, which completes the output."""
    with running(workspace, engine) as run:
        assert run.wait().code == 0
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


@pytest.mark.parametrize("engine", ["dask", pytest.param("ray", marks=pytest.mark.proof("ray"))])
def test_a_signal_to_all_processes_of_a_step_lets_the_chunks_in_flight_be_finished(
    allocated: StandardWorkspace, undisturbed: StandardWorkspace, engine: str
) -> None:
    workspace = allocated
    with running(workspace, engine, NET_HOLD="forward", NET_AFTER="3") as run:
        workspace.wait_until_stopped()
        before = workspace.done()
        signal_step(run)
        if engine == "dask":  # Ray's workers have no supervisor that reports it
            wait_until(lambda: "stopping" in run.output(), "the workers are stopping")
        workspace.open_gate()
        result = run.wait()
        assert result.code == 130, result.err
        run.wait_for_children()
    assert len(before) < len(workspace.done()) < len(undisturbed.done())
    assert_rest_is_computed_once(workspace, undisturbed, engine)


@pytest.mark.parametrize("engine", ["dask", pytest.param("ray", marks=pytest.mark.proof("ray"))])
def test_a_signal_to_a_step_whose_network_is_checked_lets_the_first_chunks_be_finished(
    allocated: StandardWorkspace, undisturbed: StandardWorkspace, engine: str
) -> None:
    workspace = allocated
    with running(workspace, engine, NET_HOLD="load", NET_SLEEP="0.5") as run:
        workspace.wait_until_stopped()
        signal_step(run)
        wait_until(lambda: "stopping" in run.output(), "the signal is acknowledged")
        assert not workspace.job_folder.exists()
        workspace.open_gate()
        result = run.wait()
        assert result.code == 130, result.err
        run.wait_for_children()
    assert 0 < len(workspace.done()) < len(undisturbed.done())
    assert_rest_is_computed_once(workspace, undisturbed, engine)


@pytest.mark.proof("ray")
def test_a_run_whose_ray_head_dies_ends_soon_with_one_line_and_the_same_command_continues(
    allocated: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace = allocated
    with running(workspace, "ray", NET_SLEEP="0.2") as run:
        wait_until(lambda: len(workspace.done()) >= 2, "some chunks are done")
        before = run.output()
        servers = psutil.Process(run.pid).children(recursive=True)
        [head] = [p for p in servers if p.cmdline()[:1] and "gcs_server" in p.cmdline()[0]]
        run.children()
        head.kill()
        result = run.wait(SOON)
        run.wait_for_children()
    assert result.code == 1
    [line] = result.err.removeprefix(before).splitlines()
    assert line.endswith(f"[{ErrorCode.CLUSTER_UNAVAILABLE}]")
    page = "docs/troubleshooting.md"
    assert f"{line}\n" == code_block(page, "The cluster of a run has ended", "text")
    with running(workspace, "ray") as run:
        assert run.wait().code == 0
    assert workspace.stored() == undisturbed.stored()
