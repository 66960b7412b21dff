"""Ray: a real cluster, in a network of its own; what it does when something is amiss or dies."""

import json
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

from tests.harness.network_namespace import NetworkNamespace
from tests.harness.networks import NETWORK
from tests.harness.processes import CommandResult, RunningCommand, is_alive
from tests.harness.servers.ray import ray_cluster
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import TIMEOUT, wait_until

CHUNKS = 24
ON_CPU = ("work", "--gpus", "none", "--burst")
CLIENT = "ray://127.0.0.1:10001"
NOBODY = ("ray://auto?address=127.0.0.1:6399", "ray://127.0.0.1:10009")
RUNNING = {
    "cluster": "running",
    "hardware": "cpu_only",
    "ray_config": {"address": "127.0.0.1"},
}

NOT_INSTALLED = """
from importlib.machinery import PathFinder

found = PathFinder.find_spec


def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] == "ray" else found(name, path, target)


PathFinder.find_spec = staticmethod(find_spec)
"""
NO_CHUNKQ = """
import os
import sys


class Finder:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0].startswith("chunkq") and os.path.exists({marker!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


if "chunkq" not in sys.orig_argv:  # but the commands themselves, `-m chunkq`
    sys.meta_path.insert(0, Finder)
"""
OTHER_CHUNKQ = """
import importlib.metadata

true = importlib.metadata.version
importlib.metadata.version = lambda name: "0.0.1" if name == "chunkq" else true(name)
"""
OTHER_RAY = """
import ray

ray.__version__ = "2.40.0"
"""
MORTAL = """
import os
import signal
import sys


def hurry():  # else Ray's proxy listens to a dead server for up to a minute
    proxier = sys.modules["ray.util.client.server.proxier"]
    patience = (1, 1) if os.listdir({deaths!r}) else (30, 5)
    proxier.CHECK_CHANNEL_TIMEOUT_S, proxier.LOGSTREAM_RETRIES = patience


def die():
    for name in os.listdir({deaths!r}):
        os.unlink(os.path.join({deaths!r}, name))
        os.kill(os.getpid(), signal.SIGKILL)


if "--mode=proxy" in sys.orig_argv:
    os.register_at_fork(before=hurry, after_in_child=die)
"""
DEVICES = """

class Telling(Net):
    def forward(self, x):
        with open(os.environ["NET_DEVICES"], "a") as file:
            file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')!r}\\n")
        return super().forward(x)
"""


@pytest.fixture
def workspace(standard_job: StandardJob, tmp_path: Path, ray: str) -> StandardWorkspace:
    """The job in a folder of its own, on the cluster that the tests share."""
    return standard_job.workspace(tmp_path, url=ray)


@pytest.fixture
def alone(standard_job: StandardJob, tmp_path: Path) -> Iterator[StandardWorkspace]:
    """The job in a folder of its own, in an empty network."""
    network = NetworkNamespace()
    with network.inside():
        yield standard_job.workspace(tmp_path, url="ray://")
    network.close()


@pytest.fixture(scope="module")
def peculiar(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[NetworkNamespace, str, Path]]:
    """A cluster of two emulated GPUs, whose Python finds no chunkq while a file is there."""
    folder = tmp_path_factory.mktemp("peculiar")
    marker = folder / "marker"
    paths = hook(folder, NO_CHUNKQ.format(marker=str(marker)))
    network = NetworkNamespace()
    with mock.patch.dict(os.environ, paths), ray_cluster(network, gpus=2) as url:
        yield network, url, marker
    network.close()


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NetworkNamespace, Path]]:
    """A cluster whose servers for clients die at birth, as often as there are files in a folder."""
    folder = tmp_path_factory.mktemp("outside")
    deaths = folder / "deaths"
    deaths.mkdir()
    told = hook(folder, MORTAL.format(deaths=str(deaths))) | {"GRPC_ENABLE_FORK_SUPPORT": "0"}
    network = NetworkNamespace()
    with mock.patch.dict(os.environ, told), ray_cluster(network):
        yield network, deaths
    network.close()


