"""`chunkq redis`."""

from __future__ import annotations

import fcntl
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import click
import platformdirs

from chunkq.errors import ErrorCode, QueueError
from chunkq.executors import QUEUE_VARIABLE, credentials, open_executor
from chunkq.executors.rq.connect import PASSWORD_VARIABLE
from chunkq.executors.rq.server import Server, find_server
from chunkq.private_files import (
    is_private,
    is_replaceable_by_others,
    make_private_folder,
    write_private,
)

START_SECONDS = 10.0


@click.command()
@click.option("--port", default=6379, show_default=True, type=click.IntRange(1, 65535))
@click.option(
    "--bind", default="127.0.0.1", show_default=True,
    help="Address to listen on; 0.0.0.0 lets other machines in, with the password.",
)  # fmt: skip
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path),
    help="Where the queue is kept; default: redis in the user's state folder.",
)  # fmt: skip
def redis(port: int, bind: str, folder: Path | None) -> None:
    """Start a Redis server for a queue, until Ctrl-C; what is queued stays in its folder.

    For a laptop or a login node without a Redis of its own. Other users need its password.
    """
    program = find_server()
    place = (folder or platformdirs.user_state_path("chunkq") / "redis").absolute()
    _prepare_folder(place)
    _refuse_taken(bind, port)
    with _locked(place) as lock:
        server = Server(place, port, bind, _password(place))
        host = _host(bind)
        write_private(place / "url", server.url(host) + "\n")
        for name in _names(bind, host):
            credentials.store_secret("redis", name, port, server.password or "")
        code, stopped = _serve(server, program, lock, host)
    if code and not stopped:
        raise QueueError(f"the Redis server ended with code {code}; {_log(place)} says why")
    sys.exit(0)


def _serve(server: Server, program: str, lock: int, host: str) -> tuple[int, bool]:
    """Run a server until it ends; returns its exit code, and whether a signal has stopped it."""
    log = _log(server.folder)
    stopped = threading.Event()
    processes: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        for process in processes:
            process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
        process = server.start(program, output.fileno(), keep=[lock])
    processes.append(process)
    try:
        if stopped.is_set():
            process.terminate()
        _wait_for_answer(server, process.poll, log, stopped)
        if not stopped.is_set():
            for line in _greeting(server, host):
                click.echo(line)
        code = process.wait()
    finally:
        process.terminate()
        process.wait()
    return code, stopped.is_set()


def _greeting(server: Server, host: str) -> list[str]:
    lines = [
        f"Redis on {server.bind}, port {server.port}, kept in {server.folder}; Ctrl-C stops it, "
        "the queue stays"
    ]
    if not credentials.is_loopback(server.bind):
        lines.append(
            "on machines that do not share this home folder: set "
            f"{PASSWORD_VARIABLE} to a copy of {server.folder / 'password'}"
        )
    return [*lines, f"next: export {QUEUE_VARIABLE}={server.url(host, secret=False)}"]


def _log(place: Path) -> Path:
    return place / "redis.log"


def _prepare_folder(place: Path) -> None:
    """Create the folder; refuse one into which other users could put a password of theirs."""
    try:
        make_private_folder(place)
        exposed = is_replaceable_by_others(place)
    except OSError as error:
        raise QueueError(f"--folder: {place} cannot be made: {error.strerror}") from None
    if exposed:
        raise QueueError(
            f"--folder: other users can write to {place}, which holds the queue and its password; "
            f"run `chmod 700 {shlex.quote(str(place))}`, or choose another --folder",
            code=ErrorCode.QUEUE_DENIED,
        )


def _names(bind: str, host: str) -> set[str]:
    """Return the names under which this user's commands reach a server that listens on `bind`."""
    return {host, bind} if host == bind else {host, "127.0.0.1", "::1"}


def _host(bind: str) -> str:
    """Return the name under which others reach a server that listens on `bind`."""
    if bind not in ("0.0.0.0", "::", "*"):
        return bind
    name = socket.getfqdn()
    return socket.gethostname() if name.partition(".")[0] == "localhost" else name


@contextmanager
def _locked(place: Path) -> Iterator[int]:
    """Hold the folder: two servers writing one file would spoil it. Yields the descriptor."""
    lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    except BlockingIOError:
        raise QueueError(
            f"--folder: another Redis keeps its queue in {place}; use that one "
            f"(its address is in {place / 'url'}), or choose another --folder"
        ) from None
    finally:
        os.close(lock)


def _refuse_taken(bind: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port))
        except OSError as error:
            raise QueueError(
                f"cannot listen on {bind}, port {port}: {error.strerror or error}; if a Redis "
                "runs there already, use it, else choose another --port"
            ) from None


def _password(place: Path) -> str:
    """Return the folder's password; made at the first start, and where others could read it."""
    file = place / "password"
    with suppress(FileNotFoundError):
        if is_private(file) and (password := file.read_text().strip()):
            return password
    password = secrets.token_hex(24)
    write_private(file, password + "\n")
    return password


def _wait_for_answer(
    server: Server, ended: Callable[[], int | None], log: Path, stopped: threading.Event
) -> None:
    limit = time.monotonic() + START_SECONDS
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.bind, server.bind)
    while not stopped.is_set():
        try:
            open_executor(server.url(host)).close()
            return
        except QueueError:
            if stopped.is_set():
                return
            if ended() is not None:
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise QueueError(f"the Redis server does not start: {''.join(last)}") from None
            if time.monotonic() > limit:
                raise QueueError(f"the Redis server does not answer; {log} says why") from None
            time.sleep(0.1)
