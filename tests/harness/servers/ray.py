"""A Ray cluster of one machine for tests, in a separate network namespace."""

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


@contextmanager
def ray_cluster(network: NetworkNamespace, cpus: int = 8, gpus: int = 0) -> Iterator[str]:
    """Start a Ray head; yield the queue's URL; kill all its processes at the end."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--port",
            "6379",
        ]
        command += ["--node-ip-address", "127.0.0.1", "--num-cpus", str(cpus)]
        command += ["--num-gpus", str(gpus)]
        command += ["--include-dashboard", "false", "--temp-dir", folder]
        command += ["--object-store-memory", str(200 << 20), "--disable-usage-stats"]
        with network.inside(), (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            limit = time.monotonic() + TIMEOUT
            while "Ray runtime started" not in (Path(folder) / "log").read_text():
                assert process.poll() is None, (Path(folder) / "log").read_text()
                assert time.monotonic() < limit
                time.sleep(0.1)
            yield "ray://auto?address=127.0.0.1:6379"
        finally:
            descendants = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            _, running = psutil.wait_procs(descendants, timeout=3)
            for other in running:
                with suppress(psutil.NoSuchProcess):
                    other.kill()
            psutil.wait_procs(running, timeout=TIMEOUT)
            process.kill()
            process.wait()