def hook(folder: Path, code: str) -> dict[str, str]:
    """Have real processes start with some code; returns what to add to their environment."""
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder / "hook")}


def only_line(ended: CommandResult) -> str:
    """The one line that a refused command says, besides what Ray says of a missing Internet."""
    assert "Traceback" not in ended.err
    lines = [line for line in ended.err.splitlines() if "local IP via external" not in line]
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("chunkq: ")
    return lines[0]


def refused(
    workspace: StandardWorkspace, *arguments: str, code: int = 1, **environment: str
) -> str:
    with workspace.start(*arguments, **environment) as cli:
        ended = cli.wait(30)
    assert ended.code == code, ended.err
    return only_line(ended)


def done(workspace: StandardWorkspace, *arguments: str) -> CommandResult:
    """Run a command for real. One process is never at home in two networks, because of Ray."""
    with workspace.start(*arguments) as cli:
        ended = cli.wait()
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    return ended


def mates(title: str = "") -> list[psutil.Process]:
    """The living processes of this network, whose command line begins so; without this one."""
    here = os.stat("/proc/thread-self/ns/net").st_ino
    found = []
    for process in psutil.process_iter():
        try:
            inside = os.stat(f"/proc/{process.pid}/ns/net").st_ino == here
            line = " ".join(process.cmdline())
        except (OSError, psutil.Error):
            continue
        ours = inside and process.pid != os.getpid() and line.startswith(title)
        if ours and is_alive(process.pid):
            found.append(process)
    return found


def kill_the_keeper() -> None:
    """Kill the actor that keeps the queue."""
    [keeper] = mates("ray::QueueHost")
    keeper.kill()
    keeper.wait(10)


def left_to_do(workspace: StandardWorkspace) -> int:
    return CHUNKS - len(workspace.done())


def not_computed_again(workspace: StandardWorkspace, committed: set[str]) -> None:
    ours = workspace.patches()
    again = {patch for patch, times in workspace.computed().items() if times > 1}
    assert not any(again & ours[name] for name in committed)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("url", NOBODY)
def test_a_cluster_that_is_away_is_one_line_within_seconds(
    alone: StandardWorkspace, url: str
) -> None:
    begun = time.monotonic()
    for command in (("produce", str(alone.job_file)), ("work",)):
        line = refused(alone, *command, "--queue", url)
        assert line.startswith(f"chunkq: queue: no Ray cluster answers at {url} (")
    assert time.monotonic() - begun < 20


def test_status_tells_what_the_ledger_knows_while_the_cluster_is_away(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    standard_job.workspace(tmp_path).produce()
    status = standard_job.workspace(tmp_path, url=NOBODY[0]).status()
    assert (status["chunks"], status["done"]) == (CHUNKS, 0)
    assert "no Ray cluster answers" in json.dumps(status)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ray://host", "ray://host is no address of a Ray cluster; write ray://auto"),
        ("ray://host:port", "ray://host:port is no address of a Ray cluster"),
        ("ray://auto?adress=h:1", "is no address of a Ray cluster"),
        ("ray://", "ray:// alone is a cluster that `chunkq run` makes for itself"),
    ],
)
def test_an_address_that_is_none_is_one_line(
    standard_job: StandardJob, tmp_path: Path, url: str, says: str
) -> None:
    workspace = standard_job.workspace(tmp_path, url=url)
    for command in (("produce", str(workspace.job_file)), ("work",)):
        ended = workspace.call(*command)
        assert (ended.code, len(ended.err.splitlines())) == (2, 1)
        assert says in ended.err


