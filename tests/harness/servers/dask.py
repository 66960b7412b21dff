"""A Dask scheduler and Dask workers for tests, on loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.harness.processes import RunningCommand
from tests.harness.servers.redis import free_port
from tests.harness.standard_job import StandardWorkspace
from tests.harness.waiting import TIMEOUT, wait_until

HOST = "127.0.0.1"
SCHEDULER = "distributed.cli.dask_scheduler"
WORKER = "distributed.cli.dask_worker"


class DaskCluster:
    """Dask's command-line programs on loopback, in a folder for their files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.processes: list[RunningCommand] = []

    @property
    def url(self) -> str:
        return f"dask://{HOST}:{self.port}"

    def scheduler(self, dashboard_port: int = 0, **environment: str) -> RunningCommand:
        """Start the scheduler, always on the same port; wait until it listens."""
        options = ["--host", HOST, "--port", str(self.port)]
        options += ["--dashboard-address", f"{HOST}:{dashboard_port}"]
        options += [] if dashboard_port else ["--no-dashboard"]
        process = self._start(SCHEDULER, *options, **environment)
        wait_until(lambda: self._listens(process), "the scheduler listens")
        return process

    def worker(
        self, workspace: StandardWorkspace, threads: int = 1, **environment: str
    ) -> RunningCommand:
        """Start a worker under its nanny, with the environment of the workspace's network."""
        options = [f"tcp://{HOST}:{self.port}", "--host", HOST, "--no-dashboard"]
        options += ["--nthreads", str(threads), "--memory-limit", "0"]
        options += ["--local-directory", str(self.folder)]
        variables = {
            "NET_TRACE": str(workspace.folder / "trace"),
            "NET_JOB": str(workspace.job_folder),
            "NET_GATE": str(workspace.folder / "gate"),
        }
        return self._start(WORKER, *options, **(variables | environment))

    def wait_for_workers(self, count: int) -> None:
        """Wait until `count` workers have joined."""
        import distributed

        with distributed.Client(f"tcp://{HOST}:{self.port}", set_as_default=False) as client:
            client.wait_for_workers(count, TIMEOUT)

    def kill(self) -> None:
        """Kill every process that was started."""
        for process in self.processes:
            process.kill()

    def _start(self, module: str, *options: str, **environment: str) -> RunningCommand:
        log = self.folder / f"dask-{len(self.processes)}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *options],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **environment},
                start_new_session=True,
                text=True,
            )
        self.processes.append(RunningCommand(process, log))
        return self.processes[-1]

    def _listens(self, command: RunningCommand) -> bool:
        assert command.process.poll() is None, command.output()
        with socket.socket() as connection:
            return connection.connect_ex((HOST, self.port)) == 0
