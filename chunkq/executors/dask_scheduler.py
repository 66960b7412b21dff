"""A Dask scheduler of one's own, as a process that ends with the one that started it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import distributed
from distributed.utils import get_ip, get_ip_interface

from chunkq.errors import QueueError
from chunkq.executors import credentials
from chunkq.executors.dask import Address, QueuePlugin, check_protocol, silence_dask
from chunkq.executors.dask_tls import load_security
from chunkq.scratch import delete_abandoned


def start_scheduler(
    host: str,
    port: int = 0,
    protocol: str = "tcp",
    interface: str | None = None,
    tls: Path | None = None,
) -> tuple[subprocess.Popen[str], str]:
    """Start a scheduler that listens on `host` or `interface`; port 0 takes a free one.

    `tls` is the file with the cluster's key and certificate, and its folder takes the scheduler's
    files. Without it, whoever reaches the port can run code as this user.

    Returns the process, which ends when its standard input is closed, and the queue's URL.
    Raises QueueError if it does not come up.
    """
    check_protocol(protocol)
    host = local_address(interface) if interface else host
    # Its web server too listens there only: left alone, it takes all interfaces.
    settings = {"host": host, "port": port, "protocol": protocol, "dashboard_address": f"{host}:0"}
    settings |= {"protocol": "tls", "tls": str(tls)} if tls else {}
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    said = process.stdout.readline() if process.stdout is not None else ""
    answer = json.loads(said) if said else {"error": f"ended with code {process.wait()}"}
    if "error" in answer:
        process.communicate()
        raise QueueError(f"queue: no Dask scheduler could be started here: {answer['error']}")
    return process, Address.of(answer["address"], interface, str(tls) if tls else None).url


def local_address(interface: str | None = None) -> str:
    """Return the address by which other nodes reach this one, through an interface if named.

    Raises QueueError if there is no such interface.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # that the Internet is out of reach
            address: str = get_ip_interface(interface) if interface else get_ip()
    except ValueError as error:
        raise QueueError(f"dask_config.interface: {error}") from None
    return address


async def _serve(settings: dict[str, Any]) -> None:
    file = settings.pop("tls", None)
    try:
        security = load_security(file) if file else None
        # Its web pages have no access control.
        changes: dict[str, Any] = {"distributed.scheduler.http.routes": []}
        # Else Dask creates a folder that nobody removes.
        changes |= {"temporary-directory": os.path.dirname(file)} if file else {}
        with dask.config.set(changes):
            scheduler = distributed.Scheduler(dashboard=False, security=security, **settings)
        await scheduler
        await scheduler.register_scheduler_plugin(QueuePlugin(), idempotent=True)
    except (OSError, ValueError, RuntimeError, QueueError) as error:
        # Dask says that it failed, and keeps why for the cause.
        _print_answer({"error": " ".join(str(error.__cause__ or error).split())})
        os._exit(1)
    address = Address.of(scheduler.address)
    _cleanups.append(lambda: credentials.remove_secret("dask", address.host, address.port))
    _print_answer({"address": scheduler.address})
    await scheduler.finished()


def _print_answer(answer: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    """End when standard input does: then the parent has been killed, and leaves its folders."""
    sys.stdin.read()
    for clean_up in _cleanups:
        clean_up()
    os._exit(0)


_cleanups: list[Callable[[], None]] = [delete_abandoned]


if __name__ == "__main__":
    silence_dask()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asyncio.run(_serve(json.loads(sys.argv[1])))