def test_a_running_cluster_without_an_address_is_asked_for(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    workspace = standard_job.workspace(tmp_path, {"cluster": "running"}, url="ray://")
    ended = workspace.call("run", "-e", "ray", str(workspace.job_file))
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "Give ray_config.address or --queue ray://…" in ended.err


@pytest.mark.parametrize("command", [("produce",), ("run", "-e", "ray")], ids=["produce", "run"])
def test_without_the_package_the_extra_is_named(
    standard_job: StandardJob, tmp_path: Path, command: tuple[str, ...]
) -> None:
    url = "ray://auto" if command == ("produce",) else "ray://"
    workspace = standard_job.workspace(tmp_path, url=url)
    line = refused(workspace, *command, str(workspace.job_file), **hook(tmp_path, NOT_INSTALLED))
    assert line.endswith("ray:// needs a package that is not installed; pip install 'chunkq[ray]'")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (OTHER_CHUNKQ, "and here is chunkq 0.0.1; install one version everywhere"),
        (OTHER_RAY, "runs other versions than this process"),
    ],
    ids=["chunkq", "ray"],
)
def test_another_version_is_one_line(workspace: StandardWorkspace, code: str, says: str) -> None:
    workspace.produce()
    environment = hook(workspace.folder, code)
    assert says in refused(workspace, "produce", str(workspace.job_file), **environment)
    assert says in refused(workspace, "work", **environment)


@pytest.mark.proof("ray")
def test_machines_without_chunkq_are_one_line(
    standard_job: StandardJob, tmp_path: Path, peculiar: tuple[NetworkNamespace, str, Path]
) -> None:
    network, url, marker = peculiar
    workspace = standard_job.workspace(tmp_path, url=url)
    with network.inside():
        marker.touch()
        says = f"chunkq: queue: the Ray cluster at {url} has no chunkq, which keeps the queue there"
        assert refused(workspace, "produce", str(workspace.job_file)).startswith(says)
        marker.unlink()
        done(workspace, "produce", str(workspace.job_file))
        marker.touch()
        line = refused(workspace, *ON_CPU, "--quiet")
        assert line.startswith("chunkq: queue: a machine of the Ray cluster has no chunkq; pip")
        marker.unlink()
        assert f"{CHUNKS} queued" in done(workspace, "status", str(workspace.output)).err


# --------------------------------------------------------------------------- the queue is lost


