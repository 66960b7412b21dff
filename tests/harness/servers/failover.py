"""Two Redis servers behind one address: a primary and its replica, whose roles a test exchanges."""

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis

from chunkq.queue.backends.rq.server import permissions
from tests.harness.servers.redis import ADMIN, RedisServer
from tests.harness.waiting import wait_until

PASSWORD = "first"
"""Password of the users at the start. That of the administrator is never changed."""
DISK = "64m"


class ForwardedPort:
    """A port of 127.0.0.1 that forwards connections, like the address that follows a primary."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def point_to(self, target: int) -> None:
        """Forward to another port, and close the connections to the old one."""
        self.target = target
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.point_to(0)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._forward, args=[client], daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            server = socket.create_connection(("127.0.0.1", self.target))
            with server:
                ends = {client, server}
                self._open |= ends
                back = threading.Thread(target=_copy, args=(server, client), daemon=True)
                back.start()
                _copy(client, server)
                back.join()
                self._open -= ends


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class RedisPair:
    """Two servers with their data on small disks, and the port that leads to the primary."""

    def __init__(self, folders: tuple[Path, Path]) -> None:
        extra = f"masteruser {ADMIN}\nmasterauth {PASSWORD}\n"
        self.primary, self.replica = (RedisServer(folder, PASSWORD, extra) for folder in folders)
        self._password = PASSWORD
        for server in (self.primary, self.replica):
            server.start()
        self.follow()
        self._entry = ForwardedPort(self.primary.settings.port)

    @property
    def url(self) -> str:
        """The address without the password."""
        return f"redis://127.0.0.1:{self._entry.port}/0"

    def follow(self) -> None:
        """Make the replica follow the primary; wait until it has its data."""
        with self.replica.client as client:
            client.replicaof("127.0.0.1", self.primary.settings.port)
            wait_until(
                lambda: client.info("replication")["master_link_status"] == "up", "it follows"
            )

    def restart_primary(self) -> None:
        self.primary.start()
        self.set_password(self._password)

    def detach(self) -> None:
        """Let the replica get no more data, as one that lags."""
        with self.replica.client as client:
            client.replicaof("no", "one")

    def promote(self) -> None:
        """Make the replica the primary, after the primary was killed."""
        with self.replica.client as client:
            client.replicaof("no", "one")
        self.primary, self.replica = self.replica, self.primary
        self._entry.point_to(self.primary.settings.port)

    def restart_replica(self) -> None:
        self.replica.start()
        self.set_password(self._password)
        self.follow()

    def point_to_replica(self) -> None:
        """Let the address lead to the replica, as in the first seconds after a failover."""
        self._entry.point_to(self.replica.settings.port)

    def exchange(self) -> None:
        """Exchange the roles without losing a write."""
        with self.primary.client as client, self.replica.client as other:
            client.execute_command("FAILOVER", "TO", "127.0.0.1", self.replica.settings.port)
            wait_until(lambda: other.info("replication")["role"] == "master", "it is promoted")
            wait_until(
                lambda: client.info("replication").get("master_link_status") == "up", "it follows"
            )
        self.primary, self.replica = self.replica, self.primary
        self._entry.point_to(self.primary.settings.port)

    def set_password(self, password: str) -> None:
        """Change the password of the users on both servers, and disconnect them."""
        self._password = password
        for server in (self.primary, self.replica):
            with server.client as client, suppress(redis.ConnectionError):
                user = ("ACL", "SETUSER", "default", "reset", "on", f">{password}")
                client.execute_command(*user, *permissions().split())
                client.client_kill_filter(user="default")

    def fill_disk(self) -> Path:
        """Fill the primary's disk; return the file to delete."""
        file = self.primary.settings.folder / "full"
        with suppress(OSError), file.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(1 << 16))
                stream.flush()
        return file

    def rewrite_disk(self) -> None:
        """Write the primary's data again. Redis 7.0 may not read a file after a short write."""
        with self.primary.client as client:
            wait_until(
                lambda: client.info("persistence")["aof_last_write_status"] == "ok", "it writes"
            )
            client.bgrewriteaof()
            wait_until(
                lambda: not client.info("persistence")["aof_rewrite_in_progress"], "it is written"
            )

    def close(self) -> None:
        self._entry.close()
        for server in (self.primary, self.replica):
            server.kill()


@contextmanager
def redis_pair(folder: Path) -> Iterator[RedisPair]:
    """Run two servers, each with a small disk of its own, which needs root."""
    folders = (folder / "a", folder / "b")
    mounted = []
    try:
        for one in folders:
            one.mkdir()
            options = ["-t", "tmpfs", "-o", f"size={DISK}", "none", os.fspath(one)]
            subprocess.run(["mount", *options], check=True, timeout=60)
            mounted.append(one)
        pair = RedisPair(folders)
        try:
            yield pair
        finally:
            pair.close()
    finally:
        for one in mounted:
            subprocess.run(["umount", os.fspath(one)], check=True, timeout=60)
