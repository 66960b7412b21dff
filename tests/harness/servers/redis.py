"""A Redis server for tests, on a free loopback port."""

import hashlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from chunkq.errors import QueueError
from chunkq.queue.backends.rq.server import Server, find_server, permissions
from tests.harness.waiting import TIMEOUT


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def server_program() -> str:
    """Return the path of redis-server; without one, skip the test, or fail it in CI."""
    try:
        return find_server()
    except QueueError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


ADMIN = "admin"


def admin_client(url: str) -> redis.Redis:
    """Return a client with all permissions for a test server without a password."""
    return redis.Redis.from_url(url, username=ADMIN, password="any")


class RedisServer:
    """A server with chunkq's settings that can be killed and started again.

    chunkq's commands use the restricted default user. Tests can connect as `ADMIN`.
    """

    def __init__(self, folder: Path, password: str | None = None, extra: str = "") -> None:
        self.settings = Server(folder, free_port(), password=password)
        self._extra = extra
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self.settings.url("127.0.0.1")

    @property
    def client(self) -> redis.Redis:
        """A client with all permissions."""
        return redis.Redis(
            port=self.settings.port,
            username=ADMIN,
            password=self.settings.password or "any",
            protocol=2,  # some tests remove the command HELLO
        )

    @property
    def command(self) -> list[str]:
        """The server's command, which reads its configuration from standard input."""
        return [server_program(), "-"]

    @property
    def configuration(self) -> str:
        """chunkq's configuration, the users, and `extra`."""
        password = self.settings.password
        secret = f"#{hashlib.sha256(password.encode()).hexdigest()}" if password else "nopass"
        users = [f"user {ADMIN} on {secret} ~* &* +@all"]
        if not password:
            users.append(f"user default on nopass {permissions()}")
        return self.settings.configuration() + "\n".join(users) + "\n" + self._extra

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the server, on the same port and data as before; wait until it answers."""
        log = os.open(self.settings.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        os.close(log)
        assert self._process.stdin is not None
        self._process.stdin.write(self.configuration.encode())
        self._process.stdin.close()
        limit = time.monotonic() + TIMEOUT
        while True:
            try:
                with self.client as client:
                    client.ping()
                return
            except redis.RedisError:
                assert self._process.poll() is None, (self.settings.folder / "log").read_text()
                assert time.monotonic() < limit, (self.settings.folder / "log").read_text()
                time.sleep(0.02)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the server and wait until it ends."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(TIMEOUT)
            self._process = None


@contextmanager
def redis_server(password: str | None = None, extra: str = "") -> Iterator[RedisServer]:
    """Run a server in a new folder; stop it at the end. `extra` is added to its configuration."""
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), password, extra)
        server.start()
        try:
            yield server
        finally:
            server.kill()