def test_a_killed_keeper_costs_nothing_that_is_committed(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    with workspace.start(*ON_CPU, NET_HOLD="piece", NET_AFTER="4") as cli:
        workspace.wait_until_stopped()
        kill_the_keeper()
        workspace.open_gate()
        ended = cli.wait()
    assert "Traceback" not in ended.err
    committed, left = set(workspace.done()), left_to_do(workspace)
    assert 0 < left < CHUNKS
    again = workspace.produce("--resume")
    assert f"{left} newly queued" in again.out
    assert workspace.counts().queued == left
    assert workspace.work().code == 0
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    not_computed_again(workspace, committed)


# --------------------------------------------------------------------------- devices


def granted(devices: Path) -> dict[str, str]:
    """What each process saw of the devices when it ran the network, by process id."""
    lines = devices.read_text().splitlines() if devices.exists() else []
    return dict(line.split(maxsplit=1) for line in lines)


def test_each_worker_is_an_actor_with_the_device_that_ray_granted_it(
    standard_job: StandardJob, tmp_path: Path, peculiar: tuple[NetworkNamespace, str, Path]
) -> None:
    network, url, _ = peculiar
    (tmp_path / "told.py").write_text(NETWORK + DEVICES)
    model = {"class_file": str(tmp_path / "told.py"), "class_name": "Telling", "device": "cpu"}
    workspace = standard_job.workspace(tmp_path, {"model": model}, url=url)
    devices = tmp_path / "devices"
    told = {
        "CUDA_VISIBLE_DEVICES": "0,1,2",
        "NET_DEVICES": str(devices),
        "NET_HOLD": "piece",
        "NET_AFTER": "4",
    }
    with network.inside():
        done(workspace, "produce", str(workspace.job_file))
        with workspace.start("work", "--burst", "--gpus", "0,1,2", **told) as cli:
            workspace.wait_until_stopped()
            assert len(mates("ray::WorkerActor")) == 2
            wait_until(lambda: "has not granted" in cli.output(), "it says that one waits")
            wait_until(lambda: len(granted(devices)) == 2, "both have computed")
            workspace.open_gate()
            ended = cli.wait()
        assert ended.code == 0, ended.err
        assert ended.err.count("has not granted this worker its device") == 1
        done(workspace, "finalize", str(workspace.output))
    assert set(granted(devices).values()) == {"'0'", "'1'"}


@pytest.mark.proof("ray")
def test_an_actor_without_a_gpu_sees_none(
    standard_job: StandardJob, tmp_path: Path, peculiar: tuple[NetworkNamespace, str, Path]
) -> None:
    network, url, _ = peculiar
    (tmp_path / "told.py").write_text(NETWORK + DEVICES)
    model = {"class_file": str(tmp_path / "told.py"), "class_name": "Telling"}
    workspace = standard_job.workspace(tmp_path, {"model": model}, url=url)
    devices = tmp_path / "devices"
    with network.inside():
        done(workspace, "produce", str(workspace.job_file))
        ended = workspace.work(NET_DEVICES=str(devices), CUDA_VISIBLE_DEVICES="0,1")
    assert ended.code == 0, ended.err
    assert set(granted(devices).values()) == {"''"}


@pytest.mark.proof("ray")
def test_a_worker_that_waits_for_its_device_can_be_stopped(
    standard_job: StandardJob, tmp_path: Path, peculiar: tuple[NetworkNamespace, str, Path]
) -> None:
    network, url, _ = peculiar
    workspace = standard_job.workspace(tmp_path, url=url)
    with network.inside():
        done(workspace, "produce", str(workspace.job_file))
        three = {"CUDA_VISIBLE_DEVICES": "0,1,2"}
        with workspace.start("work", "--gpus", "0,1,2", "--max-time", "1h", **three) as cli:
            wait_until(lambda: len(workspace.done()) == CHUNKS, "all is done")
            cli.process.send_signal(signal.SIGINT)
            ended = cli.wait()
        assert ended.code == 0, ended.err
        cli.wait_for_children()
        wait_until(lambda: not mates("ray::WorkerActor"), "its actors are gone")


# --------------------------------------------------------------------------- run, by itself


def own_run(workspace: StandardWorkspace) -> tuple[str, ...]:
    return ("run", "-e", "ray", "--gpus", "none", "-w", "2", str(workspace.job_file))


def nothing_is_left() -> None:
    wait_until(lambda: not mates(), "every process of it is gone")


def test_run_has_a_cluster_of_its_own_that_ends_with_it(
    alone: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    with alone.start(*own_run(alone), NET_HOLD="piece", NET_AFTER="4") as cli:
        alone.wait_until_stopped()
        [worker] = [
            p for p in mates(sys.executable) if "chunkq_worker.worker_process" in p.cmdline()
        ][:1]
        stranger = worker.environ()["CHUNKQ_QUEUE"]
        with alone.start("work", "--queue", stranger) as other:
            turned_away = other.wait()
        assert turned_away.code == 1
        assert "Traceback" not in turned_away.err
        # Before it, Ray's core says once a second that a token is missing.
        [line] = turned_away.messages
        assert line.endswith("and the token if it asks for one")
        alone.open_gate()
        ended = cli.wait()
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert alone.stored() == undisturbed.stored()
    nothing_is_left()


@pytest.mark.proof("ray")
def test_ctrl_c_of_run_and_the_same_again_continues(
    alone: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    with alone.start(*own_run(alone), NET_HOLD="piece", NET_AFTER="4") as cli:
        alone.wait_until_stopped()
        cli.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        alone.open_gate()
        ended = cli.wait()
    assert ended.code == 130, ended.err
    assert ended.messages[-1].endswith("[interrupted]")
    nothing_is_left()
    committed = set(alone.done())
    assert 4 <= len(committed) < CHUNKS
    with alone.start(*own_run(alone)) as cli:
        ended = cli.wait()
    assert ended.code == 0, ended.err
    assert alone.stored() == undisturbed.stored()
    not_computed_again(alone, committed)


@pytest.mark.proof("ray")
def test_a_run_killed_with_9_leaves_no_process_of_rays(alone: StandardWorkspace) -> None:
    with alone.start(*own_run(alone), NET_HOLD="piece", NET_AFTER="4") as cli:
        alone.wait_until_stopped()
        assert mates("ray::")
        cli.process.kill()
        cli.process.wait()
        alone.open_gate()
        nothing_is_left()


# --------------------------------------------------------------------------- a running cluster


def hired_place(
    standard_job: StandardJob, folder: Path, url: str, **told: str
) -> StandardWorkspace:
    """The job for a running cluster's own workers, which are told through the network's file."""
    told |= {
        "NET_TRACE": str(folder / "trace"),
        "NET_JOB": str(folder / "out.zarr.chunkq"),
        "NET_GATE": str(folder / "gate"),
    }
    (folder / "told.py").write_text(f"import os\nos.environ.update({told!r})\n" + NETWORK)
    model = {"class_file": str(folder / "told.py")}
    return standard_job.workspace(folder, RUNNING | {"model": model}, url=url)


def voxels(workspace: StandardWorkspace) -> dict[str, bytes]:
    """What is stored, save the metadata: they name the network's file by its hash."""
    return {name: data for name, data in workspace.stored().items() if not name.endswith(".json")}


@contextmanager
def run_there(workspace: StandardWorkspace) -> Iterator[RunningCommand]:
    with workspace.start("run", "-e", "ray", str(workspace.job_file), CHUNKQ_QUEUE="") as cli:
        yield cli


def no_hired_actor_remains() -> None:
    wait_until(lambda: not mates("ray::WorkerActor"), "the hired actors are gone")


def test_run_on_a_running_cluster_gives_the_same_bytes(
    standard_job: StandardJob, tmp_path: Path, ray: str, undisturbed: StandardWorkspace
) -> None:
    workspace = hired_place(standard_job, tmp_path, ray)
    with run_there(workspace) as cli:
        ended = cli.wait()
    assert ended.code == 0, ended.err
    assert voxels(workspace) == voxels(undisturbed)
    assert set(workspace.computed().values()) == {1}
    no_hired_actor_remains()


def test_hired_actors_outlive_the_client_and_their_own_death(
    standard_job: StandardJob, tmp_path: Path, ray: str, undisturbed: StandardWorkspace
) -> None:
    workspace = hired_place(standard_job, tmp_path, ray, NET_HOLD="piece", NET_AFTER="4")
    with workspace.start("produce", str(workspace.job_file), CHUNKQ_QUEUE="") as cli:
        ended = cli.wait()
    assert ended.code == 0, ended.err
    assert "workers are running in the cluster" in ended.err
    held = workspace.wait_until_stopped()
    committed = set(workspace.done())
    os.kill(held, signal.SIGKILL)
    workspace.open_gate()
    wait_until(lambda: workspace.status()["done"] == CHUNKS, "Ray's own actors have done it")
    workspace.finalize().ok()
    assert voxels(workspace) == voxels(undisturbed)
    not_computed_again(workspace, committed)
    no_hired_actor_remains()


@pytest.mark.proof("ray")
def test_a_network_that_always_fails_is_told_and_nobody_remains(
    standard_job: StandardJob, tmp_path: Path, ray: str
) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    workspace = hired_place(standard_job, tmp_path, ray, NET_BROKEN=str(broken))
    with run_there(workspace) as cli:
        ended = cli.wait()
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.err
    assert any("failed alike (ArithmeticError: broken for" in line for line in ended.messages)
    no_hired_actor_remains()


@pytest.mark.proof("ray")
def test_ctrl_c_of_a_run_there_has_the_hired_leave(
    standard_job: StandardJob, tmp_path: Path, ray: str, undisturbed: StandardWorkspace
) -> None:
    workspace = hired_place(standard_job, tmp_path, ray, NET_HOLD="piece", NET_AFTER="4")
    with run_there(workspace) as cli:
        workspace.wait_until_stopped()
        cli.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        workspace.open_gate()
        ended = cli.wait()
    assert ended.code == 130, ended.err
    no_hired_actor_remains()
    assert 4 <= len(workspace.done()) < CHUNKS
    with run_there(workspace) as cli:
        ended = cli.wait()
    assert ended.code == 0, ended.err
    assert voxels(workspace) == voxels(undisturbed)
    assert set(workspace.computed().values()) == {1}


@pytest.mark.proof("ray")
def test_ctrl_c_ends_a_run_for_which_the_cluster_has_no_room(
    standard_job: StandardJob, tmp_path: Path, peculiar: tuple[NetworkNamespace, str, Path]
) -> None:
    network, url, _ = peculiar
    workspace = hired_place(standard_job, tmp_path, url)
    hog = "import ray, sys, time; ray.init(sys.argv[1]); " + (
        "f = ray.remote(num_cpus=8)(lambda: time.sleep(99)); f.remote(); print(flush=True); "
        "time.sleep(99)"
    )
    command = [sys.executable, "-c", hog, url.partition("=")[2]]
    with (
        network.inside(),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as other,
    ):
        assert other.stdout is not None
        other.stdout.readline()
        with run_there(workspace) as cli:
            wait_until((workspace.job_folder / "job.json").exists, "it is produced")
            time.sleep(3)
            cli.process.send_signal(signal.SIGINT)
            ended = cli.wait()
        other.kill()
    assert ended.code == 130, ended.err
    assert not workspace.done()


# --------------------------------------------------------------------------- Ray Client


def let_die(deaths: Path, count: int) -> None:
    """Have so many of the servers that are born next die at once."""
    for number in range(1, count + 1):
        (deaths / str(number)).touch()


@pytest.mark.proof("ray")
def test_all_commands_work_from_outside_the_cluster(
    standard_job: StandardJob,
    tmp_path: Path,
    outside: tuple[NetworkNamespace, Path],
    undisturbed: StandardWorkspace,
) -> None:
    workspace = standard_job.workspace(tmp_path, url=CLIENT)
    with outside[0].inside():
        said = done(workspace, "produce", str(workspace.job_file)).err
        said += done(workspace, *ON_CPU).err
        told = done(workspace, "status", str(workspace.output)).err
        said += done(workspace, "finalize", str(workspace.output)).err
    assert f"{CHUNKS}/{CHUNKS} chunks done" in told
    assert "trying again" not in said + told
    assert workspace.stored() == undisturbed.stored()


@pytest.mark.proof("ray")
def test_a_server_for_a_client_that_dies_at_birth_is_asked_for_again(
    standard_job: StandardJob, tmp_path: Path, outside: tuple[NetworkNamespace, Path]
) -> None:
    network, deaths = outside
    workspace = standard_job.workspace(tmp_path, url=CLIENT)
    let_die(deaths, 2)
    with (
        network.inside(),
        workspace.start(
            "produce", str(workspace.job_file), RAY_CLIENT_RECONNECT_GRACE_PERIOD="2"
        ) as cli,
    ):
        ended = cli.wait(2 * TIMEOUT)
    assert ended.code == 0, ended.err
    assert ended.err.count("could not start its server for this process; trying again") == 2
    assert not list(deaths.iterdir())


@pytest.mark.proof("ray")
def test_a_cluster_that_cannot_serve_a_client_is_one_line(
    standard_job: StandardJob, tmp_path: Path, outside: tuple[NetworkNamespace, Path]
) -> None:
    network, deaths = outside
    workspace = standard_job.workspace(tmp_path, url=CLIENT)
    let_die(deaths, 3)
    with (
        network.inside(),
        workspace.start(
            "produce", str(workspace.job_file), RAY_CLIENT_RECONNECT_GRACE_PERIOD="2"
        ) as cli,
    ):
        ended = cli.wait(2 * TIMEOUT)
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.err
    [line] = ended.messages
    says = f"chunkq: queue: the Ray cluster at {CLIENT} failed 3 times to start its server for this"
    assert line.startswith(says)
    assert "start its head with GRPC_ENABLE_FORK_SUPPORT=0 in the environment" in line
    assert not list(deaths.iterdir())
    assert not workspace.job_folder.exists()
