"""Start or join a Ray cluster in child processes, which end with their parent."""

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

from chunkq.errors import ErrorCode, QueueError
from chunkq.install_hint import install_command
from chunkq.system.parent_process import after_parent_ended, when_parent_ends
from chunkq.system.python_process import python_module
from chunkq.system.scratch import delete_abandoned, scratch_folder

MAX_FOLDER_LENGTH = 24
"""Longest temporary folder: the paths of Ray's sockets in it may have 107 bytes."""
END_SECONDS = 10.0
"""Time to wait for killed processes."""
STARTED_MESSAGE = re.compile(r"ray start --address='([^']+)'")


@contextmanager
def start_head(
    *, alone: bool, cpus: int | None = None, gpus: bool = True, port: int = 0
) -> Iterator[tuple[str, str]]:
    """Start a head on this machine; yield its address HOST:PORT and its token.

    With `alone` the cluster has no other machines. Ray listens on all interfaces in any case,
    and accepts only clients with the token. A process that has already imported Ray cannot set a
    token; the token is then empty, and the cluster accepts all clients. Raises QueueError if the
    head does not start.
    """
    if find_spec("ray") is None:
        raise QueueError(
            "queue: ray:// needs the package ray, which is not installed; "
            f"run `{install_command('ray')}`",
            code=ErrorCode.PACKAGE_MISSING,
        )
    local = ["--node-ip-address", "127.0.0.1", "--include-dashboard", "false"] if alone else []
    token = "" if "ray" in sys.modules else secrets.token_hex(32)
    with (
        _token_in_environment(token),
        _node(["--head", "--port", str(port), *local], cpus, gpus) as output,
    ):
        match = STARTED_MESSAGE.search(output)
        yield match.group(1) if match else "", token


@contextmanager
def join_cluster(address: str, token: str, *, gpus: bool = True) -> Iterator[None]:
    """Run a node of the cluster whose head is at `address` while the context is open."""
    with _token_in_environment(token), _node(["--address", address], None, gpus):
        yield


@contextmanager
def _token_in_environment(token: str) -> Iterator[None]:
    """Set the token of Ray in the environment, which other users cannot read."""
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
    """Run `ray start --block` while the context is open; yield its output."""
    command = python_module(__name__, "start", "--block", *options)
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
        # With the default folder, `ray://auto` of other processes would find this cluster.
        command += ["--temp-dir", str(folder)]
        # By default Ray uses port 10001, and exits if another cluster uses it.
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
        # Ray takes half a minute to end on SIGTERM. Its workers, in other groups, end with it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_up(process: subprocess.Popen[str]) -> str:
    lines: list[str] = []
    for line in process.stdout or ():
        lines.append(line)
        if "will now block" in line:
            # Discard later output, because a full pipe would block Ray.
            threading.Thread(target=lambda: list(process.stdout or ()), daemon=True).start()
            return "".join(lines)
    output = " ".join("".join(lines).split())
    raise QueueError(f"queue: cannot start Ray on this machine: {output[-400:]}")


def _short_folder() -> Path:
    """Return the folder for temporary files: the default one, or /tmp if its path is too long."""
    default = tempfile.gettempdir()
    return Path(default if len(default) <= MAX_FOLDER_LENGTH else "/tmp")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
    return port


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kill_node() -> None:
    """Kill Ray and this process, and delete Ray's temporary files."""
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=END_SECONDS)
    delete_abandoned(_short_folder())
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    from ray.scripts.scripts import main

    when_parent_ends(after_parent_ended(_kill_node))
    main()
