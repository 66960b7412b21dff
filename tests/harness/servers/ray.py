"""A Ray cluster for tests, in a separate network namespace; all its nodes run on this machine."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.harness.network_namespace import NetworkNamespace
from tests.harness.waiting import TIMEOUT

HEAD = "127.0.0.1:6379"
URL = f"ray://auto?address={HEAD}"


@contextmanager
def ray_cluster(network: NetworkNamespace, cpus: int = 8, gpus: int = 0) -> Iterator[str]:
    """Start a Ray head; yield the queue's URL; kill all its processes at the end."""
    options = ["--head", "--port", "6379", "--node-ip-address", "127.0.0.1"]
    options += ["--include-dashboard", "false"]
    with ray_processes(network, *options, cpus=cpus, gpus=gpus):
        yield URL


@contextmanager
def ray_node(network: NetworkNamespace, cpus: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """Let a node join the cluster of `ray_cluster`; yield its first process."""
    with ray_processes(network, "--address", HEAD, cpus=cpus, gpus=0) as process:
        yield process


@contextmanager
def ray_processes(
    network: NetworkNamespace, *options: str, cpus: int, gpus: int
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `ray start --block` with options; yield its process when Ray has started."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
        command += ["--num-cpus", str(cpus), "--num-gpus", str(gpus)]
        if "--head" in options:
            command += ["--temp-dir", folder]
        command += ["--object-store-memory", str(200 << 20), "--disable-usage-stats"]
        with network.inside(), (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            limit = time.monotonic() + TIMEOUT
            while "Ray runtime started" not in (Path(folder) / "log").read_text():
                assert process.poll() is None, (Path(folder) / "log").read_text()
                assert time.monotonic() < limit
                time.sleep(0.1)
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the processes of a node with SIGTERM, as `ray stop` does, and kill what remains."""
    if process.poll() is not None:
        return
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, running = psutil.wait_procs(descendants, timeout=3)
    for other in running:
        with suppress(psutil.NoSuchProcess):
            other.kill()
    psutil.wait_procs(running, timeout=TIMEOUT)
    process.kill()
    process.wait()
