"""Tests of the Ray queue with real clusters in separate network namespaces, and killed actors."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import psutil
import pytest

from chunkq.errors import ErrorCode
from chunkq.install_hint import install_command, remote_hint
from tests.harness.network_namespace import NetworkNamespace
from tests.harness.networks import NETWORK
from tests.harness.processes import CommandResult, RunningCommand, is_alive
from tests.harness.servers.ray import ray_cluster
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import TIMEOUT, wait_until

CHUNKS = 24
ON_CPU = ("work", "--gpus", "none", "--burst")
CLIENT = "ray://127.0.0.1:10001"
UNREACHABLE = ("ray://auto?address=127.0.0.1:6399", "ray://127.0.0.1:10009")
RUNNING = {
    "cluster": "running",
    "hardware": "cpu_only",
    "ray_config": {"address": "127.0.0.1"},
    "threads": 4,  # for two workers on the cores of the cluster
}

NOT_INSTALLED = """
from importlib.machinery import PathFinder

original = PathFinder.find_spec


def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] == "ray" else original(name, path, target)


PathFinder.find_spec = staticmethod(find_spec)
"""
NO_CHUNKQ = """
import os
import sys


class Finder:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0].startswith("chunkq") and os.path.exists({marker!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


if "chunkq" not in sys.orig_argv:  # all processes except `-m chunkq`
    sys.meta_path.insert(0, Finder)
"""
OTHER_CHUNKQ = """
import importlib.metadata

original = importlib.metadata.version
importlib.metadata.version = lambda name: "0.0.1" if name == "chunkq" else original(name)
"""
OTHER_RAY = """
import ray

ray.__version__ = "2.40.0"
"""
CRASHING_SERVER = """
import os
import signal
import sys


def shorten_timeouts():  # by default the proxy of Ray waits for a dead server for a minute
    proxier = sys.modules["ray.util.client.server.proxier"]
    timeouts = (1, 1) if os.listdir({crashes!r}) else (30, 5)
    proxier.CHECK_CHANNEL_TIMEOUT_S, proxier.LOGSTREAM_RETRIES = timeouts


def crash():
    for name in os.listdir({crashes!r}):
        os.unlink(os.path.join({crashes!r}, name))
        os.kill(os.getpid(), signal.SIGKILL)


if "--mode=proxy" in sys.orig_argv:
    os.register_at_fork(before=shorten_timeouts, after_in_child=crash)
"""
DEVICES = """

class RecordingNet(Net):
    def forward(self, x):
        with open(os.environ["NET_DEVICES"], "a") as file:
            file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')!r}\\n")
        return super().forward(x)
"""


@pytest.fixture
def workspace(standard_job: StandardJob, tmp_path: Path, ray: str) -> StandardWorkspace:
    """Return a workspace on the shared cluster."""
    return standard_job.workspace(tmp_path, url=ray)


@pytest.fixture
def isolated(standard_job: StandardJob, tmp_path: Path) -> Iterator[StandardWorkspace]:
    """Yield a workspace in a new network namespace without a cluster."""
    network = NetworkNamespace()
    with network.inside():
        yield standard_job.workspace(tmp_path, url="ray://")
    network.close()


@pytest.fixture(scope="module")
def gpu_cluster(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[NetworkNamespace, str, Path]]:
    """Yield a cluster with two emulated GPUs, which cannot import chunkq while a file exists."""
    folder = tmp_path_factory.mktemp("gpu-cluster")
    marker = folder / "marker"
    paths = hook(folder, NO_CHUNKQ.format(marker=str(marker)))
    network = NetworkNamespace()
    with mock.patch.dict(os.environ, paths), ray_cluster(network, gpus=2) as url:
        yield network, url, marker
    network.close()


@pytest.fixture(scope="module")
def crashing_cluster(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[NetworkNamespace, Path]]:
    """Yield a cluster whose servers for clients crash once for each file in a folder."""
    folder = tmp_path_factory.mktemp("crashing-cluster")
    crashes = folder / "crashes"
    crashes.mkdir()
    environment = hook(folder, CRASHING_SERVER.format(crashes=str(crashes))) | {
        "GRPC_ENABLE_FORK_SUPPORT": "0"
    }
    network = NetworkNamespace()
    with mock.patch.dict(os.environ, environment), ray_cluster(network):
        yield network, crashes
    network.close()


def hook(folder: Path, code: str) -> dict[str, str]:
    """Write code that Python processes run at their start; return their environment."""
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(code)
    paths = [str(folder / "hook"), os.environ.get("PYTHONPATH")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def refused(workspace: StandardWorkspace, *arguments: str, **environment: str) -> str:
    """Run a command that fails; return its line, without the warnings of Ray."""
    with workspace.start(*arguments, **environment) as cli:
        result = cli.wait(30)
    assert result.code == 1, result.err
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if "local IP via external" not in line]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("chunkq: queue: ")
    return lines[0]


def has_code(line: str, code: ErrorCode) -> bool:
    return line.endswith(f" [{code}]")


def run_ok(workspace: StandardWorkspace, *arguments: str) -> CommandResult:
    """Run a command in a new process, because Ray does not support two networks in one."""
    with workspace.start(*arguments) as cli:
        result = cli.wait()
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    return result


def processes_here(title: str = "") -> list[psutil.Process]:
    """Return other processes of this network namespace, selected by their command line."""
    namespace = os.stat("/proc/thread-self/ns/net").st_ino
    processes = []
    for process in psutil.process_iter():
        try:
            is_inside = os.stat(f"/proc/{process.pid}/ns/net").st_ino == namespace
            line = " ".join(process.cmdline())
        except (OSError, psutil.Error):
            continue
        is_selected = is_inside and process.pid != os.getpid() and line.startswith(title)
        if is_selected and is_alive(process.pid):
            processes.append(process)
    return processes


def kill_queue_actor() -> None:
    [actor] = processes_here("ray::ChunkqQueue")
    actor.kill()
    actor.wait(10)


def count_missing(workspace: StandardWorkspace) -> int:
    return CHUNKS - len(workspace.done())


def assert_not_repeated(workspace: StandardWorkspace, committed: set[str]) -> None:
    patches = workspace.patches()
    repeated = {patch for patch, times in workspace.computed().items() if times > 1}
    assert not any(repeated & patches[name] for name in committed)


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize("url", UNREACHABLE)
def test_an_unreachable_cluster_is_reported_within_seconds(
    isolated: StandardWorkspace, url: str
) -> None:
    start = time.monotonic()
    for command in (("produce", str(isolated.job_file)), ("work",)):
        line = refused(isolated, *command, "--queue", url)
        assert line.startswith(f"chunkq: queue: {url}: ")
        assert has_code(line, ErrorCode.QUEUE_UNAVAILABLE)
    assert time.monotonic() - start < 20


def test_status_reports_the_ledger_while_the_cluster_is_unreachable(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    standard_job.workspace(tmp_path).produce()
    status = standard_job.workspace(tmp_path, url=UNREACHABLE[0]).status()
    assert (status["chunks"], status["done"]) == (CHUNKS, 0)
    assert UNREACHABLE[0] in status["queue_problem"]


@pytest.mark.parametrize(
    ("url", "fragment"),
    [
        ("ray://host", "ray://host: "),
        ("ray://host:port", "ray://host:port: "),
        ("ray://auto?adress=h:1", "ray://auto?adress=h:1: "),
        ("ray://", "`chunkq run`"),
    ],
)
def test_an_invalid_address_is_an_error_of_one_line(
    standard_job: StandardJob, tmp_path: Path, url: str, fragment: str
) -> None:
    workspace = standard_job.workspace(tmp_path, url=url)
    for command in (("produce", str(workspace.job_file)), ("work",)):
        result = workspace.call(*command)
        result.refused(2, ErrorCode.QUEUE_ADDRESS_INVALID, "ray://HOST:10001", fragment)
        assert len(result.err.splitlines()) == 1


def test_a_running_cluster_needs_an_address(standard_job: StandardJob, tmp_path: Path) -> None:
    workspace = standard_job.workspace(tmp_path, {"cluster": "running"}, url="ray://")
    result = workspace.call("run", "-e", "ray", str(workspace.job_file))
    result.refused(2, ErrorCode.JOB_INVALID, "cluster: ", "ray_config.address", "--queue ray://")
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("command", [("produce",), ("run", "-e", "ray")], ids=["produce", "run"])
def test_the_error_for_a_missing_package_names_the_extra(
    standard_job: StandardJob, tmp_path: Path, command: tuple[str, ...]
) -> None:
    url = "ray://auto" if command == ("produce",) else "ray://"
    workspace = standard_job.workspace(tmp_path, url=url)
    line = refused(workspace, *command, str(workspace.job_file), **hook(tmp_path, NOT_INSTALLED))
    assert "ray://" in line
    assert install_command("ray") in line
    assert has_code(line, ErrorCode.PACKAGE_MISSING)


@pytest.mark.parametrize(
    ("code", "version"),
    [(OTHER_CHUNKQ, "chunkq 0.0.1"), (OTHER_RAY, "2.40.0")],
    ids=["chunkq", "ray"],
)
def test_another_version_is_an_error_of_one_line(
    workspace: StandardWorkspace, code: str, version: str
) -> None:
    workspace.produce()
    environment = hook(workspace.folder, code)
    for command in (("produce", str(workspace.job_file)), ("work",)):
        line = refused(workspace, *command, **environment)
        assert version in line
        assert has_code(line, ErrorCode.QUEUE_VERSION_MISMATCH)


@pytest.mark.proof("ray")
def test_machines_without_chunkq_are_an_error_of_one_line(
    standard_job: StandardJob, tmp_path: Path, gpu_cluster: tuple[NetworkNamespace, str, Path]
) -> None:
    network, url, marker = gpu_cluster
    workspace = standard_job.workspace(tmp_path, url=url)
    with network.inside():
        marker.touch()
        line = refused(workspace, "produce", str(workspace.job_file))
        assert line.startswith(f"chunkq: queue: {url}: ")
        assert has_code(line, ErrorCode.PACKAGE_MISSING)
        marker.unlink()
        run_ok(workspace, "produce", str(workspace.job_file))
        marker.touch()
        line = refused(workspace, *ON_CPU, "--quiet")
        assert remote_hint("ray", "on its machines") in line
        marker.unlink()
        assert f"{CHUNKS} queued" in run_ok(workspace, "status", str(workspace.output)).err


# --------------------------------------------------------------------------- the queue is lost


def test_a_killed_queue_actor_loses_no_committed_chunks(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    with workspace.start(*ON_CPU, NET_HOLD="piece", NET_AFTER="4") as cli:
        workspace.wait_until_stopped()
        kill_queue_actor()
        workspace.open_gate()
        result = cli.wait()
    assert "Traceback" not in result.err
    committed, missing = set(workspace.done()), count_missing(workspace)
    assert 0 < missing < CHUNKS
    resumed = workspace.produce("--resume")
    assert f"{missing} newly queued" in resumed.out
    assert workspace.counts().queued == missing
    assert workspace.work().code == 0
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    assert_not_repeated(workspace, committed)


# --------------------------------------------------------------------------- devices


def visible_devices(devices: Path) -> dict[str, str]:
    """Return the visible devices of each process that ran the network, by process id."""
    lines = devices.read_text().splitlines() if devices.exists() else []
    return dict(line.split(maxsplit=1) for line in lines)


def test_each_worker_is_an_actor_with_the_gpu_that_ray_assigns(
    standard_job: StandardJob, tmp_path: Path, gpu_cluster: tuple[NetworkNamespace, str, Path]
) -> None:
    network, url, _ = gpu_cluster
    (tmp_path / "network.py").write_text(NETWORK + DEVICES)
    model = {
        "class_file": str(tmp_path / "network.py"),
        "class_name": "RecordingNet",
        "device": "cpu",
    }
    workspace = standard_job.workspace(tmp_path, {"model": model}, url=url)
    devices = tmp_path / "devices"
    environment = {
        "CUDA_VISIBLE_DEVICES": "0,1,2",
        "NET_DEVICES": str(devices),
        "NET_HOLD": "piece",
        "NET_AFTER": "4",
    }
    with network.inside():
        run_ok(workspace, "produce", str(workspace.job_file))
        with workspace.start("work", "--burst", "--gpus", "0,1,2", **environment) as cli:
            workspace.wait_until_stopped()
            assert len(processes_here("ray::ChunkqWorker")) == 2
            wait_until(lambda: "not yet assigned" in cli.output(), "a warning for the third worker")
            wait_until(lambda: len(visible_devices(devices)) == 2, "both workers run the network")
            workspace.open_gate()
            result = cli.wait()
        assert result.code == 0, result.err
        assert result.err.count("not yet assigned") == 1
        run_ok(workspace, "finalize", str(workspace.output))
    assert set(visible_devices(devices).values()) == {"'0'", "'1'"}


@pytest.mark.proof("ray")
def test_an_actor_without_a_gpu_has_no_visible_gpus(
    standard_job: StandardJob, tmp_path: Path, gpu_cluster: tuple[NetworkNamespace, str, Path]
) -> None:
    network, url, _ = gpu_cluster
    (tmp_path / "network.py").write_text(NETWORK + DEVICES)
    model = {"class_file": str(tmp_path / "network.py"), "class_name": "RecordingNet"}
    workspace = standard_job.workspace(tmp_path, {"model": model}, url=url)
    devices = tmp_path / "devices"
    with network.inside():
        run_ok(workspace, "produce", str(workspace.job_file))
        result = workspace.work(NET_DEVICES=str(devices), CUDA_VISIBLE_DEVICES="0,1")
    assert result.code == 0, result.err
    assert set(visible_devices(devices).values()) == {"''"}


@pytest.mark.proof("ray")
def test_a_worker_that_waits_for_its_device_can_be_stopped(
    standard_job: StandardJob, tmp_path: Path, gpu_cluster: tuple[NetworkNamespace, str, Path]
) -> None:
    network, url, _ = gpu_cluster
    workspace = standard_job.workspace(tmp_path, url=url)
    with network.inside():
        run_ok(workspace, "produce", str(workspace.job_file))
        three = {"CUDA_VISIBLE_DEVICES": "0,1,2"}
        with workspace.start("work", "--gpus", "0,1,2", "--max-time", "1h", **three) as cli:
            wait_until(lambda: len(workspace.done()) == CHUNKS, "all chunks are done")
            cli.process.send_signal(signal.SIGINT)
            result = cli.wait()
        assert result.code == 0, result.err
        cli.wait_for_children()
        wait_until(lambda: not processes_here("ray::ChunkqWorker"), "its actors end")


# --------------------------------------------------------------------------- temporary clusters


def own_run(workspace: StandardWorkspace) -> tuple[str, ...]:
    return ("run", "-e", "ray", "--gpus", "none", "-w", "2", str(workspace.job_file))


def wait_for_no_processes() -> None:
    wait_until(lambda: not processes_here(), "all processes end")


def test_run_starts_a_cluster_that_ends_with_it(
    isolated: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    with isolated.start(*own_run(isolated), NET_HOLD="piece", NET_AFTER="4") as cli:
        isolated.wait_until_stopped()
        [worker] = [
            p
            for p in processes_here(sys.executable)
            if "chunkq_worker.worker_process" in p.cmdline()
        ][:1]
        url = worker.environ()["CHUNKQ_QUEUE"]
        with isolated.start("work", "--queue", url) as other:
            rejected = other.wait()
        assert rejected.code == 1
        assert "Traceback" not in rejected.err
        # Ray also logs a missing token every second.
        [line] = rejected.messages
        assert "token" in line
        assert has_code(line, ErrorCode.QUEUE_UNAVAILABLE)
        isolated.open_gate()
        result = cli.wait()
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    assert isolated.stored() == undisturbed.stored()
    wait_for_no_processes()


@pytest.mark.proof("ray")
def test_after_ctrl_c_the_same_run_continues(
    isolated: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    with isolated.start(*own_run(isolated), NET_HOLD="piece", NET_AFTER="4") as cli:
        isolated.wait_until_stopped()
        cli.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        isolated.open_gate()
        result = cli.wait()
    assert result.code == 130, result.err
    assert "the same command" in result.messages[-1]
    wait_for_no_processes()
    committed = set(isolated.done())
    assert 4 <= len(committed) < CHUNKS
    with isolated.start(*own_run(isolated)) as cli:
        result = cli.wait()
    assert result.code == 0, result.err
    assert isolated.stored() == undisturbed.stored()
    assert_not_repeated(isolated, committed)


@pytest.mark.proof("ray")
def test_a_killed_run_leaves_no_processes_of_ray(isolated: StandardWorkspace) -> None:
    with isolated.start(*own_run(isolated), NET_HOLD="piece", NET_AFTER="4") as cli:
        isolated.wait_until_stopped()
        assert processes_here("ray::")
        cli.process.kill()
        cli.process.wait()
        isolated.open_gate()
        wait_for_no_processes()


# --------------------------------------------------------------------------- a running cluster


def workspace_for_cluster(
    standard_job: StandardJob, folder: Path, url: str, **environment: str
) -> StandardWorkspace:
    """Return a workspace for remote workers, whose environment is set in the network file."""
    environment |= {
        "NET_TRACE": str(folder / "trace"),
        "NET_JOB": str(folder / "out.zarr.chunkq"),
        "NET_GATE": str(folder / "gate"),
    }
    code = f"import os\nos.environ.update({environment!r})\n"
    (folder / "network.py").write_text(code + NETWORK)
    model = {"class_file": str(folder / "network.py")}
    return standard_job.workspace(folder, RUNNING | {"model": model}, url=url)


def voxels(workspace: StandardWorkspace) -> dict[str, bytes]:
    """Return the stored files without the metadata, which contain the hash of the network file."""
    return {name: data for name, data in workspace.stored().items() if not name.endswith(".json")}


@contextmanager
def run_on_cluster(workspace: StandardWorkspace) -> Iterator[RunningCommand]:
    with workspace.start("run", "-e", "ray", str(workspace.job_file), CHUNKQ_QUEUE="") as cli:
        yield cli


def wait_for_no_remote_workers() -> None:
    wait_until(lambda: not processes_here("ray::ChunkqWorker"), "the remote workers end")


def test_run_on_a_running_cluster_has_byte_identical_output(
    standard_job: StandardJob, tmp_path: Path, ray: str, undisturbed: StandardWorkspace
) -> None:
    workspace = workspace_for_cluster(standard_job, tmp_path, ray)
    with run_on_cluster(workspace) as cli:
        result = cli.wait()
    assert result.code == 0, result.err
    assert voxels(workspace) == voxels(undisturbed)
    assert set(workspace.computed().values()) == {1}
    wait_for_no_remote_workers()


def test_remote_workers_continue_after_the_client_ends_and_after_a_crash(
    standard_job: StandardJob, tmp_path: Path, ray: str, undisturbed: StandardWorkspace
) -> None:
    workspace = workspace_for_cluster(standard_job, tmp_path, ray, NET_HOLD="piece", NET_AFTER="4")
    with workspace.start("produce", str(workspace.job_file), CHUNKQ_QUEUE="") as cli:
        result = cli.wait()
    assert result.code == 0, result.err
    assert "workers" in result.err
    pid = workspace.wait_until_stopped()
    committed = set(workspace.done())
    os.kill(pid, signal.SIGKILL)
    workspace.open_gate()
    wait_until(
        lambda: workspace.status()["done"] == CHUNKS, "the remote workers have computed all chunks"
    )
    workspace.finalize().ok()
    assert voxels(workspace) == voxels(undisturbed)
    assert_not_repeated(workspace, committed)
    wait_for_no_remote_workers()


@pytest.mark.proof("ray")
def test_a_run_reports_a_network_that_always_fails_and_ends_the_remote_workers(
    standard_job: StandardJob, tmp_path: Path, ray: str
) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    workspace = workspace_for_cluster(standard_job, tmp_path, ray, NET_BROKEN=str(broken))
    with run_on_cluster(workspace) as cli:
        result = cli.wait()
    assert result.code == 1, result.err
    assert "Traceback" not in result.err
    assert any("(ArithmeticError: broken for" in line for line in result.messages)
    wait_for_no_remote_workers()


@pytest.mark.proof("ray")
def test_ctrl_c_of_a_run_stops_its_remote_workers(
    standard_job: StandardJob, tmp_path: Path, ray: str, undisturbed: StandardWorkspace
) -> None:
    workspace = workspace_for_cluster(standard_job, tmp_path, ray, NET_HOLD="piece", NET_AFTER="4")
    with run_on_cluster(workspace) as cli:
        workspace.wait_until_stopped()
        cli.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        workspace.open_gate()
        result = cli.wait()
    assert result.code == 130, result.err
    wait_for_no_remote_workers()
    assert 4 <= len(workspace.done()) < CHUNKS
    with run_on_cluster(workspace) as cli:
        result = cli.wait()
    assert result.code == 0, result.err
    assert voxels(workspace) == voxels(undisturbed)
    assert set(workspace.computed().values()) == {1}


@pytest.mark.proof("ray")
def test_ctrl_c_ends_a_run_that_waits_for_free_cores(
    standard_job: StandardJob, tmp_path: Path, gpu_cluster: tuple[NetworkNamespace, str, Path]
) -> None:
    network, url, _ = gpu_cluster
    workspace = workspace_for_cluster(standard_job, tmp_path, url)
    blocker = "import ray, sys, time; ray.init(sys.argv[1]); " + (
        "f = ray.remote(num_cpus=8)(lambda: time.sleep(99)); f.remote(); print(flush=True); "
        "time.sleep(99)"
    )
    command = [sys.executable, "-c", blocker, url.partition("=")[2]]
    with (
        network.inside(),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as other,
    ):
        assert other.stdout is not None
        other.stdout.readline()
        with run_on_cluster(workspace) as cli:
            wait_until((workspace.job_folder / "job.json").exists, "the job is produced")
            time.sleep(3)
            cli.process.send_signal(signal.SIGINT)
            result = cli.wait()
        other.kill()
    assert result.code == 130, result.err
    assert not workspace.done()


# --------------------------------------------------------------------------- Ray Client


def crash_servers(crashes: Path, count: int) -> None:
    """Make the next `count` servers for clients crash at their start."""
    for number in range(1, count + 1):
        (crashes / str(number)).touch()


@pytest.mark.proof("ray")
def test_all_commands_support_ray_client(
    standard_job: StandardJob,
    tmp_path: Path,
    crashing_cluster: tuple[NetworkNamespace, Path],
    undisturbed: StandardWorkspace,
) -> None:
    workspace = standard_job.workspace(tmp_path, url=CLIENT)
    with crashing_cluster[0].inside():
        output = run_ok(workspace, "produce", str(workspace.job_file)).err
        output += run_ok(workspace, *ON_CPU).err
        status = run_ok(workspace, "status", str(workspace.output)).err
        output += run_ok(workspace, "finalize", str(workspace.output)).err
    assert f"{CHUNKS}/{CHUNKS} chunks done" in status
    assert "retrying" not in output + status
    assert workspace.stored() == undisturbed.stored()


@pytest.mark.proof("ray")
def test_a_crash_of_the_server_for_a_client_is_retried(
    standard_job: StandardJob, tmp_path: Path, crashing_cluster: tuple[NetworkNamespace, Path]
) -> None:
    network, crashes = crashing_cluster
    workspace = standard_job.workspace(tmp_path, url=CLIENT)
    crash_servers(crashes, 2)
    with (
        network.inside(),
        workspace.start(
            "produce", str(workspace.job_file), RAY_CLIENT_RECONNECT_GRACE_PERIOD="2"
        ) as cli,
    ):
        result = cli.wait(2 * TIMEOUT)
    assert result.code == 0, result.err
    assert result.err.count("retrying") == 2
    assert not list(crashes.iterdir())


@pytest.mark.proof("ray")
def test_repeated_crashes_of_the_server_for_a_client_are_an_error_of_one_line(
    standard_job: StandardJob, tmp_path: Path, crashing_cluster: tuple[NetworkNamespace, Path]
) -> None:
    network, crashes = crashing_cluster
    workspace = standard_job.workspace(tmp_path, url=CLIENT)
    crash_servers(crashes, 3)
    with (
        network.inside(),
        workspace.start(
            "produce", str(workspace.job_file), RAY_CLIENT_RECONNECT_GRACE_PERIOD="2"
        ) as cli,
    ):
        result = cli.wait(2 * TIMEOUT)
    assert result.code == 1, result.err
    assert "Traceback" not in result.err
    [line] = result.messages
    assert line.startswith(f"chunkq: queue: {CLIENT}: ")
    assert "3 times" in line
    assert "GRPC_ENABLE_FORK_SUPPORT=0" in line
    assert has_code(line, ErrorCode.QUEUE_UNAVAILABLE)
    assert not list(crashes.iterdir())
    assert not workspace.job_folder.exists()
