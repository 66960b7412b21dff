"""Tests of the Dask queue with real schedulers and workers, which are restarted and killed."""

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from distributed.scheduler import KilledWorker

from chunkq.errors import ErrorCode
from chunkq.install_hint import install_command, remote_hint
from chunkq.queue.backends.dask.plugin import (
    OPERATION,
    REMOTE_TASK,
    QueuePlugin,
    RemoteWorkerLauncher,
)
from chunkq.queue.backends.dask.tls import create_certificate
from chunkq.queue.backends.hosted.queue_host import MAX_LOADING_DEATHS, VERSION, QueueHost
from tests.harness.processes import CommandResult, RunningCommand
from tests.harness.servers.dask import HOST, DaskCluster
from tests.harness.servers.redis import free_port
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until

CHUNKS = 24
ON_CPU = ("--gpus", "none")

MISSING_PACKAGES = """
import sys

class MissingFinder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, MissingFinder())
"""
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
SHORT_TIMEOUT = """
import chunkq.queue.backends.dask.executor

chunkq.queue.backends.dask.executor.CONNECT_SECONDS = 1.0
"""


TLS_ALERT = b"\x15"
"""First byte of the response of a TLS server to an invalid handshake."""


def startup_hook(folder: Path, code: str) -> str:
    """Write code that Python processes run at their start; return their PYTHONPATH."""
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
    """Start a scheduler with two workers, of which one has two threads."""
    cluster.scheduler()
    yield [cluster.worker(workspace, 1, **environment), cluster.worker(workspace, 2, **environment)]


def assert_refused(result: CommandResult, code: int, *fragments: str) -> None:
    """Assert that a command failed with one line that contains the fragments."""
    result.refused(code, "chunkq: queue: ", *fragments)
    assert len(result.err.splitlines()) == 1, result.err


def run_all(
    workspace: StandardWorkspace, *commands: Sequence[str], **environment: str
) -> list[CommandResult]:
    """Run commands in parallel processes; return their results."""
    with ExitStack() as stack:
        clis = [stack.enter_context(workspace.start(*each, **environment)) for each in commands]
        return [cli.wait() for cli in clis]


# Errors of one line.


