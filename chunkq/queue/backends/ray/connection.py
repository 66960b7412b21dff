"""Connection of a process to a Ray cluster, and the address of the cluster."""

from __future__ import annotations

import logging
import os
import socket
import threading
from dataclasses import dataclass
from typing import ClassVar, Self
from urllib.parse import parse_qs, urlsplit

import ray
from ray._private import worker as driver
from ray._private.services import get_ray_address_from_environment

from chunkq.errors import ErrorCode, JobError
from chunkq.queue.backends.ray.head import own_cluster_has_died

log = logging.getLogger("chunkq.queue")

NAMESPACE = "chunkq"
CONNECT_SECONDS = 5.0
ABORT_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
ABORT_SECONDS = 3600
"""Time for which Ray tolerates that a head is away, then it aborts the process; by default 60 s."""
CLIENT_TRIES = 3
"""Attempts to connect with `ray://HOST:PORT`."""
CLIENT_SERVER_ERROR = "client/server/proxier.py"
"""Part of the error of Ray when the server process that it started for a client died."""


@dataclass(frozen=True)
class Address:
    """Address of a cluster: `ray://auto` on its machines, `ray://HOST:10001` on other machines.

    `ray://auto?address=HOST:6379` selects one of several clusters on this machine.
    """

    text: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parse the URL of a queue. Raises JobError if it is invalid."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            options = parse_qs(parts.query)
        except ValueError:
            host, port, options = None, None, {}
        if url.rstrip("/") == "ray:":
            raise JobError(
                "queue: ray:// has no host; use ray://auto or ray://HOST:10001 for a running "
                "cluster, or `chunkq run` to start a temporary one",
                code=ErrorCode.QUEUE_ADDRESS_INVALID,
            )
        if host == "auto" and port is None and not options.keys() - {"address"}:
            return cls(options.get("address", ["auto"])[0])
        if host is None or port is None or options:
            raise JobError(
                f"queue: {url}: invalid address; use ray://auto on a machine of the Ray cluster, "
                "or ray://HOST:10001",
                code=ErrorCode.QUEUE_ADDRESS_INVALID,
            )
        return cls(f"ray://{host}:{port}")


class Connection:
    """Connection to a Ray cluster, shared by all executors of a process: Ray allows one only."""

    _lock = threading.Lock()
    _users: ClassVar[int] = 0
    _address: ClassVar[str | None] = None

    @classmethod
    def open(cls, address: str) -> None:
        """Connect unless connected. Raises OSError, RuntimeError or ValueError."""
        with cls._lock:
            if not ray.is_initialized():
                _check_listening(address)
                _connect(address)
                cls._address = address
            elif cls._address not in (None, address):
                raise ValueError(f"this process is connected to {cls._address} already")
            cls._users += 1

    @classmethod
    def close(cls) -> None:
        """Disconnect when the last executor closes, unless another library connected."""
        with cls._lock:
            cls._users -= 1
            if not cls._users and cls._address is not None:
                cls._address = None
                ray.shutdown()

    @classmethod
    def check(cls) -> None:
        """Raise OSError if the head of the cluster does not listen. Ray would wait for it."""
        if own_cluster_has_died():
            raise ConnectionError("the head that this run started has ended")
        if cls._address is not None:
            _check_listening(cls._address)


def _check_listening(address: str) -> None:
    """Raise OSError if no server listens at an address. Ray itself would retry for minutes."""
    resolved = get_ray_address_from_environment(address, None) if address == "auto" else address
    host, _, port = (resolved or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def _discard_events() -> None:
    """Do not print what Ray publishes to its clients, such as the log of a node that has ended.

    It would be in the output of a command, which reports what concerns its user.
    """
    driver.print_to_stdstream = lambda data, ignore_prefix: None


def _connect(address: str) -> None:
    """Connect this process; retry if the server process that Ray starts for it crashes.

    Ray forks that server from a process with active gRPC threads, so it sometimes crashes.
    """
    os.environ.setdefault(ABORT_VARIABLE, str(ABORT_SECONDS))
    _discard_events()
    for remaining in reversed(range(CLIENT_TRIES)):
        try:
            ray.init(
                address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
        except ConnectionAbortedError as error:
            if not remaining or CLIENT_SERVER_ERROR not in str(error):
                raise
            log.warning("Ray failed to start its server for this process; retrying")
        else:
            return
