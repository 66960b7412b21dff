"""Runs that start a Dask cluster for themselves: its addresses, keys, files and its end."""

import json
import signal
import socket
import ssl
import stat
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from chunkq.errors import ErrorCode
from chunkq.queue.backends.dask.tls import create_certificate
from tests.harness.processes import RunningCommand
from tests.harness.servers.dask import HOST, assert_refused
from tests.harness.servers.redis import free_port
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until

CHUNKS = 24
ON_CPU = ("--gpus", "none")
TLS_ALERT = b"\x15"
"""First byte of the response of a TLS server to an invalid handshake."""


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
