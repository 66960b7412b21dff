"""A Dask scheduler of one's own, as a process that ends with the one that started it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import warnings
from typing import Any

import distributed
from distributed.utils import get_ip, get_ip_interface

from chunkq.errors import QueueError
from chunkq.executors.dask import Address, QueuePlugin, be_quiet, check_protocol


def start(
    host: str, port: int = 0, protocol: str = "tcp", interface: str | None = None
) -> tuple[subprocess.Popen[str], str]:
    """Start a scheduler that listens on `host` or `interface`; port 0 takes a free one.

    Returns the process, which ends when its standard input is closed, and the queue's URL.
    Raises QueueError if it does not come up.
    """
    check_protocol(protocol)
    host = address_here(interface) if interface else host
    # Its web server too listens there only: left alone, it takes all interfaces.
    settings = {"host": host, "port": port, "protocol": protocol, "dashboard_address": f"{host}:0"}
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
    return process, Address.of(answer["address"], interface).url


def address_here(interface: str | None = None) -> str:
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
    try:
        scheduler = distributed.Scheduler(dashboard=False, **settings)
        await scheduler
        await scheduler.register_scheduler_plugin(QueuePlugin(), idempotent=True)
    except (OSError, ValueError, RuntimeError) as error:
        # Dask says that it failed, and keeps why for the cause.
        _tell({"error": " ".join(str(error.__cause__ or error).split())})
        os._exit(1)
    _tell({"address": scheduler.address})
    await scheduler.finished()


def _tell(answer: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    be_quiet()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asyncio.run(_serve(json.loads(sys.argv[1])))