def test_an_unreachable_scheduler_is_an_error_of_one_line(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    url = f"dask://{HOST}:{free_port()}"
    workspace = standard_job.workspace(tmp_path, url=url)
    produce, run, work = run_all(
        workspace,
        ("produce", "job.yaml"),
        ("run", str(workspace.job_file)),
        ("work", *ON_CPU, "--burst"),
        PYTHONPATH=startup_hook(tmp_path, SHORT_TIMEOUT),
    )
    for result in (produce, run, work):
        assert_refused(result, 1, ErrorCode.QUEUE_UNAVAILABLE, url, "`dask scheduler`")
    assert not workspace.job_folder.exists()
    standard_job.workspace(tmp_path).produce()
    status, distribute, finalize = run_all(
        workspace,
        ("status", str(workspace.output), "--json"),
        ("finalize", str(workspace.output), "--distribute"),
        ("finalize", str(workspace.output)),
        PYTHONPATH=startup_hook(tmp_path, SHORT_TIMEOUT),
    )
    assert status.code == 0
    assert url in json.loads(status.err)["queue_problem"]
    assert_refused(distribute, 1, ErrorCode.QUEUE_UNAVAILABLE, url)
    finalize.refused(3, ErrorCode.JOB_INCOMPLETE)
    assert url not in finalize.err


@pytest.mark.parametrize(
    ("url", "fragments"),
    [
        ("dask://", ("dask:// ", "`chunkq run`")),
        ("dask://host:port", ("dask://host:port: ",)),
        ("dask://host:8786/0", ("dask://host:8786/0: ",)),
        ("dask://host?a=b", ("dask://host?a=b: ",)),
        ("dask://host?protocol=ws", ("dask://host?protocol=ws: ", "tcp, tls, ucx")),
        ("dask://u:geheim@host", ("dask://***@host: ",)),
    ],
)
def test_an_invalid_address_is_an_error_of_one_line(
    standard_job: StandardJob, tmp_path: Path, url: str, fragments: tuple[str, ...]
) -> None:
    workspace = standard_job.workspace(tmp_path)
    for command in (("produce", str(workspace.job_file)), ("work",)):
        result = workspace.call(*command, "--queue", url)
        assert_refused(result, 2, ErrorCode.QUEUE_ADDRESS_INVALID, "dask://HOST:8786", *fragments)
        assert "geheim" not in result.err
    assert not workspace.job_folder.exists()


def test_an_unsupported_protocol_is_an_error_of_one_line(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    workspace = standard_job.workspace(tmp_path, {"dask_config": {"protocol": "ucx"}})
    job = str(workspace.job_file)
    for command in (
        ("work", "--queue", "dask://host?protocol=ucx"),
        ("run", job, "--queue", "dask://"),
    ):
        result = workspace.call(*command)
        assert_refused(result, 1, ErrorCode.PACKAGE_MISSING, "protocol=ucx", "distributed-ucxx")


def test_a_running_cluster_needs_an_address(standard_job: StandardJob, tmp_path: Path) -> None:
    workspace = standard_job.workspace(tmp_path, {"cluster": "running"}, url="dask://")
    result = workspace.call("run", str(workspace.job_file), "-e", "dask")
    result.refused(2, ErrorCode.JOB_INVALID, "cluster: ", "dask_config.address", "--queue dask://")


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


def test_the_error_for_a_missing_package_names_the_extra(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    workspace = standard_job.workspace(tmp_path, url="dask://")
    job = str(workspace.job_file)
    for result in run_all(
        workspace,
        ("produce", job, "--queue", f"dask://{HOST}"),
        ("work", "--queue", f"dask://{HOST}"),
        ("run", job, "-e", "dask"),
        PYTHONPATH=startup_hook(tmp_path, MISSING_PACKAGES.format(names={"distributed", "dask"})),
    ):
        assert_refused(result, 1, ErrorCode.PACKAGE_MISSING, "dask://", install_command("dask"))


# A running scheduler and `chunkq work`.


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


# A temporary cluster of `chunkq run`.


def test_a_run_starts_a_cluster_on_loopback_and_ends_it(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace
) -> None:
    workspace = standard_job.workspace(tmp_path, url="dask://")
    run = ("run", str(workspace.job_file), "-e", "dask", "-w", "2")
    with workspace.start(*run, NET_HOLD="piece", NET_AFTER="4") as cli:
        workspace.wait_until_stopped()
        assert listening(cli) == {HOST}
        workspace.open_gate()
        result = cli.wait()
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    cli.wait_for_children()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


def listening(cli: RunningCommand) -> set[str]:
    """Return the addresses on which the processes of a command listen."""
    processes = [psutil.Process(pid) for pid in [cli.process.pid, *cli.children()]]
    return {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def test_after_ctrl_c_the_same_command_continues(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace
) -> None:
    workspace = standard_job.workspace(tmp_path, url="dask://")
    run = ("run", str(workspace.job_file), "-e", "dask")
    with workspace.start(*run, NET_HOLD="piece", NET_AFTER="4") as cli:
        workspace.wait_until_stopped()
        cli.children()
        cli.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping" in cli.output(), "the command stops")
        workspace.open_gate()
        result = cli.wait()
    assert result.code == 130, result.err
    assert "the same command" in result.messages[-1]
    cli.wait_for_children()
    assert 4 <= len(workspace.done()) < CHUNKS
    with workspace.start(*run) as cli:
        result = cli.wait()
    assert result.code == 0, result.err
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


def test_a_run_accepts_only_its_key_and_leaves_no_files_when_killed(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    temporary, state = tmp_path / "tmp", tmp_path / "state"
    temporary.mkdir()
    (tmp_path / "job").mkdir()
    workspace = standard_job.workspace(tmp_path / "job", url="dask://")
    environment = {"TMPDIR": str(temporary), "XDG_STATE_HOME": str(state)}
    hold = {"NET_HOLD": "piece", "NET_AFTER": "2"}
    run = ("run", str(workspace.job_file), "-e", "dask")
    with workspace.start(*run, **environment, **hold) as cli:
        workspace.wait_until_stopped()
        assert len(cli.children()) >= 3  # scheduler, supervisor, worker
        (stored,) = (state / "chunkq" / "credentials").iterdir()
        (key,) = temporary.glob("chunkq-dask-*/cluster.pem")
        for secret in (stored, key):
            assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        key_lines = key.read_text().splitlines()
        arguments = " ".join(part for pid in cli.known for part in psutil.Process(pid).cmdline())
        assert not any(line in arguments for line in key_lines)
        other_certificate = create_certificate(tmp_path)
        dask_ports = ports(cli)
        assert len(dask_ports) >= 2  # of the scheduler and the worker
        for port in dask_ports:
            assert accepts(port, key)
            assert not accepts(port, None)
            assert not accepts(port, other_certificate)
        # Other commands of this user look up the key by the address.
        port = stored.name.rpartition("_")[2]
        url = f"dask://{HOST}:{port}"
        status = workspace.run(
            "status", str(workspace.output), "--json", "--queue", url, **environment
        )
        assert json.loads(status.out)["running"] >= 1
        cli.process.kill()
        cli.wait()
        cli.wait_for_children()
    assert list((state / "chunkq" / "credentials").iterdir()) == []
    assert list(temporary.iterdir()) == []


def ports(cli: RunningCommand) -> set[int]:
    """Return the ports on which the processes of a command listen, except for HTTP ports."""
    processes = [psutil.Process(pid) for pid in cli.children()]
    listening = {
        connection.laddr.port
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    return {port for port in listening if not answers_http(port)}


def accepts(port: int, certificate: Path | None) -> bool:
    """Return whether a port accepts a connection, with TLS if there is a certificate."""
    try:
        with ExitStack() as stack:
            connection = stack.enter_context(socket.create_connection((HOST, port), 10))
            if certificate is None:
                connection.sendall(bytes(64))
            else:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                context.load_cert_chain(certificate)
                connection = stack.enter_context(context.wrap_socket(connection))
            return connection.recv(1) not in (b"", TLS_ALERT)
    except (ConnectionError, ssl.SSLError):
        return False


def answers_http(port: int) -> bool:
    """Return whether a port uses HTTP. If so, assert that it has no page."""
    answer = b""
    with socket.create_connection((HOST, port), 10) as connection, suppress(ConnectionResetError):
        connection.sendall(b"GET /info/main/workers.html HTTP/1.0\r\n\r\n")
        answer = connection.makefile("rb").readline()
    if answer.startswith(b"HTTP/"):
        assert answer.split()[1] == b"404", answer
        return True
    return False


@pytest.mark.proof("dask")
def test_the_job_file_sets_workers_threads_and_port(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    port = free_port()
    config = {"n_workers": 2, "threads_per_worker": 3, "scheduler_port": port, "protocol": "tcp"}
    workspace = standard_job.workspace(tmp_path, {"dask_config": config}, url="dask://")
    observer = standard_job.workspace(tmp_path, url=f"dask://{HOST}:{port}")
    run = ("run", str(workspace.job_file), "-e", "dask")
    with workspace.start(*run, NET_SLEEP="1") as cli:
        wait_until(lambda: len(workspace.done()) >= 1, "the job has started")
        observer.wait_for_chunks_in_flight(3)
        wait_until(
            lambda: len({item.worker for item in observer.running()}) == 2, "both workers are busy"
        )
        cli.children()
    cli.wait_for_children()


def test_a_port_in_use_is_an_error_of_one_line(standard_job: StandardJob, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        config = {"scheduler_port": other.getsockname()[1]}
        workspace = standard_job.workspace(tmp_path, {"dask_config": config}, url="dask://")
        result = workspace.call("run", str(workspace.job_file))
    assert_refused(result, 1, ErrorCode.QUEUE_UNAVAILABLE, "ddress already in use")


# Remote workers in a running cluster.


def workspace_for_cluster(
    cluster: DaskCluster, standard_job: StandardJob, folder: Path
) -> StandardWorkspace:
    """Return a workspace whose job file has the address of a running cluster."""
    config = {"address": f"tcp://{HOST}:{cluster.port}"}
    workspace = standard_job.workspace(
        folder, {"cluster": "running", "dask_config": config}, url=cluster.url
    )
    assert workspace.job_file.exists()
    return workspace


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


def test_deaths_of_a_worker_count_against_a_thread_only_before_it_has_its_network() -> None:
    plugin = QueuePlugin(has_page=False)
    scheduler = SimpleNamespace(handlers={}, idle_since=0.0, idle_timeout=None, tasks={})
    asyncio.run(plugin.start(scheduler))
    keys = (f"{REMOTE_TASK}-ab-0", "x-1", ("x", 2))
    scheduler.tasks |= {key: SimpleNamespace(suspicious=3) for key in keys}
    plugin.remove_worker(scheduler, "tcp://node")  # no worker of chunkq ran there
    assert [task.suspicious for task in scheduler.tasks.values()] == [3, 3, 3]
    call = {"method": "register_worker", "params": ["worker", "tcp://node"], "version": VERSION}
    scheduler.handlers[OPERATION](json.dumps(call))
    plugin.remove_worker(scheduler, "tcp://node")
    assert [task.suspicious for task in scheduler.tasks.values()] == [0, 3, 3]


@pytest.mark.parametrize(
    ("allowed", "tolerated"), [(0, MAX_LOADING_DEATHS), (3, 0)], ids=["of a site", "of Dask"]
)
def test_tasks_that_dask_gives_up_end_a_group_after_four_deaths_in_a_row(
    allowed: int, tolerated: int
) -> None:
    host = QueueHost()
    host.start_group("ab", "/out.zarr.chunkq", "dask://host:1", 1, gpu=False, cores=1)
    scheduler = SimpleNamespace(allowed_failures=allowed, workers={}, task_prefixes={})
    launcher = RemoteWorkerLauncher(scheduler, host)

    def is_reported() -> bool:
        error = KilledWorker("task", None, allowed)
        state = SimpleNamespace(exception=error)
        given_up = SimpleNamespace(status="error", done=lambda: True, _state=state)
        launcher._tasks["ab"] = [given_up]
        launcher._update(None, "ab")
        return bool(host.group("ab").messages)

    assert not any(is_reported() for _ in range(tolerated))
    launcher.record_death(has_worked=True, was_loading=False)
    assert not any(is_reported() for _ in range(tolerated))
    assert is_reported()


def test_workers_that_dask_loses_while_they_load_end_a_group_in_the_end() -> None:
    plugin = QueuePlugin(has_page=False)
    scheduler = SimpleNamespace(
        handlers={}, idle_timeout=None, tasks={}, allowed_failures=3, workers={}, task_prefixes={}
    )

    def call(method: str, *arguments: object) -> None:
        values = {"method": method, "params": arguments, "version": VERSION}
        assert "result" in json.loads(plugin._host.answer(json.dumps(values)))

    def lose(number: int) -> bool:
        """Lose a worker, which has a new address each time; return whether the group has ended."""
        address = f"tcp://node:{number}"
        call("register_worker", f"worker-{number}", address)
        call("set_loading", f"worker-{number}", True)
        plugin.remove_worker(scheduler, address)
        plugin._launcher._update(None, "ab")
        return bool(plugin._host.group("ab").messages)

    asyncio.run(plugin.start(scheduler))
    call("start_group", "ab", "/out.zarr.chunkq", "dask://host:1", 1, False, 1)
    assert [lose(number) for number in range(3)] == [False] * 3
    job = ("/out.zarr.chunkq", "00000001")
    call("submit", [(*job, "infer/0/1", "{}")])
    call("reserve", "worker", 60.0, None, [])
    call("ack", *job, "infer/0/1", "worker")
    assert [lose(number) for number in range(4)] == [False, False, False, True]


def test_a_scheduler_with_an_idle_timeout_is_idle_when_its_queue_is_empty() -> None:
    plugin = QueuePlugin(has_page=False)
    scheduler = SimpleNamespace(handlers={}, idle_timeout=60.0, periodic_callbacks={})

    def is_idle_after(method: str, *arguments: object) -> bool:
        call = {"method": method, "params": arguments, "version": VERSION}
        assert "result" in json.loads(scheduler.handlers[OPERATION](json.dumps(call)))
        scheduler.idle_since = 1.0  # as the scheduler sets it, without tasks of its own
        scheduler.periodic_callbacks[OPERATION].callback()
        return scheduler.idle_since is not None

    async def states() -> list[bool]:
        await plugin.start(scheduler)
        job = ("/out.zarr.chunkq", "00000001")
        return [
            is_idle_after("jobs"),
            is_idle_after("submit", [(*job, "infer/0/1", "{}")]),
            is_idle_after("reserve", "worker", 60.0, None, []),
            is_idle_after("ack", *job, "infer/0/1", "worker"),
        ]

    assert asyncio.run(states()) == [True, False, False, True]


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
