"""Start a Dask scheduler as a child process, which ends with its parent."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import distributed
from distributed.utils import get_ip, get_ip_interface

from chunkq.errors import QueueError
from chunkq.queue.backends import credentials
from chunkq.queue.backends.dask.executor import Address, check_protocol, silence_dask
from chunkq.queue.backends.dask.plugin import QueuePlugin
from chunkq.queue.backends.dask.tls import load_security
from chunkq.system.parent_process import after_parent_ended, when_parent_ends
from chunkq.system.python_process import python_module
from chunkq.system.scratch import delete_abandoned
from chunkq.system.signal_masks import sigterm_blocked
from chunkq.system.start_limit import START_SECONDS, killed_unless_started


def start_scheduler(
    host: str,
    port: int = 0,
    protocol: str = "tcp",
    interface: str | None = None,
    tls: Path | None = None,
) -> tuple[subprocess.Popen[str], str]:
    """Start a scheduler that listens on `host` or `interface`. Port 0 selects a free port.

    `tls` is the file with the key and certificate of the cluster; the scheduler puts its temporary
    files into the same folder. Without TLS, any user who can connect can run code as this user.

    Return the process, which ends when its standard input is closed, and the URL of the queue.
    Raises QueueError if the scheduler does not start.
    """
    check_protocol(protocol)
    host = local_address(interface) if interface else host
    # By default its web server listens on all interfaces.
    settings = {"host": host, "port": port, "protocol": protocol, "dashboard_address": f"{host}:0"}
    settings |= {"protocol": "tls", "tls": str(tls)} if tls else {}
    with sigterm_blocked():  # a signal to all processes of a run stops its workers first
        process = subprocess.Popen(
            python_module(__name__, json.dumps(settings)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
    with killed_unless_started(process) as late:
        line = process.stdout.readline() if process.stdout is not None else ""
    if line:
        answer = json.loads(line)
    elif late.is_set():
        answer = {"error": f"it gave no address within {START_SECONDS:.0f} s"}
    else:
        answer = {"error": f"it ended with code {process.wait()}"}
    if "error" in answer:
        process.communicate()
        raise QueueError(f"queue: cannot start a Dask scheduler on this machine: {answer['error']}")
    address = Address.from_dask(answer["address"], interface, str(tls) if tls else None)
    return process, address.url


def local_address(interface: str | None = None) -> str:
    """Return the IP address of this host for other hosts, on `interface` if it is set.

    Raises QueueError if the interface does not exist.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # Dask warns without Internet access
            address: str = get_ip_interface(interface) if interface else get_ip()
    except ValueError as error:
        raise QueueError(f"dask_config.interface: {error}") from None
    return address


async def _serve(settings: dict[str, Any]) -> None:
    file = settings.pop("tls", None)
    try:
        security = load_security(file) if file else None
        # Its web pages have no access control.
        config: dict[str, Any] = {"distributed.scheduler.http.routes": []}
        # It ends with the run, whatever the configuration of the site.
        config |= {"distributed.scheduler.idle-timeout": None}
        # A worker is silent while it loads a network that holds Python's lock.
        config |= {"distributed.scheduler.worker-ttl": None}
        # By default Dask creates a folder and does not remove it.
        config |= {"temporary-directory": os.path.dirname(file)} if file else {}
        with dask.config.set(config):
            scheduler = distributed.Scheduler(dashboard=False, security=security, **settings)
        await scheduler
        await scheduler.register_scheduler_plugin(QueuePlugin(has_page=False), idempotent=True)
    except (OSError, ValueError, RuntimeError, QueueError) as error:
        # The reason is in the cause of the error.
        _print_answer({"error": " ".join(str(error.__cause__ or error).split())})
        os._exit(1)
    address = Address.from_dask(scheduler.address)
    _cleanups.append(lambda: credentials.remove_secret("dask", address.host, address.port))
    _print_answer({"address": scheduler.address})
    await scheduler.finished()


def _print_answer(answer: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _clean_up_and_exit() -> None:
    for clean_up in _cleanups:
        clean_up()
    os._exit(0)


_cleanups: list[Callable[[], None]] = [delete_abandoned]


if __name__ == "__main__":
    silence_dask()
    when_parent_ends(after_parent_ended(_clean_up_and_exit))
    asyncio.run(_serve(json.loads(sys.argv[1])))
