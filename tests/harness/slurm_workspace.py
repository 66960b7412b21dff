"""What the tests of SLURM's scripts share: where a job lives, and how its scripts are submitted."""

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

TELL_PINS = """
import json, os, sys

if "SLURMD_NODENAME" in os.environ:
    told = {"pid": os.getpid(), "node": os.environ["SLURMD_NODENAME"]}
    told["gpu"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    told["is_worker"] = "chunkq_worker.worker_process" in sys.orig_argv
    with open(os.environ["PINS"], "a") as file:
        file.write(json.dumps(told) + "\\n")
"""


@dataclass(frozen=True)
class SlurmWorkspace:
    """A workspace on the cluster, and the environment in which its scripts are submitted."""

    slurm: SlurmCluster
    workspace: StandardWorkspace

    @property
    def environment(self) -> dict[str, str]:
        folder = self.workspace.folder
        (folder / "hooks").mkdir(exist_ok=True)
        (folder / "hooks" / "sitecustomize.py").write_text(TELL_PINS)
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
        """The jobs' own temporary folder, with a path that is short enough for Ray's sockets."""
        return Path(tempfile.gettempdir()) / f"j-{self.slurm.folder.name[-4:]}"

    @property
    def address(self) -> Path:
        """The file with the queue's address, which only its owner reads."""
        file = self.workspace.folder / "address"
        if not file.exists():
            file.touch(0o600)
            file.write_text(self.workspace.queue_url + "\n")
        return file

    def submit(self, script: str, *arguments: str, options: str = "", **environment: str) -> str:
        return self.slurm.sbatch(
            SCRIPTS / script,
            *arguments,
            options=options.split(),
            cwd=self.workspace.folder,
            **self.environment | environment,
        )

    def pins(self) -> dict[int, tuple[str, str]]:
        """Node and GPU of every worker process so far, by its id."""
        return {one["pid"]: (one["node"], one["gpu"]) for one in self._told() if one["is_worker"]}

    def alive(self) -> set[int]:
        """The worker processes that live now."""
        return set(filter(is_alive, self.pins()))

    def computing(self) -> set[int]:
        """The processes whose network was given a patch."""
        lines = (self.workspace.folder / "trace").read_text().splitlines()
        return {int(line.split()[0]) for line in lines}

    def computing_nodes(self) -> set[str]:
        return {one["node"] for one in self._told() if one["pid"] in self.computing()}

    def _told(self) -> list[dict[str, Any]]:
        file = self.workspace.folder / "pins"
        return list(map(json.loads, file.read_text().splitlines() if file.exists() else ()))
