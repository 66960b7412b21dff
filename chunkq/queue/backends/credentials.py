"""Secrets of servers that this user has started, stored by the address of the server.

Each secret is a private file in the state folder of the user. Therefore queue URLs in job files,
environment variables and command lines need no password.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from chunkq.errors import ErrorCode, JobError, QueueError
from chunkq.system.private_files import is_private, make_private_folder, write_private
from chunkq.system.user_folders import state_folder


def store_secret(kind: str, host: str, port: int, secret: str) -> Path:
    """Store the secret of a server and return the file. Raises QueueError if it is unwritable."""
    path = _path(kind, host, port)
    try:
        make_private_folder(path.parent)
        return write_private(path, secret + "\n")
    except OSError as error:
        raise QueueError(
            f"queue: {path.parent}: cannot store the password of the server "
            f"({error.strerror or error}); set XDG_STATE_HOME to a folder that you can write to"
        ) from None


def remove_secret(kind: str, host: str, port: int) -> None:
    """Remove the secret of a server that has ended."""
    with suppress(OSError, JobError):
        _path(kind, host, port).unlink()


def find_secret(kind: str, host: str, port: int) -> Path | None:
    """Return the file with the secret of a server, or None if this user has not started one there.

    Raises QueueError if other users can read or replace the file.
    """
    for address in _names(host):
        try:
            path = _path(kind, address, port)
        except JobError:  # a user without folders has stored nothing
            return None
        with suppress(FileNotFoundError, NotADirectoryError):
            if not is_private(path):
                raise QueueError(
                    f"queue: {path}: other users can read or replace this file; remove it, then "
                    "start the server again",
                    code=ErrorCode.QUEUE_DENIED,
                )
            return path
    return None


def require_own_listener(host: str, port: int) -> None:
    """Raise QueueError if only other users' processes listen on a loopback port.

    While the server of a user is down, any other user can listen on its port. The password does
    not authenticate the server, so a worker would run the tasks of that user. Linux only.
    """
    users = _listeners(port) if is_loopback(host) else set()
    if users and os.geteuid() not in users:
        raise QueueError(
            f"queue: {host}:{port}: the server belongs to another user (uid {min(users)}), not to "
            "you; start your server on another port",
            code=ErrorCode.QUEUE_DENIED,
        )


def is_loopback(host: str) -> bool:
    """Return whether a host name is a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _path(kind: str, host: str, port: int) -> Path:
    """Return the file of an address. The name includes this host for loopback addresses."""
    name = f"{socket.gethostname()}_{host}" if is_loopback(host) else host.lower()
    return state_folder() / "credentials" / f"{kind}_{name}_{port}"


def _names(host: str) -> Iterator[str]:
    yield from ("127.0.0.1", "::1") if host == "localhost" else (host,)


def _listeners(port: int) -> set[int]:
    """Return the ids of the users that listen on a TCP port. It is empty where /proc is missing."""
    users = set()
    for name in ("tcp", "tcp6"):
        with suppress(OSError), open(f"/proc/net/{name}", encoding="ascii") as table:
            for fields in map(str.split, islice(table, 1, None)):
                if fields[3] == _TCP_LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    users.add(int(fields[7]))
    return users


_TCP_LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp."""
