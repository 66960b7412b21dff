"""A Redis that is away, refuses or is full: one clear line within seconds, without a password."""

import contextlib
import ipaddress
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock
from urllib.parse import quote

import psutil
import pytest

from chunkq.errors import QueueError
from chunkq.executors import open_executor
from chunkq.job_handle import open_job
from chunkq.ledger import Failure
from tests.harness.files import everything_below, files_below
from tests.harness.networks import toy_model
from tests.harness.servers.redis import RedisServer, free_port, redis_server
from tests.harness.standard_job import StandardJob
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace

LONGEST_ANSWER = 5.0
LONGEST_PROCESS = 30.0
"""The same for a process of its own, whose start takes seconds on a busy machine."""
SECRET = "s3cr3t"
PASSWORD = "s3cr3t-p%40@s3cr3t/s3cr3t#s3cr3t?s3cr3t:s3cr3t"
"""Whatever an address is cut at, each part of it can be recognised."""
CODED = quote(PASSWORD, safe="")
COMMANDS = ("produce", "work", "status", "retry", "cancel", "jobs", "run", "finalize")
WRITING = ("produce", "retry", "cancel", "run", "finalize")
"""Commands that change the queue and end; `work`, which goes on, is a process in its own tests."""

WELL_TRIED = mock.Mock(error=None)
"""What trying the network came to, which takes seconds in real."""


@dataclass(frozen=True)
class Servers:
    """One server that wants a password or a certificate and has weak users; and a replica."""

    guarded: RedisServer
    replica: RedisServer
    tls_port: int
    socket: Path
    certificate: Path

    def address(
        self, user: str = "", password: str = CODED, host: str = "127.0.0.1", port: int = 0
    ) -> str:
        return f"{user}:{password}@{host}:{port or self.guarded.settings.port}/0"


