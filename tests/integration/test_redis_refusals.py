"""An unusable Redis server is reported in one line, within seconds and without the password."""

import contextlib
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
from pathlib import Path
from unittest import mock
from urllib.parse import quote

import psutil
import pytest

from chunkq.errors import ErrorCode, QueueError
from chunkq.install_hint import install_command
from chunkq.job.job_handle import open_job
from chunkq.job.task_records import Failure
from chunkq.queue.contract.executor import jobs_at
from chunkq.queue.registry import open_executor
from tests.harness.files import everything_below, files_below
from tests.harness.processes import CommandResult
from tests.harness.servers.certificate import write_certificate
from tests.harness.servers.redis import RedisServer, free_port, redis_server
from tests.harness.small_job import four_chunks
from tests.harness.standard_job import StandardJob
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace

MAX_CALL_SECONDS = 5.0
MAX_PROCESS_SECONDS = 30.0
"""For a command in a new process, which takes seconds to start on a busy machine."""
SECRET = "s3cr3t"
PASSWORD = "s3cr3t-p%40@s3cr3t/s3cr3t#s3cr3t?s3cr3t:s3cr3t"
"""Every part between two delimiters of a URL contains SECRET."""
CODED = quote(PASSWORD, safe="")
COMMANDS = ("produce", "work", "status", "retry", "cancel", "jobs", "run", "finalize")
WRITING = ("produce", "retry", "cancel", "run", "finalize")
"""Commands that change the queue and end. `work` does not end, so it has separate tests."""


