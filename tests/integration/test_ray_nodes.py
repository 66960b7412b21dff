"""Ray clusters that grow and shrink while a job runs on them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from chunkq.queue.contract.executor import DEFAULT_DEPTH_CPU
from tests.harness.network_namespace import NetworkNamespace
from tests.harness.servers.ray import HEAD, URL, ray_cluster, ray_node, ray_processes
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until
from tests.integration.test_ray import run_on_cluster, voxels, workspace_for_cluster

pytestmark = pytest.mark.proof("ray")

AUTOSCALER: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": 3,
    "idle_timeout_minutes": 0.05,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1, "object_store_memory": 100 << 20},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 3,
        },
    },
    **{key: {} for key in ("docker", "auth", "file_mounts")},
    **{
        key: []
        for key in (
            "cluster_synced_files",
            "head_setup_commands",
            "head_start_ray_commands",
            "initialization_commands",
            "rsync_exclude",
            "rsync_filter",
            "setup_commands",
            "worker_setup_commands",
            "worker_start_ray_commands",
        )
    },
    "file_mounts_sync_continuously": False,
    "upscaling_speed": 1.0,
}
"""Ray's provider of nodes that are processes of this machine, for its own tests: none to three."""
COUNT_NODES = f"""
import ray

ray.init({HEAD!r}, log_to_driver=False, logging_level="CRITICAL")
print(len([node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]))
"""


@pytest.fixture
def network() -> Iterator[NetworkNamespace]:
    namespace = NetworkNamespace()
    yield namespace
    namespace.close()


def workspace_of_small_workers(
    standard_job: StandardJob, folder: Path, **environment: str
) -> StandardWorkspace:
    """Return a workspace whose workers use one core each."""
    workspace = workspace_for_cluster(standard_job, folder, URL, **environment)
    workspace.values["threads"] = 1
    return workspace


def computing(workspace: StandardWorkspace) -> set[int]:
    """Return the ids of the processes whose network has received a patch."""
    trace = workspace.folder / "trace"
    lines = trace.read_text().splitlines() if trace.exists() else []
    return {int(line.split()[0]) for line in lines}


def test_a_node_that_joins_computes_and_one_that_leaves_gives_its_chunks_back(
    standard_job: StandardJob,
    tmp_path: Path,
    undisturbed: StandardWorkspace,
    network: NetworkNamespace,
) -> None:
    workspace = workspace_of_small_workers(standard_job, tmp_path, NET_SLEEP="0.5")
    with network.inside(), ray_cluster(network, cpus=1), run_on_cluster(workspace) as run:
        wait_until(lambda: computing(workspace), "the first node computes")
        with ray_node(network) as node:
            wait_until(lambda: len(computing(workspace)) == 2, "the second node computes")
            members = psutil.Process(node.pid).children(recursive=True)
            assert computing(workspace) & {process.pid for process in members}
            done_before = len(workspace.done())
            assert done_before < len(undisturbed.done()) - 1
            [raylet] = [process for process in members if process.name() == "raylet"]
            raylet.terminate()  # as `ray stop` does
            result = run.wait()
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    assert voxels(workspace) == voxels(undisturbed)
    assert {commit.attempt for commit in workspace.commits()} == {1}


def test_a_node_that_is_killed_costs_attempts_of_its_chunks_only_and_is_one_line(
    standard_job: StandardJob,
    tmp_path: Path,
    undisturbed: StandardWorkspace,
    network: NetworkNamespace,
) -> None:
    workspace = workspace_of_small_workers(standard_job, tmp_path, NET_SLEEP="0.5")
    with network.inside(), ray_cluster(network, cpus=1), run_on_cluster(workspace) as run:
        wait_until(lambda: computing(workspace), "the first node computes")
        with ray_node(network) as node:
            wait_until(lambda: len(computing(workspace)) == 2, "the second node computes")
            members = psutil.Process(node.pid).children(recursive=True)
            [raylet] = [process for process in members if process.name() == "raylet"]
            raylet.kill()
            result = run.wait()
    assert result.code == 0, result.err
    assert len([line for line in result.err.splitlines() if "lost" in line]) == 1
    assert not [line for line in result.err.splitlines() if "(raylet)" in line]
    assert voxels(workspace) == voxels(undisturbed)
    attempts = [commit.attempt for commit in workspace.commits()]
    assert max(attempts) == 2
    assert attempts.count(2) <= DEFAULT_DEPTH_CPU


def test_an_autoscaler_adds_nodes_for_queued_chunks_and_removes_them_afterwards(
    standard_job: StandardJob,
    tmp_path: Path,
    undisturbed: StandardWorkspace,
    network: NetworkNamespace,
) -> None:
    (tmp_path / "autoscaler.json").write_text(json.dumps(AUTOSCALER))
    options = ["--head", "--port", "6379", "--node-ip-address", "127.0.0.1"]
    options += ["--include-dashboard", "false"]
    options += ["--autoscaling-config", str(tmp_path / "autoscaler.json")]
    fast = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    workspace = workspace_of_small_workers(standard_job, tmp_path, NET_SLEEP="1")

    def count_nodes() -> int:
        command = [sys.executable, "-c", COUNT_NODES]
        return int(subprocess.check_output(command, stderr=subprocess.DEVNULL))

    with (
        network.inside(),
        mock.patch.dict("os.environ", fast),
        ray_processes(network, *options, cpus=0, gpus=0),
    ):
        assert count_nodes() == 0
        with run_on_cluster(workspace) as run:
            wait_until(lambda: "waiting for" in run.output(), "the run says what it waits for")
            result = run.wait()
        assert result.code == 0, result.err
        wait_until(lambda: count_nodes() == 0, "the nodes are removed")
    assert len(computing(workspace)) == 3
    assert voxels(workspace) == voxels(undisturbed)
    assert set(workspace.computed().values()) == {1}
