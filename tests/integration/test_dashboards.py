"""The dashboards of Dask and Ray, with the packages of their pages, show jobs of chunkq."""

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.network_namespace import NetworkNamespace
from tests.harness.servers.ray import URL, ray_processes
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until
from tests.integration.test_ray import workspace_for_cluster

pytestmark = pytest.mark.proof("dashboards")

RAY, RAY_METRICS = "http://127.0.0.1:8265", "http://127.0.0.1:8099"


@pytest.fixture
def network() -> Iterator[NetworkNamespace]:
    namespace = NetworkNamespace()
    yield namespace
    namespace.close()


def fetch(url: str) -> str:
    """Return a page; empty while its server does not answer."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            content: bytes = response.read()
            return content.decode()
    except OSError:
        return ""


def metrics(name: str) -> dict[str, float]:
    """Return the values of a metric of Ray by the tag `state`, or by ""."""
    values: dict[str, float] = {}
    for line in fetch(RAY_METRICS).splitlines():
        if line.startswith(name) and "out.zarr" in line:
            state = line.partition('state="')[2].partition('"')[0]
            values[state] = values.get(state, 0) + float(line.rpartition(" ")[2])
    return values


def actors() -> list[dict[str, Any]]:
    """Return the actors that Ray's dashboard lists."""
    listed: list[dict[str, Any]] = json.loads(fetch(f"{RAY}/api/v0/actors?detail=true"))["data"][
        "result"
    ]["result"]
    return listed


def test_ray_shows_workers_by_the_output_and_exports_tasks_and_patches(
    network: NetworkNamespace, standard_job: StandardJob, tmp_path: Path
) -> None:
    options = ["--head", "--port", "6379", "--node-ip-address", "127.0.0.1"]
    options += ["--include-dashboard", "true", "--metrics-export-port", "8099"]
    with ray_processes(network, *options, cpus=8, gpus=0), network.inside():
        hold = {"NET_HOLD": "forward", "NET_AFTER": "8"}
        workspace = workspace_for_cluster(standard_job, tmp_path, URL, **hold)
        with workspace.start("run", str(workspace.job_file), "-e", "ray") as run:
            workspace.wait_until_stopped()
            wait_until(lambda: metrics("ray_chunkq_tasks").get("done", 0) >= 8, "they are shown")
            shown = {(actor["name"], actor["repr_name"]) for actor in actors()}
            assert ("queue", "chunkq queue") in shown
            assert any(n.startswith("out.zarr-") and "out.zarr" in r for n, r in shown)
            workspace.open_gate()
            assert run.wait().code == 0
        total = len(workspace.done())
        wait_until(lambda: metrics("ray_chunkq_tasks").get("done") == total, "all are done")
        assert metrics("ray_chunkq_tasks") == dict.fromkeys(
            ("queued", "running", "waiting", "failed"), 0
        ) | {"done": total}
        patches = sum(len(patches) for patches in workspace.patches().values())
        wait_until(lambda: metrics("ray_chunkq_patches").get("") == patches, "all are counted")


def test_pages_of_dask_link_the_page_of_chunkq(
    network: NetworkNamespace, standard_job: StandardJob, tmp_path: Path
) -> None:
    with network.inside(), socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dask", "scheduler", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dashboard-address", "127.0.0.1:8787"]
    with network.inside():
        scheduler = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=tmp_path)
        try:
            site = "http://127.0.0.1:8787"
            wait_until(lambda: fetch(f"{site}/status"), "the scheduler has started")
            assert "chunkq" not in fetch(f"{site}/status")
            (tmp_path / "job").mkdir()
            workspace: StandardWorkspace = standard_job.workspace(
                tmp_path / "job", url=f"dask://127.0.0.1:{port}"
            )
            workspace.run("produce", str(workspace.job_file)).ok()
            for page in ("status", "workers", "tasks"):
                assert '<a href="chunkq">Chunkq</a>' in fetch(f"{site}/{page}")
            assert "out.zarr" in fetch(f"{site}/chunkq")
        finally:
            scheduler.kill()
            scheduler.wait()
