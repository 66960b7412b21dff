"""A Dask scheduler and Dask workers for tests, on loopback."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.processes import CommandResult, RunningCommand
from tests.harness.servers.redis import free_port
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import TIMEOUT, wait_until

HOST = "127.0.0.1"
SCHEDULER = "distributed.cli.dask_scheduler"
WORKER = "distributed.cli.dask_worker"
SHORT_TIMEOUT = """
import chunkq.queue.backends.dask.executor

chunkq.queue.backends.dask.executor.CONNECT_SECONDS = 1.0
"""
"""Code that lets a process give up soon a scheduler that does not answer."""


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


def assert_refused(result: CommandResult, code: int, *fragments: str) -> None:
    """Assert that a command failed with one line that contains the fragments."""
    result.refused(code, "chunkq: queue: ", *fragments)
    assert len(result.err.splitlines()) == 1, result.err


@contextmanager
def running_cluster(
    cluster: DaskCluster, workspace: StandardWorkspace, **environment: str
) -> Iterator[list[RunningCommand]]:
    """Start a scheduler with two workers, of which one has two threads."""
    cluster.scheduler()
    yield [cluster.worker(workspace, 1, **environment), cluster.worker(workspace, 2, **environment)]


def workspace_for_cluster(
    cluster: DaskCluster, standard_job: StandardJob, folder: Path
) -> StandardWorkspace:
    """Return a workspace whose job file has the address of a running cluster."""
    config = {"address": f"tcp://{HOST}:{cluster.port}"}
    workspace = standard_job.workspace(
        folder, {"cluster": "running", "dask_config": config}, url=cluster.url
    )
    assert workspace.job_file.exists()
    return workspace
