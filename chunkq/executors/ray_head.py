"""A Ray cluster of one's own, whose processes end with the one that started it."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil

from chunkq.errors import QueueError
from chunkq.scratch import delete_abandoned, scratch_folder

LONGEST_FOLDER = 24
END_SECONDS = 10.0
STARTED_MESSAGE = re.compile(r"ray start --address='([^']+)'")


@contextmanager
def start_head(
    *, alone: bool, cpus: int | None = None, gpus: bool = True, port: int = 0
) -> Iterator[tuple[str, str]]:
    """Start a head on this machine; yields the address HOST:PORT that others join, and its token.

    Ray listens everywhere, also for a cluster of this machine `alone`, and serves only who has the
    token. A process that has loaded Ray before cannot set one: the token is then empty, and the
    cluster open. Raises QueueError if it does not come up.
    """
    if find_spec("ray") is None:
        raise QueueError(
            "queue: ray:// needs a package that is not installed; pip install 'chunkq[ray]'"
        )
    here = ["--node-ip-address", "127.0.0.1", "--include-dashboard", "false"] if alone else []
    token = "" if "ray" in sys.modules else secrets.token_hex(32)
    with (
        _token_in_environment(token),
        _node(["--head", "--port", str(port), *here], cpus, gpus) as said,
    ):
        found = STARTED_MESSAGE.search(said)
        yield found.group(1) if found else "", token


@contextmanager
def join_cluster(address: str, token: str, *, gpus: bool = True) -> Iterator[None]:
    """Have this machine be part of the cluster whose head is at `address`."""
    with _token_in_environment(token), _node(["--address", address], None, gpus):
        yield


@contextmanager
def _token_in_environment(token: str) -> Iterator[None]:
    """Set Ray's token for this process and its children; other users cannot read that."""
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
    before = {name: os.environ.get(name) for name in secret}
    os.environ.update(secret)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _node(options: Sequence[str], cpus: int | None, gpus: bool) -> Iterator[str]:
    """Run `ray start --block`; yields what it said."""
    command = [sys.executable, "-m", __name__, "start", "--block", *options]
    command += ["--disable-usage-stats"]
    command += ["--num-cpus", str(cpus or _cores())]
    granted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not gpus:
        command += ["--num-gpus", "0"]
    elif granted is not None:
        count = len([name for name in granted.split(",") if name.strip() not in ("", "-1")])
        command += ["--num-gpus", str(count)]
    if "--head" not in options:
        yield from _run(command)
        return
    with scratch_folder("ray", _short_folder()) as folder:
        # Else `ray://auto` elsewhere on this machine would find this one.
        command += ["--temp-dir", str(folder)]
        # Else Ray takes the port 10001, and goes down if another cluster has it.
        command += ["--ray-client-server-port", str(_free_port())]
        yield from _run(command)


def _run(command: Sequence[str]) -> Iterator[str]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    try:
        yield _wait_until_up(process)
    finally:
        # A SIGTERM would take half a minute; its workers, in groups of their own, die with Ray.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_up(process: subprocess.Popen[str]) -> str:
    lines: list[str] = []
    for line in process.stdout or ():
        lines.append(line)
        if "will now block" in line:
            # What it says later is nobody's concern, but a full pipe would stop it.
            threading.Thread(target=lambda: list(process.stdout or ()), daemon=True).start()
            return "".join(lines)
    said = " ".join("".join(lines).split())
    raise QueueError(f"queue: Ray could not be started here: {said[-400:]}")


def _short_folder() -> Path:
    """Return where temporary files go: the paths of Ray's sockets may have 107 bytes at most."""
    usual = tempfile.gettempdir()
    return Path(usual if len(usual) <= LONGEST_FOLDER else "/tmp")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        port: int = found.getsockname()[1]
    return port


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_parent() -> None:
    """End Ray and remove its folder when standard input ends: then the parent has been killed."""
    sys.stdin.read()
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=END_SECONDS)
    delete_abandoned(_short_folder())
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    from ray.scripts.scripts import main

    threading.Thread(target=_end_with_parent, daemon=True).start()
    main()
