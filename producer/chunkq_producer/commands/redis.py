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
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click
import platformdirs

from chunkq.errors import QueueError
from chunkq.executors import QUEUE_VARIABLE, open_executor
from chunkq.executors.rq.server import Server, find_server

START_SECONDS = 10.0


@click.command()
@click.option("--port", default=6379, show_default=True, type=click.IntRange(1, 65535))
@click.option(
    "--bind", default="127.0.0.1", show_default=True,
    help="Address to listen on; 0.0.0.0 lets other machines in, with a password made for it.",
)  # fmt: skip
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path),
    help="Where the queue is kept; default: redis in the user's state folder.",
)  # fmt: skip
def redis(port: int, bind: str, folder: Path | None) -> None:
    """Start a Redis server for a queue, until Ctrl-C; what is queued stays in its folder.

    For a laptop or a login node without a Redis of its own.
    """
    program = find_server()
    place = (folder or platformdirs.user_state_path("chunkq") / "redis").absolute()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QueueError(f"--folder: {place} cannot be made: {error.strerror}") from None
    _refuse_taken(bind, port)
    server = Server(place, port, bind)
    if not server.is_local:
        server = Server(place, port, bind, _password(place))
    with _locked(place) as lock:
        address = server.url(_host(bind))
        file = _write_secret(place / "url", address)
        log = place / "redis.log"
        stopped = threading.Event()
        processes: list[subprocess.Popen[bytes]] = []

        def stop(number: int, frame: FrameType | None) -> None:
            stopped.set()
            for process in processes:
                process.terminate()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, stop)
        with log.open("ab") as output:
            process = server.start(program, output.fileno(), keep=[lock])
        processes.append(process)
        try:
            if stopped.is_set():
                process.terminate()
            _wait_for_answer(server, process.poll, log, stopped)
            if not stopped.is_set():
                shown = f"$(cat {shlex.quote(str(file))})" if server.password else address
                click.echo(
                    f"Redis on {bind}, port {port}, kept in {place}; Ctrl-C stops it, the queue "
                    "stays"
                )
                click.echo(f"next: export {QUEUE_VARIABLE}={shown}")
            code = process.wait()
        finally:
            process.terminate()
            process.wait()
    if code and not stopped.is_set():
        raise QueueError(f"the Redis server ended with code {code}; {log} says why")
    sys.exit(0)


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
    """Return the folder's password, made at the first start."""
    file = place / "password"
    if not file.exists():
        _write_secret(file, secrets.token_hex(24))
    return file.read_text().strip()


def _write_secret(file: Path, text: str) -> Path:
    """Write a file that only its owner can read."""
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(text + "\n")
    return file


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
