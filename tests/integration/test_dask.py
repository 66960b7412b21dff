"""Dask as a queue: real schedulers and workers, away, wrong, restarted and killed."""

import json
import os
import re
import signal
import socket
import ssl
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from chunkq.errors import ErrorCode
from chunkq.executors.dask_tls import create_certificate
from tests.harness.processes import CommandResult, RunningCommand
from tests.harness.servers.dask import HOST, DaskCluster
from tests.harness.servers.redis import free_port
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until

CHUNKS = 24
ON_CPU = ("--gpus", "none")

WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Missing())
"""
OTHER_VERSION = """
import importlib.metadata

real = importlib.metadata.version
importlib.metadata.version = lambda name: "1.2.3" if name == "{name}" else real(name)
"""
OTHER_PYTHON = """
import distributed.versions

real = distributed.versions.get_package_info
distributed.versions.get_package_info = lambda names: real(names) | {"python": "3.99.0.final.0"}
"""
IMPATIENT = """
import chunkq.executors.dask

chunkq.executors.dask.CONNECT_SECONDS = 1.0
"""


TLS_ALERT = b"\x15"
"""The first byte with which a TLS server refuses what is no handshake."""


def hooked(folder: Path, code: str) -> str:
    """Write a start-up hook for Python processes; returns their PYTHONPATH."""
    hooks = folder / f"hooks-{len(list(folder.glob('hooks-*')))}"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(code)
    return os.pathsep.join(filter(None, [str(hooks), os.environ.get("PYTHONPATH")]))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[DaskCluster]:
    folder = tmp_path / "dask"
    folder.mkdir()
    cluster = DaskCluster(folder)
    yield cluster
    cluster.kill()


@contextmanager
def running_cluster(
    cluster: DaskCluster, workspace: StandardWorkspace, **environment: str
) -> Iterator[list[RunningCommand]]:
    """A scheduler with two workers, one of them with two threads."""
    cluster.scheduler()
    yield [cluster.worker(workspace, 1, **environment), cluster.worker(workspace, 2, **environment)]


def only_line(ended: CommandResult) -> str:
    """The one line that a command says, and nothing besides."""
    [line] = ended.err.splitlines()
    assert line.startswith("chunkq: ")
    return line.removeprefix("chunkq: ")


def said_by(
    workspace: StandardWorkspace, *commands: Sequence[str], **environment: str
) -> list[CommandResult]:
    """Run commands for real, side by side."""
    with ExitStack() as stack:
        clis = [stack.enter_context(workspace.start(*each, **environment)) for each in commands]
        return [cli.wait() for cli in clis]


def of_its_own(workspace: StandardWorkspace) -> dict[str, str]:
    """The environment in which `run` makes a cluster for itself."""
    return {"CHUNKQ_QUEUE": "dask://"}


# Refusals: one line each.


def test_a_scheduler_that_is_away_is_said_in_one_line(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    url = f"dask://{HOST}:{free_port()}"
    workspace = standard_job.workspace(tmp_path, url=url)
    produce, run, work = said_by(
        workspace,
        ("produce", "job.yaml"),
        ("run", str(workspace.job_file)),
        ("work", *ON_CPU, "--burst"),
        PYTHONPATH=hooked(tmp_path, IMPATIENT),
    )
    for ended in (produce, run, work):
        assert ended.code == 1
        assert re.fullmatch(
            rf"queue: no Dask scheduler answers at {url} \(.+\); start one with `dask scheduler`, "
            r"or check host and port",
            only_line(ended),
        )
    assert not workspace.job_folder.exists()
    standard_job.workspace(tmp_path).produce()
    status, blocks, seal = said_by(
        workspace,
        ("status", str(workspace.output), "--json"),
        ("finalize", str(workspace.output), "--distribute"),
        ("finalize", str(workspace.output)),
        PYTHONPATH=hooked(tmp_path, IMPATIENT),
    )
    assert status.code == 0
    assert f"no Dask scheduler answers at {url}" in json.loads(status.err)["queue_problem"]
    assert (blocks.code, seal.code) == (1, 3)
    assert "no Dask scheduler answers" in only_line(blocks)
    assert "no Dask scheduler" not in seal.err


@pytest.mark.parametrize(
    ("url", "line"),
    [
        (
            "dask://",
            r"dask:// alone is a cluster that `chunkq run` makes .* write dask://HOST:8786",
        ),
        ("dask://host:port", "dask://host:port is no address of a Dask scheduler; write .*"),
        ("dask://host:8786/0", "dask://host:8786/0 is no address of a Dask scheduler; write .*"),
        ("dask://host?a=b", r"dask://host\?a=b is no address of a Dask scheduler; write .*"),
        ("dask://host?protocol=ws", ".* with .protocol= one of tcp, tls, ucx"),
        ("dask://u:geheim@host", r"dask://\*\*\*@host is no address of a Dask scheduler; .*"),
    ],
)
def test_a_wrong_address_is_refused_in_one_line(
    standard_job: StandardJob, tmp_path: Path, url: str, line: str
) -> None:
    workspace = standard_job.workspace(tmp_path)
    for command in (("produce", str(workspace.job_file)), ("work",)):
        ended = workspace.call(*command, "--queue", url)
        assert ended.code == 2
        assert re.fullmatch(f"queue: {line}", only_line(ended))
    assert not workspace.job_folder.exists()


def test_a_protocol_that_is_not_there_is_said_in_one_line(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    workspace = standard_job.workspace(tmp_path, {"dask_config": {"protocol": "ucx"}})
    job = str(workspace.job_file)
    for command in (
        ("work", "--queue", "dask://host?protocol=ucx"),
        ("run", job, "--queue", "dask://"),
    ):
        ended = workspace.call(*command)
        assert ended.code == 1
        assert only_line(ended).startswith("queue: Dask cannot speak ucx here; pip install ")


def test_a_running_cluster_needs_an_address(standard_job: StandardJob, tmp_path: Path) -> None:
    workspace = standard_job.workspace(tmp_path, {"cluster": "running"}, url="dask://")
    ended = workspace.call("run", str(workspace.job_file), "-e", "dask")
    assert ended.code == 2
    message = only_line(ended)
    assert message.startswith("cluster: running ")
    assert "dask_config.address" in message
    assert "--queue dask://" in message


def test_a_running_cluster_without_workers_is_said_in_one_line(
    standard_job: StandardJob, tmp_path: Path, dask: str
) -> None:
    keys = {"cluster": "running", "dask_config": {"address": dask.removeprefix("dask://")}}
    for command, url in (("run", "dask://"), ("produce", dask)):
        workspace = standard_job.workspace(tmp_path, keys, url=url)
        ended = workspace.call(command, str(workspace.job_file))
        assert ended.code == 1
        [line] = ended.messages
        assert line == (
            f"chunkq: queue: the Dask cluster at {dask} has no free workers; start some with "
            "`dask worker`, or use `chunkq work`"
        )


@pytest.mark.parametrize(
    ("hook", "line"),
    [
        (WITHOUT.format(names={"chunkq"}), "the Dask scheduler at {url} has no chunkq, which .*"),
        (
            OTHER_VERSION.format(name="chunkq"),
            r"{url} is kept by chunkq 1\.2\.3, and here is chunkq .+; install one version .*",
        ),
        (
            OTHER_VERSION.format(name="distributed"),
            r"the Dask scheduler at {url} runs distributed 1\.2\.3, and here is .+; install .*",
        ),
        (OTHER_PYTHON, r"the Dask scheduler at {url} runs python 3\.99\.0.*, and here is 3.*"),
    ],
    ids=["no chunkq", "another chunkq", "another distributed", "another Python"],
)
def test_a_scheduler_of_another_environment_is_refused(
    standard_job: StandardJob, tmp_path: Path, cluster: DaskCluster, hook: str, line: str
) -> None:
    cluster.scheduler(PYTHONPATH=hooked(tmp_path, hook))
    workspace = standard_job.workspace(tmp_path, url=cluster.url)
    produce, work = said_by(
        workspace, ("produce", str(workspace.job_file)), ("work", *ON_CPU, "--burst")
    )
    for ended in (produce, work):
        assert ended.code == 1
        assert re.fullmatch(f"queue: {line.format(url=cluster.url)}", only_line(ended))
    assert not workspace.job_folder.exists()


def test_the_missing_extra_is_named(standard_job: StandardJob, tmp_path: Path) -> None:
    workspace = standard_job.workspace(tmp_path, url="dask://")
    job = str(workspace.job_file)
    for ended in said_by(
        workspace,
        ("produce", job, "--queue", f"dask://{HOST}"),
        ("work", "--queue", f"dask://{HOST}"),
        ("run", job, "-e", "dask"),
        PYTHONPATH=hooked(tmp_path, WITHOUT.format(names={"distributed", "dask"})),
    ):
        assert ended.code == 1
        assert only_line(ended) == (
            "queue: dask:// needs a package that is not installed; pip install 'chunkq[dask]'"
        )


# A scheduler that stays, with `chunkq work`.


def test_a_scheduler_started_again_in_the_middle_loses_no_work(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = standard_job.workspace(tmp_path, url=cluster.url)
    first = cluster.scheduler()
    workspace.produce()
    hook = hooked(tmp_path, IMPATIENT)
    with workspace.start("work", *ON_CPU, NET_SLEEP="0.1", PYTHONPATH=hook) as cli:
        wait_until(lambda: len(workspace.done()) >= 4, "some chunks are done")
        first.kill()
        time.sleep(2)  # Dask's client has given up by then
        committed = set(workspace.done())
        cluster.scheduler()
        resumed = workspace.produce("--resume")
        queued = int(re.search(r"(\d+) newly queued", resumed.out)[1])  # type: ignore[index]
        assert queued == CHUNKS - len(workspace.done())
        wait_until(lambda: len(workspace.done()) == CHUNKS, "all chunks are done")
        cli.children()
        cli.process.send_signal(signal.SIGINT)
        ended = cli.wait()
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert not [line for line in ended.err.splitlines() if "distributed" in line]
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    again = {patch for patch, times in workspace.computed().items() if times > 1}
    ours = workspace.patches()
    assert not any(again & ours[name] for name in committed)
    cli.wait_for_children()


@pytest.mark.proof("dask")
def test_a_burst_that_meets_a_new_empty_queue_says_what_is_lost_and_resuming_completes_it(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = standard_job.workspace(tmp_path, url=cluster.url)
    first = cluster.scheduler()
    workspace.produce()
    hook = hooked(tmp_path, IMPATIENT)
    burst = ("work", *ON_CPU, "--burst")
    with workspace.start(*burst, NET_SLEEP="0.1", PYTHONPATH=hook) as cli:
        wait_until(lambda: len(workspace.done()) >= 4, "some chunks are done")
        first.kill()
        time.sleep(2)  # Dask's client has given up by then
        cluster.scheduler()
        ended = cli.wait()
    assert ended.code == 3, ended.err
    assert ended.err.splitlines()[-1].endswith(f" [{ErrorCode.QUEUE_LOST}]")
    assert f"chunks of {workspace.output}; " in ended.err.splitlines()[-1]
    assert len(workspace.done()) < CHUNKS
    workspace.produce("--resume")
    assert workspace.work().code == 0
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()


# A cluster that `run` makes for itself.


def test_a_run_makes_a_cluster_on_loopback_and_leaves_nothing_behind(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace
) -> None:
    workspace = standard_job.workspace(tmp_path, url="dask://")
    run = ("run", str(workspace.job_file), "-e", "dask", "-w", "2")
    with workspace.start(*run, NET_HOLD="piece", NET_AFTER="4") as cli:
        workspace.wait_until_stopped()
        assert listening(cli) == {HOST}
        workspace.open_gate()
        ended = cli.wait()
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    cli.wait_for_children()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


def listening(cli: RunningCommand) -> set[str]:
    """The addresses on which a command's processes take connections."""
    processes = [psutil.Process(pid) for pid in [cli.process.pid, *cli.children()]]
    return {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def test_after_ctrl_c_the_same_run_again_continues(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace
) -> None:
    workspace = standard_job.workspace(tmp_path, url="dask://")
    run = ("run", str(workspace.job_file), "-e", "dask")
    with workspace.start(*run, NET_HOLD="piece", NET_AFTER="4") as cli:
        workspace.wait_until_stopped()
        cli.children()
        cli.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping" in cli.output(), "it has heard")
        workspace.open_gate()
        ended = cli.wait()
    assert ended.code == 130, ended.err
    assert ended.messages[-1].endswith("[interrupted]")
    cli.wait_for_children()
    assert 4 <= len(workspace.done()) < CHUNKS
    with workspace.start(*run) as cli:
        ended = cli.wait()
    assert ended.code == 0, ended.err
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


def test_a_run_serves_nobody_without_its_key_and_is_gone_without_a_trace_when_killed(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    temporary, state = tmp_path / "tmp", tmp_path / "state"
    temporary.mkdir()
    (tmp_path / "job").mkdir()
    workspace = standard_job.workspace(tmp_path / "job", url="dask://")
    environment = {"TMPDIR": str(temporary), "XDG_STATE_HOME": str(state)}
    held = {"NET_HOLD": "piece", "NET_AFTER": "2"}
    run = ("run", str(workspace.job_file), "-e", "dask")
    with workspace.start(*run, **environment, **held) as cli:
        workspace.wait_until_stopped()
        assert len(cli.children()) >= 3  # scheduler, supervisor, worker
        (published,) = (state / "chunkq" / "credentials").iterdir()
        (key,) = temporary.glob("chunkq-dask-*/cluster.pem")
        for secret in (published, key):
            assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        key_lines = key.read_text().splitlines()
        said = " ".join(part for pid in cli.known for part in psutil.Process(pid).cmdline())
        assert not any(line in said for line in key_lines)
        another = create_certificate(tmp_path)
        found = ports(cli)
        assert len(found) >= 2  # the scheduler's and the worker's
        for port in found:
            assert serves(port, key)
            assert not serves(port, None)
            assert not serves(port, another)
        # Other commands of this user find the key by the address.
        port = published.name.rpartition("_")[2]
        url = f"dask://{HOST}:{port}"
        seen = workspace.run(
            "status", str(workspace.output), "--json", "--queue", url, **environment
        )
        assert json.loads(seen.out)["running"] >= 1
        cli.process.kill()
        cli.wait()
        cli.wait_for_children()
    assert list((state / "chunkq" / "credentials").iterdir()) == []
    assert list(temporary.iterdir()) == []


def ports(cli: RunningCommand) -> set[int]:
    """The ports on which a command's processes speak Dask's protocol, not HTTP."""
    processes = [psutil.Process(pid) for pid in cli.children()]
    listening = {
        connection.laddr.port
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    return {port for port in listening if not answers_http(port)}


def serves(port: int, certificate: Path | None) -> bool:
    """Whether a port greets who connects, with TLS if there is a certificate to show."""
    try:
        with ExitStack() as stack:
            line = stack.enter_context(socket.create_connection((HOST, port), 10))
            if certificate is None:
                line.sendall(bytes(64))
            else:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                context.load_cert_chain(certificate)
                line = stack.enter_context(context.wrap_socket(line))
            return line.recv(1) not in (b"", TLS_ALERT)
    except (ConnectionError, ssl.SSLError):
        return False


def answers_http(port: int) -> bool:
    """Whether a port answers HTTP; then it must have no page."""
    answer = b""
    with socket.create_connection((HOST, port), 10) as line, suppress(ConnectionResetError):
        line.sendall(b"GET /info/main/workers.html HTTP/1.0\r\n\r\n")
        answer = line.makefile("rb").readline()
    if answer.startswith(b"HTTP/"):
        assert answer.split()[1] == b"404", answer
        return True
    return False


@pytest.mark.proof("dask")
def test_the_job_says_how_many_processes_and_chunks_in_flight_and_which_port(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    port = free_port()
    config = {"n_workers": 2, "threads_per_worker": 3, "scheduler_port": port, "protocol": "tcp"}
    workspace = standard_job.workspace(tmp_path, {"dask_config": config}, url="dask://")
    seen = standard_job.workspace(tmp_path, url=f"dask://{HOST}:{port}")
    run = ("run", str(workspace.job_file), "-e", "dask")
    with workspace.start(*run, NET_SLEEP="1") as cli:
        wait_until(lambda: len(workspace.done()) >= 1, "it has begun")
        seen.wait_for_chunks_in_flight(3)
        wait_until(lambda: len({item.worker for item in seen.running()}) == 2, "both work")
        cli.children()
    cli.wait_for_children()


def test_a_port_that_is_taken_is_said_in_one_line(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        config = {"scheduler_port": other.getsockname()[1]}
        workspace = standard_job.workspace(tmp_path, {"dask_config": config}, url="dask://")
        ended = workspace.call("run", str(workspace.job_file))
    assert ended.code == 1
    assert re.fullmatch(
        "queue: no Dask scheduler could be started here: .*[Aa]ddress already in use.*",
        only_line(ended),
    )


# A cluster that runs, and works with its own workers.


def of_cluster(cluster: DaskCluster, standard_job: StandardJob, folder: Path) -> StandardWorkspace:
    """A job for the workers of a running cluster, which its file names."""
    config = {"address": f"tcp://{HOST}:{cluster.port}"}
    workspace = standard_job.workspace(
        folder, {"cluster": "running", "dask_config": config}, url=cluster.url
    )
    assert workspace.job_file.exists()
    return workspace


def test_a_running_cluster_does_the_job_with_its_own_workers(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = of_cluster(cluster, standard_job, tmp_path)
    with running_cluster(cluster, workspace, NET_SLEEP="0.1") as workers:
        cluster.has_workers(2)
        with workspace.start("run", "job.yaml", "-e", "dask", CHUNKQ_QUEUE="dask://") as cli:
            wait_until(lambda: len(workspace.running()) == 3, "each thread has a chunk")
            ended = cli.wait()
        assert ended.code == 0, ended.err
        assert "Traceback" not in ended.err
        assert all(worker.process.poll() is None for worker in workers)
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}
    lines = (workspace.folder / "trace").read_text().splitlines()
    assert len({line.split()[0] for line in lines}) == 2


@pytest.mark.proof("dask")
def test_a_cluster_goes_on_when_the_producer_has_gone(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = of_cluster(cluster, standard_job, tmp_path)
    with running_cluster(cluster, workspace, NET_HOLD="piece", NET_AFTER="2"):
        cluster.has_workers(2)
        [produced] = said_by(workspace, ("produce", "job.yaml"))
        assert produced.code == 0, produced.err
        assert "workers are running in the cluster" in produced.err
        workspace.wait_until_stopped()
        status = workspace.status()
        assert status["queue_problem"] is None
        assert status["running"] >= 1
        workspace.open_gate()
        wait_until(lambda: len(workspace.done()) == CHUNKS, "the cluster has done it")
        workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


def test_a_dask_worker_killed_in_the_middle_loses_nothing(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = of_cluster(cluster, standard_job, tmp_path)
    with running_cluster(cluster, workspace, NET_HOLD="piece", NET_AFTER="4", NET_SLEEP="0.1"):
        cluster.has_workers(2)
        with workspace.start("run", "job.yaml") as cli:
            held = workspace.wait_until_stopped()
            committed = set(workspace.done())
            os.kill(held, signal.SIGKILL)
            workspace.open_gate()
            ended = cli.wait()
    assert ended.code == 0, ended.err
    assert workspace.stored() == undisturbed.stored()
    again = {patch for patch, times in workspace.computed().items() if times > 1}
    ours = workspace.patches()
    assert not any(again & ours[name] for name in committed)


@pytest.mark.proof("dask")
def test_what_goes_wrong_on_the_clusters_workers_is_told_by_the_run(
    standard_job: StandardJob, tmp_path: Path, cluster: DaskCluster
) -> None:
    workspace = of_cluster(cluster, standard_job, tmp_path)
    (tmp_path / "broken").touch()
    with running_cluster(cluster, workspace, NET_BROKEN=str(tmp_path / "broken")):
        cluster.has_workers(2)
        [ended] = said_by(workspace, ("run", "job.yaml"))
    assert ended.code == 1
    assert "ArithmeticError: broken for every chunk" in ended.err
    assert "Traceback" not in ended.err
    assert ended.messages


def test_a_run_says_that_the_scheduler_of_its_cluster_has_died(
    standard_job: StandardJob, tmp_path: Path, cluster: DaskCluster
) -> None:
    workspace = of_cluster(cluster, standard_job, tmp_path)
    hook = hooked(tmp_path, IMPATIENT)
    with running_cluster(cluster, workspace, NET_SLEEP="0.2"):
        cluster.has_workers(2)
        with workspace.start("run", "job.yaml", PYTHONPATH=hook) as cli:
            wait_until(lambda: len(workspace.done()) >= 2, "some chunks are done")
            cluster.processes[0].kill()
            ended = cli.wait(30)
    assert ended.code == 1
    assert "no Dask scheduler answers" in ended.messages[-1]
    assert "Traceback" not in ended.err


@pytest.mark.proof("dask")
def test_ctrl_c_frees_the_clusters_workers_and_the_same_run_continues(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace, cluster: DaskCluster
) -> None:
    workspace = of_cluster(cluster, standard_job, tmp_path)
    with running_cluster(cluster, workspace, NET_SLEEP="0.2"):
        cluster.has_workers(2)
        with workspace.start("run", "job.yaml") as cli:
            wait_until(lambda: len(workspace.done()) >= 3, "some chunks are done")
            cli.process.send_signal(signal.SIGINT)
            ended = cli.wait()
        assert ended.code == 130, ended.err
        done = len(workspace.done())
        assert 3 <= done < CHUNKS
        counts = workspace.counts()
        assert (counts.running, counts.queued) == (0, CHUNKS - done)
        [again] = said_by(workspace, ("run", "job.yaml"))
        assert again.code == 0, again.err
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}