@dataclass(frozen=True)
class Servers:
    """A server with a password, TLS and users with few permissions; and a replica."""

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
    """Write a self-signed certificate for 127.0.0.1; return the settings of the server."""
    certificate, key = write_certificate(folder)
    return f"tls-cert-file {certificate}\ntls-key-file {key}\ntls-auth-clients no\n"


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
    """A workspace with three jobs: not produced, all chunks done, one failed chunk."""

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

    def assert_refused(self, command: str, url: str, *fragments: str) -> None:
        """Run a command; assert that it ends soon with one line that does not have the secret."""
        start = time.monotonic()
        with mock.patch("chunkq_producer.worker_command.WorkerCommand.check"):
            answer = self.workspace.call(*self.arguments(command), "--queue", url)
        seconds = time.monotonic() - start
        answer.refused(1, "chunkq: queue: ", *fragments)
        assert len(answer.err.splitlines()) == 1, answer.err
        assert answer.out == ""
        assert seconds < MAX_CALL_SECONDS
        assert SECRET not in answer.err
        assert not files_with_secret(self.folder)

    def assert_refused_without_writes(self, command: str, url: str, *fragments: str) -> None:
        before = everything_below(self.folder)
        self.assert_refused(command, url, *fragments)
        assert everything_below(self.folder) == before

    def delete_new_job(self) -> None:
        for name in ("new.zarr", "new.zarr.chunkq"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def files_with_secret(folder: Path) -> list[str]:
    """Return the files below a folder that contain a part of the password."""
    return [name for name, content in files_below(folder).items() if SECRET.encode() in content]


@pytest.fixture(scope="module")
def stage_of_module(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("stage")
    workspace = four_chunks(folder)
    workspace.call("produce", workspace.write_job()).ok()
    workspace.compute_inline()
    assert len(workspace.commits()) == 4
    workspace.call("produce", workspace.write_job("failing.json", output="failing.zarr")).ok()
    failure = Failure(
        "infer", 0, (0, 1), 3, "a:cpu:b", "ValueError", "no such voxel", "Traceback …"
    )
    open_job(f"{folder}/failing.zarr.chunkq").items[0].ledger.record_failure(failure)
    workspace.write_job("new.json", output="new.zarr")
    return Stage(workspace)


@pytest.fixture
def stage(stage_of_module: Stage) -> Iterator[Stage]:
    yield stage_of_module
    stage_of_module.delete_new_job()


@contextlib.contextmanager
def short_timeout() -> Iterator[None]:
    """Reduce the timeout of responses. Another test measures the actual one."""
    with mock.patch("chunkq.queue.backends.rq.connect.ANSWER_SECONDS", 0.2):
        yield


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """Yield a port that does not respond to connection requests."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        with socket.create_connection(listener.getsockname()):  # fills the backlog
            yield listener.getsockname()[1]


@contextlib.contextmanager
def answering_port(answer: bytes) -> Iterator[int]:
    """Yield a port of a server that sends `answer` to every request; b"" sends nothing."""

    def respond(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(1 << 16):
                connection.sendall(answer)

    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=respond, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@dataclass(frozen=True)
class State:
    """An unusable queue: its address, and the code and fragments of the error."""

    name: str
    url: Callable[[Servers, contextlib.ExitStack], str]
    code: ErrorCode
    fragments: tuple[str, ...]
    commands: tuple[str, ...] = COMMANDS
    writes: bool = field(default=False)
    """Whether the job folder may be created before the error is detected."""


STATES = (
    State(
        "nothing listens",
        lambda servers, stack: f"redis://:{CODED}@127.0.0.1:{free_port()}/0",
        ErrorCode.QUEUE_UNAVAILABLE,
        ("127.0.0.1", "Connection refused"),
    ),
    State(
        "the host name is wrong",
        lambda servers, stack: f"redis://:{CODED}@no-such-host.invalid:6379/0",
        ErrorCode.QUEUE_UNAVAILABLE,
        ("no-such-host.invalid",),
    ),
    State(
        "no packet is returned",
        lambda servers, stack: f"redis://:{CODED}@127.0.0.1:{stack.enter_context(black_hole())}",
        ErrorCode.QUEUE_UNAVAILABLE,
        ("Timeout",),
    ),
    State(
        "the server never responds",
        lambda servers, stack: (
            f"redis://:{CODED}@127.0.0.1:{stack.enter_context(answering_port(b''))}"
        ),
        ErrorCode.QUEUE_UNAVAILABLE,
        ("Timeout",),
    ),
    State(
        "the server is not Redis",
        lambda servers, stack: "redis://:{}@127.0.0.1:{}".format(
            CODED, stack.enter_context(answering_port(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
        ),
        ErrorCode.QUEUE_UNAVAILABLE,
        ("HTTP/1.1 400 Bad Request",),
    ),
    State(
        "the server is loading",
        lambda servers, stack: "redis://127.0.0.1:{}".format(
            stack.enter_context(
                answering_port(b"-LOADING Redis is loading the dataset in memory\r\n")
            )
        ),
        ErrorCode.QUEUE_BUSY,
        ("loading the dataset",),
    ),
    State(
        "the password is wrong",
        lambda servers, stack: f"redis://{servers.address(password=CODED + 'x')}",
        ErrorCode.QUEUE_DENIED,
        ("redis://user:password@host",),
    ),
    State(
        "the user is unknown",
        lambda servers, stack: f"redis://{servers.address(user='nobody')}",
        ErrorCode.QUEUE_DENIED,
        ("redis://user:password@host",),
    ),
    State(
        "the password is missing",
        lambda servers, stack: f"redis://127.0.0.1:{servers.guarded.settings.port}/0",
        ErrorCode.QUEUE_DENIED,
        ("redis://:password@host",),
    ),
    State(
        "the user may only ping",
        lambda servers, stack: f"redis://{servers.address(user='pinger')}",
        ErrorCode.QUEUE_DENIED,
        ("rq:* and chunkq:*",),
        writes=True,
    ),
    State(
        "the user may only read",
        lambda servers, stack: f"redis://{servers.address(user='reader')}",
        ErrorCode.QUEUE_DENIED,
        ("rq:* and chunkq:*",),
        WRITING,
        writes=True,
    ),
    State(
        "the keys are not the user's",
        lambda servers, stack: f"redis://{servers.address(user='stranger')}",
        ErrorCode.QUEUE_DENIED,
        ("rq:* and chunkq:*",),
        writes=True,
    ),
    State(
        "the port uses TLS",
        lambda servers, stack: f"redis://{servers.address(port=servers.tls_port)}",
        ErrorCode.QUEUE_UNAVAILABLE,
        ("rediss://",),
    ),
    State(
        "the port does not use TLS",
        lambda servers, stack: f"rediss://{servers.address()}",
        ErrorCode.QUEUE_UNAVAILABLE,
        ("TLS", "redis://"),
    ),
    State(
        "the certificate is not trusted",
        lambda servers, stack: f"rediss://{servers.address(port=servers.tls_port)}",
        ErrorCode.QUEUE_UNAVAILABLE,
        ("TLS", "self-signed certificate", "?ssl_ca_certs=FILE"),
    ),
    State(
        "the certificate is another host's",
        lambda servers, stack: (
            f"rediss://{servers.address(host='localhost', port=servers.tls_port)}"
            f"?ssl_ca_certs={servers.certificate}"
        ),
        ErrorCode.QUEUE_UNAVAILABLE,
        ("TLS", "not valid for 'localhost'"),
    ),
    State(
        "the authority's file is missing",
        lambda servers, stack: (
            f"rediss://{servers.address(port=servers.tls_port)}?ssl_ca_certs=/nowhere/ca.pem"
        ),
        ErrorCode.QUEUE_ADDRESS_INVALID,
        ("ssl_ca_certs: ", "/nowhere/ca.pem"),
    ),
    State(
        "the server is a replica",
        lambda servers, stack: servers.replica.url,
        ErrorCode.QUEUE_READ_ONLY,
        ("read-only", "primary"),
        WRITING,
        writes=True,
    ),
    State(
        "the socket is missing",
        lambda servers, stack: "unix:///nowhere/redis.sock",
        ErrorCode.QUEUE_UNAVAILABLE,
        ("/nowhere/redis.sock", "No such file"),
    ),
    State(
        "the socket needs a password",
        lambda servers, stack: f"unix://{servers.socket}?password={CODED}x",
        ErrorCode.QUEUE_DENIED,
        ("?password=***",),
    ),
)
CASES = [
    pytest.param(state, command, id=f"{state.name}-{command}")
    for state in STATES
    for command in state.commands
]
every_state = pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)


@pytest.mark.parametrize(("state", "command"), CASES)
def test_an_unusable_queue_is_an_error_of_one_line(
    state: State, command: str, stage: Stage, servers: Servers
) -> None:
    with contextlib.ExitStack() as stack, short_timeout():
        check = stage.assert_refused if state.writes else stage.assert_refused_without_writes
        check(command, state.url(servers, stack), state.code, *state.fragments)


@every_state
def test_status_reports_the_ledger_and_the_problem_of_the_queue(
    state: State, stage: Stage, servers: Servers
) -> None:
    before = everything_below(stage.folder)
    with contextlib.ExitStack() as stack, short_timeout():
        queue = ("--queue", state.url(servers, stack))
        text = stage.workspace.call("status", stage.failing, *queue).ok()
        answer = stage.workspace.call("status", stage.failing, "--json", *queue).ok()
    status = json.loads(answer.out)
    assert (status["chunks"], status["done"], len(status["failures"])) == (4, 0, 1)
    assert "0/4 chunks done" in text.out
    assert "no such voxel" in text.out
    assert text.err + answer.err == ""
    assert SECRET not in text.out + answer.out
    assert everything_below(stage.folder) == before
    if state.name == "the server is a replica":  # which supports reads
        assert (status["queue_problem"], status["queued"]) == (None, 0)
        return
    problem = status["queue_problem"]
    assert problem.startswith("queue: ")
    assert len(problem.splitlines()) == 1
    assert all(fragment in problem for fragment in state.fragments), problem
    assert "".join(problem.split()) in "".join(text.out.split())
    assert (status["queued"], status["running"], status["failed"]) == (None, None, None)


@pytest.mark.parametrize("command", ["status", "jobs"])
def test_a_user_who_may_not_run_scripts_cannot_list_jobs(
    command: str, stage: Stage, servers: Servers
) -> None:
    admin = ("--queue", f"redis://{servers.address()}")
    stage.workspace.call("produce", "new.json", *admin).ok()
    reader = f"redis://{servers.address(user='reader')}"
    try:
        stage.assert_refused(command, reader, ErrorCode.QUEUE_DENIED, "scripts")
    finally:
        stage.workspace.call("cancel", stage.folder / "new.zarr", *admin).ok()


@pytest.mark.parametrize("server", ["a user that may only read", "a replica"])
def test_a_worker_ends_immediately_if_it_may_not_write(
    server: str, stage: Stage, servers: Servers
) -> None:
    reader = f"redis://{servers.address(user='reader')}"
    url = servers.replica.url if server == "a replica" else reader
    with stage.workspace.start(*stage.arguments("work"), CHUNKQ_QUEUE=url) as cli:
        try:
            result = cli.wait(MAX_PROCESS_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the worker still runs: {cli.output()}")
    errors = [line for line in result.messages if line.startswith("chunkq: queue: ")]
    assert (result.code, len(errors)) == (1, 1), result.err
    assert SECRET not in result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reports_an_unreachable_queue_within_seconds(
    command: str, stage: Stage
) -> None:
    url = f"redis://:{CODED}@127.0.0.1:{free_port()}/0"
    start = time.monotonic()
    answer = stage.workspace.run(*stage.arguments(command), CHUNKQ_QUEUE=url)
    assert time.monotonic() - start < MAX_PROCESS_SECONDS
    answer.refused(1, ErrorCode.QUEUE_UNAVAILABLE, "Connection refused")
    assert (answer.out, len(answer.err.splitlines())) == ("", 1)


def test_run_connects_to_the_queue_before_it_checks_the_model(stage: Stage) -> None:
    with mock.patch("chunkq_producer.worker_command.WorkerCommand.check") as check_model:
        queue = f"redis://127.0.0.1:{free_port()}/0"
        stage.workspace.call(*stage.arguments("run"), "--queue", queue).refused(
            1, ErrorCode.QUEUE_UNAVAILABLE, "Connection refused"
        )
    check_model.assert_not_called()


def test_a_silent_server_is_reported_within_five_seconds(servers: Servers) -> None:
    def seconds_until_refused(url: str) -> float:
        start = time.monotonic()
        with pytest.raises(QueueError, match="Timeout"):
            open_executor(url)
        return time.monotonic() - start

    with black_hole() as unreachable, answering_port(b"") as silent, ThreadPoolExecutor() as pool:
        urls = (f"redis://127.0.0.1:{unreachable}", f"redis://127.0.0.1:{silent}")
        no_tls = f"rediss://{servers.address()}"
        assert max(pool.map(seconds_until_refused, (*urls, no_tls))) < MAX_CALL_SECONDS


# Invalid addresses, and passwords that are not encoded.


@pytest.mark.parametrize("command", ["produce", "jobs"])
@pytest.mark.parametrize(
    "url",
    [
        "redis://host:notaport",
        "redis://127.0.0.1:99999",
        "redis://[::1",
        "redis://127.0.0.1:1/myqueue",
        "redis://127.0.0.1:1/0?socket_timeout=soon",
        "redis://127.0.0.1:1/0?color=red",
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
def test_the_error_for_an_invalid_address_shows_the_expected_form(
    url: str, command: str, stage: Stage
) -> None:
    form = "redis://[user:password@]host[:port]"
    stage.assert_refused_without_writes(
        command, url, ErrorCode.QUEUE_ADDRESS_INVALID, form, "%-codes"
    )


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
def test_the_error_for_an_unknown_scheme_does_not_show_the_password(url: str, stage: Stage) -> None:
    answer = stage.workspace.call("jobs", "--queue", url)
    answer.refused(2, ErrorCode.QUEUE_ADDRESS_INVALID, "redis://")
    assert SECRET not in answer.err


# Supported servers and addresses.


@pytest.mark.parametrize("password", ["", PASSWORD])
def test_a_unix_socket_is_supported(password: str, stage: Stage, tmp_path: Path) -> None:
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
    assert not files_with_secret(stage.folder)


@pytest.mark.parametrize("password", ["s3cr3t+~!$&'()*,;=", "s3cr3t@s3cr3t", "s3cr3t:s3cr3t"])
def test_a_password_without_encoding_works_and_is_not_shown(password: str, stage: Stage) -> None:
    with redis_server(password) as server:
        answer = stage.workspace.call("produce", "new.json", "--queue", server.url).ok()
    assert "4 newly queued" in answer.out
    assert SECRET not in answer.out + answer.err
    assert not files_with_secret(stage.folder)


def test_a_job_over_tls_does_not_reveal_the_password(
    servers: Servers, standard_job: StandardJob, tmp_path: Path
) -> None:
    host = servers.address(port=servers.tls_port)
    url = f"rediss://{host}?ssl_ca_certs={servers.certificate}"
    workspace = standard_job.workspace(tmp_path, url=url)
    outputs = []
    command = ("run", str(workspace.job_file), "--gpus", "none", "-w", "1")
    with workspace.start(*command, NET_HOLD="forward", NET_AFTER="5") as cli:
        worker = workspace.wait_until_stopped()
        assert worker in cli.children()
        pids = [cli.process.pid, *cli.known]
        outputs += [" ".join(psutil.Process(pid).cmdline()) for pid in pids]
        for arguments in (("status",), ("jobs",), ("status", str(workspace.output), "--json")):
            answer = workspace.call(*arguments)
            assert answer.code == 0, answer.err
            outputs.append(answer.out + answer.err)
        workspace.open_gate()
        assert cli.wait().code == 0, cli.output()
    assert "complete: " in cli.output()
    for arguments in (
        ("produce", str(workspace.job_file), "--resume"),
        ("cancel", str(workspace.output)),
    ):
        answer = workspace.call(*arguments)
        assert answer.code == 0, answer.err
        outputs.append(answer.out + answer.err)
    assert "queue" not in json.loads((workspace.job_folder / "job.json").read_text())["job"]
    assert (workspace.epoch_folder / "report.json").exists()
    assert SECRET not in "\n".join(outputs)
    assert not files_with_secret(tmp_path)


# A full server.


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


def test_produce_on_a_full_redis_fails_and_resume_queues_the_rest(
    stage: Stage, own_redis: RedisServer
) -> None:
    queue = ("--queue", own_redis.url)
    write_zarr(stage.folder / "large.zarr", random_volume((480, 480)), (240, 240))
    job = stage.workspace.write_job(
        "large.json", input="large.zarr", output="new.zarr", chunksize=[8, 8]
    )
    with own_redis.client as client:
        # 1 MB more than an empty server uses.
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 1_000_000)
        answer = stage.workspace.call("produce", job, *queue)
        answer.refused(1, ErrorCode.QUEUE_FULL, "maxmemory", "chunkq produce --resume")
        assert len(answer.err.splitlines()) == 1, answer.err
        status = json.loads(
            stage.workspace.call("status", stage.folder / "new.zarr", "--json", *queue).ok().out
        )
        assert 0 < status["queued"] < status["chunks"] == 3600
        client.config_set("maxmemory", 0)
        answer = stage.workspace.call("produce", job, "--resume", *queue).ok()
        assert f"3600 chunks, 0 done, {3600 - status['queued']} newly queued" in answer.out
        (name,) = client.keys("rq:queue:*")
        assert len(set(client.lrange(name, 0, -1))) == client.llen(name) == 3600


def test_jobs_on_a_full_redis_can_be_cancelled(stage: Stage, own_redis: RedisServer) -> None:
    queue = ("--queue", own_redis.url)
    stage.workspace.call("produce", "new.json", *queue).ok()
    with own_redis.client as client:
        client.config_set("maxmemory", "100kb")
        stage.assert_refused("finalize", own_redis.url, ErrorCode.QUEUE_FULL, "maxmemory")
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

        def reports_full_queue() -> bool:
            return "maxmemory" in cli.output()

        wait_until(lambda: reports_full_queue() or cli.process.poll() is not None, "it ends")
        assert not reports_full_queue(), cli.output()
        assert cli.wait().code == 0
    assert len(workspace.done()) == 24


# Errors with other causes.


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_a_job_outside_allow_is_rejected_and_stays_on_the_queue(
    quiet: tuple[str, ...], stage: Stage, redis: RedisServer
) -> None:
    stage.workspace.call("produce", "new.json", "--queue", redis.url).ok()
    allowed = stage.folder / "new.zarr.chunkq-not"
    work = (*stage.arguments("work"), "--allow", allowed, *quiet)
    with stage.workspace.start(*work, CHUNKQ_QUEUE=redis.url) as cli:
        result = cli.wait(60)
    errors = [line for line in result.err.splitlines() if "CHUNKQ_ALLOW" in line]
    assert (result.code, len(errors)) == (1, 1), result.err
    assert errors[0].startswith("chunkq: "), result.err
    assert str(allowed) in errors[0]
    assert f"--allow {stage.folder}" in errors[0]
    assert "Traceback" not in result.err
    with contextlib.closing(open_executor(redis.url)) as executor:
        [counts] = jobs_at(executor, str(stage.folder / "new.zarr.chunkq")).values()
    assert (counts.queued, counts.running, counts.failed) == (4, 0, 0)


def test_the_error_for_a_missing_package_names_the_extra(stage: Stage) -> None:
    hide = "import sys; sys.modules['rq'] = None; from chunkq.cli import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", hide, "jobs", "--queue", f"redis://:{CODED}@127.0.0.1"],
        env=stage.workspace.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == ""
    CommandResult(result.returncode, result.stdout, result.stderr).refused(
        1, ErrorCode.PACKAGE_MISSING, "redis://", "package rq", install_command("redis")
    )
    assert len(result.stderr.splitlines()) == 1
