"""Tests of the Dask queue with real schedulers and workers, which are restarted and killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from chunkq.errors import ErrorCode
from chunkq.install_hint import remote_hint
from tests.harness.processes import MISSING_PACKAGES, RunningCommand, startup_hook
from tests.harness.servers.dask import (
    HOST,
    SHORT_TIMEOUT,
    DaskCluster,
    assert_refused,
    running_cluster,
    workspace_for_cluster,
)
from tests.harness.servers.redis import free_port
from tests.harness.standard_job import StandardJob, StandardWorkspace, run_all
from tests.harness.waiting import wait_until

CHUNKS = 24
ON_CPU = ("--gpus", "none")

OTHER_VERSION = """
import importlib.metadata

original = importlib.metadata.version
importlib.metadata.version = lambda name: "1.2.3" if name == "{name}" else original(name)
"""
OTHER_PYTHON = """
import distributed.versions

original = distributed.versions.get_package_info
distributed.versions.get_package_info = lambda names: original(names) | {"python": "3.99.0.final.0"}
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[DaskCluster]:
    folder = tmp_path / "dask"
    folder.mkdir()
    cluster = DaskCluster(folder)
    yield cluster
    cluster.kill()


@pytest.mark.parametrize(
    ("hook", "code", "fragment"),
    [
        (
            MISSING_PACKAGES.format(names={"chunkq"}),
            ErrorCode.PACKAGE_MISSING,
            remote_hint("dask", "there"),
        ),
        (OTHER_VERSION.format(name="chunkq"), ErrorCode.QUEUE_VERSION_MISMATCH, "chunkq 1.2.3"),
        (
            OTHER_VERSION.format(name="distributed"),
            ErrorCode.QUEUE_VERSION_MISMATCH,
            "distributed 1.2.3",
        ),
        (OTHER_PYTHON, ErrorCode.QUEUE_VERSION_MISMATCH, "python 3.99.0"),
    ],
    ids=["no chunkq", "another chunkq", "another distributed", "another Python"],
)
def test_a_scheduler_with_other_packages_is_rejected(
    standard_job: StandardJob,
    tmp_path: Path,
    cluster: DaskCluster,
    hook: str,
    code: ErrorCode,
    fragment: str,
) -> None:
    cluster.scheduler(PYTHONPATH=startup_hook(tmp_path, hook))
    workspace = standard_job.workspace(tmp_path, url=cluster.url)
    produce, work = run_all(
        workspace, ("produce", str(workspace.job_file)), ("work", *ON_CPU, "--burst")
    )
    for result in (produce, work):
        assert_refused(result, 1, code, cluster.url, fragment)
    assert not workspace.job_folder.exists()


