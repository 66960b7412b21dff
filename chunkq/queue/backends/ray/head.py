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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil

from chunkq.errors import ErrorCode, QueueError
from chunkq.install_hint import install_command
from chunkq.system.cores import available_cores
from chunkq.system.gpus import VISIBLE, visible_gpus
from chunkq.system.parent_process import after_parent_ended, when_parent_ends
from chunkq.system.python_process import python_module
from chunkq.system.scratch import delete_abandoned, scratch_folder
from chunkq.system.signal_masks import sigterm_blocked
from chunkq.system.start_limit import START_SECONDS, killed_unless_started
from chunkq.terminal import without_colors

MAX_FOLDER_LENGTH = 24
"""Longest temporary folder: the paths of Ray's sockets in it may have 107 bytes."""
END_SECONDS = 10.0
"""Time to wait for killed processes."""
FULL_DISK_VARIABLE = "RAY_local_fs_capacity_threshold"
"""Share of the temporary folder's disk above which Ray stores no more objects, by default 0.95.

Many shared disks are that full, and chunks are not objects of Ray.
"""
STARTED_MESSAGE = re.compile(r"ray start --address='([^']+)'")


_own_nodes: list[subprocess.Popen[str]] = []
"""The nodes that this process has started."""


@dataclass(frozen=True)
class Head:
    """Head of a cluster: its address HOST:PORT, its token, and whether it has ended."""

    address: str
    token: str
    has_died: Callable[[], bool]


@contextmanager
def start_head(
    *, alone: bool, cpus: int | None = None, gpus: bool = True, port: int = 0
) -> Iterator[Head]:
    """Start a head on this machine, which ignores SIGTERM; yield it.

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
        _node(["--head", "--port", str(port), *local], cpus, gpus) as node,
    ):
        match = STARTED_MESSAGE.search(node.output)
        yield Head(match.group(1) if match else "", token, node.has_died)


@contextmanager
def join_cluster(address: str, token: str, *, gpus: bool = True) -> Iterator[Callable[[], bool]]:
    """Run a node of the cluster whose head is at `address` while the context is open.

    Yields a function that returns whether the node has ended.
    """
    with _token_in_environment(token), _node(["--address", address], None, gpus) as node:
        yield node.has_died


def own_cluster_has_died() -> bool:
    """Return whether a node that this process has started, its head for example, has ended."""
    return any(process.poll() is not None for process in _own_nodes)


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


@dataclass(frozen=True)
class _Node:
    """Processes of Ray on this machine, and what they printed when they started."""

    process: subprocess.Popen[str]
    output: str

    def has_died(self) -> bool:
        """Return whether they have ended. `ray start --block` ends when one of its servers does."""
        return self.process.poll() is not None


@contextmanager
def _node(options: Sequence[str], cpus: int | None, gpus: bool) -> Iterator[_Node]:
    """Run `ray start --block` while the context is open."""
    command = python_module(__name__, "start", "--block", *options)
    command += ["--disable-usage-stats"]
    devices = len(visible_gpus()) if gpus else 0
    # Each worker needs a core besides its GPU. SLURM may grant fewer cores than GPUs.
    command += ["--num-cpus", str(max(cpus or available_cores(), devices))]
    if not gpus or VISIBLE in os.environ:  # otherwise Ray looks for GPUs of all kinds
        command += ["--num-gpus", str(devices)]
    if "--head" not in options:
        yield from _run(command)
        return
    with scratch_folder("ray", _short_folder()) as folder:
        # With the default folder, `ray://auto` of other processes would find this cluster.
        command += ["--temp-dir", str(folder)]
        # By default Ray uses port 10001, and exits if another cluster uses it.
        command += ["--ray-client-server-port", str(_free_port())]
        yield from _run(command, folder.resolve())


def _run(command: Sequence[str], folder: Path | None = None) -> Iterator[_Node]:
    """Run a node with its temporary files in a folder of its own, if that is not None."""
    with sigterm_blocked():  # a signal to all processes of a run stops its workers first
        process = subprocess.Popen(
            command,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            errors="replace",
        )
    try:
        output = _wait_until_up(process)
        _own_nodes.append(process)
        yield _Node(process, output)
    finally:
        with suppress(ValueError):
            _own_nodes.remove(process)
        has_died = process.poll() is not None
        # Ray takes half a minute to end on SIGTERM. Its workers, in other groups, end with it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if has_died and folder is not None:
            _kill_users_of(folder)


def _kill_users_of(folder: Path) -> None:
    """Kill the other processes with open files in a folder.

    The workers of a node whose first process has ended run on for a minute. They log there.
    """
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and any(
                Path(file.path).is_relative_to(folder) for file in process.open_files()
            ):
                process.kill()


def _environment() -> dict[str, str]:
    """Return the environment of a node; RAY_ADDRESS would name another cluster."""
    environment = {FULL_DISK_VARIABLE: "1", **os.environ}
    environment.pop("RAY_ADDRESS", None)
    return environment


def _wait_until_up(process: subprocess.Popen[str]) -> str:
    lines: list[str] = []
    with killed_unless_started(process) as late:
        for line in process.stdout or ():
            lines.append(line)
            if "will now block" in line:
                # Discard later output, because a full pipe would block Ray.
                threading.Thread(target=lambda: list(process.stdout or ()), daemon=True).start()
                return "".join(lines)
    if late.is_set():
        lines.append(f"it did not start within {START_SECONDS:.0f} s")
    output = " ".join(without_colors("".join(lines)).split())
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
