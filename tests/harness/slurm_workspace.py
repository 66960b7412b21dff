"""Workspace for the tests of SLURM's scripts: the job's folder and how scripts are submitted."""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.processes import is_alive
from tests.harness.servers.slurm import SlurmCluster
from tests.harness.standard_job import StandardWorkspace

SCRIPTS = Path(__file__).parents[2] / "deploy" / "slurm"

RECORD_PLACEMENT = """
import json, os, sys

if "SLURMD_NODENAME" in os.environ:
    record = {"pid": os.getpid(), "node": os.environ["SLURMD_NODENAME"]}
    record["gpu"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    record["is_worker"] = "chunkq_worker.worker_process" in sys.orig_argv
    with open(os.environ["PINS"], "a") as file:
        file.write(json.dumps(record) + "\\n")
"""


@dataclass(frozen=True)
class SlurmWorkspace:
    """A workspace on the cluster, and the environment for submitting its scripts."""

    slurm: SlurmCluster
    workspace: StandardWorkspace

    @property
    def environment(self) -> dict[str, str]:
        folder = self.workspace.folder
        (folder / "hooks").mkdir(exist_ok=True)
        (folder / "hooks" / "sitecustomize.py").write_text(RECORD_PLACEMENT)
        self.temporary.mkdir(exist_ok=True)
        paths = [str(folder / "hooks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            "CHUNKQ_ENV": sys.prefix,
            "HOME": str(folder),
            "NET_JOB": str(self.workspace.job_folder),
            "NET_GATE": str(folder / "gate"),
            "NET_TRACE": str(folder / "trace"),
            "PINS": str(folder / "pins"),
            "PYTHONPATH": os.pathsep.join(paths),
            "TMPDIR": str(self.temporary),
        }

    @property
    def temporary(self) -> Path:
        """The jobs' temporary folder; its path is short enough for Ray's sockets."""
        return Path(tempfile.gettempdir()) / f"j-{self.slurm.folder.name[-4:]}"

    @property
    def address(self) -> Path:
        """The file with the queue's address, readable only by its owner."""
        file = self.workspace.folder / "address"
        if not file.exists():
            file.touch(0o600)
            file.write_text(self.workspace.queue_url + "\n")
        return file

    def submit(self, script: str, *arguments: str, options: str = "", **environment: str) -> str:
        """Submit a script of deploy/slurm with `options` of sbatch; return the job's id."""
        return self.slurm.sbatch(
            SCRIPTS / script,
            *arguments,
            options=options.split(),
            cwd=self.workspace.folder,
            **self.environment | environment,
        )

    def pins(self) -> dict[int, tuple[str, str]]:
        """Return node and GPU of every worker process that has started, by process id."""
        return {
            record["pid"]: (record["node"], record["gpu"])
            for record in self._records()
            if record["is_worker"]
        }

    def alive(self) -> set[int]:
        """Return the ids of the worker processes that are running."""
        return set(filter(is_alive, self.pins()))

    def computing(self) -> set[int]:
        """Return the ids of the processes whose network has received a patch."""
        lines = (self.workspace.folder / "trace").read_text().splitlines()
        return {int(line.split()[0]) for line in lines}

    def computing_nodes(self) -> set[str]:
        """Return the nodes of the processes in `computing`."""
        pids = self.computing()
        return {record["node"] for record in self._records() if record["pid"] in pids}

    def _records(self) -> list[dict[str, Any]]:
        """Return what the Python processes on the nodes have written to the file `pins`."""
        file = self.workspace.folder / "pins"
        return list(map(json.loads, file.read_text().splitlines() if file.exists() else ()))