def test_a_restarted_scheduler_loses_no_results(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = standard_job.workspace(tmp_path, url=cluster.url)
    first = cluster.scheduler()
    workspace.produce()
    hook = startup_hook(tmp_path, SHORT_TIMEOUT)
    with workspace.start("work", *ON_CPU, NET_SLEEP="0.1", PYTHONPATH=hook) as cli:
        wait_until(lambda: len(workspace.done()) >= 4, "some chunks are done")
        first.kill()
        time.sleep(2)  # longer than the timeout of the client
        committed = set(workspace.done())
        cluster.scheduler()
        resumed = workspace.produce("--resume")
        queued = int(re.search(r"(\d+) newly queued", resumed.out)[1])  # type: ignore[index]
        assert queued == CHUNKS - len(workspace.done())
        wait_until(lambda: len(workspace.done()) == CHUNKS, "all chunks are done")
        cli.children()
        cli.process.send_signal(signal.SIGINT)
        result = cli.wait()
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    assert not [line for line in result.err.splitlines() if "distributed" in line]
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    repeated = {patch for patch, times in workspace.computed().items() if times > 1}
    patches = workspace.patches()
    assert not any(repeated & patches[name] for name in committed)
    cli.wait_for_children()


@pytest.mark.proof("dask")
def test_a_burst_reports_a_lost_queue_and_resume_completes_the_job(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = standard_job.workspace(tmp_path, url=cluster.url)
    first = cluster.scheduler()
    workspace.produce()
    hook = startup_hook(tmp_path, SHORT_TIMEOUT)
    burst = ("work", *ON_CPU, "--burst")
    with workspace.start(*burst, NET_SLEEP="0.1", PYTHONPATH=hook) as cli:
        wait_until(lambda: len(workspace.done()) >= 4, "some chunks are done")
        first.kill()
        time.sleep(2)  # longer than the timeout of the client
        cluster.scheduler()
        result = cli.wait()
    assert result.code == 3, result.err
    assert str(workspace.output) in result.err.splitlines()[-1]
    assert "`chunkq produce --resume`" in result.err.splitlines()[-1]
    assert len(workspace.done()) < CHUNKS
    workspace.produce("--resume")
    assert workspace.work().code == 0
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()


def test_a_running_cluster_computes_the_job_in_its_own_workers(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = workspace_for_cluster(cluster, standard_job, tmp_path)
    with running_cluster(cluster, workspace, NET_SLEEP="0.1") as workers:
        cluster.wait_for_workers(2)
        with workspace.start("run", "job.yaml", "-e", "dask", CHUNKQ_QUEUE="dask://") as cli:
            wait_until(lambda: len(workspace.running()) == 3, "each thread has a chunk")
            result = cli.wait()
        assert result.code == 0, result.err
        assert "Traceback" not in result.err
        assert all(worker.process.poll() is None for worker in workers)
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}
    lines = (workspace.folder / "trace").read_text().splitlines()
    assert len({line.split()[0] for line in lines}) == 2


def test_a_cluster_that_a_user_started_without_tls_runs_the_code_of_any_client(
    standard_job: StandardJob, tmp_path: Path, cluster: DaskCluster
) -> None:
    import distributed

    workspace = workspace_for_cluster(cluster, standard_job, tmp_path)
    cluster.scheduler()
    worker = cluster.worker(workspace)
    cluster.wait_for_workers(1)
    with distributed.Client(f"tcp://{HOST}:{cluster.port}", set_as_default=False) as client:
        pid = client.submit(os.getpid).result(60)
    assert pid in worker.children()


@pytest.mark.proof("dask")
def test_a_cluster_continues_after_the_producer_has_ended(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = workspace_for_cluster(cluster, standard_job, tmp_path)
    with running_cluster(cluster, workspace, NET_HOLD="piece", NET_AFTER="2"):
        cluster.wait_for_workers(2)
        [produced] = run_all(workspace, ("produce", "job.yaml"))
        assert produced.code == 0, produced.err
        assert "workers" in produced.err
        workspace.wait_until_stopped()
        status = workspace.status()
        assert status["queue_problem"] is None
        assert status["running"] >= 1
        workspace.open_gate()
        wait_until(lambda: len(workspace.done()) == CHUNKS, "the cluster has computed all chunks")
        workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


def test_a_killed_dask_worker_loses_no_committed_chunks(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = workspace_for_cluster(cluster, standard_job, tmp_path)
    with running_cluster(cluster, workspace, NET_HOLD="piece", NET_AFTER="4", NET_SLEEP="0.1"):
        cluster.wait_for_workers(2)
        with workspace.start("run", "job.yaml") as cli:
            pid = workspace.wait_until_stopped()
            committed = set(workspace.done())
            os.kill(pid, signal.SIGKILL)
            workspace.open_gate()
            result = cli.wait()
    assert result.code == 0, result.err
    assert workspace.stored() == undisturbed.stored()
    repeated = {patch for patch, times in workspace.computed().items() if times > 1}
    patches = workspace.patches()
    assert not any(repeated & patches[name] for name in committed)


def test_a_run_does_not_wait_for_a_suspended_process_of_the_cluster(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = workspace_for_cluster(cluster, standard_job, tmp_path)
    hold = {"NET_HOLD": "piece", "NET_AFTER": "4", "CHUNKQ_WORKER_SETTINGS": '{"lease": 2}'}
    with running_cluster(cluster, workspace, **hold):
        cluster.wait_for_workers(2)
        with workspace.start("run", "job.yaml") as cli:
            pid = workspace.wait_until_stopped()
            os.kill(pid, signal.SIGSTOP)
            workspace.open_gate()
            result = cli.wait()
            assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
    assert result.code == 0, result.err
    assert result.messages == []
    assert workspace.stored() == undisturbed.stored()


def test_the_dashboard_shows_the_chunks_of_the_queue(
    standard_job: StandardJob, tmp_path: Path, cluster: DaskCluster
) -> None:
    workspace = workspace_for_cluster(cluster, standard_job, tmp_path)
    port = free_port()
    cluster.scheduler(dashboard_port=port)
    cluster.worker(workspace, NET_HOLD="forward", NET_AFTER="3")
    pages = f"http://{HOST}:{port}"
    with workspace.start("run", "job.yaml") as cli:
        workspace.wait_until_stopped()
        state = json.loads(get(f"{pages}/json/chunkq.json"))
        page = get(f"{pages}/chunkq")
        tasks = get(f"{pages}/info/main/workers.html")
        workspace.open_gate()
        assert cli.wait().code == 0
    [job] = state["jobs"]
    [running] = state["running"]
    counts = {name: job[name] for name in ("done", "running", "queued", "waiting", "failed")}
    assert counts == {"done": 3, "running": 1, "queued": 20, "waiting": 0, "failed": 0}
    assert job["path"] == str(workspace.job_folder)
    assert running["chunk"].startswith(f"{workspace.output} infer ")
    for text in (str(workspace.output), running["chunk"], running["worker"], 'value="3" max="24"'):
        assert text in page
    assert "tcp://" in tasks
    assert json.loads(get(f"{pages}/json/chunkq.json"))["jobs"][0]["done"] == CHUNKS


def get(url: str) -> str:
    """Return a page of a web server."""
    with urllib.request.urlopen(url, timeout=30) as response:
        text: str = response.read().decode()
    return text


def test_workers_that_join_a_cluster_without_workers_compute_the_job(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = workspace_for_cluster(cluster, standard_job, tmp_path)
    cluster.scheduler()
    with workspace.start("run", "job.yaml") as cli:
        wait_until(lambda: "no free workers" in cli.output(), "the run says what it waits for")
        first = cluster.worker(workspace, NET_SLEEP="0.2")
        wait_until(lambda: len(workspace.done()) >= 2, "the first worker computes chunks")
        second = cluster.worker(workspace, NET_SLEEP="0.2")
        result = cli.wait()
        computing = {int(line.split()[0]) for line in trace(workspace)}
        assert all(computing & {*worker.children()} for worker in (first, second))
    assert result.code == 0, result.err
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


def trace(workspace: StandardWorkspace) -> list[str]:
    """Return process id and patch of every patch that the network has received."""
    return (workspace.folder / "trace").read_text().splitlines()


ADAPTIVE = """
import sys

import distributed

if __name__ == "__main__":
    with distributed.LocalCluster(
        n_workers=0, threads_per_worker=1, host="127.0.0.1", scheduler_port=int(sys.argv[1]),
        dashboard_address="127.0.0.1:0", memory_limit=0,
    ) as cluster:
        cluster.adapt(minimum=0, maximum=3, interval="200ms", wait_count=2)
        print("adapting", flush=True)
        sys.stdin.read()
"""


@pytest.mark.proof("dask")
def test_an_adaptive_cluster_grows_from_zero_and_shrinks_to_it(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = workspace_for_cluster(cluster, standard_job, tmp_path)
    (tmp_path / "adaptive.py").write_text(ADAPTIVE)
    command = [sys.executable, str(tmp_path / "adaptive.py"), str(cluster.port)]
    with subprocess.Popen(
        command,
        env=workspace.process_env | {"NET_SLEEP": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "adapting\n"
            [result] = run_all(workspace, ("run", "job.yaml"))
            assert result.code == 0, result.err
            wait_until(lambda: not spawned(process.pid), "the cluster has no workers again")
        finally:
            RunningCommand(process, tmp_path / "adaptive.py").kill()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}
    assert len({line.split()[0] for line in trace(workspace)}) == 3


def spawned(pid: int) -> list[int]:
    """Return the running processes of workers below a process."""
    workers = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # or a zombie
            workers += [child.pid] if "spawn_main" in " ".join(child.cmdline()) else []
    return workers


@pytest.mark.proof("dask")
def test_a_thread_of_a_cluster_survives_any_number_of_deaths_of_its_worker(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = workspace_for_cluster(cluster, standard_job, tmp_path)
    cluster.scheduler()
    cluster.worker(workspace, NET_SLEEP="0.1")
    cluster.wait_for_workers(1)
    with workspace.start("run", "job.yaml") as cli:
        for deaths in range(1, 7):  # Dask fails a task after the fourth
            wait_until(lambda n=deaths: len(workspace.done()) >= 2 * n, "chunks are done")
            [running] = {task.worker for task in workspace.running()} or {""}
            with suppress(ProcessLookupError):
                os.kill(int(running.rpartition(":")[2], 16), signal.SIGKILL)
        result = cli.wait()
    assert result.code == 0, result.err
    assert workspace.stored() == undisturbed.stored()


@pytest.mark.proof("dask")
def test_a_run_reports_errors_of_remote_workers(
    standard_job: StandardJob, tmp_path: Path, cluster: DaskCluster
) -> None:
    workspace = workspace_for_cluster(cluster, standard_job, tmp_path)
    (tmp_path / "broken").touch()
    with running_cluster(cluster, workspace, NET_BROKEN=str(tmp_path / "broken")):
        cluster.wait_for_workers(2)
        [result] = run_all(workspace, ("run", "job.yaml"))
    assert result.code == 1
    assert "ArithmeticError: broken for every chunk" in result.err
    assert "Traceback" not in result.err
    assert result.messages


def test_a_run_reports_the_death_of_the_scheduler(
    standard_job: StandardJob, tmp_path: Path, cluster: DaskCluster
) -> None:
    workspace = workspace_for_cluster(cluster, standard_job, tmp_path)
    hook = startup_hook(tmp_path, SHORT_TIMEOUT)
    with running_cluster(cluster, workspace, NET_SLEEP="0.2"):
        cluster.wait_for_workers(2)
        with workspace.start("run", "job.yaml", PYTHONPATH=hook) as cli:
            wait_until(lambda: len(workspace.done()) >= 2, "some chunks are done")
            cluster.processes[0].kill()
            result = cli.wait(30)
    assert result.code == 1
    assert f"[{ErrorCode.QUEUE_UNAVAILABLE}]" in result.messages[-1]
    assert "Traceback" not in result.err


@pytest.mark.proof("dask")
def test_ctrl_c_stops_the_remote_workers_and_the_same_command_continues(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = workspace_for_cluster(cluster, standard_job, tmp_path)
    with running_cluster(cluster, workspace, NET_SLEEP="0.2"):
        cluster.wait_for_workers(2)
        with workspace.start("run", "job.yaml") as cli:
            wait_until(lambda: len(workspace.done()) >= 3, "some chunks are done")
            cli.process.send_signal(signal.SIGINT)
            result = cli.wait()
        assert result.code == 130, result.err
        done = len(workspace.done())
        assert 3 <= done < CHUNKS
        counts = workspace.counts()
        assert (counts.running, counts.queued) == (0, CHUNKS - done)
        [second] = run_all(workspace, ("run", "job.yaml"))
        assert second.code == 0, second.err
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}
