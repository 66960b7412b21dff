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
from typing import TYPE_CHECKING

import click

from chunkq.errors import ErrorCode, QueueError
from chunkq.queue.backends import credentials
from chunkq.queue.registry import QUEUE_VARIABLE, load_backend, open_executor
from chunkq.system.private_files import (
    is_private,
    is_replaceable_by_others,
    make_private_folder,
    write_private,
)

if TYPE_CHECKING:
    from chunkq.queue.backends.rq.server import Server
from chunkq.system.standard_output import print_text
from chunkq.system.user_folders import state_folder

START_SECONDS = 10.0
"""Seconds within which a new server must accept connections."""


@click.command()
@click.option("--port", default=6379, show_default=True, type=click.IntRange(1, 65535))
@click.option(
    "--bind", default="127.0.0.1", show_default=True,
    help="Address to listen on; 0.0.0.0 accepts other machines, which need the password.",
)  # fmt: skip
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the queue (default: redis in the user's state folder).",
)  # fmt: skip
def redis(port: int, bind: str, folder: Path | None) -> None:
    """Run a Redis server for a queue until Ctrl-C. The queue is stored in a folder.

    Intended for laptops and login nodes that have no Redis server. The server has a password.
    """
    load_backend("redis")
    from chunkq.queue.backends.rq.server import Server, find_server  # needs the extra redis

    program = find_server()
    folder = (folder or state_folder() / "redis").absolute()
    _prepare_folder(folder)
    _check_port(bind, port)
    with _locked(folder) as lock:
        server = Server(folder, port, bind, _password(folder))
        host = _host(bind)
        write_private(folder / "url", server.url(host) + "\n")
        for name in _names(bind, host):
            credentials.store_secret("redis", name, port, server.password or "")
        code, stopped = _run_server(server, program, lock, host)
    if code and not stopped:
        raise QueueError(f"redis: the server ended with exit code {code}; see {_log(folder)}")
    sys.exit(0)


def _run_server(server: Server, program: str, lock: int, host: str) -> tuple[int, bool]:
    """Run a server until it ends; return its exit code and whether a signal stopped it."""
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
        _wait_until_ready(server, process.poll, log, stopped)
        if not stopped.is_set():
            for line in _startup_lines(server, host):
                print_text(line)
        code = process.wait()
    finally:
        process.terminate()
        process.wait()
    return code, stopped.is_set()


def _startup_lines(server: Server, host: str) -> list[str]:
    """Return what the command prints as soon as the server is ready."""
    lines = [
        f"Redis on {server.bind}, port {server.port}, data in {server.folder}; press Ctrl-C to "
        "stop it, the queue is kept"
    ]
    if not credentials.is_loopback(server.bind):
        from chunkq.queue.backends.rq.connect import PASSWORD_VARIABLE

        lines.append(
            f"on machines without this home folder: set {PASSWORD_VARIABLE} to a copy of "
            f"{server.folder / 'password'}"
        )
    return [*lines, f"next: export {QUEUE_VARIABLE}={server.url(host, secret=False)}"]


def _log(folder: Path) -> Path:
    return folder / "redis.log"


def _prepare_folder(folder: Path) -> None:
    """Create the folder. Raises QueueError if other users could replace its password."""
    try:
        make_private_folder(folder)
        exposed = is_replaceable_by_others(folder)
    except OSError as error:
        raise QueueError(
            f"--folder: {folder} cannot be created: {error.strerror}; choose another folder"
        ) from None
    if exposed:
        raise QueueError(
            f"--folder: other users can write to {folder}, which contains the queue and its "
            f"password; run `chmod 700 {shlex.quote(str(folder))}` or choose another folder",
            code=ErrorCode.QUEUE_DENIED,
        )


def _names(bind: str, host: str) -> set[str]:
    """Return the host names under which local commands reach a server that listens on `bind`."""
    return {host, bind} if host == bind else {host, "127.0.0.1", "::1"}


def _host(bind: str) -> str:
    """Return the host name under which other machines reach a server that listens on `bind`."""
    if bind not in ("0.0.0.0", "::", "*"):
        return bind
    name = socket.getfqdn()
    return socket.gethostname() if name.partition(".")[0] == "localhost" else name


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Lock the folder, since two servers would corrupt its file; yield the file descriptor."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    except BlockingIOError:
        raise QueueError(
            f"--folder: another Redis server is using {folder}; use that server (its address is "
            f"in {folder / 'url'}) or choose another folder"
        ) from None
    finally:
        os.close(lock)


def _check_port(bind: str, port: int) -> None:
    """Raise QueueError if the port cannot be listened on."""
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((bind, port))
        except OSError as error:
            raise QueueError(
                f"redis: cannot listen on {bind}, port {port}: {error.strerror or error}; use "
                "the Redis server that runs there or choose another --port"
            ) from None


def _password(folder: Path) -> str:
    """Return the folder's password. Create one if it is missing or readable by other users."""
    file = folder / "password"
    with suppress(FileNotFoundError):
        if is_private(file) and (password := file.read_text().strip()):
            return password
    password = secrets.token_hex(24)
    write_private(file, password + "\n")
    return password


def _wait_until_ready(
    server: Server, exit_code: Callable[[], int | None], log: Path, stopped: threading.Event
) -> None:
    """Wait until the server accepts connections or a signal stops it. Raises QueueError."""
    deadline = time.monotonic() + START_SECONDS
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.bind, server.bind)
    while not stopped.is_set():
        try:
            open_executor(server.url(host)).close()
            return
        except QueueError:
            if stopped.is_set():
                return
            if exit_code() is not None:
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise QueueError(f"redis: the server cannot start: {''.join(last)}") from None
            if time.monotonic() > deadline:
                raise QueueError(
                    f"redis: no answer from the server within {START_SECONDS:g} s; see {log}"
                ) from None
            time.sleep(0.1)