def make_certificate(folder: Path) -> str:
    """Write a certificate for 127.0.0.1 that nobody has signed; returns the server's settings."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, today = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "chunkq test")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return f"tls-cert-file {folder}/cert.pem\ntls-key-file {folder}/key.pem\ntls-auth-clients no\n"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder, tls_port = tmp_path_factory.mktemp("servers"), free_port()
    settings = make_certificate(folder) + f"tls-port {tls_port}\nunixsocket {folder}/redis.sock\n"
    with (
        redis_server(PASSWORD, settings) as guarded,
        redis_server(extra="replicaof 127.0.0.1 1\n") as replica,
        guarded.client as client,
    ):
        for user, rights in (
            ("pinger", ("~nothing*", "+ping")),
            ("reader", ("~*", "+@read", "+@connection")),
            ("stranger", ("~others:*", "+@all")),
        ):
            client.execute_command("ACL", "SETUSER", user, "on", f">{PASSWORD}", *rights)
        yield Servers(guarded, replica, tls_port, folder / "redis.sock", folder / "cert.pem")


@dataclass(frozen=True)
class Stage:
    """Jobs for every command: one to produce, one whose chunks are all done, one with a failure."""

    workspace: Workspace

    @property
    def folder(self) -> Path:
        return self.workspace.folder

    @property
    def failing(self) -> Path:
        return self.folder / "failing.zarr"

    def arguments(self, command: str) -> list[str]:
        done, failing = str(self.workspace.output), str(self.failing)
        return {
            "produce": ["produce", "new.json"],
            "work": ["work", "--burst", "--gpus", "none"],
            "status": ["status"],
            "retry": ["retry", failing],
            "cancel": ["cancel", failing],
            "jobs": ["jobs"],
            "run": ["run", "new.json", "--gpus", "none"],
            "finalize": ["finalize", done, "--distribute"],
        }[command]

    def refuses(self, command: str, url: str, *words: str) -> str:
        """Run a command in this process; it must end soon with one clear line, and no secret."""
        began = time.monotonic()
        with mock.patch("chunkq_producer.commands.run.check_model", return_value=WELL_TRIED):
            answer = self.workspace.call(*self.arguments(command), "--queue", url)
        took = time.monotonic() - began
        answer.refused(1, "chunkq: queue: ", *words)
        assert len(answer.err.splitlines()) == 1, answer.err
        assert answer.out == ""
        assert took < LONGEST_ANSWER
        assert SECRET not in answer.err
        assert not holds_secret(self.folder)
        return answer.err

    def leaves_all_as_it_was(self, command: str, url: str, *words: str) -> str:
        before = everything_below(self.folder)
        said = self.refuses(command, url, *words)
        assert everything_below(self.folder) == before
        return said

    def forget_new(self) -> None:
        for name in ("new.zarr", "new.zarr.chunkq"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def holds_secret(folder: Path) -> list[str]:
    """The files below a folder that contain a part of the password."""
    return [name for name, content in files_below(folder).items() if SECRET.encode() in content]


@pytest.fixture(scope="module")
def stage_of_module(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("stage")
    write_zarr(folder / "in.zarr", random_volume((32, 24)), (8, 8))
    values = {
        "input": "in.zarr",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [4, 4],
        "chunksize": [16, 12],
        "storage_chunks": [4, 4],
        "threads": 1,
        "model_config": toy_model(folder, (8, 8), scale=100.0),
    }
    workspace = Workspace(folder, values)
    workspace.call("produce", workspace.write_job()).ok()
    workspace.compute_inline()
    assert len(workspace.commits()) == 4
    workspace.call("produce", workspace.write_job("failing.json", output="failing.zarr")).ok()
    told = Failure("infer", (0, 1), 3, "a:cpu:b", "ValueError", "no such voxel", "Traceback …")
    open_job(f"{folder}/failing.zarr.chunkq").ledger.record_failure(told)
    workspace.write_job("new.json", output="new.zarr")
    return Stage(workspace)


@pytest.fixture
def stage(stage_of_module: Stage) -> Iterator[Stage]:
    yield stage_of_module
    stage_of_module.forget_new()


@contextlib.contextmanager
def quick_to_give_up() -> Iterator[None]:
    """Wait for an answer a twentieth of the time; what the real time is, other tests measure."""
    with mock.patch("chunkq.executors.rq.connect.ANSWER_SECONDS", 0.2):
        yield


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port whose host seems not to be there: connecting to it is never answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        with socket.create_connection(listener.getsockname()):  # the one that it has room for
            yield listener.getsockname()[1]


@contextlib.contextmanager
def speaker(answer: bytes) -> Iterator[int]:
    """A port on which something says `answer` to whatever it is sent; b"" keeps it silent."""

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(1 << 16):
                connection.sendall(answer)

    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@dataclass(frozen=True)
class State:
    """One way in which a queue is of no use: its address, and what must be said about it."""

    name: str
    url: Callable[[Servers, contextlib.ExitStack], str]
    words: tuple[str, ...]
    commands: tuple[str, ...] = COMMANDS
    writes: bool = field(default=False)
    """Whether the job folder may be there before the queue is found to refuse."""


STATES = (
    State(
        "nothing listens",
        lambda servers, stack: f"redis://:{CODED}@127.0.0.1:{free_port()}/0",
        ("127.0.0.1", "Connection refused", "is it running"),
    ),
    State(
        "the host name is wrong",
        lambda servers, stack: f"redis://:{CODED}@no-such-host.invalid:6379/0",
        ("no-such-host.invalid", "are host and port right"),
    ),
    State(
        "no packet comes back",
        lambda servers, stack: f"redis://:{CODED}@127.0.0.1:{stack.enter_context(black_hole())}",
        ("does not answer", "is the host right"),
    ),
    State(
        "it never answers",
        lambda servers, stack: f"redis://:{CODED}@127.0.0.1:{stack.enter_context(speaker(b''))}",
        ("does not answer", "is it running"),
    ),
    State(
        "it is no Redis",
        lambda servers, stack: "redis://:{}@127.0.0.1:{}".format(
            CODED, stack.enter_context(speaker(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
        ),
        ("HTTP/1.1 400 Bad Request", "port right"),
    ),
    State(
        "it is still loading",
        lambda servers, stack: "redis://127.0.0.1:{}".format(
            stack.enter_context(speaker(b"-LOADING Redis is loading the dataset in memory\r\n"))
        ),
        ("is still loading", "try again"),
    ),
    State(
        "the password is wrong",
        lambda servers, stack: f"redis://{servers.address(password=CODED + 'x')}",
        ("refuses user or password", "redis://user:password@host"),
    ),
    State(
        "the user is unknown",
        lambda servers, stack: f"redis://{servers.address(user='nobody')}",
        ("refuses user or password", "redis://user:password@host"),
    ),
    State(
        "the password is missing",
        lambda servers, stack: f"redis://127.0.0.1:{servers.guarded.settings.port}/0",
        ("write", "into the address", "password@host"),
    ),
    State(
        "the user may only ping",
        lambda servers, stack: f"redis://{servers.address(user='pinger')}",
        ("this user may not do that", "rq:* and chunkq:*"),
        writes=True,
    ),
    State(
        "the user may only read",
        lambda servers, stack: f"redis://{servers.address(user='reader')}",
        ("this user may not do that", "rq:* and chunkq:*"),
        WRITING,
        writes=True,
    ),
    State(
        "the keys are not the user's",
        lambda servers, stack: f"redis://{servers.address(user='stranger')}",
        ("this user may not do that", "rq:* and chunkq:*"),
        writes=True,
    ),
    State(
        "TLS is spoken there",
        lambda servers, stack: f"redis://{servers.address(port=servers.tls_port)}",
        ("a TLS port wants rediss://",),
    ),
    State(
        "no TLS is spoken there",
        lambda servers, stack: f"rediss://{servers.address()}",
        ("TLS", "redis://"),
    ),
    State(
        "the certificate is not trusted",
        lambda servers, stack: f"rediss://{servers.address(port=servers.tls_port)}",
        ("TLS", "self-signed certificate", "?ssl_ca_certs=FILE"),
    ),
    State(
        "the certificate is another host's",
        lambda servers, stack: (
            f"rediss://{servers.address(host='localhost', port=servers.tls_port)}"
            f"?ssl_ca_certs={servers.certificate}"
        ),
        ("TLS", "not valid for 'localhost'"),
    ),
    State(
        "the authority's file is missing",
        lambda servers, stack: (
            f"rediss://{servers.address(port=servers.tls_port)}?ssl_ca_certs=/nowhere/ca.pem"
        ),
        ("ssl_ca_certs: no file /nowhere/ca.pem",),
    ),
    State(
        "it is a replica",
        lambda servers, stack: servers.replica.url,
        ("only reads", "name the primary"),
        WRITING,
        writes=True,
    ),
    State(
        "the socket is missing",
        lambda servers, stack: "unix:///nowhere/redis.sock",
        ("/nowhere/redis.sock", "No such file", "is it running"),
    ),
    State(
        "the socket wants a password",
        lambda servers, stack: f"unix://{servers.socket}?password={CODED}x",
        ("refuses user or password", "?password=***"),
    ),
)
CASES = [
    pytest.param(state, command, id=f"{state.name}-{command}")
    for state in STATES
    for command in state.commands
]
every_state = pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)


@pytest.mark.parametrize(("state", "command"), CASES)
def test_a_queue_of_no_use_is_refused_in_one_line(
    state: State, command: str, stage: Stage, servers: Servers
) -> None:
    with contextlib.ExitStack() as stack, quick_to_give_up():
        refuses = stage.refuses if state.writes else stage.leaves_all_as_it_was
        refuses(command, state.url(servers, stack), *state.words)


@every_state
def test_status_of_a_job_tells_what_the_ledger_knows_and_what_ails_the_queue(
    state: State, stage: Stage, servers: Servers
) -> None:
    before = everything_below(stage.folder)
    with contextlib.ExitStack() as stack, quick_to_give_up():
        queue = ("--queue", state.url(servers, stack))
        shown = stage.workspace.call("status", stage.failing, *queue).ok()
        told = stage.workspace.call("status", stage.failing, "--json", *queue).ok()
    found = json.loads(told.out)
    assert (found["chunks"], found["done"], len(found["failures"])) == (4, 0, 1)
    assert "0/4 chunks done" in shown.out
    assert "no such voxel" in shown.out
    assert shown.err + told.err == ""
    assert SECRET not in shown.out + told.out
    assert everything_below(stage.folder) == before
    if state.name == "it is a replica":  # which answers questions like any other
        assert (found["queue_problem"], found["queued"]) == (None, 0)
        return
    problem = found["queue_problem"]
    assert problem.startswith("queue: ")
    assert len(problem.splitlines()) == 1
    assert all(word in problem for word in state.words), problem
    assert "".join(problem.split()) in "".join(shown.out.split())
    assert (found["queued"], found["running"], found["failed"]) == (None, None, None)


@pytest.mark.parametrize("command", ["status", "jobs"])
def test_who_may_not_run_scripts_cannot_list_jobs(
    command: str, stage: Stage, servers: Servers
) -> None:
    admin = ("--queue", f"redis://{servers.address()}")
    stage.workspace.call("produce", "new.json", *admin).ok()
    reader = f"redis://{servers.address(user='reader')}"
    try:
        stage.refuses(command, reader, "this user may not do that", "scripts")
    finally:
        stage.workspace.call("cancel", stage.folder / "new.zarr", *admin).ok()


@pytest.mark.parametrize("who", ["a user that may only read", "a replica"])
def test_a_worker_ends_at_once_if_it_may_not_write(
    who: str, stage: Stage, servers: Servers
) -> None:
    reader = f"redis://{servers.address(user='reader')}"
    url = servers.replica.url if who == "a replica" else reader
    with stage.workspace.start(*stage.arguments("work"), CHUNKQ_QUEUE=url) as cli:
        try:
            ended = cli.wait(LONGEST_PROCESS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it still runs, its output: {cli.output()}")
    complaints = [line for line in ended.messages if line.startswith("chunkq: queue: ")]
    assert (ended.code, len(complaints)) == (1, 1), ended.err
    assert SECRET not in ended.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_as_a_process_of_its_own_says_so_within_seconds(
    command: str, stage: Stage
) -> None:
    url = f"redis://:{CODED}@127.0.0.1:{free_port()}/0"
    began = time.monotonic()
    answer = stage.workspace.run(*stage.arguments(command), CHUNKQ_QUEUE=url)
    assert time.monotonic() - began < LONGEST_PROCESS
    answer.refused(1, "cannot be reached")
    assert (answer.out, len(answer.err.splitlines())) == ("", 1)


def test_run_asks_the_queue_before_it_tries_the_network(stage: Stage) -> None:
    with mock.patch("chunkq_producer.commands.run.check_model", return_value=WELL_TRIED) as probe:
        queue = f"redis://127.0.0.1:{free_port()}/0"
        stage.workspace.call(*stage.arguments("run"), "--queue", queue).refused(
            1, "cannot be reached"
        )
    probe.assert_not_called()


def test_silence_is_told_within_five_seconds(servers: Servers) -> None:
    def seconds_until_refused(url: str) -> float:
        began = time.monotonic()
        with pytest.raises(QueueError, match="does not answer"):
            open_executor(url)
        return time.monotonic() - began

    with black_hole() as nobody, speaker(b"") as silent, ThreadPoolExecutor() as pool:
        urls = (f"redis://127.0.0.1:{nobody}", f"redis://127.0.0.1:{silent}")
        no_tls = f"rediss://{servers.address()}"
        assert max(pool.map(seconds_until_refused, (*urls, no_tls))) < LONGEST_ANSWER


# Addresses that are none, and passwords that were not encoded.


@pytest.mark.parametrize("command", ["produce", "jobs"])
@pytest.mark.parametrize(
    "url",
    [
        "redis://host:notaport",
        "redis://127.0.0.1:99999",
        "redis://[::1",
        "redis://127.0.0.1:1/myqueue",
        "redis://127.0.0.1:1/0?socket_timeout=soon",
        "redis://127.0.0.1:1/0?colour=red",
        f"redis://127.0.0.1:1/0?ssl_password={SECRET}",
        f"redis://:{SECRET}/w#x@host",
        f"redis://:{SECRET}#{SECRET}@127.0.0.1:1",
        f"redis://:{SECRET}?{SECRET}@127.0.0.1:1",
        f"redis://:{SECRET}[{SECRET}@127.0.0.1:1",
        f"redis://:{SECRET}@{SECRET}/{SECRET}@127.0.0.1:1",
        f"redis://me:{SECRET}@{SECRET}?{SECRET}@127.0.0.1:1",
        f"redis://:{SECRET}",
    ],
)
def test_an_address_that_is_none_is_refused_with_the_form_of_one(
    url: str, command: str, stage: Stage
) -> None:
    form = "redis://[user:password@]host[:port]"
    stage.leaves_all_as_it_was(command, url, "is no Redis address", form, "%-codes")


@pytest.mark.parametrize(
    "url",
    [
        f"redis:/:{SECRET}@host",
        f"redis:{SECRET}@host",
        f"redi://:{SECRET}@{SECRET}/{SECRET}@host",
        f"REDIS://:{SECRET}@{SECRET}/{SECRET}@host",
        f"rediss+tls://me:{SECRET}/{SECRET}@host",
    ],
)
def test_a_misspelt_kind_of_queue_does_not_show_the_password(url: str, stage: Stage) -> None:
    answer = stage.workspace.call("jobs", "--queue", url)
    answer.refused(2, "is no queue this version knows", "redis://")
    assert SECRET not in answer.err


# What works.


@pytest.mark.parametrize("password", ["", PASSWORD])
def test_a_socket_is_a_queue_as_any_other(password: str, stage: Stage, tmp_path: Path) -> None:
    with redis_server(password or None, f"unixsocket {tmp_path}/redis.sock\n"):
        secret = f"?password={quote(password, safe='')}" if password else ""
        queue = ("--queue", f"unix://{tmp_path}/redis.sock{secret}")
        answers = [
            stage.workspace.call("produce", "new.json", *queue).ok(),
            stage.workspace.call("jobs", *queue).ok(),
            stage.workspace.call("cancel", stage.folder / "new.zarr", *queue).ok(),
        ]
    assert "4 newly queued" in answers[0].out
    assert "4 queued, 0 running, 0 failed" in answers[1].out
    assert "4 chunks taken off the queue" in answers[2].out
    assert SECRET not in str(answers)
    assert not holds_secret(stage.folder)


@pytest.mark.parametrize("password", ["s3cr3t+~!$&'()*,;=", "s3cr3t@s3cr3t", "s3cr3t:s3cr3t"])
def test_a_password_that_need_not_be_encoded_works_and_does_not_show(
    password: str, stage: Stage
) -> None:
    with redis_server(password) as server:
        answer = stage.workspace.call("produce", "new.json", "--queue", server.url).ok()
    assert "4 newly queued" in answer.out
    assert SECRET not in answer.out + answer.err
    assert not holds_secret(stage.folder)


def test_a_job_over_tls_shows_its_password_nowhere(
    servers: Servers, standard_job: StandardJob, tmp_path: Path
) -> None:
    host = servers.address(port=servers.tls_port)
    url = f"rediss://{host}?ssl_ca_certs={servers.certificate}"
    workspace = standard_job.workspace(tmp_path, url=url)
    said = []
    command = ("run", str(workspace.job_file), "--gpus", "none", "-w", "1")
    with workspace.start(*command, NET_HOLD="forward", NET_AFTER="5") as cli:
        worker = workspace.wait_until_stopped()
        assert worker in cli.children()
        everyone = [cli.process.pid, *cli.known]
        said += [" ".join(psutil.Process(pid).cmdline()) for pid in everyone]
        for arguments in (("status",), ("jobs",), ("status", str(workspace.output), "--json")):
            answer = workspace.call(*arguments)
            assert answer.code == 0, answer.err
            said.append(answer.out + answer.err)
        workspace.open_gate()
        assert cli.wait().code == 0, cli.output()
    assert "complete: " in cli.output()
    for arguments in (
        ("produce", str(workspace.job_file), "--resume"),
        ("cancel", str(workspace.output)),
    ):
        answer = workspace.call(*arguments)
        assert answer.code == 0, answer.err
        said.append(answer.out + answer.err)
    assert "queue" not in json.loads((workspace.job_folder / "job.json").read_text())["job"]
    assert (workspace.epoch_folder / "report.json").exists()
    assert SECRET not in "\n".join(said)
    assert not holds_secret(tmp_path)


# Full.


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


def test_produce_into_a_full_redis_is_refused_and_the_rest_follows(
    stage: Stage, own_redis: RedisServer
) -> None:
    queue = ("--queue", own_redis.url)
    write_zarr(stage.folder / "large.zarr", random_volume((480, 480)), (240, 240))
    job = stage.workspace.write_job(
        "large.json", input="large.zarr", output="new.zarr", chunksize=[8, 8]
    )
    with own_redis.client as client:
        # About 2 MB in all, which is some room beyond what an empty server takes.
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 1_000_000)
        answer = stage.workspace.call("produce", job, *queue)
        answer.refused(1, "has no memory left", "maxmemory", "chunkq produce --resume")
        assert len(answer.err.splitlines()) == 1, answer.err
        found = json.loads(
            stage.workspace.call("status", stage.folder / "new.zarr", "--json", *queue).ok().out
        )
        assert 0 < found["queued"] < found["chunks"] == 3600
        client.config_set("maxmemory", 0)
        answer = stage.workspace.call("produce", job, "--resume", *queue).ok()
        assert f"3600 chunks, 0 done, {3600 - found['queued']} newly queued" in answer.out
        (name,) = client.keys("rq:queue:*")
        assert len(set(client.lrange(name, 0, -1))) == client.llen(name) == 3600


def test_a_full_redis_lets_jobs_be_cancelled(stage: Stage, own_redis: RedisServer) -> None:
    queue = ("--queue", own_redis.url)
    stage.workspace.call("produce", "new.json", *queue).ok()
    with own_redis.client as client:
        client.config_set("maxmemory", "100kb")
        stage.refuses("finalize", own_redis.url, "has no memory left", "maxmemory")
        answer = stage.workspace.call("cancel", stage.folder / "new.zarr", *queue).ok()
    assert "4 chunks taken off the queue" in answer.out


def test_workers_empty_a_full_redis(
    own_redis: RedisServer, standard_job: StandardJob, tmp_path: Path
) -> None:
    workspace = standard_job.workspace(tmp_path, url=own_redis.url)
    workspace.produce()
    with own_redis.client as client:
        client.config_set("maxmemory", "100kb")
    with workspace.start("work", "--burst", "--gpus", "none") as cli:

        def complains() -> bool:
            return "has no memory left" in cli.output()

        wait_until(lambda: complains() or cli.process.poll() is not None, "it ends or complains")
        assert not complains(), cli.output()
        assert cli.wait().code == 0
    assert len(workspace.done()) == 24


# Not the queue's fault.


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_a_job_outside_allow_is_refused_and_stays_on_the_queue(
    quiet: tuple[str, ...], stage: Stage, redis: RedisServer
) -> None:
    stage.workspace.call("produce", "new.json", "--queue", redis.url).ok()
    allowed = stage.folder / "new.zarr.chunkq-not"
    work = (*stage.arguments("work"), "--allow", allowed, *quiet)
    with stage.workspace.start(*work, CHUNKQ_QUEUE=redis.url) as cli:
        ended = cli.wait(60)
    code, said = ended.code, ended.err
    complaints = [line for line in said.splitlines() if "this worker only runs" in line]
    assert (code, len(complaints)) == (1, 1), said
    assert complaints[0].startswith("chunkq: "), said
    assert f"from below {allowed}; found outside: job folder" in complaints[0]
    assert f"--allow {stage.folder} too, or set CHUNKQ_ALLOW" in complaints[0]
    assert "Traceback" not in said
    with contextlib.closing(open_executor(redis.url)) as executor:
        counts = executor.counts(str(stage.folder / "new.zarr.chunkq"))
    assert (counts.queued, counts.running, counts.failed) == (4, 0, 0)


def test_without_the_extra_one_line_names_it(stage: Stage) -> None:
    hide = "import sys; sys.modules['rq'] = None; from chunkq.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", hide, "jobs", "--queue", f"redis://:{CODED}@127.0.0.1"],
        env=stage.workspace.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "chunkq: queue: redis:// needs a package that is not installed; "
        "pip install 'chunkq[redis]'\n"
    )
